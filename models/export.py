"""Export a run as a model folder in Hugging Face layout, for transformers, vLLM and others to load.

    python -m models.export --run runs/mind --out data/models/mind
    python -m models.export --run runs/mind --out data/models/mind --dtype fp32

The adapter is merged into the base model's weights; a model that was trained whole is taken as it
is. The base's tokenizer, chat template and configuration come along. trsr.json says how to ask:
the prompt with placeholders, its longest length, and the tokens of Yes and No (docs/serving.md).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import lora
import trsr
from files.folders import check_out
from files.jsonl import write_json
from launch.bars import Bar
from launch.command import Help, Parser, run_main
from llama import CheckpointError, Llama
from models.chat import Form
from models.folders import replacement
from models.hub import DTYPES, build_model, find_model, load_config, load_form, load_model
from ops.checkpoint import fingerprint, read_json_file, weight_files
from prepare.domains import wording
from state.checkpoint import epochs_done
from state.origin import check_trained_on, differences
from state.settings import read_config
from trsr import Domain, InputError

COMMAND = "models.export"
ORIGIN = "trsr.json"  # what the folder is, how to ask it, and that it may be replaced
SHARD = 5 * 10**9  # bytes of the largest weights file
COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json")
COPIED += ("vocab.json", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*")
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # in safetensors

# ---- What to export


def read_trained(run: Path) -> tuple[dict, str]:
    """Return a run's training settings, and what it wrote: adapter or model.

    Raises InputError if nothing is trained there, or by a version that recorded no prompt.
    """
    trained = read_config(run).get("train")
    kind = "adapter" if trained and trained["lora_r"] else "model"
    if trained is None or not (run / kind).is_dir():
        first = f"first run python train.py --run {run}"
        raise InputError(f"{run}: nothing trained here yet; {first}")
    if not isinstance(trained.get("prompt"), str):
        what = "config.json: field 'prompt' of 'train' is missing"
        raise InputError(f"{run}: {what}; train it again with this version")
    return trained, kind


def trained_model(run: Path, kind: str, base: Path, dtype: str | None) -> Llama:
    """Return the run's model on the CPU, its adapter merged; dtype: None for the weights' own."""
    source = base if kind == "adapter" else run / "model"
    found = DTYPES[dtype] if dtype else own_dtype(source)
    model = load_model(source, torch.device("cpu"), found)
    if kind == "adapter":
        if odd := differences(run, lora.load_adapter(model, run / "adapter")):
            print(f"adapter not as the run's settings say: {odd}")
        lora.merge(model)
    return model


def own_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of a folder's weights; InputError if they have several, or a strange one."""
    with torch.device("meta"):
        model = build_model(folder)
    used = dict(model.named_parameters())  # some files have tensors that no model reads
    kinds = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                kinds |= {file.get_slice(name).get_dtype() for name in {*file.keys()} & used.keys()}
        except (SafetensorError, OSError) as error:
            what = f"not a safetensors file, or cut short ({error})"
            raise CheckpointError(f"{path}: {what}") from None
    if len(kinds) != 1 or not kinds <= KINDS.keys():
        what = f"weights in {' and '.join(sorted(kinds)) or 'no known format'}"
        raise InputError(f"{folder}: {what}; choose with --dtype {' or '.join(DTYPES)}")
    return KINDS[kinds.pop()]


# ---- How to ask it


def how_to_ask(trained: dict, base: Path, form: Form) -> dict:
    """Return what somebody who serves the model has to know of its prompts and answers."""
    paradigm, items = trained["paradigm"], trained["history_items"]
    domain = Domain(*["-"] * 5, recommend=question_of(trained, form))  # no other word is needed
    recent = trsr.PARADIGMS[paradigm]
    shown = ["ITEM"] if recent == "all" or (recent == "last" and items) else []
    (message,) = trsr.recommendation_prompts(paradigm, domain, "SUMMARY", shown, ["CANDIDATE"])
    (ids,) = form.encode([message])
    context = load_config(base).max_position_embeddings
    return {
        "paradigm": paradigm,
        "summary": paradigm in trsr.SUMMARIZED,
        "items": {"last": items, "all": "all", "none": 0}[recent],
        "form": "chat" if trained.get("chat") else "plain",
        "max_length": min(trained["max_length"], context),
        "message": message,
        "prompt": form.show(message),  # the message in the form that the model reads
        "prompt_ids": ids,
        "answers": dict(zip(trsr.ANSWERS, trsr.answer_ids(form.encode, domain), strict=True)),
    }


def question_of(trained: dict, form: Form) -> str:
    """Return the domain's question in the prompt that a run was trained with.

    Raises InputError if the other words or the form are not what they were then.
    """
    unknown = Domain(*["-"] * 5, recommend="QUESTION")
    before, _, after = wording(trained["paradigm"], unknown, form.show)["recommend"].partition(
        "QUESTION"
    )
    prompt = trained["prompt"]
    same = prompt.startswith(before) and prompt.endswith(after)
    if not same or len(prompt) <= len(before) + len(after):
        raise InputError("the prompt has other words than in training; train the run again")
    return prompt[len(before) : len(prompt) - len(after)]


# ---- Writing


def export(model: Llama, base: Path, folder: Path, limit: int = SHARD) -> int:
    """Write a model and the base's other files to folder; return the number of parameters.

    limit: bytes of a weights file; only a single tensor may be larger.
    """
    for pattern in COPIED:
        for path in filter(Path.is_file, base.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    config, kind = read_json_file(base / "config.json"), str(model.lm_head.weight.dtype)
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    kinds = dict.fromkeys(names, kind.removeprefix("torch."))
    write_json(folder / "config.json", config | kinds)

    # Tied weights are one parameter, so they stay tied.
    adapter = lora.adapter_tensors(model).keys()
    named = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    tensors = {name: p.detach() for name, p in named.items() if name not in adapter}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        what = f"{bad[0]} holds something that is not a finite number"
        raise InputError(f"the merged weights: {what}; train the run again")
    shards = list(in_shards(tensors, limit))
    files = {}
    for i, names in enumerate(Bar(shards, "write", unit="file"), 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        files |= dict.fromkeys(names, f"model{part}.safetensors")
        whole = {name: tensors[name].contiguous() for name in names}
        save_file(whole, folder / files[names[0]], metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(size, tensors.values()))}, "weight_map": files}
        write_json(folder / "model.safetensors.index.json", index)
    return sum(tensor.numel() for tensor in tensors.values())


def in_shards(tensors: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Yield the tensors' names in consecutive groups of at most limit bytes, or of one tensor."""
    group, total = [], 0
    for name, tensor in tensors.items():
        if group and total + size(tensor) > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size(tensor)
    yield group


def size(tensor: Tensor) -> int:
    """Return a tensor's bytes."""
    return tensor.numel() * tensor.itemsize


README = """# {name}

A model that answers whether a user takes a candidate, exported by `python -m models.export`.
Base model: {base} ({kind}). Weights: {dtype}.

Ask with this prompt, at most {max_length} tokens long with its answer:

```text
{prompt}
```

{fill}
Texts are on one line each, and cleaned as in training (`trsr.clean`). The probability that the
user takes the candidate is the softmax over the logits of the next token's two answers: {answers}.
In trsr.json, `message` is the prompt without its form, and `prompt_ids` are the token ids of the
prompt above, to compare a server's with.
"""


def readme(record: dict, name: str) -> str:
    """Return the folder's README.md."""
    fill = ["Put the candidate's text in the place of `CANDIDATE`."]
    if record["summary"]:
        fill.append("`SUMMARY` is the user's preference summary.")
    if record["items"]:
        which = record["items"] if record["items"] == "all" else f"last {record['items']}"
        fill.append(f"`1. ITEM` is a numbered list of the user's {which} items, oldest first.")
    answers = ", ".join(f"{answer} is token {i}" for answer, i in record["answers"].items())
    more = {"name": name, "fill": "\n".join(fill), "answers": answers}
    return README.format(**record | more)


def main() -> None:
    """Export the run on the command line."""
    parser = Parser(description=__doc__, formatter_class=Help)
    parser.add_argument("--run", "--run-dir", type=Path, required=True, help="trained run folder")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (unset: their own)")
    asked = parser.parse_args()
    check_out(asked.out, COMMAND, ORIGIN, set())
    trained, kind = read_trained(asked.run)
    base = find_model(trained["model"], trained.get("revision"))
    check_trained_on(asked.run, trained["model"], fingerprint(base), trained["prompt"])
    record = how_to_ask(trained, base, load_form(base, bool(trained.get("chat"))))

    done, wanted = epochs_done(asked.run), trained.get("epochs")
    if None not in (done, wanted) and done < wanted:
        print(f"{asked.run}: unfinished, this is the best of {done} of {wanted} epochs")
    model = trained_model(asked.run, kind, base, asked.dtype)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    record = {"made_by": COMMAND, "base": trained["model"], "kind": kind, "dtype": dtype} | record
    asked.out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with replacement(asked.out) as folder:
        record["parameters"] = export(model, base, folder)
        (folder / "README.md").write_text(readme(record, asked.out.name), "utf-8")
        record["files"] = sorted(path.name for path in folder.iterdir())
        write_json(folder / ORIGIN, record)
    print(f"{record['parameters']:,} parameters in {dtype}, {kind} of {asked.run} on {base}")
    if kind == "adapter" and dtype != "float32":
        print(f"merged weights are rounded to {dtype}; --dtype fp32 keeps evaluate.py's scores")
    print(
        f"wrote   {asked.out}; {asked.out / ORIGIN} says how to ask, docs/serving.md how to serve"
    )


if __name__ == "__main__":
    run_main(main, CheckpointError, lora.AdapterError)

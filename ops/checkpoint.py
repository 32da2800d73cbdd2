"""The files of a model folder in Hugging Face layout: JSON, safetensors, and its identity.

Whatever does not fit is a CheckpointError, which names the file and the field or tensor.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A model folder that cannot be used: one line that names the file or field, and a way out."""


def read_json_file(path: Path) -> dict:
    """Return the JSON object in a file of a model folder."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = f"no JSON object here ({error})"
        raise CheckpointError(f"{path}: {what}; --model takes a checkpoint's folder") from None


# ---- Weights


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files; CheckpointError for missing shards or unsafe names.

    A whole model.safetensors goes before an index whose shards are gone, as in transformers.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = shard_names(index) if index.is_file() else [whole.name]
    missing = [name for name in names if not (folder / name).is_file()]
    if whole.is_file() and names != [whole.name]:
        if not missing:
            what = f"two sets of weights, {whole.name} and the shards of {index.name}"
            raise CheckpointError(f"{folder}: {what}; delete the one that is out of date")
        return [whole]
    if missing:
        note = "weights are read from safetensors only"
        raise CheckpointError(f"{folder}: missing {', '.join(missing)} ({note})")
    return [folder / name for name in names]


def shard_names(index: Path) -> list[str]:
    """Return the files that an index names; CheckpointError for one outside of its folder."""
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: field 'weight_map' is missing")
    names = sorted(set(map(str, weight_map.values())))
    # It must not lead to a file that could execute something either.
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            what = f"{name!r} is not the plain name of a safetensors file"
            raise CheckpointError(f"{index}: {what}")
    return names


def read_tensors(path: Path, device: str, shapes: dict, ignored: tuple[str, ...]) -> Iterator:
    """Yield the (name, tensor) of a safetensors file; CheckpointError unless they have shapes.

    ignored: endings of names to pass over.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(ignored):
                    continue
                shape = tuple(file.get_slice(name).get_shape())
                if name not in shapes:
                    what = f"tensor {name} has shape {shape}, config.json has no place for it"
                    raise CheckpointError(f"{path}: {what}")
                if shape != shapes[name]:
                    what = f"tensor {name} has shape {shape}, expected shape {shapes[name]} for it"
                    raise CheckpointError(f"{path}: {what}")
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        what = f"not a safetensors file, or cut short ({error})"
        raise CheckpointError(f"{path}: {what}; fetch it again") from None


def fingerprint(folder: Path) -> str:
    """Return a hash that identifies a model: configuration, tokenizer and samples of the weights.

    Of every safetensors file it reads the header and the first 4 KiB of each tensor.
    """
    state = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json"):
        path = folder / name
        state.update(path.read_bytes() if path.is_file() else b"-")
    options = folder / "tokenizer_config.json"  # such as whether a text begins with a token
    state.update(options.read_bytes() if options.is_file() else b"")
    for path in weight_files(folder):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                what = "not a safetensors file, or cut short"
                raise CheckpointError(f"{path}: {what}; fetch it again")
            header = file.read(size)
            state.update(header)
            try:
                entries = json.loads(header).items()
                starts = [e["data_offsets"][0] for name, e in entries if name[:2] != "__"]
                for start in starts:
                    file.seek(8 + size + start)
                    state.update(file.read(4096))
            except (
                AttributeError,
                LookupError,
                TypeError,
                ValueError,
                OverflowError,
                OSError,
            ) as error:
                what = f"not a safetensors file ({error})"
                raise CheckpointError(f"{path}: {what}; fetch it again") from None
    return state.hexdigest()[:32]

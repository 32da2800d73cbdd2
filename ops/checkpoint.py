"""The files of a model folder in Hugging Face layout: config.json's fields, safetensors, identity.

Whatever does not fit is a CheckpointError, which names the file and the field or tensor.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

Config = TypeVar("Config")  # a frozen dataclass of config.json's fields


class CheckpointError(ValueError):
    """A model folder that cannot be used: one line that names the file or field, and a way out."""


def read_json_file(path: Path) -> dict:
    """Return the JSON object in a file of a model folder."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        what = f"no JSON object here ({error})"
        raise CheckpointError(f"{path}: {what}; --model takes a checkpoint's folder") from None


# ---- Fields of config.json

_TYPES = {int: (int,), float: (int, float), bool: (bool,)}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}  # and the numbers they need


def config_from(path: Path, raw: dict, form: type[Config], **supported) -> Config:
    """Return raw, the object in the config.json at path, as a configuration of that form.

    supported: fields that may only have this value. Raises CheckpointError, which names the field.
    """
    check_supported(path, raw, supported | {"quantization_config": None})
    rope, kind = rope_parameters(path, raw)
    try:
        numbers = {name: float(rope[name]) for name in ROPE_TYPES[kind]}
        heads = raw["num_attention_heads"]
        values = raw | {
            "rope_scaling": {"rope_type": kind} | numbers if numbers else None,
            "rope_theta": rope.get("rope_theta", raw.get("rope_theta")),
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "eos_token_id": end_tokens(path.parent, raw),
        }

        # A field that is absent or null takes its default; one without a default has to be there.
        required = [f.name for f in fields(form) if f.default is MISSING]
        given = [f.name for f in fields(form) if values.get(f.name) is not None]
        config = form(**{name: values[name] for name in dict.fromkeys([*required, *given])})
    except KeyError as missing:
        raise CheckpointError(f"{path}: field {missing} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        what = f"a field is of another type than expected ({error})"
        raise CheckpointError(f"{path}: {what}") from None
    check_values(path, config)
    return config


def check_supported(path: Path, raw: dict, supported: dict) -> None:
    """Raise CheckpointError for a field with a value other than the only one built here."""
    for field, value in supported.items():
        if raw.get(field, value) != value or (field == "model_type" and field not in raw):
            found = raw.get(field)
            raise CheckpointError(f"{path}: {field} is {found!r}, only {value!r} is supported")


def rope_parameters(path: Path, raw: dict) -> tuple[dict, str]:
    """Return the rotary parameters, from the new layout or else the old one, and their type."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: the rope parameters are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(ROPE_TYPES):
        known = ", ".join(ROPE_TYPES)
        raise CheckpointError(f"{path}: rope_type is {kind!r}, only {known} are supported")
    return rope, kind


def end_tokens(folder: Path, raw: dict) -> tuple[int, ...] | None:
    """Return the ids that end a text: generation_config.json's if it has any, else raw's."""
    path = folder / "generation_config.json"
    generation = read_json_file(path) if path.is_file() else {}
    ids = generation.get("eos_token_id", raw.get("eos_token_id"))
    if isinstance(ids, list):
        return tuple(ids)
    return None if ids is None else (ids,)


def check_values(path: Path, config) -> None:
    """Raise CheckpointError for a number of another type, or of a size that no model has."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), _TYPES.get(field.type)
        if not kinds:
            continue
        in_range = field.type is bool or (type(value) in kinds and 0 < value < 1 << 24)
        if type(value) not in kinds or not in_range:
            expected = f"expected {field.type.__name__} of usual size"
            raise CheckpointError(f"{path}: field {field.name} is {value!r}, {expected}")
    if config.num_hidden_layers > 1024 or not all(type(i) is int for i in config.eos_token_id):
        raise CheckpointError(f"{path}: field num_hidden_layers or eos_token_id is off")


# ---- Weights


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's safetensors files; CheckpointError for missing shards or unsafe names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = read_json_file(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: field 'weight_map' is missing")
        names = sorted(set(map(str, weight_map.values())))

    # An index must not lead out of its folder, nor to a file that could execute something.
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            what = f"{name!r} is not the plain name of a safetensors file"
            raise CheckpointError(f"{index}: {what}")
    if missing := [name for name in names if not (folder / name).is_file()]:
        note = "weights are read from safetensors only"
        raise CheckpointError(f"{folder}: missing {', '.join(missing)} ({note})")
    return [folder / name for name in names]


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

"""config.json of a model folder: which of its fields are read, and which values are refused.

The three tables below name every field of transformers' LlamaConfig and GPTNeoXConfig. A field
that neither class has is ignored here, as it is there.
"""

import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TypeVar

from ops.checkpoint import CheckpointError, read_json_file

Config = TypeVar("Config")  # a frozen dataclass of config.json's fields

# Read: what a model's Config has, and these.
READ = {"model_type", "hidden_act", "rope_parameters", "rope_scaling", "rope_theta"}
READ |= {"rotary_pct", "rotary_emb_base", "partial_rotary_factor", "eos_token_id"}

# These would change the logits, or the training, so they may only have this value.
FIXED = {
    "quantization_config": None,
    "is_causal": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
}

# These change nothing that is computed here.
HARMLESS = {
    *("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "is_decoder"),
    *("id2label", "label2id", "problem_type", "classifier_dropout", "num_labels"),
    *("initializer_range", "pretraining_tp", "bos_token_id", "pad_token_id", "torchscript"),
}

TYPES = {int: (int,), float: (int, float), bool: (bool,)}
LARGEST = 2**31 - 1  # of a whole number
MOST_LAYERS = 1024  # building more would take minutes before anything could be refused
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}  # and the numbers they need


def config_from(path: Path, raw: dict, form: type[Config], **supported) -> Config:
    """Return raw, the object in the config.json at path, as a configuration of that form.

    supported: fields that may only have this value. Raises CheckpointError, which names the field.
    """
    check_supported(path, raw, supported | FIXED)
    rope, kind = rope_parameters(path, raw)
    check_supported(path, rope, {n: v for n, v in supported.items() if n in rope})
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
    check_shape(path, config, derived=not raw.get("head_dim"))
    return config


def check_supported(path: Path, raw: dict, supported: dict) -> None:
    """Raise CheckpointError for a field with a value other than the only one built here."""
    for field, value in supported.items():
        found = raw.get(field)
        absent = field not in raw or (found is None and field != "model_type")
        if (field == "model_type" and absent) or (not absent and found != value):
            raise CheckpointError(f"{path}: {field} is {found!r}, only {value!r} is supported")


def rope_parameters(path: Path, raw: dict) -> tuple[dict, str]:
    """Return the rotary parameters, in the new layout or the old one, and their type.

    Raises CheckpointError if both layouts are there and say different things.
    """
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for rope in (new, old):
        if not isinstance(rope, dict):
            raise CheckpointError(f"{path}: the rope parameters are {rope!r}, expected an object")
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in (new, old)]
    for rope, kind in zip((new, old), kinds, strict=True):
        if rope and kind not in list(ROPE_TYPES):
            known = ", ".join(ROPE_TYPES)
            raise CheckpointError(f"{path}: rope_type is {kind!r}, only {known} are supported")

    if new and old:
        names = ROPE_TYPES[kinds[0]]
        if kinds[0] != kinds[1] or any(new.get(name) != old.get(name) for name in names):
            what = "rope_parameters and rope_scaling say different things"
            raise CheckpointError(f"{path}: {what}; keep the one that the model was trained with")
    return (new, kinds[0]) if new else (old, kinds[1])


def end_tokens(folder: Path, raw: dict) -> tuple[int, ...] | None:
    """Return the ids that end a text: generation_config.json's if it has any, else raw's."""
    path = folder / "generation_config.json"
    generation = read_json_file(path) if path.is_file() else {}
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = raw.get("eos_token_id")
    if isinstance(ids, list):
        return tuple(ids)
    return None if ids is None else (ids,)


def check_values(path: Path, config) -> None:
    """Raise CheckpointError for a value of another type, or for a number out of its range."""
    for field in fields(config):
        value, kinds = getattr(config, field.name), TYPES.get(field.type)
        if not kinds or (type(value) is bool and field.type is bool):
            continue
        limit = LARGEST if field.type is int else float("inf")
        if type(value) not in kinds or not (0 < value <= limit and math.isfinite(value)):
            expected = "expected bool" if field.type is bool else f"expected {named(field.type)}"
            raise CheckpointError(f"{path}: field {field.name} is {value!r}, {expected}")
    if config.num_hidden_layers > MOST_LAYERS:
        what = f"num_hidden_layers is {config.num_hidden_layers}, at most {MOST_LAYERS} are built"
        raise CheckpointError(f"{path}: {what}")
    if not all(type(i) is int for i in config.eos_token_id):
        what = f"eos_token_id is {list(config.eos_token_id)}, expected whole numbers"
        raise CheckpointError(f"{path}: {what}")
    for name, number in (config.rope_scaling or {}).items():
        if name != "rope_type" and not 0 < number < float("inf"):
            raise CheckpointError(f"{path}: rope {name} is {number}, expected a number above 0")


def named(kind: type) -> str:
    """Return what a number of that type has to be, in words."""
    return "a whole number above 0" if kind is int else "a number above 0"


def check_shape(path: Path, config, derived: bool) -> None:
    """Raise CheckpointError for heads that do not fit one another or the hidden size.

    derived: whether the head size follows from the hidden size.
    """
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        what = f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        raise CheckpointError(f"{path}: {what}")
    if derived and config.hidden_size % heads:
        what = f"hidden_size {config.hidden_size} is no multiple of num_attention_heads {heads}"
        raise CheckpointError(f"{path}: {what}")
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {config.head_dim} is odd, expected pairs")

"""A GGUF file of the Llama architecture: its metadata as config.json, its tensors by their names.

The package `gguf`, an optional extra, parses and dequantizes; here is what llama.cpp means by it.
Whatever would change the logits and is not converted is an InputError that names it.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trsr import InputError

EXTRA = "pip install 'llm-trsr[gguf]', or pip install gguf tokenizers protobuf"
REQUIRED = object()  # in the place of a default
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
KINDS[list] = "a list"

# The llama.* keys that are read below, and those that change nothing that is computed.
READ = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "expert_count", "expert_used_count"),
}
HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout"}

# A layer's tensors, by llama.cpp's names and by those of a Hugging Face checkpoint.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"

# ---- The file


def import_gguf():
    """Return the package gguf; InputError, which says how to install it, where it is missing."""
    try:
        import gguf
    except ImportError:
        raise InputError(f"reading GGUF needs the optional extra: {EXTRA}") from None
    return gguf


class File:
    """An open GGUF file: metadata by key, tensors by name. Every error starts with `shown`."""

    def __init__(self, path: Path, shown: str):
        self.shown = shown
        self.package = import_gguf()
        self.reader = self._open(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        if self.reader.byte_order != "I":
            raise self.error("is of the other byte order than this machine; fetch one that is not")

    def error(self, what: str) -> InputError:
        """Return an error about this file."""
        return InputError(f"{self.shown}: {what}")

    def _open(self, path: Path):
        class Reader(self.package.GGUFReader):
            def _get(self, offset, dtype, count=1, override_order=None):
                # Past the end NumPy returns fewer numbers and no error.
                end = int(offset) + int(count) * np.dtype(dtype).itemsize
                if end > len(self.data):
                    raise ValueError(f"it has {len(self.data)} bytes and needs {end}")
                return super()._get(offset, dtype, count, override_order)

        with open(path, "rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise self.error(f"no GGUF file, nor a wheel or zip with one (starts with {magic!r})")
        try:
            return Reader(path)
        except (ValueError, LookupError, OverflowError, TypeError, MemoryError) as error:
            if "GGMLQuantizationType" in str(error):
                what = f"a tensor's quantization is unknown to the package gguf ({error})"
                raise self.error(f"{what}; take the file in another, as Q8_0") from None
            what = f"cut short, or not a GGUF file that can be read ({error})"
            raise self.error(f"{what}; fetch it again") from None

    def get(self, key: str, kind: type, default: object = REQUIRED):
        """Return a key's value, of that kind; without a default, InputError if it is missing."""
        field = self.reader.fields.get(key)
        if field is None:
            if default is REQUIRED:
                raise self.error(f"metadata {key} is missing; the file is no whole model")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError:
            raise self.error(f"metadata {key} is not UTF-8 text") from None
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            shown = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
            raise self.error(f"metadata {key} is {shown}, expected {KINDS[kind]}")
        return value

    def entries(self, key: str, kind: type, default: object = REQUIRED) -> list:
        """Return a key's list, all of whose entries are of that kind."""
        found = self.get(key, list, default)
        numbers = (int, float) if kind is float else kind
        if not all(isinstance(entry, numbers) for entry in found or []):
            raise self.error(f"metadata {key} holds something that is not {KINDS[kind]}")
        return found

    def number(self, key: str, default: object = REQUIRED) -> float:
        """Return a 32-bit number as it was written: 1e-05, and not 9.99999974e-06."""
        value = self.get(key, float, default)
        return value if value is None else float(str(np.float32(value)))

    def types(self) -> str:
        """Return the tensors' types and how many there are of each."""
        counts = Counter(tensor.tensor_type.name for tensor in self.reader.tensors)
        return ", ".join(f"{n} {name}" for name, n in counts.most_common())


def check_kind(file: File) -> None:
    """Raise InputError unless the file is one whole model of the Llama architecture."""
    architecture = file.get("general.architecture", str)
    if architecture != "llama":
        raise file.error(f"architecture is {architecture!r}, only 'llama' is converted")
    if (kind := file.get("general.type", str, "model")) != "model":
        raise file.error(f"general.type is {kind!r}, expected a whole 'model'")
    if (parts := file.get("split.count", int, 0)) > 1:
        what = f"one of {parts} parts of a model"
        raise file.error(f"{what}; join them first, with llama.cpp's gguf-split --merge")
    if (experts := file.get("llama.expert_count", int, 0)) > 0:
        raise file.error(f"a mixture of {experts} experts (llama.expert_count), not converted")

    known = {f"llama.{name}" for name in READ | HARMLESS}
    for key in file.reader.fields:
        if key.startswith("llama.") and key not in known:
            raise file.error(f"metadata {key} is not converted, and may change the logits")


# ---- Configuration


def read_config(file: File) -> dict:
    """Return the fields of config.json that describe the layers; the tokenizer's are not there."""
    check_kind(file)
    width, heads = (
        positive(file, f"llama.{name}") for name in ("embedding_length", "attention.head_count")
    )
    size = head_size(file, width, heads)
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise file.error("tensor token_embd.weight is missing; the file is no whole model")
    rows = int(table.shape[-1])
    if (stated := file.get("llama.vocab_size", int, rows)) != rows:
        raise file.error(f"llama.vocab_size is {stated}, but token_embd.weight has {rows} rows")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": positive(file, "llama.feed_forward_length"),
        "num_hidden_layers": positive(file, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads(file, heads),
        "head_dim": size,
        "max_position_embeddings": positive(file, "llama.context_length"),
        "rms_norm_eps": file.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.number("llama.rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, size),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def positive(file: File, key: str, default: object = REQUIRED) -> int:
    """Return a key's whole number above 0."""
    value = file.get(key, int, default)
    if value < 1:
        raise file.error(f"metadata {key} is {value}, expected a whole number above 0")
    return value


def head_size(file: File, width: int, heads: int) -> int:
    """Return D; InputError unless keys, values and the rotation all have it."""
    if "llama.attention.key_length" not in file.reader.fields and width % heads:
        raise file.error(f"embedding_length {width} is no multiple of head_count {heads}")
    size = positive(file, "llama.attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        found = file.get(f"llama.{name}", int, size)
        if found != size:
            raise file.error(f"llama.{name} is {found}, only the head size {size} is converted")
    return size


def key_value_heads(file: File, heads: int) -> int:
    """Return the number of key-value heads, which has to be the same in all layers."""
    key = "llama.attention.head_count_kv"
    field = file.reader.fields.get(key)
    found = field.contents() if field is not None else heads
    if isinstance(found, list):
        if len(set(found)) != 1:
            raise file.error(f"{key} differs between the layers, which is not converted")
        found = found[0]
    if type(found) is not int or found < 1 or heads % found:
        raise file.error(f"{key} is {found!r}, expected a divisor of head_count {heads}")
    return found


def rope_scaling(file: File, size: int) -> dict | None:
    """Return how the context was extended, as config.json says it; None if it was not."""
    kind = file.get("llama.rope.scaling.type", str, None)
    factor = file.number("llama.rope.scaling.factor", None)
    if factor is None:
        factor = file.number("llama.rope.scale_linear", None)
    factor = factor or 1.0  # llama.cpp reads 0 as no scaling
    if kind not in (None, "none", "linear"):
        what = f"llama.rope.scaling.type is {kind!r}"
        raise file.error(f"{what}, only 'linear' and Llama 3's {ROPE_FACTORS} are converted")
    linear = kind != "none" and factor != 1.0
    if ROPE_FACTORS in file.tensors:
        if linear:
            raise file.error(f"has {ROPE_FACTORS} and a factor {factor} too; not converted")
        return llama3_scaling(file, size)
    return {"rope_type": "linear", "factor": factor} if linear else None


def llama3_scaling(file: File, size: int) -> dict | None:
    """Return the parameters behind rope_freqs.weight, by which llama.cpp divides frequencies.

    All Llama 3 models share all of them but the factor, which is the slowest frequency's.
    """
    factors = dequantize(file, ROPE_FACTORS)
    if factors.shape != (size // 2,):
        shape = tuple(factors.shape)
        raise file.error(f"tensor {ROPE_FACTORS} has shape {shape}, expected ({size // 2},)")
    if bool((factors == factors[0]).all()):
        same = float(factors[0])
        return None if same == 1 else {"rope_type": "linear", "factor": same}

    theta = file.number("llama.rope.freq_base", 10000.0)
    context = file.get("llama.rope.scaling.original_context_length", int, 8192)
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors[-1]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
    turns = context * theta ** (-2 * np.arange(size // 2) / size) / (2 * math.pi)
    share = np.clip((turns - 1.0) / 3.0, 0, 1)  # 1: this frequency stays as it is
    expected = 1 / ((1 - share) / scaling["factor"] + share)
    if not np.allclose(factors, expected, rtol=1e-4):
        what = f"tensor {ROPE_FACTORS} is not the one of Llama 3 with factor {factors[-1]}"
        raise file.error(f"{what} and {context} positions; not converted")
    return scaling


# ---- Weights


def tensor_table(config: dict) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return for each of llama.cpp's names the checkpoint's name and shape."""
    c, i, rows = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    q, kv = (
        config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    table = {
        "token_embd.weight": ("model.embed_tokens.weight", (rows, c)),
        "output_norm.weight": ("model.norm.weight", (c,)),
    }
    if not config["tie_word_embeddings"]:
        table["output.weight"] = ("lm_head.weight", (rows, c))
    shapes = {"attn_q": (q, c), "attn_k": (kv, c), "attn_v": (kv, c), "attn_output": (c, q)}
    shapes |= {"ffn_gate": (i, c), "ffn_up": (i, c), "ffn_down": (c, i)}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            source, target = f"blk.{layer}.{theirs}", f"model.layers.{layer}.{ours}"
            shape = shapes.get(theirs, (c,))
            table[f"{source}.weight"] = (f"{target}.weight", shape)
            biased = config["attention_bias" if theirs.startswith("attn") else "mlp_bias"]
            if biased and theirs in shapes:
                table[f"{source}.bias"] = (f"{target}.bias", shape[:1])
    return table


def check_tensors(file: File, table: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise InputError unless the file has exactly these tensors, in their shapes."""
    if missing := [name for name in table if name not in file.tensors]:
        raise file.error(f"lacks {len(missing)} tensors, the first is {missing[0]}")
    for name, tensor in file.tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if name == ROPE_FACTORS:
            continue  # read as rope_scaling
        if name not in table:
            raise file.error(f"tensor {name} has no place in a Llama; not converted")
        if shape != table[name][1]:
            raise file.error(f"tensor {name} has shape {shape}, expected {table[name][1]}")


def dequantize(file: File, name: str) -> np.ndarray:
    """Return a tensor in fp32; InputError for a quantization that the package cannot undo."""
    tensor = file.tensors[name]
    try:
        values = file.package.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        what = f"tensor {name} is of type {tensor.tensor_type.name}, which is not converted"
        raise file.error(f"{what}; take the file in another, as Q8_0") from None
    if not np.isfinite(values).all():
        raise file.error(f"tensor {name} holds NaN or infinity: damaged; fetch it again")
    return values


def read_tensors(file: File, config: dict, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield (the checkpoint's name, tensor) of every tensor, in dtype, one at a time."""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    for name, (target, _) in tensor_table(config).items():
        values = dequantize(file, name)
        if (part := name.split(".")[-2]) in heads:
            values = halves(values, heads[part])
        yield target, torch.from_numpy(np.array(values)).to(dtype)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows (heads * D, ...) of q or k in the checkpoint's order.

    llama.cpp puts the two dimensions that are rotated together side by side; in a checkpoint one
    is in the head's first half and one in its second.
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)

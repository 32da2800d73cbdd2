"""Llama in PyTorch: token ids in, logits out. Independent of adapters and distribution.

It reads any checkpoint of the Llama architecture in Hugging Face layout (Llama 1, 2, 3.x,
TinyLlama, SmolLM2, ...). Modules and tensors have the checkpoint's own names, so loading renames
and permutes nothing. From top to bottom:

    configuration   Config, load_config
    attention       rotary positions; one function for packs, caches and plain text
    layers          Attention, MLP, Layer, Decoder, Llama with its loss
    loading         load_model, from safetensors

Two ideas come from ops/; read them first: packs, many texts in one row of tokens
(ops/packs.py), and caches, the keys and values of earlier tokens (ops/cache.py).

Shapes: B rows, T tokens of a row, S cache slots of a row, H heads, K key-value heads, D head size,
C hidden size, V vocabulary. Positions count tokens from 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from ops.cache import Cache
from ops.checkpoint import CheckpointError, read_json_file, read_tensors, weight_files
from ops.config import config_from
from ops.fp8 import use_fp8
from ops.int8 import Int8Linear, bitsandbytes_linear, replace_linears
from ops.loss import CrossEntropy
from ops.masks import QueryBlocks, as_additive, kernel_tiles, with_copies
from ops.packs import Pack

# ---- Configuration


@dataclass(frozen=True)
class Config:
    """The fields of a Llama's config.json, under their own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"rope_type": "linear" or "llama3", ...}; None: no scaling
    eos_token_id: tuple[int, ...] = ()


def load_config(folder: Path) -> Config:
    """Return a model folder's configuration; CheckpointError if it asks for what is not built."""
    path = folder / "config.json"
    only = {"model_type": "llama", "hidden_act": "silu", "partial_rotary_factor": 1.0}
    return config_from(path, read_json_file(path), Config, **only)


# ---- Attention


def rotary_tables(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of the rotary angles at positions (B, T): (B, T, 1, D) each.

    The angle of pair i at position t is t * theta^(-2i / D) (Su et al., 2021). The sine has a
    minus in its first half, as `rotate` needs it.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (exponents / config.head_dim)
    if config.rope_scaling:
        frequencies = scale_frequencies(frequencies, config.rope_scaling)
    angles = positions[..., None, None].float() * frequencies  # (B, T, 1, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def scale_frequencies(frequencies: Tensor, rope: dict) -> Tensor:
    """Return the frequencies (D / 2) of a model whose context was extended."""
    slow = frequencies / rope["factor"]
    if rope["rope_type"] == "linear":
        return slow
    # llama3: waves that turn often within the original context stay, those that turn seldom are
    # stretched by the factor, and the ones between are interpolated.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return x (B, T, H, D) rotated by its position.

    A pair is (x1, x2), from the first and the second half of D, as in the checkpoints. It becomes
    (x1 cos - x2 sin, x2 cos + x1 sin): rolling x by half of D puts x2 above x1, and the sine's
    sign does the rest.
    """
    cos, signed_sin = rotary
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


@cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)  # on first use, because this alone takes two seconds


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | QueryBlocks | None):
    """Return softmax(q k^T / sqrt(D)) v (B, H, T, D) for q (B, H, T, D) and k, v (B, K, S, D).

    mask: a BlockMask (FlexAttention; it may want copies of keys), a pack's QueryBlocks, a tensor
    with 0 where a query sees a key and -inf elsewhere, or None for causal.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves them in fp32 after the rotation
        k, v = with_copies(k, mask), with_copies(v, mask)
        tiles = kernel_tiles(mask, v)
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=tiles)

    if isinstance(mask, QueryBlocks):  # each block of queries attends to the keys that it sees
        queries = q.split([len(seen) for seen in mask.seen], dim=2)
        keys, values = (x.index_select(2, mask.keys).split(mask.sizes, dim=2) for x in (k, v))
        blocks = zip(queries, keys, values, mask.seen, strict=True)
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=grouped)
        return torch.cat([sdpa(*block) for block in blocks], dim=2)

    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


# ---- Layers, from leaf to root


class Attention(nn.Module):
    """Grouped-query self-attention, over the batch's own tokens or over a cache."""

    def __init__(self, config: Config):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=bias)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None):
        """Return (B, T, C) for x (B, T, C), or (N, C) at select's N (rows, tokens)."""
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim), rotary)  # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim), rotary)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        # Transposing after the rotation keeps T before H in memory, so that attention's output
        # needs no copy.
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(positions, k, v, mask)  # (B, K, S, D)

        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_proj(y if select is None else y[select])


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        c, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(c, i, bias=bias)
        self.up_proj = nn.Linear(c, i, bias=bias)
        self.down_proj = nn.Linear(i, c, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape (..., C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer block, normalized before attention and before the MLP."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None):
        """Return the next hidden states (B, T, C), or (N, C) at select's N (rows, tokens)."""
        y = self.self_attn(self.input_layernorm(x), rotary, positions, mask, cache, select)
        x = y + (x if select is None else x[select])
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # recompute a layer in the backward pass, to save memory

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None,
        mask,
        cache: Sequence[Cache] | None,  # one per layer
        select: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, C) for ids (B, T), or (N, C) at select's (rows, tokens).

        Of the last layer only the keys and values are needed everywhere; the rest of it is computed
        for the selected tokens alone.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.embed_tokens(ids)
        mask = as_additive(mask, x.dtype)
        rotary = rotary_tables(self.config, positions, x.dtype)
        if x.is_cuda and torch.is_grad_enabled():
            x.requires_grad_()  # as in the later layers, so one compilation serves them all

        for layer, cached in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            # Calling a layer runs its compiled version, which wants the same shapes every time.
            fixed_shape = cached is None or cached.fixed_shape
            run = layer if fixed_shape else layer.forward
            chosen = select if layer is self.layers[-1] else None
            inputs = (x, rotary, positions, mask, cached, chosen)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, *inputs, use_reentrant=False)
            else:
                x = run(*inputs)
        return self.norm(x)


class Llama(nn.Module):
    """The causal language model. Without positions and mask, rows are plain causal texts."""

    unused = ("rotary_emb.inv_freq",)  # endings of tensor names that files may have for no use

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.syncs_host = False  # whether a layer waits for the GPU; it then fits no CUDA graph

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | BlockMask | QueryBlocks | None = None,
        cache: Sequence[Cache] | None = None,
        select: tuple[Tensor, Tensor] | None = None,
        vocabulary: Tensor | None = None,
    ) -> Tensor:
        """Return logits for ids (B, T): (B, T, V), or (N, V) at select's N (rows, tokens).

        vocabulary: token ids (M,), to compute only their columns of the logits.
        """
        x = self.model(ids, positions, mask, cache, select)
        if vocabulary is None:
            return self.lm_head(x)
        return F.linear(x, self.lm_head.weight[vocabulary])

    def loss(self, pack: Pack, chunk: int = 1024) -> Tensor:
        """Return the sum of weight * cross-entropy over the pack's targets, in fp32.

        This is equation 1 as a sum; the caller divides it by the number of targets of its step.
        Only the chunk's logits are in memory at a time.
        """
        x = self.model(pack.ids[None], pack.positions[None], pack.mask(), None)[0, pack.rows]
        return CrossEntropy.apply(x, self.lm_head.weight, pack.next_ids, pack.weights, chunk)


def compile_layers(model: Llama) -> None:
    """Compile the layers on a GPU: once for each shape that occurs, shared by all layers."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._inductor.config.fallback_random = True  # dropout draws as uncompiled, and faster
    for layer in model.model.layers:
        layer.compile(dynamic=False)


# ---- Loading

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    int8: str | None = None,
    fp8: str | None = None,
    build: Callable[[Path], Llama] | None = None,
) -> Llama:
    """Return a folder's model on device, in dtype and eval mode.

    The files are mapped into memory: on a CPU, and where dtype is the file's own, the weights are
    the mapping itself. int8 or fp8: a way to hold the layers' matrices in 8 bit (ops/int8.py,
    ops/fp8.py). build: makes another architecture from the folder. Raises CheckpointError, which
    names the file, tensor and shape that do not fit.
    """
    if int8 and fp8:
        raise CheckpointError("--int8 and --fp8: the matrices are held in one of them, choose one")
    with torch.device("meta"):
        model = build(folder) if build else Llama(load_config(folder))
    tied = model.config.tie_word_embeddings
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied weights once
    if int8 == "weights":
        replace_linears(model, Int8Linear)
    elif fp8:
        use_fp8(model, way=fp8)

    source = "cpu" if int8 == "bitsandbytes" else str(device)  # it quantizes on the way to a GPU
    found = find_weights(model, folder, source, dtype, shapes)
    if missing := [name for name in shapes if name not in found]:
        what = f"the safetensors files lack {len(missing)} tensors, the first is {missing[0]}"
        raise CheckpointError(f"{folder}: {what}")
    model.load_state_dict(found, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight

    if int8 == "bitsandbytes":
        replace_linears(model, bitsandbytes_linear)
        model.syncs_host = True
    return model.to(device).eval()


def find_weights(
    model: Llama, folder: Path, device: str, dtype: torch.dtype, shapes: dict
) -> dict[str, Tensor]:
    """Return the folder's tensors by name; what a layer holds in 8 bit is encoded, with scales."""
    if model.config.tie_word_embeddings:  # the file may have the head too, or the head alone
        shapes = shapes | {HEAD: shapes[EMBEDDING]}
    encoders = {f"{n}.weight": m.encode for n, m in model.named_modules() if hasattr(m, "encode")}
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in read_tensors(path, device, shapes, model.unused):
            # Numbers of 8 bit, which torch counts as floating point, would need their scales.
            if name in found or not tensor.is_floating_point() or tensor.itemsize < 2:
                what = f"tensor {name} is there twice, or not of floating point in 16 bit or more"
                raise CheckpointError(f"{path}: {what}")
            found[name] = tensor.to(dtype)
            if name in encoders:  # at once, since all weights in 16 bit may not fit
                parts, place = encoders[name](found[name]), name.removesuffix("weight")
                found |= {place + part: held for part, held in parts.items()}

    if model.config.tie_word_embeddings:
        settle_tied(folder, found)
    return found


def settle_tied(folder: Path, found: dict[str, Tensor]) -> None:
    """Keep one of two tied tensors, as the embedding; CheckpointError if they differ."""
    head = found.pop(HEAD, None)
    if head is not None and not torch.equal(found.setdefault(EMBEDDING, head), head):
        what = f"config.json ties {HEAD} to {EMBEDDING}, but the file's two differ"
        raise CheckpointError(f"{folder}: {what}; set tie_word_embeddings to false to use both")

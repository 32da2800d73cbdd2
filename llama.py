"""Llama in PyTorch: token ids in, logits out. It knows nothing of recommendation, adapters or processes.

Reads any checkpoint of the Llama architecture in Hugging Face layout (Llama 1, 2, 3.x, TinyLlama, SmolLM2, ...); module
and tensor names are the checkpoint's own, so nothing is renamed or permuted on the way in.

    config, layers      Config, Llama               the model, with one attention for two kinds of batch:
    packed attention    Llama.loss, score_packs     many texts that share beginnings in one row (models/packs.py)
    cached attention    KVCache, Generator          greedy generation
    files               load_model

Shapes: B rows, T tokens of a row, S cache slots of a row, H heads, K key-value heads, D head size, C hidden size,
V vocabulary. Positions count from 0 in tokens.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from models.int8 import Int8Linear, bitsandbytes_linear, quantize, replace_linears
from models.packs import BLOCK, Pack, QueryBlocks, common_prefix, grow_trees, kernel_tiles, on_device, pack_trees

PREFILL_TOKENS = 8192  # of prompts that a GPU reads at once before it writes


class CheckpointError(ValueError):
    """A model folder that cannot be used: one line that names the file or field, and the way out."""


# ---- Configuration


@dataclass(frozen=True)
class Config:
    """The fields of a Llama's config.json under their own names; rope_theta and rope_scaling from either layout."""

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
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", ...}; None for plain rotary embeddings
    eos_token_id: tuple[int, ...] = ()


_TYPES = {int: (int,), float: (int, float), bool: (bool,)}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}  # the fields that each kind needs


def load_config(folder: Path) -> Config:
    """Return the configuration of a model folder; CheckpointError for an architecture or feature not built here."""
    path = folder / "config.json"
    return config_from(path, read_json_file(path), Config, model_type="llama", hidden_act="silu")


def config_from(path: Path, raw: dict, form: type[Config], **supported) -> Config:
    """Return the fields of config.json as a configuration of that form; supported: values that are the only ones."""
    generation = path.parent / "generation_config.json"
    for field, value in (supported | {"quantization_config": None}).items():
        if raw.get(field, value) != value or (field == "model_type" and field not in raw):
            raise CheckpointError(f"{path}: {field} is {raw.get(field)!r}, only {value!r} is supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # the new layout, then the old
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: the rope parameters are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(_ROPE):
        raise CheckpointError(f"{path}: rope_type is {kind!r}, only {', '.join(_ROPE)} are supported")
    try:
        numbers = {name: float(rope[name]) for name in _ROPE[kind]}
        raw["rope_scaling"] = {"rope_type": kind} | numbers if numbers else None
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
        raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        eos = (read_json_file(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id"))
        raw["eos_token_id"] = tuple(eos) if isinstance(eos, list) else None if eos is None else (eos,)
        given = [f.name for f in fields(form) if f.default is MISSING or raw.get(f.name) is not None]
        config = form(**{name: raw[name] for name in given})
    except KeyError as missing:
        raise CheckpointError(f"{path}: field {missing} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{path}: a field is of another type than expected ({error})") from None
    for field in fields(form):
        value, kinds = getattr(config, field.name), _TYPES.get(field.type)
        if kinds and (type(value) not in kinds or not (field.type is bool or 0 < value < 1 << 24)):
            raise CheckpointError(
                f"{path}: field {field.name} is {value!r}, expected {field.type.__name__} of usual size"
            )
    if config.num_hidden_layers > 1024 or not all(type(i) is int for i in config.eos_token_id):
        raise CheckpointError(f"{path}: field num_hidden_layers or eos_token_id is off")
    return config


# ---- Layers, from leaf to root


def rotary_tables(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine of the rotary angles at positions (B, T), each (B, T, 1, D)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if rope := config.rope_scaling:
        slow = frequencies / rope["factor"]
        if rope["rope_type"] == "linear":
            frequencies = slow
        else:  # llama3: waves that turn often within the original context stay, the slowest are stretched
            turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            frequencies = torch.lerp(slow, frequencies, ((turns - low) / (high - low)).clamp(0, 1))
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return x (B, T, H, D) turned by its position; the two halves of D are the two coordinates, as in the files."""
    return x * rotary[0] + x.roll(x.shape[-1] // 2, -1) * rotary[1]


@cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)  # when it is first needed, since this alone takes two seconds


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None") -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v (B, H, T, D) for q (B, H, T, D) and k, v (B, K, S, D).

    mask: a BlockMask (FlexAttention), a pack's QueryBlocks, a tensor with 0 where a query sees a key and -inf
    elsewhere, or None for causal.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        q, k = q.to(v.dtype), k.to(v.dtype)  # autocast leaves them in fp32 after the rotation
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped, kernel_options=kernel_tiles(mask, v))
    if isinstance(mask, QueryBlocks):
        queries = q.split([len(seen) for seen in mask.seen], dim=2)
        keys, values = (x.index_select(2, mask.keys).split(mask.sizes, dim=2) for x in (k, v))
        parts = zip(queries, keys, values, mask.seen, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, enable_gqa=grouped) for part in parts], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as what attention adds: 0 where True, -inf elsewhere. Once here, or once in each layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


@dataclass
class Slots:
    """A layer's keys and values of B rows, (B, K, S, D) each; a token's slot is its position."""

    keys: Tensor
    values: Tensor
    steady = True  # the same shapes in every call

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Write k, v (n, K, T, D) at positions (n, T) of the first n rows; return what mask (.., S) is about there."""
        n, visible = len(positions), mask.shape[-1]
        rows = torch.arange(n, device=positions.device)[:, None]
        self.keys[rows, :, positions] = k.transpose(1, 2)
        self.values[rows, :, positions] = v.transpose(1, 2)
        return self.keys[:n, :, :visible], self.values[:n, :, :visible]


@dataclass(frozen=True)
class PackWriter:
    """Writes a pack's sequences into rows of a layer's slots, while the tokens attend to one another."""

    layer: Slots
    rows: Tensor  # (N,), as the next two: the row where a token goes, its slot there
    slots: Tensor
    tokens: Tensor  # and where in the pack it stands; a shared one goes to several rows
    steady = True

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Write k, v (1, K, T, D); return them."""
        self.layer.keys[self.rows, :, self.slots] = k[0, :, self.tokens].transpose(0, 1)
        self.layer.values[self.rows, :, self.slots] = v[0, :, self.tokens].transpose(0, 1)
        return k, v


@dataclass
class PrefixCache:
    """A layer's keys and values of a prefix of `length` tokens, kept from the first pack that begins with it."""

    length: int
    kept: tuple[Tensor, Tensor] | None = None
    steady = False

    def update(self, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Keep what begins k, v (1, K, T, D) and return them, or return them behind what was kept."""
        if self.kept is None:
            self.kept = k[:, :, : self.length], v[:, :, : self.length]
            return k, v
        return tuple(torch.cat(pair, dim=2) for pair in zip(self.kept, (k, v), strict=True))


Cache = Slots | PackWriter | PrefixCache  # of one layer


class Attention(nn.Module):
    """Grouped-query self-attention over the batch's own tokens or over a cache."""

    def __init__(self, config: Config):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=bias)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None) -> Tensor:  # noqa: D102
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        # Transposed after the rotation, so that in memory T stays before H and attention's output needs no copy.
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, rotary), rotate(k, rotary), v))  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(positions, k, v, mask)  # (B, K, S, D)
        y = attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y if select is None else y[select])


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config):
        super().__init__()
        c, i, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(c, i, bias=bias)
        self.up_proj = nn.Linear(c, i, bias=bias)
        self.down_proj = nn.Linear(i, c, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer block, normalized before attention and before the MLP."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, positions, mask, cache: Cache | None, select=None) -> Tensor:
        """Return the next hidden states (B, T, C), or (N, C) at the N places (rows, tokens) that select names."""
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
        self.checkpointing = False  # compute a layer again in the backward pass instead of keeping what is in it

    def forward(
        self, ids: Tensor, positions: Tensor | None, mask, cache: Sequence[Cache] | None, select: tuple | None = None
    ) -> Tensor:
        """Return hidden states (B, T, C) for ids (B, T), or (N, C) at the places that select names.

        cache is a list, of each layer's. Beyond the last layer's keys and values nobody asks for the other places, so
        the rest of that layer is not computed for them.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.embed_tokens(ids)
        if isinstance(mask, Tensor):
            mask = additive(mask, x.dtype)
        elif isinstance(mask, QueryBlocks):
            mask = replace(mask, seen=[additive(seen, x.dtype) for seen in mask.seen])
        rotary = rotary_tables(self.config, positions, x.dtype)
        if x.is_cuda and torch.is_grad_enabled():
            x.requires_grad_()  # as in the later layers, so that one compilation serves them all
        for layer, cached in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            run = layer if cached is None or cached.steady else layer.forward  # what is compiled fits fixed shapes
            inputs = (x, rotary, positions, mask, cached, select if layer is self.layers[-1] else None)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, *inputs, use_reentrant=False)
            else:
                x = run(*inputs)
        return self.norm(x)


class Llama(nn.Module):
    """The causal language model. Without positions and mask, rows are plain texts: positions from 0, causal."""

    leftovers = ("rotary_emb.inv_freq",)  # how the names of tensors end that files may have and nobody needs

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.asks_host = False  # whether a layer waits for the GPU, so that no graph of it can be captured

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: "Tensor | BlockMask | None" = None,
        cache: Sequence[Cache] | None = None,
        select: tuple | None = None,
        vocabulary: Tensor | None = None,
    ) -> Tensor:
        """Return logits for ids (B, T): (B, T, V), or (N, V) at the N places (rows, tokens) that select names.

        vocabulary: token ids (M,), to compute only their columns of the logits.
        """
        x = self.model(ids, positions, mask, cache, select)
        return self.lm_head(x) if vocabulary is None else F.linear(x, self.lm_head.weight[vocabulary])

    def loss(self, pack: "Pack", chunk: int = 1024) -> Tensor:
        """Return the sum of weight * cross-entropy over the pack's targets, in fp32 (equation 1, summed)."""
        x = self.model(pack.ids[None], pack.positions[None], pack.mask(), None)[0, pack.rows]
        return CrossEntropy.apply(x, self.lm_head.weight, pack.next_ids, pack.weights, chunk)


class CrossEntropy(torch.autograd.Function):
    """Sum of weight * cross-entropy of the logits x W^T, `chunk` rows at a time.

    The gradients are made on the way forward, from the same logits: over a whole pack those would take more memory than
    all other activations, and to compute them again in the backward pass takes time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, ids: Tensor, weights: Tensor, chunk: int) -> Tensor:  # noqa: D102
        loss = torch.zeros((), device=x.device)
        needs = zip((x, head), ctx.needs_input_grad, strict=False)
        dx, dhead = (torch.zeros_like(tensor) if need else None for tensor, need in needs)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            logs = F.log_softmax(F.linear(x[part], head).float(), dim=-1)
            due, weight = ids[part, None], weights[part, None]
            loss -= (logs.gather(1, due) * weight).sum()
            if dx is None:
                continue
            change = logs.exp_().scatter_add_(1, due, -torch.ones_like(weight)).to(x.dtype)  # softmax - one-hot
            dx[part] = (change @ head) * weight
            if dhead is not None:
                dhead += change.T @ (x[part] * weight).to(x.dtype)
        ctx.save_for_backward(dx, dhead)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: D102
        return *(None if t is None else t * grad for t in ctx.saved_tensors), None, None, None


# ---- Scoring


@torch.no_grad()
def score_packs(model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int], progress=lambda pack: None) -> dict:
    """Return {(tree, branch): fp32 logits of vocabulary after its last token}; progress gets each pack when done."""
    device, scores, running = next(model.parameters()).device, {}, deque()
    columns = on_device(torch.tensor(vocabulary), device)
    large, prefix = None, None  # the last tree that was split, and each layer's keys and values of its prefix

    def collect() -> None:
        pack, logits = running.popleft()
        scores.update(zip(pack.leaves, logits(), strict=True))
        progress(pack)

    for pack in packs:
        here, first = pack.to(device), 0
        if pack.known and large == next(iter(pack.leaves))[0]:
            first = pack.known
        elif pack.known:
            large, prefix = next(iter(pack.leaves))[0], [PrefixCache(pack.known) for _ in model.model.layers]
        inputs = (here.ids[None, first:], here.positions[None, first:], here.mask(first))
        select = places([row - first for row in pack.leaves.values()], device)
        logits = model(*inputs, prefix if pack.known else None, select=select, vocabulary=columns)
        running.append((pack, fetch(logits[: len(pack.leaves)].float())))
        if len(running) > 1:  # a result is fetched when the GPU has the next pack to work on
            collect()
    while running:
        collect()
    return scores


def fetch(tensor: Tensor) -> Callable[[], list]:
    """Begin to copy a tensor to the host; return what waits for it, but for nothing that comes after, and lists it."""
    if not tensor.is_cuda:
        return tensor.tolist
    copy, there = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    there.record()
    return lambda: there.synchronize() or copy.tolist()


def places(tokens: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what selects tokens of the only row; on a GPU some more, since layers are compiled for each number."""
    more = -len(tokens) % BLOCK if device.type == "cuda" else 0
    chosen = on_device(torch.tensor(tokens + tokens[-1:] * more), device)
    return torch.zeros_like(chosen), chosen


def compile_layers(model: Llama) -> None:
    """Compile the layers for batches of fixed shape on a GPU: one compilation for each shape serves all of them."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)


# ---- Greedy generation with a cache
#
# Prompts wait in a queue for one of the rows of a static cache. Those that get one are read in packs, where their
# common beginnings stand once; then all rows decode together, and a row that is done is filled again at once. Each row
# has its own length: a query sees the slots up to its own, and what a former prompt left behind them is overwritten
# before anybody looks at it.


@dataclass
class Row:
    """One text in the making: its name, its prompt, and the tokens that the model wrote."""

    key: object
    prompt: list[int]
    tokens: list[int]

    @property
    def length(self) -> int:
        """Slots in use; also the position of the last token, which is not in the cache yet."""
        return len(self.prompt) + len(self.tokens) - 1


class KVCache:
    """The slots of every layer for B rows; it starts with `slots` a row and can grow."""

    def __init__(self, config: Config, rows: int, slots: int, device: torch.device, dtype: torch.dtype):
        def empty() -> Tensor:
            shape = (rows, config.num_key_value_heads, slots, config.head_dim)
            return torch.zeros(shape, device=device, dtype=dtype)

        self.layers = [Slots(empty(), empty()) for _ in range(config.num_hidden_layers)]

    @property
    def slots(self) -> int:
        """Slots of a row, in every layer."""
        return self.layers[-1].values.shape[2]

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots a row, a layer at a time, since two whole caches may not fit."""
        for layer in self.layers:
            layer.keys = F.pad(layer.keys, (0, 0, 0, slots - layer.keys.shape[2]))
            layer.values = F.pad(layer.values, (0, 0, 0, slots - layer.values.shape[2]))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[target, :, :length] = tensor[source, :, :length]


class Generator:
    """Greedy continuations, up to and without an end token, of prompts that may come at any time.

    On a GPU a step for all rows is captured as one CUDA graph, if the model's layers do not ask the host.
    """

    def __init__(self, model: Llama, rows: int, max_new_tokens: int, eos_ids: Sequence[int], slots: int = 0):
        self.model, self.n_rows, self.max_new_tokens, self.eos_ids = model, rows, max_new_tokens, eos_ids
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.waiting: deque[tuple[object, list[int]]] = deque()
        self.rows: list[Row] = []  # in the first rows of the cache
        self.cache = KVCache(model.config, rows, slots, self.device, self.dtype)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs = torch.zeros(2, rows, dtype=torch.long, device=self.device)  # of the graph: tokens, positions

    def submit(self, prompts: Iterable[tuple[object, list[int]]], first: bool = False) -> None:
        """Queue (key, token ids) pairs at the end, or with `first` before all others."""
        self.waiting.extendleft(reversed(list(prompts))) if first else self.waiting.extend(prompts)

    @torch.inference_mode()
    def step(self) -> list[tuple[object, list[int]]]:
        """Read waiting prompts into free rows, write a token in every row; return (key, tokens) of those done."""
        if due := self._due():
            self._prefill([self.waiting.popleft() for _ in range(due)])
        elif self.rows:
            for row, token in zip(self.rows, self._decode(), strict=True):
                row.tokens.append(token)
        return self._take_done()

    def _due(self) -> int:
        """Return how many waiting prompts to read now: none until they are worth it, on GPUs a full pack at most."""
        free, tokens, first = self.n_rows - len(self.rows), 0, None
        for n, (_, ids) in enumerate(islice(self.waiting, free if self.device.type == "cuda" else 0)):
            first = first or ids
            # What they have in common is read once, but written to each row.
            tokens += len(ids) - (common_prefix([first, ids]) if n else 0)
            if n and tokens > PREFILL_TOKENS:
                return n
        least = max(1, self.n_rows // (4 if self.device.type == "cuda" else 8))
        return min(free, len(self.waiting)) if len(self.waiting) <= free or free >= least else 0

    def shrink(self) -> None:
        """Go on with half as many rows, where memory has run out; what was being written is begun again."""
        self.submit([(row.key, row.prompt) for row in self.rows], first=True)
        self.rows, self.graph, self.n_rows = [], None, self.n_rows // 2
        for layer in self.cache.layers:
            layer.keys = layer.keys[: self.n_rows].clone()
            layer.values = layer.values[: self.n_rows].clone()
        self.inputs = self.inputs[:, : self.n_rows].clone()
        torch.cuda.empty_cache()

    def _decode(self) -> list[int]:
        """Return the next token of each row in use."""
        pairs = [(row.tokens[-1], row.length) for row in self.rows]
        idle = [(0, 0)] * (self.n_rows - len(pairs) if self.device.type == "cuda" else 0)  # where all rows run
        inputs = torch.tensor(pairs + idle).T
        if self.device.type == "cpu":
            return decode(self.model, *inputs, self.cache, max(row.length for row in self.rows) + 1).tolist()
        self.inputs.copy_(inputs)
        step = partial(decode, self.model, *self.inputs, self.cache, self.cache.slots)
        if self.model.asks_host:
            return step()[: len(pairs)].tolist()
        if self.graph is None:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):  # what is compiled must be so before the capture
                step(), step()
            side.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.written = step()
        self.graph.replay()
        return self.written[: len(pairs)].tolist()

    def _prefill(self, prompts: list[tuple[object, list[int]]]) -> None:
        """Read prompts into the rows after those in use, and write the first token of each."""
        first = len(self.rows)
        self.rows += [Row(key, ids, []) for key, ids in prompts]
        needed = max(len(ids) for _, ids in prompts) + self.max_new_tokens
        if needed > self.cache.slots:  # slots are made as they are needed
            self.cache.grow(needed if self.device.type == "cpu" else -(-needed // 512) * 512)
            self.graph = None
        trees, prompt_of = grow_trees([ids for _, ids in prompts])
        size, pad = 2048, 1
        if self.device.type == "cuda":  # few lengths, since kernels are compiled for each
            size = pad = rounded_up(min(PREFILL_TOKENS, sum(tree.size for tree in trees)))
        for pack in pack_trees(trees, size, pad, last_only=True):
            rows, tokens = [], []
            for leaf, last in pack.leaves.items():
                path = (pack.ends[: last + 1] > last).nonzero()[:, 0]
                rows.append(torch.full_like(path, first + prompt_of[leaf]))
                tokens.append(path)
            rows, tokens = torch.cat(rows), torch.cat(tokens)
            here = pack.to(self.device)
            if pad > 1:  # likewise; to write a token again does no harm
                more = -len(rows) % pad
                rows, tokens = (torch.cat((t, t[-1:].expand(more))) for t in (rows, tokens))
            where = [t.to(self.device) for t in (rows, pack.positions[tokens], tokens)]
            writers = [PackWriter(layer, *where) for layer in self.cache.layers]
            select = places(list(pack.leaves.values()), self.device)
            logits = self.model(here.ids[None], here.positions[None], here.mask(), writers, select)[: len(pack.leaves)]
            for leaf, token in zip(pack.leaves, logits.argmax(-1).tolist(), strict=True):
                self.rows[first + prompt_of[leaf]].tokens.append(token)

    def ends(self, row: Row) -> bool:
        """Return whether the row is done."""
        return row.tokens[-1] in self.eos_ids or len(row.tokens) == self.max_new_tokens

    def _take_done(self) -> list[tuple[object, list[int]]]:
        done = []
        for i in reversed(range(len(self.rows))):
            row = self.rows[i]
            if self.ends(row):
                done.append((row.key, row.tokens[: len(row.tokens) - (row.tokens[-1] in self.eos_ids)]))
                last = self.rows.pop()
                if last is not row:  # the last row moves into the gap, so that the rows in use are the first ones
                    self.rows[i] = last
                    self.cache.move(len(self.rows), i, last.length)
        return done


def rounded_up(n: int) -> int:
    """Return the least of 512, 768, 1024, 1536, 2048, ... that is not below n."""
    power = max(512, 1 << (n - 1).bit_length())
    return power * 3 // 4 if power > 512 and n <= power * 3 // 4 else power


def decode(model: Llama, tokens: Tensor, positions: Tensor, cache: KVCache, visible: int) -> Tensor:
    """Read one token a row, (B,), at positions (B,), seeing `visible` slots at most; return the next tokens (B,)."""
    if tokens.is_cuda:
        mask = length_mask(positions, visible)
    else:
        mask = torch.arange(visible) <= positions[:, None, None, None]  # (B, 1, 1, S)
    return model(tokens[:, None], positions[:, None], mask, cache.layers)[:, -1].argmax(-1)


def length_mask(positions: Tensor, slots: int) -> BlockMask:
    """Return the mask by which the query of row b sees the slots up to positions[b]: whole blocks, then a part of one.

    Blocks that a row has not reached are not read, so that unequal rows cost what each takes.
    """
    whole = (positions // BLOCK).int()[:, None, None]  # (B, 1, 1)
    blocks = torch.arange(-(-slots // BLOCK), dtype=torch.int32, device=positions.device)
    return BlockMask.from_kv_blocks(
        torch.ones_like(whole),
        (whole[..., None] + blocks) % len(blocks),  # the block where the row ends stands first
        whole,
        blocks.expand(len(positions), 1, 1, -1).contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda row, _head, _query, slot: slot <= positions[row],
        seq_lengths=(1, slots),
    )


def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, eos_ids: Sequence[int], batch_size: int = 16
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and without its end token, max_new_tokens at most."""
    generator, outputs = Generator(model, batch_size, max_new_tokens, eos_ids), {}
    generator.submit(sorted(enumerate(prompts), key=lambda pair: -len(pair[1])))
    while len(outputs) < len(prompts):
        outputs |= generator.step()
    return [outputs[i] for i in range(len(prompts))]


# ---- Files


def read_json_file(path: Path) -> dict:
    """Return the JSON object in a file of a model folder."""
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no JSON object here ({error}); --model takes a checkpoint's folder") from None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder; CheckpointError for missing shards and unsafe names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        names = ["model.safetensors"]
    else:
        weight_map = read_json_file(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: field 'weight_map' is missing")
        names = sorted(set(map(str, weight_map.values())))
    if unsafe := [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]:
        raise CheckpointError(f"{index}: {unsafe[0]!r} is not the plain name of a safetensors file")
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise CheckpointError(f"{folder}: missing {', '.join(missing)} (weights are read from safetensors only)")
    return [folder / n for n in names]


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, int8: str | None = None, threshold: float = 6.0, build=None
) -> Llama:
    """Return the model of a folder on device, in dtype and eval mode.

    The files are mapped into memory: on a CPU, and where dtype is the files' own, the weights are the mapping itself.
    int8: a way to have the layers' matrices in 8 bit (models/int8.py). build: makes another model from the folder.
    CheckpointError names files, tensors and shapes that are off.
    """
    with torch.device("meta"):
        model = build(folder) if build else Llama(load_config(folder))
    tied = model.config.tie_word_embeddings
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied weights once, as embed_tokens
    if int8 == "weights":
        replace_linears(model, Int8Linear)
    scales = {name for name, _ in model.named_parameters() if name.endswith(".scale")}
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu" if int8 == "bitsandbytes" else str(device)) as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith(model.leftovers) or (tied and name == "lm_head.weight"):
                        continue
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != wanted.get(name):
                        expected = f"expected shape {wanted[name]}" if name in wanted else "config.json has no place"
                        raise CheckpointError(f"{path}: tensor {name} has shape {shape}, {expected} for it")
                    if name in found or not (tensor := file.get_tensor(name)).is_floating_point():
                        raise CheckpointError(f"{path}: tensor {name} is there twice, or not of floating point")
                    found[name] = tensor.to(dtype)
                    if name.removesuffix("weight") + "scale" in scales:  # at once, since all in 16 bit may not fit
                        found[name], found[name.removesuffix("weight") + "scale"] = quantize(found[name])
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file, or cut short ({error}); fetch it again") from None
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{folder}: the safetensors files lack {len(missing)} tensors, the first is {missing[0]}")
    model.load_state_dict(found, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if int8 == "bitsandbytes":
        replace_linears(model, partial(bitsandbytes_linear, threshold=threshold))
        model.asks_host = threshold > 0
    return model.to(device).eval()

"""Llama in PyTorch: token ids in, logits out. It knows nothing of recommendation, adapters or processes.

Reads any checkpoint of the Llama architecture in Hugging Face layout (Llama 1, 2, 3.x, TinyLlama, SmolLM2, ...); module
and tensor names are the checkpoint's own, so nothing is renamed or permuted on the way in.

    config, layers      Config, Llama               the model, with one attention for two kinds of batch:
    packed attention    Tree, pack_trees, Pack      many texts that share beginnings in one row (training, scoring)
    cached attention    KVCache, generate           greedy generation
    files               load_model

Shapes: B rows, T tokens of a row, S cache slots of a row, H heads, K key-value heads, D head size, C hidden size,
V vocabulary. Positions count from 0 in tokens.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

WORTH_SHARING = 32  # tokens that prompts must have in common, or else they are read apart


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


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}  # the fields that each kind needs


def load_config(folder: Path) -> Config:
    """Return the configuration of a model folder; CheckpointError for an architecture or feature not built here."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    raw = read_json_file(path)
    for field, supported in (("model_type", "llama"), ("hidden_act", "silu"), ("quantization_config", None)):
        if raw.get(field, supported) != supported or (field == "model_type" and field not in raw):
            raise CheckpointError(f"{path}: {field} is {raw.get(field)!r}, only {supported!r} is supported")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # the new layout, then the old
    kind = rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROPE:
        raise CheckpointError(f"{path}: rope_type is {kind!r}, only {', '.join(_ROPE)} are supported")
    try:
        raw["rope_scaling"] = {"rope_type": kind} | {name: rope[name] for name in _ROPE[kind]} if _ROPE[kind] else None
        raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
        raw["num_key_value_heads"] = raw.get("num_key_value_heads") or raw["num_attention_heads"]
        raw["head_dim"] = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        eos = (read_json_file(generation) if generation.is_file() else {}).get("eos_token_id", raw.get("eos_token_id"))
        raw["eos_token_id"] = tuple(eos) if isinstance(eos, list) else None if eos is None else (eos,)
        required = {f.name: raw[f.name] for f in fields(Config) if f.default is MISSING}
        optional = {f.name: raw[f.name] for f in fields(Config) if raw.get(f.name) is not None}
        return Config(**required | optional)
    except KeyError as missing:
        raise CheckpointError(f"{path}: field {missing} is missing") from None


# ---- Layers, from leaf to root


def rotary_tables(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles at positions (B, T), each (B, 1, T, D)."""
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
    angles = (positions[:, None, :, None].float() * frequencies).repeat(1, 1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return x (B, H, T, D) turned by its position; the two halves of D are the two coordinates, as in the files."""
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat((-second, first), dim=-1) * rotary[1]


@cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention)  # when it is first needed, since this alone takes two seconds


def attend(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None") -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v (B, H, T, D) for q (B, H, T, D) and k, v (B, K, S, D).

    mask: a BlockMask (FlexAttention), a Pack's blocks of queries, a tensor with 0 where a query sees a key and -inf
    elsewhere, or None for causal.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped)
    if isinstance(mask, list):
        queries = q.split([len(seen) for _, seen in mask], dim=2)
        parts = (
            (x, k.index_select(2, keys), v.index_select(2, keys), seen)
            for x, (keys, seen) in zip(queries, mask, strict=True)
        )
        return torch.cat([F.scaled_dot_product_attention(*part, enable_gqa=grouped) for part in parts], dim=2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as what attention adds: 0 where True, -inf elsewhere. Once here, or once in each layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


class KVCache:
    """Keys and values of every layer for B rows, (B, K, S, D) each, written at the tokens' own positions."""

    def __init__(self, config: Config, batch: int, slots: int, device: torch.device, dtype: torch.dtype):
        shape = (2, batch, config.num_key_value_heads, slots, config.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def grow(self, slots: int) -> None:
        """Make room for `slots` slots a row, a layer at a time, since two whole caches may not fit."""
        for i, layer in enumerate(self.layers):
            self.layers[i] = F.pad(layer, (0, 0, 0, max(0, slots - layer.shape[3])))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (n, K, T, D) at positions (n, T) of the first n rows; return what mask (.., S) is about there."""
        n, visible = len(positions), mask.shape[-1]
        rows = torch.arange(n, device=positions.device)[:, None]
        for cached, new in zip(self.layers[layer], (k, v), strict=True):
            cached[rows, :, positions] = new.transpose(1, 2)
        keys, values = self.layers[layer][:, :n, :, :visible]
        return keys, values


@dataclass(frozen=True)
class PackWriter:
    """A cache for reading a pack's sequences into rows of a KVCache, while the tokens attend to one another."""

    cache: KVCache
    rows: Tensor  # (N,), as the next two: the row of the cache where a token goes, its slot there
    slots: Tensor
    tokens: Tensor  # and where in the pack it stands; a shared one goes to several rows

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Write k, v (1, K, T, D); return them."""
        for cached, new in zip(self.cache.layers[layer], (k, v), strict=True):
            cached[self.rows, :, self.slots] = new[0, :, self.tokens].transpose(0, 1)
        return k, v


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of a prefix of `length` tokens, kept from the first pack that begins with it for later ones."""

    length: int
    layers: list[tuple[Tensor, Tensor]]

    def update(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, mask) -> tuple[Tensor, Tensor]:
        """Keep what begins k, v (1, K, T, D) and return them, or return them behind what was kept."""
        if layer == len(self.layers):
            self.layers.append((k[:, :, : self.length], v[:, :, : self.length]))
            return k, v
        return tuple(torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))


Cache = KVCache | PackWriter | PrefixCache


class Attention(nn.Module):
    """Grouped-query self-attention over the batch's own tokens or over a cache."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=bias)

    def forward(self, x: Tensor, rotary, positions: Tensor, mask, cache: Cache | None) -> Tensor:  # noqa: D102
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotary), rotate(k, rotary)  # (B, H, T, D), (B, K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, positions, k, v, mask)  # (B, K, S, D)
        y = attend(q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


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

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, positions: Tensor, mask, cache: Cache | None) -> Tensor:  # noqa: D102
        x = x + self.self_attn(self.input_layernorm(x), rotary, positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm: what checkpoints call `model`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, positions: Tensor | None, mask, cache: Cache | None) -> Tensor:
        """Return hidden states (B, T, C) for ids (B, T)."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.embed_tokens(ids)
        if isinstance(mask, Tensor):
            mask = additive(mask, x.dtype)
        elif isinstance(mask, list):
            mask = [(keys, additive(seen, x.dtype)) for keys, seen in mask]
        rotary = rotary_tables(self.config, positions, x.dtype)
        for layer in self.layers:
            run = layer if cache is None else layer.forward  # what is compiled is for packs alone
            x = run(x, rotary, positions, mask, cache)
        return self.norm(x)


class Llama(nn.Module):
    """The causal language model. Without positions and mask, rows are plain texts: positions from 0, causal."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: "Tensor | BlockMask | None" = None,
        cache: Cache | None = None,
        select: tuple | None = None,
        vocabulary: Sequence[int] | None = None,
    ) -> Tensor:
        """Return logits for ids (B, T): (B, T, V), or (N, V) at the N places (rows, tokens) that select names.

        vocabulary: token ids, to compute only their columns of the logits.
        """
        x = self.model(ids, positions, mask, cache)
        x = x if select is None else x[select]
        return self.lm_head(x) if vocabulary is None else F.linear(x, self.lm_head.weight[list(vocabulary)])

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


# ---- Packing: texts that share a beginning, computed once. A tree is a prefix and its branches; a pack is one row with
# many trees, whose common first tokens (the trunk) stand in it once. Plain text is a tree of one branch.


@dataclass(frozen=True)
class Tree:
    """Token sequences prefix + branch, for each branch. Branches are not empty."""

    prefix: list[int]
    branches: list[list[int]]

    @property
    def size(self) -> int:
        """Tokens that it takes in a pack without a trunk."""
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Pack:
    """A row of T tokens, where each stands in the trees, and N next-token targets.

    Target i: at row rows[i] token next_ids[i] is due and counts weights[i] times. A row may have several, since the
    last token of a prefix predicts the first token of every branch; a token that n sequences share has weight n, so
    that the loss is that of the sequences apart.
    """

    ids: Tensor  # (T,), and so the next three
    positions: Tensor
    documents: Tensor  # 0 the trunk, then 1, 2, ... a tree each; -1 padding
    branches: Tensor  # 0 a prefix, then 1, 2, ...
    rows: Tensor  # (N,), and so the next two
    next_ids: Tensor
    weights: Tensor
    leaves: dict[tuple[int, int], int]  # (tree, branch) as given to pack_trees -> row of the branch's last token
    tokens: int  # T without padding
    known: int = 0  # first rows that all packs of one large tree have in common, its prefix; 0 in other packs

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tensors on device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})

    def mask(self, first: int = 0, block: int = 256) -> "BlockMask | list[tuple[Tensor, Tensor]]":
        """Return whom the queries from row `first` on see, by tree_rule: a BlockMask on CUDA; elsewhere a list, for
        each `block` queries, of the keys that any sees (S,), and which of them each sees (block, S).
        """
        rule, rows = tree_rule(self.documents, self.branches), torch.arange(len(self.ids))
        if self.ids.is_cuda:
            shifted = (lambda b, h, query, key: rule(b, h, query + first, key)) if first else rule
            return create_block_mask(shifted, None, None, len(rows) - first, len(rows), device=self.ids.device)
        blocks = []
        for queries in rows[first:].split(block):
            seen = rule(None, None, queries[:, None], rows[None, : queries[-1] + 1])
            keys = seen.any(0).nonzero()[:, 0]
            blocks.append((keys, seen[:, keys]))
        return blocks


def tree_rule(documents: Tensor, branches: Tensor) -> Callable:
    """Return the attention rule of a pack: (batch, head, query row, key row) -> whether the query sees the key."""

    def rule(_batch, _head, query, key):
        same_path = (branches[key] == 0) | (branches[key] == branches[query])
        return (key <= query) & ((documents[key] == 0) | ((documents[key] == documents[query]) & same_path))

    return rule


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that all sequences share."""
    # The least and the greatest sequence differ first where any two do.
    low, high = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def make_tree(sequences: list[list[int]]) -> Tree:
    """Return the tree of token sequences that begin alike; every branch keeps one token at least."""
    shared = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    return Tree(sequences[0][:shared], [ids[shared:] for ids in sequences])


def pack_trees(trees: list[Tree], max_tokens: int, pad_to: int = 1, last_only: bool = False) -> list[Pack]:
    """Return packs of up to max_tokens tokens that hold all trees, best fit first, padded to a multiple of pad_to.

    A tree larger than a pack is split between its branches, in packs of its own that begin alike; a single sequence
    larger than that makes a pack larger.
    Every token is a target except a sequence's first; with last_only just the last token of each branch.
    """
    trunk = common_prefix([tree.prefix for tree in trees]) if trees else 0
    pieces: list[tuple[int, int, list[int]]] = []  # (size without the trunk, tree, its branches)
    packs = []
    for t, tree in enumerate(trees):
        groups, start = [[]], len(tree.prefix) - trunk
        size = start
        for b, branch in enumerate(tree.branches):
            if groups[-1] and trunk + size + len(branch) > max_tokens:
                groups.append([])
                size = start
            groups[-1].append(b)
            size += len(branch)
        if len(groups) == 1:
            pieces.append((size, t, groups[0]))
        else:
            split = (_build_pack(trees, trunk, [(0, t, group)], pad_to, last_only) for group in groups)
            packs += [replace(pack, known=len(tree.prefix)) for pack in split]
    bins: list[tuple[int, list]] = []
    for piece in sorted(pieces, key=lambda p: -p[0]):
        room = [(max_tokens - used - piece[0], i) for i, (used, _) in enumerate(bins)]
        _, best = min((r for r in room if r[0] >= 0), default=(0, None))
        if best is None:
            bins.append((trunk + piece[0], [piece]))
        else:
            bins[best] = (bins[best][0] + piece[0], [*bins[best][1], piece])
    return packs + [_build_pack(trees, trunk, held, pad_to, last_only) for _, held in bins]


def _build_pack(trees: list[Tree], trunk: int, held: list[tuple], pad_to: int, last_only: bool) -> Pack:
    columns = ids, positions, _, _ = [], [], [], []  # of tokens; then documents and branches
    targets = rows, next_ids, weights = [], [], []

    def add(segment: list[int], document: int, branch: int, parent: int | None, weight: int) -> int | None:
        """Append a segment that continues row `parent`; return the row of its last token."""
        if not segment:
            return parent
        first, n = len(ids), len(segment)
        start = 0 if parent is None else positions[parent] + 1
        for column, values in zip(
            columns, (segment, range(start, start + n), [document] * n, [branch] * n), strict=True
        ):
            column.extend(values)
        predecessors = ([] if parent is None else [parent]) + list(range(first, first + n - 1))
        if last_only:
            predecessors = predecessors[-1:] if branch else []
        due = segment[len(segment) - len(predecessors) :]
        for column, values in zip(targets, (predecessors, due, [weight] * len(due)), strict=True):
            column.extend(values)
        return first + n - 1

    leaves = {}
    root = add(trees[held[0][1]].prefix[:trunk], 0, 0, None, sum(len(group) for _, _, group in held))
    for document, (_, t, group) in enumerate(held, 1):
        stem = add(trees[t].prefix[trunk:], document, 0, root, len(group))
        for branch, b in enumerate(group, 1):
            leaves[t, b] = add(trees[t].branches[b], document, branch, stem, 1)
    tokens = len(ids)
    for column, value in zip(columns, (0, 0, -1, 0), strict=True):
        column.extend([value] * (-tokens % pad_to))
    made = (torch.tensor(column, dtype=torch.long) for column in (*columns, rows, next_ids))
    return Pack(*made, torch.tensor(weights, dtype=torch.float32), leaves, tokens)


@torch.no_grad()
def score_packs(model: Llama, packs: Iterable[Pack], vocabulary: Sequence[int], progress=lambda pack: None) -> dict:
    """Return {(tree, branch): fp32 logits of vocabulary after its last token}; progress gets each pack when done."""
    device, scores, running = next(model.parameters()).device, {}, deque()
    large, prefix = None, None  # the last tree that was split, and the keys and values of its prefix

    def collect() -> None:
        pack, logits = running.popleft()
        scores.update(zip(pack.leaves, logits.tolist(), strict=True))
        progress(pack)

    for pack in packs:
        here, first = pack.to(device), 0
        if pack.known and large == next(iter(pack.leaves))[0]:
            first = pack.known
        elif pack.known:
            large, prefix = next(iter(pack.leaves))[0], PrefixCache(pack.known, [])
        rows = torch.tensor(list(pack.leaves.values())) - first
        inputs = (here.ids[None, first:], here.positions[None, first:], here.mask(first))
        select = (torch.zeros_like(rows).to(device), rows.to(device))
        logits = model(*inputs, prefix if pack.known else None, select=select, vocabulary=vocabulary)
        running.append((pack, logits.float()))
        if len(running) > 1:  # a result is fetched when the GPU has the next pack to work on
            collect()
    while running:
        collect()
    return scores


def compile_layers(model: Llama) -> None:
    """Compile the layers for packs of one length on a GPU: one compilation serves all of them."""
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
    """One text in the making: its name, its length in the cache, and the tokens that the model wrote."""

    key: object
    length: int
    tokens: list[int]


class Generator:
    """Greedy continuations, up to and without an end token, of prompts that may come at any time."""

    def __init__(self, model: Llama, rows: int, max_new_tokens: int, eos_ids: Sequence[int]):
        self.model, self.n_rows, self.max_new_tokens, self.eos_ids = model, rows, max_new_tokens, eos_ids
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        self.waiting: deque[tuple[object, list[int]]] = deque()
        self.rows: list[Row] = []  # in the first rows of the cache
        self.cache = KVCache(model.config, rows, 0, self.device, self.dtype)

    def submit(self, prompts: Iterable[tuple[object, list[int]]], first: bool = False) -> None:
        """Queue (key, token ids) pairs at the end, or with `first` before all others."""
        self.waiting.extendleft(reversed(list(prompts))) if first else self.waiting.extend(prompts)

    @torch.inference_mode()
    def step(self) -> list[tuple[object, list[int]]]:
        """Read waiting prompts into free rows, write a token in every row; return (key, tokens) of those done."""
        free = self.n_rows - len(self.rows)
        if self.waiting and (free >= max(1, self.n_rows // 8) or len(self.waiting) <= free):
            self._prefill([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
        elif self.rows:
            tokens = torch.tensor([row.tokens[-1] for row in self.rows], device=self.device)
            positions = torch.tensor([row.length for row in self.rows], device=self.device)
            written = decode(self.model, tokens, positions, self.cache, max(row.length for row in self.rows) + 1)
            for row, token in zip(self.rows, written.tolist(), strict=True):
                row.tokens.append(token)
                row.length += 1
        return self._take_done()

    def _prefill(self, prompts: list[tuple[object, list[int]]]) -> None:
        """Read prompts into the rows after those in use, and write the first token of each."""
        needed = max(len(ids) for _, ids in prompts) + self.max_new_tokens
        if needed > self.cache.layers[0].shape[3]:  # slots are made as they are needed
            self.cache.grow(needed)
        trees, places = grow_trees([ids for _, ids in prompts])
        first = len(self.rows)
        self.rows += [Row(key, len(ids), []) for key, ids in prompts]
        size, pad = (8192, 256) if self.device.type == "cuda" else (2048, 1)
        for pack in pack_trees(trees, size, pad, last_only=True):
            rows, tokens = [], []
            for place, leaf in pack.leaves.items():
                same = (pack.branches == 0) | (pack.branches == pack.branches[leaf])
                path = (((pack.documents == pack.documents[leaf]) & same) | (pack.documents == 0)).nonzero()[:, 0]
                rows.append(torch.full_like(path, first + places[place]))
                tokens.append(path)
            rows, tokens = torch.cat(rows), torch.cat(tokens)
            here = pack.to(self.device)
            writer = PackWriter(self.cache, *(t.to(self.device) for t in (rows, pack.positions[tokens], tokens)))
            last = torch.tensor(list(pack.leaves.values()), device=self.device)
            select = (torch.zeros_like(last), last)
            written = self.model(here.ids[None], here.positions[None], here.mask(), writer, select).argmax(-1).tolist()
            for place, token in zip(pack.leaves, written, strict=True):
                self.rows[first + places[place]].tokens.append(token)

    def _take_done(self) -> list[tuple[object, list[int]]]:
        done = []
        for i in reversed(range(len(self.rows))):
            row = self.rows[i]
            ended = row.tokens[-1] in self.eos_ids
            if ended or len(row.tokens) == self.max_new_tokens:
                done.append((row.key, row.tokens[: len(row.tokens) - ended]))
                last = self.rows.pop()
                if last is not row:  # the last row moves into the gap, so that the rows in use are the first ones
                    self.rows[i] = last
                    self.cache.move(len(self.rows), i, last.length)
        return done


def decode(model: Llama, tokens: Tensor, positions: Tensor, cache: KVCache, visible: int) -> Tensor:
    """Read one token a row, (B,), at positions (B,), seeing `visible` slots at most; return the next tokens (B,)."""
    slots = torch.arange(visible, device=tokens.device)
    mask = slots <= positions[:, None, None, None]  # (B, 1, 1, S)
    return model(tokens[:, None], positions[:, None], mask, cache)[:, -1].argmax(-1)


def grow_trees(prompts: list[list[int]]) -> tuple[list[Tree], dict[tuple[int, int], int]]:
    """Return trees of prompts that begin alike, and which prompt each (tree, branch) is."""
    trees, places, group = [], {}, []
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    for i, following in zip(order, [*order[1:], None], strict=True):
        group.append(i)
        if following is None or common_prefix([prompts[i], prompts[following]]) < WORTH_SHARING:
            places |= {(len(trees), branch): j for branch, j in enumerate(group)}
            trees.append(make_tree([prompts[j] for j in group]))
            group = []
    return trees, places


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
        raise CheckpointError(f"{path}: no JSON object here ({error}); --model takes a Llama checkpoint") from None


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
    folder: Path, device: torch.device, dtype: torch.dtype, int8: bool = False, int8_threshold: float = 6.0
) -> Llama:
    """Return the model of a folder on device, in dtype and eval mode.

    The files are mapped into memory: on a CPU, and where dtype is the files' own, the weights are the mapping itself.
    int8: the layers' matrices as bitsandbytes LLM.int8. CheckpointError names files, tensors and shapes that are off.
    """
    with torch.device("meta"):
        model = Llama(load_config(folder))
    tied = model.config.tie_word_embeddings
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied weights once, as embed_tokens
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu" if int8 else str(device)) as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                        continue
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != wanted.get(name):
                        expected = f"expected shape {wanted[name]}" if name in wanted else "config.json has no place"
                        raise CheckpointError(f"{path}: tensor {name} has shape {shape}, {expected} for it")
                    found[name] = file.get_tensor(name).to(dtype)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file, or cut short ({error}); fetch it again") from None
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{folder}: the safetensors files lack {len(missing)} tensors, the first is {missing[0]}")
    model.load_state_dict(found, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if int8:
        quantize_int8(model, int8_threshold)
    return model.to(device).eval()


def quantize_int8(model: Llama, threshold: float) -> None:
    """Replace the layers' linear modules by bitsandbytes' LLM.int8, which quantize as they move to their device."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt  # here, because it takes seconds and only --int8 needs it

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it warns of every bf16 input
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, old in list(parent.named_children()):
                options = {"bias": old.bias is not None, "has_fp16_weights": False, "threshold": threshold}
                new = Linear8bitLt(old.in_features, old.out_features, **options)
                new.weight = Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
                new.bias = old.bias
                setattr(parent, name, new)

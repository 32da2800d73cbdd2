"""Packs: many texts that share beginnings in one row of tokens, each token computed once.

A tree is a prefix and its branches, such as a user's prompts, which differ in the candidate alone. A pack holds many
trees, whose common first tokens (the trunk) stand in it once. Plain text is a tree of one branch.

    row         0  1  2 |  3  4  5  6  7  8  9 | 10 11 12 13 14 15
    token       i  i  i |  p  p  p  a  a  b  b |  p  p  a  a  b  b     the trunk, a tree, another tree
    position    0  1  2 |  3  4  5  6  7  6  7 |  3  4  5  6  5  6     branches begin again where their prefix ends
    end        16 16 16 | 10 10 10  8  8 10 10 | 16 16 14 14 16 16     the first row that no longer continues it

What continues a token stands right after it, so a query sees a key if key <= query < end of the key (tree_rule). Every
mask is made from this rule or checked against it. T: tokens of a pack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries and keys of a block of FlexAttention's
SMALL_BLOCK = 64  # where no gradients are needed: closer to the rule, but not for every card's backward kernel
WORTH_SHARING = 32  # tokens that prompts must have in common, or else they are read apart


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
class QueryBlocks:
    """A mask for CPUs: blocks of queries, the keys that any query of a block sees, and which of them each sees."""

    keys: Tensor  # (sum of sizes,), the rows of all blocks' keys, one block after the other
    seen: list[Tensor]  # a block's (queries, keys)

    @property
    def sizes(self) -> list[int]:
        """How many keys each block has."""
        return [block.shape[1] for block in self.seen]


@dataclass(frozen=True)
class Pack:
    """A row of T tokens, where each stands in the trees, and N next-token targets.

    Target i: at row rows[i] token next_ids[i] is due and counts weights[i] times. A row may have several, since the
    last token of a prefix predicts the first token of every branch; a token that n sequences share has weight n, so
    that the loss is that of the sequences apart.
    """

    ids: Tensor  # (T,), and so the next two
    positions: Tensor
    ends: Tensor  # the first row that no longer continues the token; int32, as the kernels' own row numbers are
    rows: Tensor  # (N,), and so the next two
    next_ids: Tensor
    weights: Tensor
    leaves: dict[tuple[int, int], int]  # (tree, branch) as given to pack_trees -> row of the branch's last token
    tokens: int  # T without padding
    known: int = 0  # first rows that all packs of one large tree have in common, its prefix; 0 in other packs

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tensors on device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: on_device(tensor, device) for name, tensor in tensors.items()})

    def mask(self, first: int = 0, block: int = 256) -> BlockMask | QueryBlocks:
        """Return whom the queries from row `first` on see, by tree_rule: on CUDA a BlockMask, elsewhere QueryBlocks.

        A mask that is made under no_grad serves only what needs no gradients.
        """
        if self.ids.is_cuda:
            return block_mask(self.ends, first)
        rule, rows = tree_rule(self.ends), torch.arange(len(self.ids))
        keys, blocks = [], []
        for queries in rows[first:].split(block):
            seen = rule(None, None, queries[:, None], rows[None, : queries[-1] + 1])
            keys.append(seen.any(0).nonzero()[:, 0])
            blocks.append(seen[:, keys[-1]])
        return QueryBlocks(torch.cat(keys), blocks)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return tensor on device, without a wait for what the device is at: from other memory the driver would wait."""
    return (tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor).to(
        device, non_blocking=True
    )


def tree_rule(ends: Tensor) -> Callable:
    """Return the attention rule of a pack: (batch, head, query row, key row) -> whether the query sees the key.

    A kernel asks it of every query and key in a block that is not seen as a whole. In packs of short texts those are
    most, so that what the rule reads and compares counts.
    """
    return lambda _batch, _head, query, key: (key <= query) & (query < ends[key])


def block_mask(ends: Tensor, first: int = 0) -> BlockMask:
    """Return tree_rule, for the queries from row `first` on, as which blocks of keys each block of queries looks at.

    A block's greatest end lies beyond the first query, or no query sees any of its keys; its least end lies beyond the
    last query, or not all see all. So a few comparisons make the mask, where asking the rule of each query and key
    takes a tenth of scoring's time.
    """
    size = BLOCK if torch.is_grad_enabled() else SMALL_BLOCK
    rows = torch.arange(len(ends), device=ends.device)
    start, keys = rows[first::size, None], rows[::size]  # of the blocks of queries, of keys
    last = (start + size - 1).clamp(max=len(ends) - 1)
    least, greatest = F.pad(ends, (0, -len(ends) % size)).view(-1, size).aminmax(dim=1)
    some = (keys <= last) & (greatest > start)
    whole = (keys + size - 1 <= start) & (least > last)
    columns = []
    for blocks in (some & ~whole, whole):
        columns += [blocks.sum(1, dtype=torch.int32), blocks.int().argsort(dim=1, descending=True, stable=True).int()]
    rule = tree_rule(ends)
    return BlockMask.from_kv_blocks(
        *(column[None, None] for column in columns),
        BLOCK_SIZE=size,
        mask_mod=(lambda b, h, query, key: rule(b, h, query + first, key)) if first else rule,
        seq_lengths=(len(ends) - first, len(ends)),
    )


def kernel_tiles(mask: BlockMask, values: Tensor) -> dict | None:
    """Return the kernel's tiles of a mask of small blocks over values (B, K, S, D); None for those that it chooses.

    It holds two tiles of keys and two of values, which with at most 16 KiB each fit the shared memory of any card.
    """
    if mask.BLOCK_SIZE != (SMALL_BLOCK, SMALL_BLOCK):
        return None
    row = values.element_size() * values.shape[-1]  # bytes; the kernel widens heads to a power of two
    keys = SMALL_BLOCK if row <= 256 else 32 if row <= 512 else 16
    return {"BLOCK_M": SMALL_BLOCK, "BLOCK_N": keys, "num_stages": 2, "num_warps": 4}


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
    """Return packs of up to max_tokens tokens that hold all trees, one as full as can be after the other, padded to a
    multiple of pad_to.

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
    for chosen in fill_bins([size for size, *_ in pieces], max_tokens - trunk):
        packs.append(_build_pack(trees, trunk, [pieces[i] for i in chosen], pad_to, last_only))
    return packs


def fill_bins(sizes: list[int], room: int) -> list[list[int]]:
    """Return all indices of sizes in bins, each filled as near to room as the sizes left allow; what exceeds room is
    in a bin of its own.
    """
    left, bins = sorted(range(len(sizes)), key=lambda i: -sizes[i]), []
    while left:
        sums = [1]  # bit s of sums[i]: some of the first i sizes sum to s
        for i in left:
            sums.append(sums[-1] | (sums[-1] << sizes[i]) & ((2 << max(room, 0)) - 1))
        total, chosen = sums[-1].bit_length() - 1, []
        for before, i in zip(reversed(sums[:-1]), reversed(left), strict=True):
            if not before >> total & 1:
                chosen.append(i)
                total -= sizes[i]
        bins.append(chosen or left[:1])
        left = [i for i in left if i not in set(bins[-1])]
    return bins


def pack_length(trees: list[Tree], max_tokens: int) -> int:
    """Return the length up to max_tokens at which the fewest packs hold all trees, with little room to spare.

    Lengths are multiples of 256 (128 for short ones), since kernels are compiled for each that occurs.
    """
    trunk = common_prefix([tree.prefix for tree in trees])
    sizes = [tree.size - trunk for tree in trees]
    n = -(-sum(sizes) // max(1, max_tokens - trunk))
    least = trunk + -(-sum(sizes) // n)
    multiple = 2 * BLOCK if least > 4096 else BLOCK
    for length in range(-(-least // multiple) * multiple, max_tokens, multiple):
        if max(sizes) <= length - trunk and len(fill_bins(sizes, length - trunk)) == n:
            return length
    return max_tokens


def _build_pack(trees: list[Tree], trunk: int, held: list[tuple], pad_to: int, last_only: bool) -> Pack:
    columns = ids, positions, _ = [], [], []  # of tokens; then ends
    targets = [], [], []

    def add(segment: list[int], parent: int | None, weight: int, below: int) -> int | None:
        """Append a segment that continues row `parent` and that the next `below` tokens continue; return the row of its
        last token.
        """
        if not segment:
            return parent
        first, n = len(ids), len(segment)
        start = 0 if parent is None else positions[parent] + 1
        for column, values in zip(columns, (segment, range(start, start + n), [first + n + below] * n), strict=True):
            column.extend(values)
        predecessors = ([] if parent is None else [parent]) + list(range(first, first + n - 1))
        if last_only:
            predecessors = [] if below else predecessors[-1:]
        due = segment[len(segment) - len(predecessors) :]
        for column, values in zip(targets, (predecessors, due, [weight] * len(due)), strict=True):
            column.extend(values)
        return first + n - 1

    leaves = {}
    below = [sum(len(trees[t].branches[b]) for b in group) for _, t, group in held]
    tokens = trunk + sum(below) + sum(len(trees[t].prefix) - trunk for _, t, _ in held)
    length = -(-tokens // pad_to) * pad_to
    root = add(trees[held[0][1]].prefix[:trunk], None, sum(len(group) for _, _, group in held), length - trunk)
    for (_, t, group), n in zip(held, below, strict=True):
        stem = add(trees[t].prefix[trunk:], root, len(group), n)
        for b in group:
            leaves[t, b] = add(trees[t].branches[b], stem, 1, 0)
    for column, value in zip(columns, (0, 0, length), strict=True):
        column.extend([value] * (length - tokens))
    types = (torch.long, torch.long, torch.int, torch.long, torch.long, torch.float32)
    made = (torch.tensor(column, dtype=dtype) for column, dtype in zip((*columns, *targets), types, strict=True))
    return Pack(*made, leaves, tokens)


def steady_length(trees: list[Tree], max_tokens: int) -> int:
    """Return the length up to max_tokens at which packs of trees like these, which keep coming, are fullest."""
    trunk = common_prefix([tree.prefix for tree in trees])
    sizes = [tree.size - trunk for tree in trees]

    def room_left(length: int) -> float:
        bins = fill_bins(sizes, length - trunk)
        used = [sum(sizes[i] for i in held) + trunk for held in bins]
        used.remove(min(used))  # which those that come would fill
        return 1 - sum(used) / (length * max(1, len(used)))

    lengths = [n for n in range(max_tokens, max_tokens // 2, -2 * BLOCK) if n >= max(sizes) + trunk]
    return min(lengths or [max_tokens], key=room_left)


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

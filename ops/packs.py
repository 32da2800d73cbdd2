"""Packs: many texts that share prefixes in one row of tokens, so that each token is computed once.

A tree is a prefix and its branches, such as a user's prompts, which differ only in the candidate; a
branch can have branches of its own. A pack holds many trees; the tokens that begin all of them, the
trunk, appear once. Plain text is a tree with one branch.

    row         0  1  2 |  3  4  5  6  7  8  9 | 10 11 12 13 14 15
    token       i  i  i |  p  p  p  a  a  b  b |  p  p  a  a  b  b   the trunk and two trees
    position    0  1  2 |  3  4  5  6  7  6  7 |  3  4  5  6  5  6   branches restart after p
    end        16 16 16 | 10 10 10  8  8 10 10 | 16 16 14 14 16 16   first row not continuing it

The ends are all that the attention mask needs (ops/masks.py). T: tokens of a pack.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ops.masks import BLOCK, QueryBlocks, tree_mask
from ops.transfer import on_device

WORTH_SHARING = 32  # prompts with a shorter prefix in common are read separately


# ---- Trees


@dataclass(frozen=True)
class Tree:
    """The token sequences from the prefix to each leaf: each branch that no other continues.

    The branches are in depth-first order, and none is empty.
    """

    prefix: list[int]
    branches: list[list[int]]
    parents: list[int] | None = None  # the branch that each continues, ROOT or an earlier one

    @property
    def size(self) -> int:
        """The tokens that it takes in a pack without a trunk."""
        return len(self.prefix) + sum(map(len, self.branches))

    @property
    def above(self) -> list[int]:
        """The parent of each branch; in a tree without any, all continue the prefix."""
        return [ROOT] * len(self.branches) if self.parents is None else self.parents

    @property
    def leaves(self) -> list[int]:
        """The branches with which a sequence ends."""
        if self.parents is None:
            return [*range(len(self.branches))]
        inner = set(self.parents)
        return [b for b in range(len(self.branches)) if b not in inner]

    def path(self, branch: int) -> list[int]:
        """Return the branches from the prefix to this one, which comes last."""
        path = [branch]
        while self.parents and self.parents[path[-1]] != ROOT:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def sequences(self) -> list[list[int]]:
        """Return the tokens of each sequence, in the order of the leaves."""
        paths = (self.path(leaf) for leaf in self.leaves)
        return [sum((self.branches[b] for b in path), self.prefix) for path in paths]


ROOT = -1  # the parent of a branch that continues the prefix


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the number of leading tokens that all sequences share."""
    # Wherever any two sequences differ first, the least and the greatest do.
    low, high = min(sequences), max(sequences)
    pairs = enumerate(zip(low, high, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(low), len(high)))


def make_tree(sequences: list[list[int]]) -> Tree:
    """Return the tree of token sequences that share a prefix; each branch keeps a token or more."""
    shared = min(common_prefix(sequences), min(map(len, sequences)) - 1)
    return Tree(sequences[0][:shared], [ids[shared:] for ids in sequences])


def make_deep_tree(sequences: list[list[int]]) -> Tree:
    """Return the tree of token sequences in which what any of them share is there once.

    The leaves are in the order of the sorted sequences. A sequence that others continue keeps its
    last token to itself, since it ends with a leaf of its own.
    """
    ordered = sorted(sequences)

    def shared(first: int, end: int) -> int:
        group = ordered[first:end]
        return min(common_prefix(group), min(map(len, group)) - 1)

    def groups(first: int, end: int, start: int, parent: int) -> list[tuple[int, int, int, int]]:
        """Return what continues a branch: the sequences from first to end by their next token."""
        bounds = [i for i in range(first + 1, end) if ordered[i][start] != ordered[i - 1][start]]
        return [(a, b, start, parent) for a, b in pairwise([first, *bounds, end])]

    prefix = shared(0, len(ordered))
    branches, parents = [], []
    waiting = groups(0, len(ordered), prefix, ROOT)[::-1]  # a stack, so depth first
    while waiting:
        first, end, start, parent = waiting.pop()
        until = shared(first, end) if end - first > 1 else len(ordered[first])
        if until == start:  # the first one ends here, and the others go on
            waiting.append((first + 1, end, start, parent))
            until, end = start + 1, first + 1
        branches.append(ordered[first][start:until])
        parents.append(parent)
        if end - first > 1:
            waiting += groups(first, end, until, len(branches) - 1)[::-1]
    return Tree(ordered[0][:prefix], branches, parents)


def group_prompts(prompts: list[list[int]]) -> tuple[list[Tree], dict[tuple[int, int], int]]:
    """Return trees of prompts that share a prefix, and the prompt of each (tree, branch)."""
    trees, prompt_of, group = [], {}, []
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    for i, following in zip(order, [*order[1:], None], strict=True):
        group.append(i)
        # In sorted order, prompts that share a prefix are neighbors.
        last = following is None
        if last or common_prefix([prompts[i], prompts[following]]) < WORTH_SHARING:
            prompt_of |= {(len(trees), branch): j for branch, j in enumerate(group)}
            trees.append(make_tree([prompts[j] for j in group]))
            group = []
    return trees, prompt_of


# ---- Packs


@dataclass(frozen=True)
class Pack:
    """A row of T tokens, their places in the trees, and N next-token targets.

    Target i: at row rows[i] the token next_ids[i] is due and counts weights[i] times. A row may
    have several targets, since the last token of a prefix predicts the first token of every branch.
    A token that n sequences share has weight n, so the loss is that of separate sequences.
    """

    ids: Tensor  # (T,), like the next two
    positions: Tensor
    ends: Tensor  # the first row that no longer continues the token; int32, as in the kernels
    rows: Tensor  # (N,), like the next two
    next_ids: Tensor
    weights: Tensor
    leaves: dict[tuple[int, int], int]  # (tree, branch) -> row of the branch's last token
    tokens: int  # T without padding
    shared_prefix: int = 0  # leading rows that this pack repeats from the one before: a split tree

    @classmethod
    def of(cls, *tensors: Tensor) -> "Pack":
        """Return a pack of these tensors that does not know its trees."""
        return cls(*tensors, leaves={}, tokens=len(tensors[0]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order that `of` takes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> "Pack":
        """Return the pack with its tensors on device."""
        return replace(self, **{name: on_device(t, device) for name, t in self.tensors().items()})

    def mask(self, first: int = 0) -> BlockMask | QueryBlocks:
        """Return the mask of the queries from row `first` on (ops/masks.py)."""
        return tree_mask(self.ends, first)


def padded_rows(rows: Iterable[int], device: torch.device) -> Tensor:
    """Return some rows of a pack, as a tensor on the host.

    For a GPU the last one is repeated up to a power of two, because the last layer is compiled anew
    for each number of rows; beside the pack they cost next to nothing.
    """
    rows = [*rows]
    wanted = max(BLOCK, 1 << (len(rows) - 1).bit_length()) if device.type == "cuda" else len(rows)
    return torch.tensor(rows + rows[-1:] * (wanted - len(rows)))


def padded_select(rows: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the index of padded_rows on device: (rows, tokens) of a batch of one pack."""
    chosen = on_device(padded_rows(rows, device), device)
    return torch.zeros_like(chosen), chosen


def pack_trees(
    trees: list[Tree], max_tokens: int, pad_to: int = 1, last_only: bool = False
) -> list[Pack]:
    """Return packs of up to max_tokens tokens that hold all trees, padded to multiples of pad_to.

    Each pack is filled as far as the trees left allow. A tree larger than a pack is split between
    its branches into packs of its own, which repeat the prefix; a single sequence larger than that
    makes a larger pack. Every token but a sequence's first is a target; with last_only, only the
    last token of each branch is.
    """
    trunk = common_prefix([tree.prefix for tree in trees]) if trees else 0
    whole: list[tuple[int, list[int]]] = []  # (tree, all its branches)
    packs = []
    for t, tree in enumerate(trees):
        groups = split_branches(tree, max_tokens)
        if len(groups) == 1:
            whole.append((t, groups[0]))
            continue
        for group in groups:
            pack = build_pack(trees, trunk, [(t, group)], pad_to, last_only)
            packs.append(replace(pack, shared_prefix=len(tree.prefix)))

    sizes = [trees[t].size - trunk for t, _ in whole]
    for chosen in fill_bins(sizes, max_tokens - trunk):
        packs.append(build_pack(trees, trunk, [whole[i] for i in chosen], pad_to, last_only))
    return packs


def split_branches(tree: Tree, max_tokens: int) -> list[list[int]]:
    """Return the tree's branches in groups, each within max_tokens together with the prefix.

    A group has all branches on the way to its leaves, so groups may have some in common.
    """
    if tree.size <= max_tokens:
        return [[*range(len(tree.branches))]]
    groups, size = [{}], len(tree.prefix)  # dictionaries without values: sets that keep the order

    def tokens(branches: list[int]) -> int:
        return sum(len(tree.branches[b]) for b in branches)

    for leaf in tree.leaves:
        path = tree.path(leaf)
        more = [b for b in path if b not in groups[-1]]
        if groups[-1] and size + tokens(more) > max_tokens:
            groups.append({})
            more, size = path, len(tree.prefix)
        groups[-1] |= dict.fromkeys(more)
        size += tokens(more)
    return [list(group) for group in groups]


class _Columns:
    """A pack's tokens while they are appended, segment by segment, and its columns at the end.

    The columns are made of all segments at once: token by token, Python would take longer than a
    GPU takes to compute them.
    """

    def __init__(self):
        self.ids: list[int] = []
        self.segments: list[tuple[int, ...]] = []  # what `append` knows of each
        self.depths = {ROOT: -1}  # the position of each segment's last token, by its row

    def append(self, segment: list[int], parent: int, continued_by: int, weight: int) -> int:
        """Append tokens that continue row `parent`, or ROOT; return the row of the last one.

        continued_by: how many of the following tokens continue the segment. weight: how many
        sequences share it.
        """
        if not segment:
            return parent
        first, n, start = len(self.ids), len(segment), self.depths[parent] + 1
        self.ids += segment
        self.segments.append((first, n, parent, start, first + n + continued_by, weight))
        self.depths[first + n - 1] = start + n - 1
        return first + n - 1

    def tensors(self, length: int, last_only: bool, pad_targets: bool) -> dict[str, Tensor]:
        """Return the columns by name, padded to length with tokens that only later ones see.

        pad_targets: to one number of targets for all packs of a length, so that they fit one CUDA
        graph; of the last tokens alone there are few, so that a multiple of BLOCK is enough.
        """
        first, sizes, parents, starts, ends, weights = np.array(self.segments).T
        rows, segment = np.arange(len(self.ids)), np.arange(len(first)).repeat(sizes)
        ids = np.fromiter(self.ids, np.int64, len(rows))

        # A token is due at the row before it: a segment's first one at the parent's row.
        due_at = rows - 1
        due_at[first] = parents
        due = due_at != ROOT
        if last_only:
            due &= rows == ends[segment] - 1
        n = targets = int(due.sum())
        if pad_targets:
            targets = -(-n // BLOCK) * BLOCK if last_only else length
        spare = np.arange(targets - n) % length  # for targets of no weight, each at its own row

        columns = {
            "ids": padded(ids, length),
            "positions": padded(rows + (starts - first)[segment], length),
            "ends": padded(ends[segment].astype(np.int32), length, length),
            "rows": np.concatenate((due_at[due], spare)),
            "next_ids": padded(ids[due], targets),
            "weights": padded(weights[segment][due].astype(np.float32), targets),
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def padded(column: np.ndarray, length: int, value: int = 0) -> np.ndarray:
    """Return the column with a value appended up to length."""
    return np.pad(column, (0, length - len(column)), constant_values=value)


@dataclass
class _Shape:
    """What is below the branches that a pack holds of a tree, by branch."""

    tokens: dict[int, int]  # without the branch's own
    leaves: dict[int, int]

    @classmethod
    def of(cls, tree: Tree, group: list[int]) -> "_Shape":
        """Return the shape of the group's branches, ROOT for all of them included."""
        above = tree.above
        inner = {above[b] for b in group}
        tokens = dict.fromkeys([ROOT, *group], 0)
        leaves = {b: int(b not in inner) for b in tokens}
        for b in reversed(group):  # what continues a branch comes after it
            tokens[above[b]] += tokens[b] + len(tree.branches[b])
            leaves[above[b]] += leaves[b]
        return cls(tokens, leaves)


def build_pack(
    trees: list[Tree], trunk: int, held: list[tuple[int, list[int]]], pad_to: int, last_only: bool
) -> Pack:
    """Return the pack of the held (tree, its branches): the trunk, then prefixes and branches."""
    columns, leaves = _Columns(), {}
    shapes = [_Shape.of(trees[t], group) for t, group in held]
    below = sum(shape.tokens[ROOT] for shape in shapes)
    tokens = trunk + sum(len(trees[t].prefix) - trunk for t, _ in held) + below
    length = -(-tokens // pad_to) * pad_to

    sequences = sum(shape.leaves[ROOT] for shape in shapes)
    beginning = trees[held[0][0]].prefix[:trunk]
    # All that follows continues the trunk, padding included.
    root = columns.append(beginning, ROOT, continued_by=length - trunk, weight=sequences)
    for (t, group), shape in zip(held, shapes, strict=True):
        tree, above = trees[t], trees[t].above
        stem = tree.prefix[trunk:]
        last = {ROOT: columns.append(stem, root, shape.tokens[ROOT], shape.leaves[ROOT])}
        for b in group:
            branch, parent = tree.branches[b], last[above[b]]
            last[b] = columns.append(branch, parent, shape.tokens[b], shape.leaves[b])
        leaves |= {(t, b): last[b] for b in group if not shape.tokens[b]}
    tensors = columns.tensors(length, last_only, pad_targets=pad_to > 1)
    return Pack(**tensors, leaves=leaves, tokens=tokens)


# ---- Filling packs


def rounded_up(n: int) -> int:
    """Return the least of 512, 768, 1024, 1536, 2048, ... that is not below n."""
    power = max(512, 1 << (n - 1).bit_length())
    between = power * 3 // 4
    return between if power > 512 and n <= between else power


def fill_bins(sizes: list[int], room: int) -> list[list[int]]:
    """Return all indices of sizes in bins, each as near to room as the sizes left allow.

    Greedy bin packing: each bin takes the best subset of what is left. A size above room gets a
    bin of its own.
    """
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    bins = []
    while left:
        chosen = best_subset([sizes[i] for i in left], room) or [0]
        bins.append([left[i] for i in chosen])
        taken = set(chosen)
        left = [i for place, i in enumerate(left) if place not in taken]
    return bins


def best_subset(sizes: list[int], room: int) -> list[int]:
    """Return the indices, last first, of the sizes whose sum comes nearest to room from below.

    The subset sum problem, by dynamic programming over a bitset.
    """
    # Bit s of reachable[i] says whether some of the first i sizes sum to s.
    within_room = (2 << max(room, 0)) - 1
    reachable = [1]
    for size in sizes:
        reachable.append(reachable[-1] | (reachable[-1] << size) & within_room)

    # From the greatest sum back: a size belongs to it if the sizes before cannot make it alone.
    total, chosen = reachable[-1].bit_length() - 1, []
    for i in reversed(range(len(sizes))):
        if not reachable[i] >> total & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen


def pack_length(trees: list[Tree], max_tokens: int, few: bool = False) -> int:
    """Return the length up to max_tokens at which the fewest packs hold all trees with little room.

    Kernels are compiled for each length, so there are only some: multiples of 256 (of 128 for short
    packs), or few: where that takes more time than the room that they leave.
    """
    trunk = common_prefix([tree.prefix for tree in trees])
    sizes = [tree.size - trunk for tree in trees]
    n = -(-sum(sizes) // max(1, max_tokens - trunk))
    least = max(trunk + -(-sum(sizes) // n), trunk + max(sizes))
    lengths = [*range(BLOCK, 4096, BLOCK), *range(4096, max_tokens, 2 * BLOCK)]
    if few:
        lengths = [512, 768, 1024, 1536, 2048, 3072, *range(4096, max_tokens, 1024)]
    for length in lengths:
        if least <= length < max_tokens and len(fill_bins(sizes, length - trunk)) == n:
            return length
    return max_tokens


def stream_length(trees: list[Tree], max_tokens: int) -> int:
    """Return the length up to max_tokens that fills packs best if trees like these keep coming."""
    trunk = common_prefix([tree.prefix for tree in trees])
    sizes = [tree.size - trunk for tree in trees]

    def unused(length: int) -> float:
        bins = fill_bins(sizes, length - trunk)
        used = [sum(sizes[i] for i in held) + trunk for held in bins]
        used.remove(min(used))  # the trees to come would fill the emptiest pack
        return 1 - sum(used) / (length * max(1, len(used)))

    candidates = range(max_tokens, max_tokens // 2, -2 * BLOCK)
    lengths = [length for length in candidates if length >= max(sizes) + trunk]
    return min(lengths or [max_tokens], key=unused)

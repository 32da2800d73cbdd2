"""Attention masks of packs and of the cache, in the form that each device's kernel wants.

A pack's mask follows from one rule. What continues a token comes right after it, so a query sees a
key if `key <= query < end of the key`, where a key's end is the first row that no longer continues
it. On a GPU the rule becomes a BlockMask for FlexAttention, on a CPU QueryBlocks for SDPA.

T: tokens of a pack, B: rows of the cache, S: slots of a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # queries and keys per block, FlexAttention's default
SMALL_BLOCK = 64  # without gradients: fits the rule more tightly; some backward kernels refuse it

# With gradients, the first keys are repeated for every so many queries (split_spans).
FIRST_KEYS, QUERIES_A_COPY = 2 * BLOCK, 1024


def tree_rule(ends: Tensor) -> Callable:
    """Return a pack's attention rule: (batch, head, query, key) -> whether the query sees the key.

    ends: (T,), the first row that no longer continues each token. A kernel asks the rule for every
    pair in a block that is not visible as a whole. In packs of short texts most blocks are like
    that, so the rule reads and compares as little as possible.
    """
    return lambda _batch, _head, query, key: (key <= query) & (query < ends[key])


# ---- GPU


def block_mask(ends: Tensor, first: int = 0) -> BlockMask:
    """Return tree_rule for the queries from row `first` on, as a BlockMask.

    For each block of queries it lists the blocks of keys that are visible in part and as a whole.
    Comparing the blocks' least and greatest starts and ends is enough to decide that; evaluating
    the rule for every pair of tokens would take a tenth of the time of scoring. Under no_grad the
    mask has smaller blocks, which cannot be used where gradients are needed. With gradients, there
    can be more keys than tokens: `with_copies` makes them.
    """
    learn = torch.is_grad_enabled()
    size = BLOCK if learn else SMALL_BLOCK
    rows = torch.arange(len(ends), dtype=ends.dtype, device=ends.device)
    rule, spans = tree_rule(ends), (rows, ends)
    first_query = rows[first::size, None]
    last_query = (first_query + size - 1).clamp(max=len(rows) - 1)
    if learn and not first and len(rows) > QUERIES_A_COPY:
        spans = split_spans(ends)
        rule = span_rule(*spans)
    blocks = (F.pad(span, (0, -len(span) % size)).view(-1, size).aminmax(dim=1) for span in spans)
    (least_start, greatest_start), (least_end, greatest_end) = blocks

    # Some pair is visible unless all keys start later, or all have ended before the first query.
    some = (least_start <= last_query) & (greatest_end > first_query)
    # All pairs are, if all keys have started by the first query and none ends before the last.
    whole = (greatest_start <= first_query) & (least_end > last_query)

    columns = []
    for blocks in (some & ~whole, whole):
        columns.append(blocks.sum(1, dtype=torch.int32))
        columns.append(blocks.int().argsort(dim=1, descending=True, stable=True).int())
    return BlockMask.from_kv_blocks(
        *(column[None, None] for column in columns),  # one batch, one head
        BLOCK_SIZE=size,
        mask_mod=(lambda b, h, query, key: rule(b, h, query + first, key)) if first else rule,
        seq_lengths=(len(rows) - first, len(spans[0])),
    )


def split_spans(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return each key's first query and the first one that no longer sees it, with copies.

    A pack's first keys are the trunk's, which all queries see. The backward kernel visits the
    queries of a block of keys one after the other, and everything would wait for these blocks. So
    copies of the first keys follow the last one, each for its own QUERIES_A_COPY queries; gradients
    of a key and its copies add up.
    """
    rows = torch.arange(len(ends), dtype=ends.dtype, device=ends.device)
    starts = rows[QUERIES_A_COPY::QUERIES_A_COPY, None].expand(-1, FIRST_KEYS)
    first_ends = ends[:FIRST_KEYS]
    copies = first_ends.clamp(max=starts + QUERIES_A_COPY)
    originals = first_ends.clamp(max=QUERIES_A_COPY)
    return (
        torch.cat((rows, starts.flatten())),
        torch.cat((originals, ends[FIRST_KEYS:], copies.flatten())),
    )


def span_rule(starts: Tensor, ends: Tensor) -> Callable:
    """Return the attention rule by which a key is seen from its start up to its end."""
    return lambda _batch, _head, query, key: (starts[key] <= query) & (query < ends[key])


def with_copies(x: Tensor, mask: BlockMask) -> Tensor:
    """Return keys or values (B, K, T, D) followed by those copies of the first that a mask has."""
    copies = (x.shape[2] - 1) // QUERIES_A_COPY
    if not copies or mask.seq_lengths[1] - x.shape[2] != copies * FIRST_KEYS:
        return x
    return torch.cat((x, x[:, :, :FIRST_KEYS].repeat(1, 1, copies, 1)), dim=2)


def length_mask(positions: Tensor, slots: int) -> BlockMask:
    """Return the mask by which row b's only query sees the cache's slots 0 to positions[b] (B,).

    Blocks of slots that a row has not reached are not read, so rows of unequal length cost what
    each of them takes.
    """
    whole = (positions // BLOCK).int()[:, None, None]  # (B, 1, 1): blocks that are full
    blocks = torch.arange(-(-slots // BLOCK), dtype=torch.int32, device=positions.device)
    return BlockMask.from_kv_blocks(
        torch.ones_like(whole),  # one block is visible in part: the one where the row ends
        (whole[..., None] + blocks) % len(blocks),  # it has to be listed first
        whole,
        blocks.expand(len(positions), 1, 1, -1).contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda row, _head, _query, slot: slot <= positions[row],
        seq_lengths=(1, slots),
    )


def kernel_tiles(mask: BlockMask, values: Tensor) -> dict | None:
    """Return FlexAttention's tile sizes for a mask of small blocks over values (B, K, S, D).

    None leaves the choice to FlexAttention. The kernel holds two tiles of keys and two of values;
    at 16 KiB or less per tile they fit the shared memory of any card.
    """
    if mask.BLOCK_SIZE != (SMALL_BLOCK, SMALL_BLOCK):
        return None
    row = values.element_size() * values.shape[-1]  # bytes; heads are widened to a power of two
    keys = SMALL_BLOCK if row <= 256 else 32 if row <= 512 else 16
    return {"BLOCK_M": SMALL_BLOCK, "BLOCK_N": keys, "num_stages": 2, "num_warps": 4}


# ---- CPU


@dataclass(frozen=True)
class QueryBlocks:
    """Blocks of queries, the keys that any query of a block sees, and which query sees which."""

    keys: Tensor  # (sum of sizes,): the rows of every block's keys, one block after another
    seen: list[Tensor]  # for each block (queries, keys), boolean

    @property
    def sizes(self) -> list[int]:
        """The number of keys of each block."""
        return [block.shape[1] for block in self.seen]


def query_blocks(ends: Tensor, first: int = 0, size: int = 256) -> QueryBlocks:
    """Return tree_rule for the queries from row `first` on, in blocks of `size` queries."""
    rule, rows = tree_rule(ends), torch.arange(len(ends))
    keys, seen = [], []
    for queries in rows[first:].split(size):
        visible = rule(None, None, queries[:, None], rows[None, : queries[-1] + 1])
        keys.append(visible.any(0).nonzero()[:, 0])
        seen.append(visible[:, keys[-1]])
    return QueryBlocks(torch.cat(keys), seen)


def tree_mask(ends: Tensor, first: int = 0) -> BlockMask | QueryBlocks:
    """Return tree_rule for the queries from row `first` on, for the device that ends is on.

    A mask made under no_grad serves only what needs no gradients.
    """
    return (block_mask if ends.is_cuda else query_blocks)(ends, first)


# ---- What SDPA adds to the scores


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as what attention adds: 0 where True, -inf elsewhere."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -math.inf)


def as_additive(mask, dtype: torch.dtype):
    """Return a mask with its boolean parts additive, once for all layers."""
    if isinstance(mask, Tensor):
        return additive(mask, dtype)
    if isinstance(mask, QueryBlocks):
        return replace(mask, seen=[additive(seen, dtype) for seen in mask.seen])
    return mask

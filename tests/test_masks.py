"""ops/masks.py: each form of a mask against the rule spelled out."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import CPU, empty_cache, random_ids, random_trees
from torch.nn.attention.flex_attention import flex_attention

from llama import load_model
from ops.masks import (
    BLOCK,
    FIRST_KEYS,
    QUERIES_A_COPY,
    SMALL_BLOCK,
    block_mask,
    kernel_tiles,
    length_mask,
    query_blocks,
    tree_rule,
    with_copies,
)
from ops.packs import Tree, pack_trees
from summarize import decode

pytestmark = pytest.mark.usefixtures("_fresh_compiler")


def long_trees(n: int, branches: int, trunk: int, seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 640) for _ in range(rng.randrange(1, most))]

    begin = [rng.randrange(3, 640) for _ in range(trunk)]
    return [Tree(begin + ids(400), [ids(120) for _ in range(branches)]) for _ in range(n)]


def test_query_blocks_are_the_rule_spelled_out():
    trees = random_trees(4, 3)
    (pack,) = pack_trees(trees, 999, pad_to=64)
    n, trunk = len(pack.ids), 7
    mask, first = torch.zeros(n, n, dtype=torch.bool), 0
    blocks = query_blocks(pack.ends, size=24)
    for keys, seen in zip(blocks.keys.split(blocks.sizes), blocks.seen, strict=True):
        assert seen.any(0).all()  # no key that nobody sees
        mask[first : first + len(seen), keys] = seen
        first += len(seen)
    assert first == n

    expected = torch.zeros_like(mask)
    for (t, b), last in pack.leaves.items():
        stem, branches = len(trees[t].prefix) - trunk, [len(branch) for branch in trees[t].branches]
        begin = last + 1 - sum(branches[: b + 1]) - stem  # of the tree
        branch = range(last + 1 - branches[b], last + 1)
        path = [*range(trunk), *range(begin, begin + stem), *branch]
        for i, query in enumerate(path):
            expected[query, path[: i + 1]] = True
    assert (mask[: pack.tokens] == expected[: pack.tokens]).all()
    # Also where padding is, since a softmax over nothing is not a number.
    assert mask.diagonal().all()


CASES = [(1, 1, 0), (1, 21, 300), (4, 2, 0), (6, 5, 100), (9, 2, 700), (30, 1, 40), (3, 9, 128)]


@pytest.mark.parametrize(("n", "branches", "trunk"), CASES)
@pytest.mark.parametrize("first", [0, 70])
@pytest.mark.parametrize(("training", "size"), [(True, BLOCK), (False, SMALL_BLOCK)])
def test_the_block_mask_covers_the_rule_and_asks_it_where_it_must(
    n, branches, trunk, first, training, size
):
    (pack,) = pack_trees(long_trees(n, branches, trunk), 99999, pad_to=256)
    rows = torch.arange(len(pack.ids))
    with torch.set_grad_enabled(training):
        mask = block_mask(pack.ends, first)
    assert set(mask.BLOCK_SIZE) == {size}

    # The rule that it asks is the tree's, once the copies of keys are added to the keys.
    keys = torch.arange(mask.seq_lengths[1])
    seen = mask.mask_mod(None, None, rows[: len(rows) - first, None], keys[None])
    times, copies = seen[:, : len(rows)].int(), seen[:, len(rows) :].int()
    times[:, :FIRST_KEYS] += copies.view(len(seen), -1, FIRST_KEYS).sum(1)
    expected = tree_rule(pack.ends)(None, None, rows[first:, None], rows[None])
    assert torch.equal(times, expected.int())  # each pair once

    def blocks(dense):
        """Return a mask as (blocks of queries, blocks of keys, size, size)."""
        padded = F.pad(dense, (0, 0, 0, -len(dense) % size))
        return padded.view(-1, size, len(keys) // size, size).transpose(1, 2)

    tiles, real = blocks(seen), blocks(torch.ones_like(seen))
    asked, whole = torch.zeros(2, *tiles.shape[:2], dtype=torch.bool)
    counts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for found, number, order in ((asked, *counts[:2]), (whole, *counts[2:])):
        for i in range(len(found)):
            found[i, order[0, 0, i, : number[0, 0, i]].long()] = True

    some = tiles.flatten(2).any(2)
    assert not (asked & whole).any()
    assert (some <= (asked | whole)).all()  # nothing is hidden that the rule shows
    assert (asked | whole).sum() == some.sum()  # and nothing is looked at in vain
    # The rule is asked only where it must be.
    assert (whole == (tiles | ~real).flatten(2).all(2)).all()


@pytest.mark.parametrize("training", [True, False])
def test_flex_attention_with_the_block_mask_equals_the_dense_mask(training):
    (pack,) = pack_trees(long_trees(5, 3, 60), 99999, pad_to=256)
    rows = torch.arange(len(pack.ids))
    seen = tree_rule(pack.ends)(None, None, rows[:, None], rows[None])
    q, k, v = torch.randn(3, 1, 2, len(rows), 16, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(training):
        mask = block_mask(pack.ends)
        assert (mask.seq_lengths[1] > len(rows)) == training
        found = flex_attention(q, with_copies(k, mask), with_copies(v, mask), block_mask=mask)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1025, 1281, 2100])
def test_each_pair_is_seen_once_in_packs_of_any_length(n):
    (pack,) = pack_trees(long_trees(40, 3, 200), 99999)
    ends = pack.ends[:n].clamp(max=n)
    rows, mask = torch.arange(n), block_mask(ends)
    keys = torch.arange(mask.seq_lengths[1])
    seen = mask.mask_mod(None, None, rows[:, None], keys[None]).int()
    times = seen[:, :n]
    times[:, :FIRST_KEYS] += seen[:, n:].view(n, -1, FIRST_KEYS).sum(1)
    assert torch.equal(times, tree_rule(ends)(None, None, rows[:, None], rows[None]).int())


def test_keys_that_a_mask_has_no_copies_of_stay_as_they_are():
    mask = length_mask(torch.tensor([900]), 1024)
    for slots in (512, 1024):
        keys = torch.zeros(1, 1, slots, 4)
        assert with_copies(keys, mask) is keys


def test_no_block_of_the_trunk_is_visited_by_more_queries_than_a_copy_s():
    (pack,) = pack_trees(long_trees(40, 3, 200), 99999, pad_to=256)
    mask = block_mask(pack.ends)
    assert len(pack.ids) > 4 * QUERIES_A_COPY
    visits = torch.zeros(mask.seq_lengths[1] // BLOCK, dtype=torch.int32)
    for counts, order in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for n, blocks in zip(counts[0, 0], order[0, 0], strict=True):
            visits[blocks[:n].long()] += 1
    assert visits.max() == QUERIES_A_COPY // BLOCK


def test_the_copies_gradients_add_up():
    (pack,) = pack_trees(long_trees(12, 3, 150), 99999, pad_to=256)
    rows = torch.arange(len(pack.ids))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, len(rows), 16, generator=generator) for _ in range(3))
    mask, results = block_mask(pack.ends), []
    keys = torch.arange(mask.seq_lengths[1])
    for seen, copied in (
        (tree_rule(pack.ends)(None, None, rows[:, None], rows[None]), False),
        (mask.mask_mod(None, None, rows[:, None], keys[None]), True),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        others = [with_copies(x, mask) if copied else x for x in leaves[1:]]
        out = F.scaled_dot_product_attention(leaves[0], *others, attn_mask=seen)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "head", "keys"), [(torch.bfloat16, 128, 64), (torch.float32, 192, 16)]
)
def test_tiles_of_small_blocks_fit_any_card(dtype, head, keys):
    values = torch.empty(1, 2, 512, head, dtype=dtype)
    ends = torch.full((512,), 512)
    with torch.no_grad():
        found = kernel_tiles(block_mask(ends), values)
    assert (found["BLOCK_M"], found["BLOCK_N"]) == (64, keys)
    assert kernel_tiles(block_mask(ends), values) is None


def test_decoding_with_the_length_mask_equals_the_dense_mask(model_folder):
    tiny = load_model(model_folder, CPU, torch.float32)
    prompts = [random_ids(n, seed=n) for n in (3, 127, 128, 200)]
    caches = [empty_cache(tiny.config, 4, 384) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        for x, y in ((a.keys, b.keys), (a.values, b.values)):
            y.copy_(x.normal_(generator=generator))
    tokens = torch.tensor([int(p[-1]) for p in prompts])
    positions = torch.tensor([len(p) for p in prompts])
    mask = length_mask(positions, 384)
    with torch.no_grad():
        dense = decode(tiny, tokens, positions, caches[0], 201)
        blocks = tiny(tokens[:, None], positions[:, None], mask, caches[1].layers)[:, -1].argmax(-1)
    assert blocks.tolist() == dense.tolist()
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1]
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 0, 1, 1]

"""The block masks against the rule spelled out, and how full the packs are."""

import itertools
import random

import pytest
import torch
from test_llama import random_ids
from torch.nn.attention.flex_attention import flex_attention

from llama import load_model
from ops.cache import KVCache
from ops.masks import BLOCK, SMALL_BLOCK, block_mask, kernel_tiles, length_mask, tree_rule
from ops.packs import Tree, common_prefix, fill_bins, pack_length, pack_trees
from summarize import decode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _fresh_compiler():
    torch._dynamo.reset()  # or it takes other tests' shapes for changing ones; some such CPU kernels do not build


def long_trees(n: int, branches: int, trunk: int, seed: int = 0) -> list[Tree]:
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(3, 640) for _ in range(rng.randrange(1, most))]

    begin = [rng.randrange(3, 640) for _ in range(trunk)]
    return [Tree(begin + ids(400), [ids(120) for _ in range(branches)]) for _ in range(n)]


CASES = [(1, 1, 0), (1, 21, 300), (4, 2, 0), (6, 5, 100), (9, 2, 700), (30, 1, 40), (3, 9, 128)]


@pytest.mark.parametrize(("n", "branches", "trunk"), CASES)
@pytest.mark.parametrize("first", [0, 70])
@pytest.mark.parametrize(("training", "size"), [(True, BLOCK), (False, SMALL_BLOCK)])
def test_the_block_mask_covers_the_rule_and_asks_it_where_it_must(
    n, branches, trunk, first, training, size
):
    (pack,) = pack_trees(long_trees(n, branches, trunk), 99999, pad_to=256)
    rows = torch.arange(len(pack.ids))
    seen = tree_rule(pack.ends)(None, None, rows[first:, None], rows[None])
    with torch.set_grad_enabled(training):
        mask = block_mask(pack.ends, first)
    assert set(mask.BLOCK_SIZE) == {size}
    dense = torch.nn.functional.pad(seen, (0, 0, 0, -len(seen) % size))
    tiles = dense.view(-1, size, len(rows) // size, size).transpose(
        1, 2
    )  # (blocks of queries, of keys, size, size)
    real = torch.nn.functional.pad(torch.ones_like(seen), (0, 0, 0, -len(seen) % size))
    real = real.view(-1, size, len(rows) // size, size).transpose(1, 2)
    asked, whole = torch.zeros(2, *tiles.shape[:2], dtype=torch.bool)
    counts = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    for found, number, order in ((asked, *counts[:2]), (whole, *counts[2:])):
        for i in range(len(found)):
            found[i, order[0, 0, i, : number[0, 0, i]].long()] = True
    assert not (asked & whole).any()
    assert (
        tiles.flatten(2).any(2) <= (asked | whole)
    ).all()  # nothing is hidden that the rule shows
    assert (asked | whole).sum() == tiles.flatten(2).any(
        2
    ).sum()  # and nothing is looked at in vain
    assert (
        whole == (tiles | ~real).flatten(2).all(2)
    ).all()  # and the rule is asked only where it must be


@pytest.mark.parametrize("training", [True, False])
def test_flex_attention_with_the_block_mask_equals_the_dense_mask(training):
    (pack,) = pack_trees(long_trees(5, 3, 60), 99999, pad_to=256)
    rows = torch.arange(len(pack.ids))
    seen = tree_rule(pack.ends)(None, None, rows[:, None], rows[None])
    q, k, v = torch.randn(3, 1, 2, len(rows), 16, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(training):
        found = flex_attention(q, k, v, block_mask=block_mask(pack.ends))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "head", "keys"), [(torch.bfloat16, 128, 64), (torch.float32, 192, 16)]
)
def test_tiles_of_small_blocks_take_the_memory_that_cards_have(dtype, head, keys):
    values = torch.empty(1, 2, 512, head, dtype=dtype)
    ends = torch.full((512,), 512)
    with torch.no_grad():
        found = kernel_tiles(block_mask(ends), values)
    assert (found["BLOCK_M"], found["BLOCK_N"]) == (64, keys)
    assert kernel_tiles(block_mask(ends), values) is None


def test_decoding_with_the_block_mask_equals_the_dense_mask(model_folder):
    tiny = load_model(model_folder, CPU, torch.float32)
    prompts = [random_ids(n, seed=n) for n in (3, 127, 128, 200)]
    caches = [KVCache(tiny.config, 4, 384, CPU, torch.float32) for _ in range(2)]
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


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_as_full_as_any_choice_makes_them(seed):
    rng = random.Random(seed)
    sizes, room = [rng.randrange(1, 30) for _ in range(9)], rng.randrange(30, 70)
    bins = fill_bins(sizes, room)
    assert sorted(i for b in bins for i in b) == list(range(9))
    left = set(range(9))
    for b in bins:
        sums = (
            sum(sizes[i] for i in c)
            for n in range(1, len(left) + 1)
            for c in itertools.combinations(left, n)
        )
        assert sum(sizes[i] for i in b) == max(s for s in sums if s <= room)
        left -= set(b)


def test_what_exceeds_the_room_has_a_bin_of_its_own():
    assert sorted(map(sorted, fill_bins([5, 30, 4, 40], 10))) == [[0, 2], [1], [3]]
    assert fill_bins([5, 6], -3) == [[1], [0]]
    assert fill_bins([], 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_length_of_packs_leaves_little_room(seed):
    rng = random.Random(seed)
    trees = [Tree([3] * rng.randrange(300, 500), [[4] * 53, [5] * 53]) for _ in range(32)]
    length = pack_length(trees, 8192)
    packs = pack_trees(trees, length, length)
    trunk = common_prefix([tree.prefix for tree in trees])
    assert length % 128 == 0
    assert length <= 8192
    assert len(packs) == -(-sum(tree.size - trunk for tree in trees) // (8192 - trunk))
    assert sum(pack.tokens for pack in packs) > 0.95 * length * len(packs)


def test_the_length_of_packs_holds_the_largest_tree():
    trees = [Tree([3, i], [[4] * n]) for i, n in enumerate((3000, 100, 90))]
    assert pack_length(trees, 8192) == 3200
    assert pack_length(trees, 3100) == 3072
    assert pack_length(trees, 3000) == 3000

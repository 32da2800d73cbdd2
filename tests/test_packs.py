"""ops/packs.py: what a pack holds, and how full packs are."""

import itertools
import random

import pytest
from helpers import random_prompts, random_trees

from ops.packs import (
    Tree,
    build_pack,
    common_prefix,
    fill_bins,
    group_prompts,
    make_deep_tree,
    make_tree,
    pack_length,
    pack_trees,
)

# ---- Trees


def test_make_tree_finds_the_longest_common_prefix():
    assert make_tree([[1, 2, 3, 4], [1, 2, 5]]) == Tree([1, 2], [[3, 4], [5]])
    assert make_tree([[1, 2], [1, 2, 5]]) == Tree([1], [[2], [2, 5]])  # a branch keeps a token
    assert make_tree([[1, 2, 3]]) == Tree([1, 2], [[3]])
    assert make_tree([[1], [2]]) == Tree([], [[1], [2]])


def test_a_deep_tree_has_every_shared_beginning_once():
    tree = make_deep_tree([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [1, 7]])
    assert tree == Tree([1], [[2], [3], [4], [5], [6], [7]], [-1, 0, 1, 1, 0, -1])
    assert tree.leaves == [2, 3, 4, 5]
    assert [tree.path(leaf) for leaf in tree.leaves] == [[0, 1, 2], [0, 1, 3], [0, 4], [5]]
    # A sequence that others continue keeps its last token to itself; equal ones are there twice.
    tree = make_deep_tree([[1, 2], [1, 2, 3], [1, 2, 4], [1, 2]])
    assert tree == Tree([1], [[2], [2], [2], [3], [4]], [-1, -1, -1, 2, 2])
    assert make_deep_tree([[1, 2, 3]]) == Tree([1, 2], [[3]], [-1])
    assert make_deep_tree([[1], [2]]) == Tree([], [[1], [2]], [-1, -1])


@pytest.mark.parametrize("seed", range(20))
def test_a_deep_tree_is_its_sequences_with_as_few_tokens_as_there_are_beginnings(seed):
    rng = random.Random(seed)
    made = [
        [rng.randint(1, 3) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 30))
    ]
    tree = make_deep_tree(made)
    assert tree.sequences() == sorted(made)
    beginnings = {tuple(ids[:n]) for ids in made for n in range(1, len(ids))}
    assert tree.size == len(beginnings) + len(made)  # and a last token for each sequence
    whole, small = pack_trees([tree], 999), pack_trees([tree], 12)
    assert [pack.tokens for pack in whole] == [tree.size]
    for packs in (whole, small):
        found = {}
        for pack in packs:
            assert pack.tokens <= 12 or packs == whole
            for (_, b), row in pack.leaves.items():
                path = (pack.ends[: row + 1] > row).nonzero()[:, 0]
                found[b] = pack.ids[path].tolist()
                assert pack.positions[path].tolist() == [*range(len(path))]
        assert [found[b] for b in tree.leaves] == sorted(made)


def test_prompts_that_share_a_prefix_make_a_tree():
    parts = random_prompts(40, 45, 9, 21, 7, 33, 14, 18)
    prompts = [parts[i % 2] + parts[2 + i] for i in range(6)] + [parts[3], parts[0] + parts[2]]
    trees, prompt_of = group_prompts(prompts)
    assert sorted(prompt_of.values()) == list(range(8))
    assert sum(tree.size for tree in trees) < sum(map(len, prompts)) - 3 * 40
    for (t, b), prompt in prompt_of.items():
        assert trees[t].prefix + trees[t].branches[b] == prompts[prompt]


# ---- Packs


def test_packs_share_the_trunk_and_every_prefix():
    trees = random_trees(6, 3)
    (pack,) = pack_trees(trees, 9999)
    trunk = 7
    assert pack.tokens == trunk + sum(tree.size - trunk for tree in trees)
    assert (pack.ends == len(pack.ids)).nonzero()[:trunk, 0].tolist() == list(range(trunk))


def test_a_pack_is_laid_out_as_the_module_s_docstring_draws_it():
    trees = [Tree([1, 1, 1, 2, 2, 2], [[3, 3], [4, 4]]), Tree([1, 1, 1, 5, 5], [[6, 6], [7, 7]])]
    pack = build_pack(trees, 3, [(0, [0, 1]), (1, [0, 1])], pad_to=1, last_only=False)
    assert pack.ids.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 3, 4, 5, 6, 5, 6]
    ends = [16] * 3 + [10] * 3 + [8] * 2 + [10] * 2 + [16] * 2 + [14] * 2 + [16] * 2
    assert pack.ends.tolist() == ends
    assert pack.leaves == {(0, 0): 7, (0, 1): 9, (1, 0): 13, (1, 1): 15}


# ---- Filling packs


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_as_full_as_any_choice_makes_them(seed):
    rng = random.Random(seed)
    sizes, room = [rng.randrange(1, 30) for _ in range(9)], rng.randrange(30, 70)
    bins = fill_bins(sizes, room)
    assert sorted(i for b in bins for i in b) == list(range(9))
    left = set(range(9))
    for b in bins:
        choices = (c for n in range(1, len(left) + 1) for c in itertools.combinations(left, n))
        sums = (sum(sizes[i] for i in choice) for choice in choices)
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
    assert pack_length(trees, 8192, few=True) == 4096
    assert pack_length(trees, 3100, few=True) == 3072


def test_few_lengths_are_few_and_hold_everything():
    rng, lengths = random.Random(0), ([], [])
    for _ in range(60):
        trees = [
            Tree([3] * rng.randrange(300, 500), [[4] * rng.randrange(40, 60)] * 2)
            for _ in range(rng.choice((32, 32, 32, 9)))
        ]
        for few in (False, True):
            length = pack_length(trees, 8192, few)
            lengths[few].append(length)
            packs = pack_trees(trees, length, length)
            assert sum(len(pack.leaves) for pack in packs) == 2 * len(trees)
            assert {len(pack.ids) for pack in packs} == {length}
    assert 2 * len({*lengths[True]}) < len({*lengths[False]})
    assert sum(lengths[True]) < 1.2 * sum(lengths[False])

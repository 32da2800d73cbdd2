"""batches/stream.py: packs that are filled while users are still coming hold every prompt once."""

import itertools
import random

import pytest

from batches.prompts import Batching
from batches.stream import stream_packs
from ops.packs import Tree


def ids(rng, most):
    return [rng.randrange(3, 640) for _ in range(rng.randrange(1, most + 2))]


@pytest.mark.parametrize("seed", range(12))
def test_packs_that_come_as_users_do_hold_every_prompt_once(seed):
    rng = random.Random(seed)
    room, n = rng.choice([64, 300, 2000]), rng.randrange(1, 300)
    begin, trees = ids(rng, rng.randrange(20)), []
    for _ in range(n):
        branches = [ids(rng, 15) for _ in range(rng.randrange(1, 9))]
        trees.append(Tree(begin + ids(rng, 40), branches))

    found, split = {}, []
    batching = Batching(room, rng.choice([1, room]), 0)
    for pack in stream_packs(enumerate(trees), n, batching):
        for (user, branch), row in pack.leaves.items():
            assert (user, branch) not in found
            path = pack.ids[: row + 1][pack.ends[: row + 1] > row]
            found[user, branch] = path.tolist()
        split += {user for user, _ in pack.leaves} if pack.shared_prefix else []
    branches = ((u, b) for u, tree in enumerate(trees) for b in range(len(tree.branches)))
    assert found == {(u, b): trees[u].prefix + trees[u].branches[b] for u, b in branches}
    # One tree's packs follow one another.
    assert len(list(itertools.groupby(split))) == len(set(split))


def test_full_packs_wait_for_no_more_users():
    trees = [Tree([3, 4], [[5] * 10, [6] * 8]) for _ in range(400)]  # ten fill a pack
    came = []

    def counted():
        for i, tree in enumerate(trees):
            came.append(i)
            yield i, tree

    found = [len(came) for _ in stream_packs(counted(), 400, Batching(182, 182, 0))]
    assert len(found) == 40
    assert found[:3] == [32] * 3  # and two users wait


def test_a_process_without_users_has_no_packs():
    assert list(stream_packs(iter(()), 0, Batching(256, 256, 0))) == []

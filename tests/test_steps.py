"""batches/steps.py: which users make a step, and that no target is lost on the way."""

import pytest
import torch
from helpers import random_trees, sequences

from batches import steps
from batches.prompts import Batching
from batches.steps import check_batch_size, make_step, step_batches, target_count
from ops.packs import Tree, pack_trees
from trsr import Example, InputError


def test_an_epoch_is_a_permutation_that_the_seed_determines():
    sizes = [2] * 10
    steps = step_batches(sizes, 9, seed=3, epoch=1)
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(u for step in steps for u in step) == list(range(10))
    assert steps == step_batches(sizes, 9, seed=3, epoch=1)
    assert steps != step_batches(sizes, 9, seed=3, epoch=2)
    assert steps != step_batches(sizes, 9, seed=4, epoch=1)


def test_users_of_any_size_fill_a_step_in_the_same_order():
    sizes = [3, 1, 40, 2, 5, 1, 1]
    steps = step_batches(sizes, 6, seed=0, epoch=0)
    order = [u for step in steps for u in step]
    assert order == [u for step in step_batches([1] * 7, 1, seed=0, epoch=0) for u in step]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        total = sum(sizes[u] for u in step)
        assert total <= 6 or len(step) == 1
        assert following is None or total + sizes[following[0]] > 6  # as full as it can be


@pytest.mark.parametrize("loss", ["prompt", "answer"])
def test_targets_are_counted_as_if_examples_were_apart(loss):
    tree = Tree([1, 2, 3], [[4, 5], [6]])
    assert target_count(tree, loss) == {"prompt": 4 + 3, "answer": 2}[loss]
    (pack,) = pack_trees([tree], 99, last_only=loss == "answer")
    assert pack.weights.sum() == target_count(tree, loss)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("loss", ["prompt", "answer"])
def test_the_shares_of_all_processes_make_the_step(monkeypatch, world, loss):
    trees, batching = random_trees(9, 2), Batching(60, 1, 0)
    users, weights = [7, 0, 3], 0.0
    for rank in range(world):
        monkeypatch.setattr(steps, "ranks", lambda rank=rank: (rank, world))
        step = make_step(trees, users, loss, batching)
        assert (step.users, step.tokens) == (users, sum(trees[u].size for u in users))
        assert step.packs  # FSDP needs one from every process
        if step.targets:
            weights += sum(pack.weights.sum() for pack in step.packs)
            assert step.targets == sum(target_count(trees[u], loss) for u in users)
    counts = {"prompt": lambda ids: len(ids) - 1, "answer": lambda ids: 1}
    apart = sum(counts[loss](ids) for u in users for ids in sequences(trees[u]))
    assert weights == torch.tensor(float(apart))


def test_users_with_unequal_examples_are_refused_by_name():
    users = [Example(f"u{n}", ["a"], "b", ["c"] * (2 if n == 2 else 1)) for n in range(4)]
    with pytest.raises(InputError, match="users 'u0' and 'u2' differ in their number of negatives"):
        check_batch_size(8, users, 1)
    with pytest.raises(InputError, match=r"--batch-size 7: not a multiple of the 2 .* choose 6"):
        check_batch_size(7, users[:2], 1)
    check_batch_size(8, users[:2], 1)
    check_batch_size(8, users, 2)

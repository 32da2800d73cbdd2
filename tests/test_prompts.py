"""batches/prompts.py: worker processes make the same trees, count what is cut, and end."""

import gc
import multiprocessing
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import CPU, wait_until

import trsr
from batches.prompts import Batching, Prompts, Ranking, tokenize
from batches.stream import user_packs
from launch.processes import prefetch
from models.tokenizer import Tokenizer
from prepare.dataset import load_dataset


def test_batching_follows_the_device(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert Batching.on(CPU, None, 8192) == Batching(4096, 1, 0)
    assert Batching.on(CPU, 300, 8192) == Batching(300, 1, 0)
    assert Batching.on(torch.device("cuda"), None, 8192) == Batching(8192, 8192, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_trimmed_adds_up_over_users_and_splits(workers, data_folder, model_folder):
    domain, items, splits = load_dataset(data_folder, ("train", "val"))
    tokenizer = Tokenizer(model_folder, 640)
    budget = trsr.Budget(130, tokenizer.encode, Counter())
    recommender = trsr.Recommender("whole-history", domain, items, {}, 3, budget)
    expected = Counter()
    for split in ("train", "val"):
        users = [(e, [e.positive, *e.negatives]) for e in splits[split]]
        for example, candidates in users:
            own = replace(recommender, budget=replace(budget, trimmed=Counter()))
            own.prompt_ids(example, candidates)
            expected += own.budget.trimmed
        trees = list(tokenize(Prompts(recommender, users), workers, show=False))
        assert len(trees) == len(users)
    assert expected
    assert budget.trimmed == expected


@dataclass(frozen=True)
class Refusing:
    """A recommender that has no prompts for user 50."""

    budget: trsr.Budget

    def prompt_ids(self, user, _items):
        if user == 50:
            raise trsr.InputError("no room")
        return [[1, 2, 3], [1, 2, 4]]


def test_an_error_ends_the_worker_processes_at_once_and_not_when_garbage_is_collected():
    users, budget = range(400), trsr.Budget(99, list, Counter())
    ranking = Ranking(Refusing(budget), users, [[]] * 400)

    def packs():
        return user_packs(ranking, users, Batching(64, 1, 2), show=False)

    def all_ended():
        return not multiprocessing.active_children()

    gc.collect()
    gc.disable()
    try:
        found = packs()
        assert multiprocessing.active_children()
        with pytest.raises(trsr.InputError, match="no room"):
            list(prefetch(found))
        del found
        wait_until(all_ended)
        found = packs()
        del found  # as an error does that comes before the first one is asked for
        wait_until(all_ended)
    finally:
        gc.enable()

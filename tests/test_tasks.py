"""batches/tasks.py: many users at once get the trees that each would get alone."""

import random
from collections import Counter

import pytest

import trsr
from batches.tasks import run_tasks
from prepare.domains import DOMAINS

PRODUCTS = DOMAINS["products"]
BUDGET = trsr.Budget(100000, lambda messages: [message.split() for message in messages], Counter())


@pytest.mark.parametrize("paradigm", [trsr.hierarchical, trsr.recurrent])
@pytest.mark.parametrize("seed", range(3))
def test_users_answered_in_any_order_get_the_same_trees(paradigm, seed):
    users = {f"u{n}": [f"{n}-{i}" for i in range(n)] for n in (0, 3, 12, 30, 17, 5)}
    rng, queue, most = random.Random(seed), [], 0

    class Engine:
        def has_room(self):
            return len(queue) < 3

        def submit(self, prompts, first):
            nonlocal most
            assert first == (prompts[0][0][0] in begun)
            begun.update(user for (user, _), _ in prompts)
            queue.extend(prompts)
            most = max(most, len(queue))

        def finished(self):
            key, prompt = queue.pop(rng.randrange(len(queue)))
            return [(key, summary_of(prompt))]

    def summary_of(prompt):
        return f"summary of {len(prompt)} characters"

    def answers(prompts):
        return [summary_of(prompt) for prompt in prompts]

    begun = set()
    tasks = ((u, paradigm(items, PRODUCTS, BUDGET, 5)) for u, items in users.items())
    found = dict(run_tasks(tasks, Engine()))
    assert found.keys() == users.keys()
    assert most <= 2 + 6  # has_room() is asked before each user
    for u, items in users.items():
        alone = trsr.solve(paradigm(items, PRODUCTS, BUDGET, 5), answers)
        assert found[u] == alone

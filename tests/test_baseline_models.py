"""baselines/models.py: what each model may and may not depend on, and that each learns."""

import math

import numpy as np
import pytest
import torch

from baselines.models import MODELS

EACH = pytest.mark.parametrize("name", MODELS)


def made(name, n_items=40, width=24, seed=0):
    torch.manual_seed(seed)
    return MODELS[name](torch.randn(n_items, width), size=16, dropout=0.1).eval()


@EACH
def test_scores_depend_on_nothing_but_the_user_and_the_candidate(name):
    model, rng = made(name), np.random.default_rng(0)
    histories = [rng.integers(40, size=n).tolist() for n in (1, 3, 12, 7)]
    candidates = torch.from_numpy(rng.integers(40, size=(4, 5)))
    padded = torch.tensor([h + [-1] * (15 - len(h)) for h in histories])
    with torch.no_grad():
        together = model.score(padded, candidates)
        for u, history in enumerate(histories):
            # Alone, without padding, the candidates in another order.
            alone = model.score(torch.tensor([history]), candidates[u : u + 1].flip(1))
            assert (alone[0].flip(0) - together[u]).abs().max() < 1e-5
            one = model.score(torch.tensor([history]), candidates[u : u + 1, 2:3])
            assert (one[0, 0] - together[u, 2]).abs() < 1e-5


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ncf", "din"}))
def test_sequential_models_see_the_order(name):
    model, history = made(name), torch.tensor([[3, 9, 27, 14, 5]])
    with torch.no_grad():
        scores = [model.score(h, torch.tensor([[1, 2]])) for h in (history, history.flip(1))]
    assert (scores[0] - scores[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["ncf", "din"])
def test_the_others_do_not(name):
    model, history = made(name), torch.tensor([[3, 9, 27, 14, 5]])
    with torch.no_grad():
        scores = [model.score(h, torch.tensor([[1, 2]])) for h in (history, history.flip(1))]
    assert (scores[0] - scores[1]).abs().max() < 1e-5


@EACH
def test_each_learns_which_kind_of_item_a_user_takes(name):
    rng = np.random.default_rng(1)
    kinds = rng.integers(4, size=80)  # the target is of the kind of the last items
    torch.manual_seed(0)
    texts = torch.nn.functional.normalize(torch.eye(4)[kinds] + 0.1 * torch.randn(80, 4), dim=-1)
    model = MODELS[name](texts, size=16, dropout=0.0)
    own = rng.integers(4, size=300)
    of_kind = [np.flatnonzero(kinds == k) for k in range(4)]
    histories = torch.tensor([rng.choice(of_kind[k], 6).tolist() for k in own])
    candidates = torch.tensor([[rng.choice(of_kind[(k + j) % 4]) for j in range(4)] for k in own])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(
            model.score(histories[:200], candidates[:200]), torch.zeros(200).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval().score(histories[200:], candidates[200:]).argmax(1) == 0
    assert right.float().mean() > 0.9


def test_dien_s_update_by_hand():
    model = made("dien")
    h, c = torch.randn(1, 3, 16), torch.randn(1, 1, 16)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        states, _ = model.interests(h)
        weights = [float(model.attend(states)[0, t] @ c[0, 0]) for t in range(3)]
        total = sum(math.exp(w) for w in weights)
        state = torch.zeros(16)
        for t in range(3):
            new, old = model.inner(states[0, t]).chunk(3), model.outer(state).chunk(3)
            gate = torch.sigmoid(new[1] + old[1]) * math.exp(weights[t]) / total
            candidate = torch.tanh(new[2] + torch.sigmoid(new[0] + old[0]) * old[2])
            state = (1 - gate) * state + gate * candidate
        expected = model.output(torch.cat((state, c[0, 0], state * c[0, 0])))
        assert (model(h, mask, c)[0, 0] - expected[0]).abs() < 1e-5
    assert model.auxiliary_loss(torch.cat((h, -h)), mask.repeat(2, 1)) > 0

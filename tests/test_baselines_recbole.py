"""GRU4Rec, NARM and SASRec against RecBole's own, with the same weights.

Skipped where RecBole is not. RecBole 1.2.1 asks for packages that these models do not use, so its
model files are loaded beside a stand-in for `recbole.utils`. An unpacked recbole wheel on
PYTHONPATH is enough; nothing of it needs to be installed.
"""

import importlib
import importlib.util
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import pytest
import torch

from baselines.models import NARM, GRU4Rec, SASRec

ITEMS, WIDTH, SIZE = 30, 24, 16
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("recbole") is None, reason="no recbole on the path"
)


@pytest.fixture
def theirs(monkeypatch):
    """Return a function that makes one of RecBole's models."""
    spec = importlib.util.find_spec("recbole")
    package = ModuleType("recbole")
    package.__path__ = list(spec.submodule_search_locations)
    utils = ModuleType("recbole.utils")
    kinds = "GENERAL SEQUENTIAL CONTEXT KNOWLEDGE DECISIONTREE TRADITIONAL POINTWISE"
    for name in ("ModelType", "InputType", "FeatureSource", "FeatureType"):
        setattr(utils, name, Enum(name, kinds))
    utils.set_color = lambda text, *_: text
    model = ModuleType("recbole.model")
    model.__path__ = [f"{package.__path__[0]}/model"]
    monkeypatch.setitem(sys.modules, "recbole", package)
    monkeypatch.setitem(sys.modules, "recbole.utils", utils)
    monkeypatch.setitem(sys.modules, "recbole.model", model)
    inner = ModuleType("recbole.model.sequential_recommender")
    inner.__path__ = [f"{package.__path__[0]}/model/sequential_recommender"]
    monkeypatch.setitem(sys.modules, inner.__name__, inner)
    settings = {
        "USER_ID_FIELD": "u",
        "ITEM_ID_FIELD": "i",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "n",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": 9,
        "device": "cpu",
        "loss_type": "CE",
        "embedding_size": SIZE,
        "num_layers": 1,
        "dropout_prob": 0.2,
        "n_layers": 1,
        "dropout_probs": [0.2, 0.2],
    }

    def make(name: str, **more):
        module = importlib.import_module(f"recbole.model.sequential_recommender.{name.lower()}")
        dataset = SimpleNamespace(num=lambda _field: ITEMS + 1)
        return getattr(module, name)(settings | {"hidden_size": 2 * SIZE} | more, dataset).eval()

    yield make
    for name in [n for n in sys.modules if n.startswith("recbole.")]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def compare(ours, other, histories: torch.Tensor) -> None:
    rng = torch.Generator().manual_seed(1)
    candidates = torch.randint(ITEMS, (len(histories), 6), generator=rng)
    with torch.no_grad():
        # Theirs counts items from 1.
        other.item_embedding.weight[1:] = ours.items(torch.arange(ITEMS))
        user = other(histories + 1, (histories >= 0).sum(1))
        expected = (user[:, None] * other.item_embedding(candidates + 1)).sum(-1)
        assert (ours.score(histories, candidates) - expected).abs().max() < 1e-5


def some_histories(equal: bool = False) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(ITEMS, (5, 9), generator=rng)
    for i in range(0 if equal else 5):
        rows[i, 9 - i :] = -1
    return rows


def made(kind):
    torch.manual_seed(0)
    return kind(torch.randn(ITEMS, WIDTH), SIZE, 0.2).eval()


def test_gru4rec(theirs):
    ours, other = made(GRU4Rec), theirs("GRU4Rec")
    other.gru_layers.load_state_dict(ours.gru.state_dict())
    other.dense.load_state_dict(ours.output.state_dict())
    compare(ours, other, some_histories())


def test_narm(theirs):
    ours, other = made(NARM), theirs("NARM")
    names = {"gru": ours.gru, "a_1": ours.key, "a_2": ours.query, "v_t": ours.weigh}
    for name, module in (names | {"b": ours.output}).items():
        getattr(other, name).load_state_dict(module.state_dict())
    compare(ours, other, some_histories())


def test_sasrec(theirs):
    more = {
        "n_layers": 2,
        "n_heads": 2,
        "inner_size": 4 * SIZE,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "hidden_size": SIZE,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
    }
    ours, other = made(SASRec), theirs("SASRec", **more)
    other.LayerNorm.load_state_dict(ours.norm.state_dict())
    # Theirs counts positions from the start, so histories are equally long here.
    with torch.no_grad():
        other.position_embedding.weight.copy_(ours.positions.weight[:9].flip(0))
    for a, b in zip(ours.encoder.layers, other.trm_encoder.layer, strict=True):
        attention, inner = b.multi_head_attention, b.feed_forward
        weights, biases = a.self_attn.in_proj_weight.chunk(3), a.self_attn.in_proj_bias.chunk(3)
        linears = attention.query, attention.key, attention.value
        for linear, weight, bias in zip(linears, weights, biases, strict=True):
            linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
        for to, of in (
            (attention.dense, a.self_attn.out_proj),
            (attention.LayerNorm, a.norm1),
            (inner.dense_1, a.linear1),
            (inner.dense_2, a.linear2),
            (inner.LayerNorm, a.norm2),
        ):
            to.load_state_dict(of.state_dict())
    compare(ours, other, some_histories(equal=True))

"""bench/random_model.py: random weights in the shapes of real models."""

import json

import pytest
import torch
from helpers import CPU, random_ids
from transformers import GPTNeoXForCausalLM

from bench import random_model
from models.hub import build_model, load_model
from models.neox import GPTNeoX


def test_random_weights_of_a_pythia_s_shape_are_read_by_transformers(tmp_path):
    small = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 640}
    config = random_model.config_of("pythia-1.4b", **small)
    total = random_model.write_model(tmp_path, config, torch.float32, 0)
    reference = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    assert total == sum(p.numel() for p in reference.parameters())
    with torch.no_grad():
        ids = random_ids(2, 30)
        ours = load_model(tmp_path, CPU, torch.float32)(ids)
        assert (ours - reference(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "millions"), [("pythia-1.4b", 1414.6), ("pythia-2.8b", 2775.2)])
def test_the_shapes_have_the_parameters_that_pythia_has(tmp_path, name, millions):
    (tmp_path / "config.json").write_text(json.dumps(random_model.config_of(name)))
    with torch.device("meta"):
        model = build_model(tmp_path)
    assert isinstance(model, GPTNeoX)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)

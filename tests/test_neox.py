"""models/neox.py: what differs from Llama. All that is the same is tested with llama.py."""

import torch
from helpers import CPU, PYTHIAS, TINY_NEOX, change_json, random_ids, write_neox
from transformers import GPTNeoXConfig

from models.hub import load_model


def test_each_difference_between_configurations_shows(tmp_path):
    """Otherwise a model that ignored a field could pass for all of them."""
    write_neox(tmp_path)
    path, ids = tmp_path / "config.json", random_ids(2, 40)
    whole = path.read_text()
    with torch.no_grad():
        base = load_model(tmp_path, CPU, torch.float32)(ids)
        for family in ("sequential", "whole-heads", "half-heads", "gelu-fast"):
            change_json(path, **GPTNeoXConfig(**TINY_NEOX | PYTHIAS[family]).to_diff_dict())
            other = load_model(tmp_path, CPU, torch.float32)(ids)
            assert (other - base).abs().max() > (1e-5 if family == "gelu-fast" else 1e-2), family
            path.write_text(whole)

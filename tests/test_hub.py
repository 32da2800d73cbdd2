"""models/hub.py: where a model comes from, and which architecture it has."""

import pytest
import torch
from helpers import CPU, LLAMA, NEOX

from llama import CheckpointError, Llama
from models.hub import attention_names, find_model, load_model
from models.neox import GPTNeoX


def test_a_model_that_is_nowhere_is_named(monkeypatch):
    with pytest.raises(CheckpointError, match="no such model folder"):
        find_model("./nowhere")
    with pytest.raises(CheckpointError, match="neither a folder here nor a model on the hub"):
        find_model("not a/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        find_model("owner/absent-model")


def test_the_architecture_follows_config_json(model_folder, pythia_folder):
    for folder, kind, own in ((model_folder, Llama, LLAMA), (pythia_folder, GPTNeoX, NEOX)):
        assert find_model(str(folder)) == folder
        assert type(load_model(folder, CPU, torch.float32)) is kind
        assert attention_names(folder) == own.attention

"""launch/estimate.py: what a run will take, before its first step."""

from collections import Counter

import pytest
import torch
from helpers import CPU

import trsr
from launch.estimate import expected_slots, rows_that_fit, training_flops, training_memory
from llama import load_model
from lora import LoRAConfig, apply_lora
from models.chat import Plain
from models.tokenizer import Tokenizer
from prepare.domains import DOMAINS


@pytest.fixture
def model(model_folder):
    return load_model(model_folder, CPU, torch.float32)


def layer_weights(model):
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if ".layers." in name and p.dim() > 1)


def test_flops_are_six_per_trained_weight_and_token_and_four_per_frozen_one(model):
    weights = layer_weights(model)
    assert training_flops(model, 100) == 100 * 6 * weights
    apply_lora(model, LoRAConfig())
    assert training_flops(model, 100) == 100 * (4 * weights + 6 * (layer_weights(model) - weights))


def test_memory_counts_weights_optimizer_and_activations(model):
    n = sum(p.numel() for p in model.parameters())
    whole = training_memory(model, 1, "zero2", 4, 1000, checkpointing=False)
    assert whole["weights"] == 0  # all of them are trained
    assert whole["trained, gradients, optimizer"] == 16 * n
    several = training_memory(model, 4, "zero2", 4, 1000, checkpointing=False)
    assert several["trained, gradients, optimizer"] == 4 * n
    less = training_memory(model, 1, "zero2", 4, 1000, checkpointing=True)
    assert less["activations of a pack"] < whole["activations of a pack"]
    apply_lora(model, LoRAConfig())
    frozen = training_memory(model, 1, "zero2", 4, 1000, checkpointing=False)
    assert frozen["weights"] == 4 * n


@pytest.mark.parametrize("paradigm", trsr.SUMMARIZED)
def test_the_slots_expected_are_about_the_longest_prompt_with_its_summary(model_folder, paradigm):
    form, domain = Plain(Tokenizer(model_folder, 640)), DOMAINS["products"]
    budget = trsr.Budget(1000, form.encode, Counter())
    histories = [[f"Title: blue lamp {n}" for n in range(count)] for count in (3, 12, 30)]
    slots = expected_slots(histories, domain, budget, paradigm, 5, 20)
    prompts = []
    for items in histories:
        task = getattr(trsr, paradigm)(items, domain, budget, 5)
        trsr.solve(task, lambda asked: prompts.extend(asked) or ["lamps"] * len(asked))
    longest = max(map(len, form.encode(prompts)))
    assert 0.8 * (longest + 20) < slots <= 1020
    assert expected_slots([["x" * 9999]], domain, budget, paradigm, 5, 20) == 1020
    assert not budget.trimmed  # an estimate cuts nothing


def test_a_cpu_decodes_16_prompts_together(model):
    assert rows_that_fit(model, 500, 8192, CPU) == 16

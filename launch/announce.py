"""What the scripts are about to do, in words, before they begin."""

from collections.abc import Sequence

import torch

import trsr
from launch.estimate import preflight, training_memory
from launch.processes import ranks
from llama import Llama
from ops.fp8 import in_words
from ops.int8 import told
from ops.packs import Tree

# settings: those of the script.


def summarization(settings, n_users: int, n_done: int, generator) -> None:
    """Print what is about to be summarized."""
    where = f"on {ranks()[1]} x {generator.device.type}, {generator.n_rows} prompts per batch"
    held = f", int8 ({settings.int8})" if settings.int8 else told(generator.model)
    blocks = f"{settings.block_size} items per block"
    print(f"data    {settings.data}: {n_users} users, {n_done} of them summarized before")
    print(f"model   {settings.model}, {settings.dtype}{held}, {where}")
    print(f"method  {settings.paradigm}, {blocks}, {settings.max_new_tokens} new tokens at most")
    ends, own = list(generator.eos_ids), sorted(generator.model.config.eos_token_id)
    if ends != own:
        what = "config.json and the tokenizer name other end tokens"
        print(f"ends    {what} ({own}): a summary ends at any of {ends or 'none, only the limit'}")


def items_shown(settings) -> str:
    """Return which items of a history the prompt shows."""
    shown = trsr.PARADIGMS[settings.paradigm]
    return f"{settings.history_items} recent items" if shown == "last" else f"{shown} of the items"


def training(settings, model: Llama, n_train: int, n_val: int, tokens: int) -> None:
    """Print what is about to be trained; tokens: the longest prompt's."""
    n = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    where = f"{ranks()[1]} x {'cuda' if torch.cuda.is_available() else 'cpu'}"
    steps = f"{settings.epochs} epochs, {settings.batch_size} examples per step"
    print(f"data    {settings.data}: {n_train} users to train on, {n_val} to validate on")
    size, held = f"{n:.1f}M parameters, {trained:.2f}M trained", settings.dtype + told(model)
    print(f"model   {settings.model}: {size}, {held}")
    print(f"prompt  {settings.paradigm}, {items_shown(settings)}, {tokens} tokens")
    print(f"steps   {steps}, on {where}")


def cost_of_training(
    settings, model: Llama, trees: list[Tree], budget: trsr.Budget, device: torch.device
) -> None:
    """Print what was trimmed, and what training will take."""
    for what, number in budget.trimmed.items():
        print(f"trimmed to the context: {number} {what}")
    itemsize, (_, world) = (2 if settings.dtype == "bf16" else 4), ranks()
    packs = settings.pack_tokens, settings.activation_checkpointing
    memory = training_memory(model, world, settings.shard, itemsize, *packs)
    preflight(model, trees, memory, world, device)


def evaluation(settings, examples: Sequence[trsr.Example], tokens: int, where: str) -> None:
    """Print what is about to be evaluated; tokens: the longest prompt's."""
    row, recent = f"trained ({settings.kind})", items_shown(settings)
    if settings.untrained:
        row = "untrained"
    elif settings.epochs:
        row += f", unfinished: the best of {settings.epochs}"
    mean = sum(1 + len(example.negatives) for example in examples) / len(examples)
    users = f"{len(examples)} users of {settings.split}.jsonl"
    print(f"data    {settings.data}: {users}, {mean:.10g} candidates each")
    held = settings.dtype + (f", {in_words()}" if settings.fp8 else "")
    print(f"model   {settings.model}, {row}, {held}, on {where}")
    print(f"prompt  {settings.paradigm}, {recent}, {tokens} tokens at most")

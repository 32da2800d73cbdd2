"""What a run will take, before its first step: memory, FLOP, time, and how many rows fit."""

import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

import trsr
from llama import Llama
from ops.packs import Tree

SHARE = 0.5  # of a large matrix product's rate: a cautious guess of what training reaches
SHORT = 1e17  # FLOP, which take an H100 minutes, or half an hour at a small model's rate
GIB = 2**30
CPU_COPIES = 3

# ---- Training


def product_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product on device, measured in less than a second."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, times = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(6):
        began = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the result
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[1:])


def training_flops(model: Llama, tokens: int) -> float:
    """Return the FLOP of the layers' matrices for a forward and backward pass over tokens.

    A weight takes 2 FLOP per token forward and 2 for the gradient of its input; 2 more if it is
    trained itself. Attention is not counted.
    """
    weights = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1]
    return tokens * sum((6 if p.requires_grad else 4) * p.numel() for p in weights)


def is_short(model: Llama, trees: list[Tree], epochs: int) -> bool:
    """Return whether a training is so short that compiling for a pack's length counts."""
    return training_flops(model, epochs * sum(tree.size for tree in trees)) < SHORT


def training_memory(
    model: Llama, world: int, shard: str, itemsize: int, pack_tokens: int, checkpointing: bool
) -> dict[str, float]:
    """Return the expected bytes on each device, by what they hold.

    FSDP's buffers and fragmentation come on top. shard: zero2, zero3 or replicate. itemsize: bytes
    of an activation.
    """
    c = model.config
    frozen = sum(p.numel() * p.itemsize for p in model.parameters() if not p.requires_grad)
    frozen += sum(b.numel() * b.itemsize for b in model.buffers())  # fp8's second copies
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    weights = frozen
    if shard == "zero3" and world > 1:  # a shard of all layers, and two layers gathered
        weights = frozen / world + 2 * frozen / c.num_hidden_layers

    per_layer = 8 * c.hidden_size + 3 * c.intermediate_size  # values kept for a token's gradient
    kept = per_layer * c.num_hidden_layers
    if checkpointing:
        kept = c.hidden_size * c.num_hidden_layers + per_layer
    logits = 3 * 1024 * c.vocab_size * 4
    return {
        "weights": weights,
        "trained, gradients, optimizer": trained * 16 / (1 if shard == "replicate" else world),
        "activations of a pack": pack_tokens * kept * itemsize + logits,
    }


def on_cpu(memory: dict[str, float]) -> dict[str, float]:
    """Return the expected bytes on a CPU, where the process counts, and attention's copies.

    Each block of queries keeps a copy of the keys and values that it sees (ops/masks.py), which
    makes activations about three times as large: 2.6 and 3.2 times were measured.
    """
    what = "activations of a pack"
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    return memory | {what: CPU_COPIES * memory[what], "the process by now": process}


def preflight(
    model: Llama, trees: list[Tree], memory: dict[str, float], world: int, device: torch.device
) -> None:
    """Print what the run will take, at the rate of a matrix product measured on the device."""
    if device.type == "cpu":
        memory = on_cpu(memory)
    parts = ", ".join(f"{what} {size / GIB:.2f}" for what, size in memory.items())
    print(f"memory  about {sum(memory.values()) / GIB:.2f} GiB a device: {parts}")

    computed = sum(tree.size for tree in trees)
    apart = sum(len(ids) for tree in trees for ids in tree.sequences())
    flops, flops_apart = (training_flops(model, tokens) for tokens in (computed, apart))
    work = f"{computed} tokens an epoch, {flops:.2e} FLOP"
    print(f"work    {work}; each example apart: {apart}, {flops_apart:.2e}")

    rate = product_rate(device)
    minutes = flops / (rate * SHARE * world) / 60
    at = f"at {SHARE:.0%} of the {rate / 1e12:.2f} TFLOP/s measured now"
    print(f"time    {minutes:.1f} minutes an epoch, {at}")


# ---- Summarization


def expected_slots(
    histories: Iterable[list[str]],
    domain: trsr.Domain,
    budget: trsr.Budget,
    paradigm: str,
    block_size: int,
    max_new_tokens: int,
) -> int:
    """Return the tokens of the longest prompt and summary to expect, to start a cache with.

    It is an estimate; the cache can grow.
    """
    blocks, most = [], 1
    for items in histories:
        blocks += [items[a:b] for a, b in trsr.split_blocks(len(items), block_size)]
        most = max(most, len(items) // block_size + 1)
    longest = max(blocks, key=lambda items: sum(map(len, items)), default=[])
    prompt = trsr.block_prompt(longest, domain, replace(budget, trimmed=Counter()))
    block, instruction = len(budget.encode([prompt])[0]), 128

    if paradigm == "recurrent":
        prompt_tokens = block + max_new_tokens  # the block and the summary before it
    else:
        prompt_tokens = max(block, instruction + most * max_new_tokens)  # or one merge of them all
    return min(prompt_tokens, budget.tokens) + max_new_tokens


def rows_that_fit(model: Llama, slots: int, reading: int, device: torch.device) -> int:
    """Return how many prompts of `slots` tokens can be decoded together in the free GPU memory.

    reading: tokens of prompts that are read at once. A CPU gets 16 rows.
    """
    if device.type == "cpu":
        return 16
    c = model.config
    itemsize = model.lm_head.weight.itemsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * slots * itemsize
    activations = reading * (8 * c.hidden_size + 3 * c.intermediate_size) * itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(128, int((0.95 * free - activations) // row)))

"""What a run will take, known before its first step: memory, FLOP, time."""

import statistics
import time
from collections import Counter
from dataclasses import replace

import torch

import trsr
from llama import PREFILL_TOKENS, Llama
from models.packs import Tree

SHARE = 0.5  # of the rate of a large matrix product, which training may reach at least


def product_rate(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product on device, measured in less than a second."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, times = torch.randn(n, n, device=device).to(dtype), []
    for _ in range(6):
        began = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for it
        times.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(times[1:])


def training_flops(model: Llama, tokens: int, examples_tokens: int) -> tuple[float, float]:
    """Return the FLOP of the layers' matrices for tokens computed once, and for examples_tokens, every example apart.

    A weight takes 2 FLOP a token forward and 2 for the gradient of its input; 2 more if it is trained itself.
    """
    weights = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() > 1]
    factor = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
    return factor * tokens, factor * examples_tokens


def training_memory(model: Llama, args, world: int) -> dict[str, float]:
    """Return the expected bytes on each device by what they hold; FSDP's buffers and fragmentation come on top."""
    c = model.config
    frozen = sum(p.numel() * p.itemsize for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shards = world if args.shard == "zero3" else 1  # of the weights
    gathered = 2 * frozen / c.num_hidden_layers if shards > 1 else 0
    itemsize = 2 if args.dtype == "bf16" else 4
    inside = 8 * c.hidden_size + 3 * c.intermediate_size  # values a token that a layer keeps for its gradient
    kept = inside * c.num_hidden_layers
    if args.activation_checkpointing:
        kept = c.hidden_size * c.num_hidden_layers + inside
    logits = 3 * 1024 * c.vocab_size * 4
    return {
        "weights": frozen / shards + gathered,
        "trained, gradients, optimizer": trained * 16 / (1 if args.shard == "replicate" else world),
        "activations of a pack": args.pack_tokens * kept * itemsize + logits,
    }


def preflight(model: Llama, args, trees: list[Tree], world: int, device: torch.device) -> None:
    """Print what the run will take, by a device's measured matrix product."""
    computed = sum(tree.size for tree in trees)
    apart = sum(len(tree.branches) * len(tree.prefix) + sum(map(len, tree.branches)) for tree in trees)
    flops, flops_apart = training_flops(model, computed, apart)
    rate = product_rate(device)
    memory = training_memory(model, args, world)
    parts = ", ".join(f"{what} {size / 2**30:.2f}" for what, size in memory.items())
    print(f"memory  about {sum(memory.values()) / 2**30:.2f} GiB a device: {parts}")
    print(f"work    {computed} tokens an epoch, {flops:.2e} FLOP; each example apart: {apart}, {flops_apart:.2e}")
    minutes = flops / (rate * SHARE * world) / 60
    print(f"time    {minutes:.1f} minutes an epoch, at {SHARE:.0%} of the {rate / 1e12:.2f} TFLOP/s measured now")


def expected_slots(histories, domain, budget: trsr.Budget, args) -> int:
    """Return the tokens of the longest prompt and summary to expect: the cache begins with these, and can grow."""
    blocks = (items[a:b] for items in histories for a, b in trsr.split_blocks(len(items), args.block_size))
    longest = max(blocks, key=lambda items: sum(map(len, items)), default=[])
    prompt = trsr.block_prompt(longest, domain, replace(budget, trimmed=Counter()))
    block, instruction = len(budget.encode([prompt])[0]), 128
    summaries = max(map(len, histories), default=0) // args.block_size + 1
    if args.paradigm == "recurrent":
        return min(block + args.max_new_tokens, budget.tokens) + args.max_new_tokens
    return min(max(block, instruction + summaries * args.max_new_tokens), budget.tokens) + args.max_new_tokens


def rows_that_fit(model: Llama, slots: int, device: torch.device) -> int:
    """Return how many prompts of `slots` tokens can be decoded together: by the memory that is free on a GPU."""
    if device.type == "cpu":
        return 16
    c = model.config
    itemsize = model.lm_head.weight.itemsize
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * slots * itemsize
    reading = PREFILL_TOKENS * (8 * c.hidden_size + 3 * c.intermediate_size) * itemsize
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(128, int((0.95 * free - reading) // row)))

"""Time LoRA fine-tuning: an optimizer step here, and in transformers + PEFT.

    python -m bench.train --shape tiny --work mind              # fp32 on a CPU, bf16 on a GPU
    python -m bench.train --shape llama-2-7b --work amazon --pack-tokens 8192
    torchrun --nproc_per_node 2 -m bench.train --shape llama-2-7b --shard zero3     # no peer

Each user has two examples, the positive and a negative. The loss covers the whole prompt, and the
adapters have rank 8 on q, k, v and o, with a dropout of 0.05. This project's steps are those of
train.py, with packs made in a thread. transformers + PEFT takes one example per forward pass,
as the paper does, and padded batches of the sizes in --batches; the fastest counts. FLOP are 4 per
weight of the layers and token, without attention, since frozen weights need no gradient. Before
anything is timed, the two losses are compared without dropout.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from batches.prompts import Batching
from batches.steps import make_step
from bench import common
from bench.common import (
    Filling,
    ceiling,
    device_name,
    dtype_name,
    layer_matrices,
    make_models,
    random_trees,
    seconds,
)
from launch.command import option, parse_settings
from launch.numbers import positive
from launch.processes import gather, join_processes, prefetch, ranks, run_script
from llama import Llama, compile_layers
from lora import ATTENTION, LoRAConfig, adapter_tensors, apply_lora
from ops.packs import Tree
from train import SHARDS, shard, train_step
from trsr import InputError

RANK, ALPHA, DROPOUT = 8, 16, 0.05


@dataclass(frozen=True)
class Settings(common.Settings):
    """The flags."""

    users: int | None = option(
        None, "users in an optimizer step (unset: 32 on GPUs, 8 on CPUs)", positive
    )
    batches: tuple[int, ...] | None = option(
        None,
        "batch sizes of the peer to try (unset: 12 8 6 4 on GPUs, 8 4 2 on CPUs)",
        positive,
        nargs="+",
    )
    pack_tokens: int | None = option(
        None, "tokens in a forward pass (unset: as in train.py)", positive
    )
    unshared: bool = option(False, "this project without shared prefixes")
    no_peer: bool = option(False, "this project alone")
    activation_checkpointing: bool = option(False, "less memory, a third more time, as in train.py")
    shard: str = option("zero2", "what processes share out, as in train.py", choices=SHARDS)


def sequences_of(trees: list[Tree]) -> list[list[int]]:
    """Return all examples, each with its prefix."""
    return [tree.prefix + branch for tree in trees for branch in tree.branches]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with a rate of 0: it does all of its work and changes nothing."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)


# ---- This project


def add_adapter(model: Llama, seed: int) -> None:
    """Add an adapter with random values in both of its matrices."""
    apply_lora(model, LoRAConfig(dropout=DROPOUT))
    torch.manual_seed(seed)
    for parameter in adapter_tensors(model).values():
        nn.init.normal_(parameter, std=0.02)


class Ours:
    """Repeats one optimizer step, as train.py would make it."""

    def __init__(self, model: Llama, trees: list[Tree], batching: Batching, mode: str):
        self.model, self.mode = model, mode
        self.optimizer = optimizer_of(model)
        users = list(range(len(trees)))
        self.make = partial(make_step, trees, users, "prompt", batching)
        self.steps = prefetch(self.make() for _ in repeat(None))

    def step(self) -> float:
        """Make the step; return its loss."""
        return train_step(self.model, self.optimizer, next(self.steps), mode=self.mode)[0]

    def filling(self) -> Filling:
        """Return how full all processes' packs are."""
        return Filling.of(gather(self.make().packs))


# ---- transformers + PEFT


def peft_model(model: nn.Module, ours: Llama) -> nn.Module:
    """Return transformers' model with this project's adapter."""
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=list(ATTENTION),
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    found = {}
    for name, parameter in model.named_parameters():
        found[name.replace("base_model.model.", "").replace(".default", "")] = parameter
    with torch.no_grad():
        for name, parameter in adapter_tensors(ours).items():
            found[name].copy_(parameter)
    return model


def padded_step(
    model: nn.Module, optimizer, trees: list[Tree], batch: int, device: torch.device
) -> float:
    """Make one optimizer step on padded batches of similar length; return the loss."""
    rows = sorted(sequences_of(trees), key=len)
    count, total = sum(len(row) - 1 for row in rows), 0.0
    for part in (rows[i : i + batch] for i in range(0, len(rows), batch)):
        longest = max(map(len, part))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in part], device=device)
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in part]
        mask = torch.tensor(mask, device=device)
        targets = ids.masked_fill(mask == 0, -100)[:, 1:]
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
        loss = losses / count
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def check_losses(model: nn.Module, trees: list[Tree], ours: float, device: torch.device) -> float:
    """Return the loss of transformers + PEFT without dropout; InputError if ours differs."""
    theirs = padded_step(model.eval(), optimizer_of(model), trees, 2, device)
    tolerance = 2e-2 if device.type == "cuda" else 1e-4
    if abs(ours - theirs) > tolerance * theirs:
        losses = f"the losses are {ours:.6f} and {theirs:.6f}"
        raise InputError(f"{losses}, so the times mean nothing")
    return theirs


def measure_peer(
    settings: Settings, model: nn.Module, trees: list[Tree], device: torch.device
) -> dict[str, float]:
    """Return the examples/s at each batch size that fits."""
    optimizer, rates = optimizer_of(model), {}
    model.train()
    sizes = settings.batches or ([12, 8, 6, 4] if device.type == "cuda" else [8, 4, 2])
    for batch in (1, *sizes):
        step = partial(padded_step, model, optimizer, trees, batch, device)
        try:
            took = seconds(step, device, settings.repeats)
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit")
            optimizer.zero_grad(set_to_none=True)
            continue
        name = f"{batch} a batch" if batch > 1 else "1 example a forward"
        rates[f"transformers + PEFT, {name}"] = len(sequences_of(trees)) / took
    return rates


# ---- The comparison


def main() -> None:
    """Print the examples/s of each, their ratios, and how close this project is to the ceiling."""
    settings = parse_settings(Settings, __doc__)
    rank, world, device = join_processes()
    gpu, peer = device.type == "cuda", not settings.no_peer and world == 1
    dtype = torch.bfloat16 if gpu else torch.float32
    model, theirs = make_models(settings, device, dtype, peer)
    weights = sum(p.numel() for p in layer_matrices(model))
    trees = random_trees(settings, settings.users or (32 if gpu else 8), 2)
    examples = sequences_of(trees)
    if settings.unshared:
        trees = [Tree([], [ids]) for ids in examples]

    theirs = prepare_models(settings, model, theirs, device)
    batching = Batching.on(device, settings.pack_tokens, on_gpus=8192)
    ours = Ours(model, trees, batching, settings.shard)
    model.eval()  # without dropout
    losses = [ours.step()]
    if peer:
        losses.append(check_losses(theirs, trees, losses[0], device))
    model.train()
    rates, peak = measure_ours(settings, ours, len(examples), device)
    if peer:
        rates |= measure_peer(settings, theirs, trees, device)
    filling, limit = ours.filling(), world * ceiling(device, dtype)
    flops = 4 * weights * filling.tokens / len(examples) * rates["ours"]
    found = {"shape": settings.shape, "work": settings.work, "torch": torch.__version__}
    found |= {"examples_per_second": rates, "flops": flops, "ceiling": limit}
    found |= {"fill": filling.share, "losses": losses, "peak_gib": peak}
    if rank == 0:
        where = device_name(device, world) + (f", {settings.shard}" if world > 1 else "")
        what = f"{settings.shape}, {settings.work}, {dtype_name(dtype)} on {where}"
        print(f"{what}, torch {torch.__version__}")
        steps_per_second = rates["ours"] / len(examples)
        apart = steps_per_second * sum(map(len, examples))
        report(found, apart, steps_per_second * filling.tokens)
        if settings.json:
            print(json.dumps(found))


def prepare_models(
    settings: Settings, model: Llama, theirs: nn.Module | None, device: torch.device
) -> nn.Module | None:
    """Add the same adapter to both models, and place this project's as train.py does.

    Returns the peer's model.
    """
    add_adapter(model, settings.seed)
    if theirs is not None:
        theirs = peft_model(theirs, model)
    if ranks()[1] > 1 and settings.shard != "replicate":
        shard(model, device, settings.shard)
    if device.type == "cuda":
        compile_layers(model)
    model.model.checkpointing = settings.activation_checkpointing
    return theirs


def measure_ours(
    settings: Settings, ours: Ours, examples: int, device: torch.device
) -> tuple[dict[str, float], float | None]:
    """Return this project's examples/s, and on a GPU the peak memory in GiB."""
    # Two steps to compile what is needed and to let the allocator settle.
    ours.step()
    ours.step()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    rates = {"ours": examples / seconds(ours.step, device, settings.repeats)}
    peak = max(gather(torch.cuda.max_memory_allocated() / 2**30)) if gpu else None
    return rates, peak


def report(found: dict, apart: float, computed: float) -> None:
    """Print the table; apart, computed: tokens/s without shared prefixes, and with them."""
    rates = found["examples_per_second"]
    best = max((name for name in rates if name != "ours"), key=rates.get, default="")
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.2f} times as fast" if name != "ours" else ""
        print(f"{name:<42}{rate:>9.3f} examples/s{ratio}{' (its best)' if name == best else ''}")
    print(f"{apart:.0f} tokens/s of examples apart, of which {computed:.0f} are computed")
    flops, limit = found["flops"], found["ceiling"]
    speed = f"{flops / 1e12:.3f} of {limit / 1e12:.3f} TFLOP/s ({flops / limit:.0%})"
    print(f"{speed}, packs {found['fill']:.1%} full")
    losses = " and ".join(f"{loss:.6f}" for loss in found["losses"])
    peak = f"; peak of ours {found['peak_gib']:.1f} GiB" if found["peak_gib"] else ""
    print(f"loss {losses}{peak}", flush=True)


if __name__ == "__main__":
    run_script(main)

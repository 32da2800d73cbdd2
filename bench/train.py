"""Time LoRA fine-tuning: an optimizer step here, and in transformers + PEFT.

    python -m bench.train --shape tiny --work mind              # fp32 on a CPU, bf16 on a GPU
    python -m bench.train --shape llama-2-7b --work amazon --pack-tokens 8192
    python -m bench.train --shape 100m --negatives 1 3 7 15 31             # a table, no peer
    torchrun --nproc_per_node 2 -m bench.train --shape llama-2-7b --shard zero3     # no peer

Each user has two examples, the positive and a negative, or as many as --negatives says. The loss
covers the whole prompt, and the adapters have rank 8 on q, k, v and o, with a dropout of 0.05. This
project's steps are those of train.py, with packs made in a thread. transformers + PEFT takes one
example per forward pass, as the paper does, and padded batches of the sizes in --batches; on a GPU
with the package liger-kernel, these with Liger's kernels too. The fastest counts. FLOP are 4 per
weight of the layers and token, without attention, since frozen weights need no gradient. Losses are
compared without dropout, and where they differ nothing is reported.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat

import torch
from torch import nn

from batches.prompts import Batching
from batches.steps import Step, make_step
from bench import common
from bench.common import (
    Filling,
    ceiling,
    device_name,
    layer_matrices,
    make_models,
    optimizer_of,
    random_trees,
    seconds,
)
from bench.peers import Peer, peft_model, sequences_of, why_no_liger
from launch.command import option, parse_settings
from launch.numbers import positive
from launch.processes import gather, join_processes, prefetch, ranks, run_script, same_bits
from llama import Llama
from lora import LoRAConfig, adapter_tensors, apply_lora
from ops.fp8 import use_fp8
from ops.packs import Tree
from train import SHARDS, Outcome, Passes, place, train_step

ADAPTER = LoRAConfig(r=8, alpha=16, dropout=0.05)
STEPS = 4  # timed together on a GPU, where the next one is launched before one has ended


@dataclass(frozen=True)
class Settings(common.PackSettings):
    """The flags."""

    users: int | None = option(
        None, "users in an optimizer step (unset: 32 on GPUs, 8 on CPUs)", positive
    )
    negatives: tuple[int, ...] = option(
        (1,), "negatives per user; several make a table of this project alone", positive, nargs="+"
    )
    batches: tuple[int, ...] | None = option(
        None,
        "batch sizes of the peer to try (unset: 1 12 8 6 4 on GPUs, 1 8 4 2 on CPUs)",
        positive,
        nargs="+",
    )
    unshared: bool = option(False, "this project without shared prefixes")
    no_peer: bool = option(False, "this project alone")
    activation_checkpointing: bool = option(False, "less memory, a third more time, as in train.py")
    deterministic: bool = option(False, "on a GPU, this project's same bits each time, as there")
    shard: str = option("zero2", "what processes share out, as in train.py", choices=SHARDS)

    def trees(self, negatives: int, device: torch.device) -> list[Tree]:
        """Return the users of an optimizer step."""
        users = self.users or (32 if device.type == "cuda" else 8)
        trees = random_trees(self, users, 1 + negatives)
        return [Tree([], [ids]) for ids in sequences_of(trees)] if self.unshared else trees


# ---- This project


def make_trainable(settings: Settings, model: Llama, device: torch.device) -> None:
    """Add a random adapter to the model, and place and compile the model as train.py does."""
    if settings.fp8:
        use_fp8(model, "training")
    apply_lora(model, ADAPTER)
    torch.manual_seed(settings.seed)
    for parameter in adapter_tensors(model).values():
        nn.init.normal_(parameter, std=0.02)

    place(model, settings, device)


class Ours:
    """Repeats one optimizer step, as train.py would make it."""

    def __init__(self, settings: Settings, model: Llama, trees: list[Tree], device: torch.device):
        self.model, self.device = model, device
        self.passes = Passes(model, settings.shard, graphs=settings.cuda_graphs)
        self.optimizer = optimizer_of(model, self.passes.fused)
        self.examples = sequences_of(trees)
        batching = Batching.on(device, settings.pack_tokens, on_gpus=8192)
        users = list(range(len(trees)))
        self.make = make = partial(make_step, trees, users, "prompt", batching)
        self.steps = prefetch(make() for _ in repeat(None))  # not self's, so that it ends with it

    def step(self, times: int = 1) -> float:
        """Make the step so many times; return its loss."""
        outcome = self.update(next(self.steps))
        for step in islice(self.steps, times - 1):
            last, outcome = outcome, self.update(step)
            last.read()  # while the next one runs, as in train.py
        return outcome.read()[0]

    def update(self, step: Step) -> Outcome:
        """Update the model; return the step's outcome."""
        return train_step(self.passes, self.optimizer, step)

    def filling(self) -> Filling:
        """Return how full all processes' packs are."""
        return Filling.of(gather(self.make().packs))

    def measure(self, repeats: int) -> float:
        """Return the examples/s."""
        # Two steps to compile what is needed and to let the allocator settle.
        self.step()
        self.step()
        times = 1
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            times = STEPS
        work = partial(self.step, times)
        return times * len(self.examples) / seconds(work, self.device, repeats)


# ---- The comparison


def main() -> None:
    """Print the examples/s of each, their ratios, and how close this project is to the ceiling."""
    settings = parse_settings(Settings, __doc__)
    rank, world, device = join_processes()
    same_bits(device.type == "cpu" or settings.deterministic)  # as in train.py
    table = len(settings.negatives) > 1
    peer = not (settings.no_peer or table or world > 1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, theirs = make_models(settings, device, dtype, peer)
    weights = sum(p.numel() for p in layer_matrices(model))
    make_trainable(settings, model, device)
    if peer:
        theirs = Peer.plain(peft_model(theirs, model, ADAPTER))

    limit = world * ceiling(device, dtype)
    if rank == 0:
        where = device_name(device, world) + (f", {settings.shard}" if world > 1 else "")
        what = f"{settings.shape}, {settings.work}, {settings.precision(dtype)} on {where}"
        print(f"{what}, torch {torch.__version__}", flush=True)
    found = {"shape": settings.shape, "work": settings.work, "torch": torch.__version__}
    found |= {"ceiling": limit}
    if table:
        found["negatives"] = negatives_table(settings, model, device, weights)
    else:
        found |= compare(settings, model, theirs, device, weights)
        if rank == 0:
            report(found)
    if settings.json and rank == 0:
        print(json.dumps(found))


def compare(
    settings: Settings, model: Llama, peer: Peer | None, device: torch.device, weights: int
) -> dict:
    """Return what was measured of this project and the peer; weights: of the layers."""
    trees = settings.trees(settings.negatives[0], device)
    losses = {"ours": loss_without_dropout(settings, model, trees, device)}
    ours = Ours(settings, model, trees, device)
    rows = ours.examples
    rates, peak = {"ours": ours.measure(settings.repeats)}, None
    if device.type == "cuda":
        peak = max(gather(torch.cuda.max_memory_allocated() / 2**30))
    if peer:
        found = measure_peer(settings, peer, rows, losses["ours"])
        rates, losses = rates | found[0], losses | found[1]

    filling, steps = ours.filling(), rates["ours"] / len(rows)  # per second
    return {
        "examples_per_second": rates,
        "tokens_apart": steps * sum(map(len, rows)),
        "tokens_computed": steps * filling.tokens,
        "flops": 4 * weights * steps * filling.tokens,
        "fill": filling.share,
        "losses": losses,
        "peak_gib": peak,
    }


def loss_without_dropout(
    settings: Settings, model: Llama, trees: list[Tree], device: torch.device
) -> float:
    """Return this project's loss of a step, as transformers + PEFT would have it."""
    # A step of its own: graphs would keep what they have captured, which is without dropout.
    ours = Ours(replace(settings, cuda_graphs=False), model, trees, device)
    model.eval()
    loss = ours.step()
    model.train()
    return loss


def measure_peer(
    settings: Settings, peer: Peer, rows: list[list[int]], ours: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Return examples/s and losses of the peer, plain and with Liger's kernels.

    ours: this project's loss. Raises InputError if the peer's is another.
    """
    same_bits(False)  # which is not asked of the peer
    gpu = next(peer.model.parameters()).is_cuda
    sizes = settings.batches or ((1, 12, 8, 6, 4) if gpu else (1, 8, 4, 2))
    losses = {peer.name: peer.check_loss(rows, ours, rough=gpu or settings.fp8)}
    rates = dict(peer.measure(rows, sizes, settings.repeats))
    if reason := why_no_liger(gpu):
        print(f"without Liger's kernels: {reason}", flush=True)
        return rates, losses

    peer = peer.with_liger()
    losses[peer.name] = peer.check_loss(rows, ours, rough=True)
    sizes = [size for size in sizes if size > 1] or sizes  # one example is the paper's setting
    return rates | dict(peer.measure(rows, sizes, settings.repeats)), losses


def report(found: dict) -> None:
    """Print the table."""
    rates = found["examples_per_second"]
    best = max((name for name in rates if name != "ours"), key=rates.get, default="")
    width = max(map(len, rates)) + 2
    for name, rate in rates.items():
        ratio = f"   ours is {rates['ours'] / rate:.2f} times as fast" if name != "ours" else ""
        star = " (its best)" if name == best else ""
        print(f"{name:<{width}}{rate:>9.3f} examples/s{ratio}{star}")
    apart, computed = found["tokens_apart"], found["tokens_computed"]
    print(f"{apart:.0f} tokens/s of examples apart, of which {computed:.0f} are computed")
    flops, limit = found["flops"], found["ceiling"]
    speed = f"{flops / 1e12:.3f} of {limit / 1e12:.3f} TFLOP/s ({flops / limit:.0%})"
    print(f"{speed}, packs {found['fill']:.1%} full")
    losses = " and ".join(f"{loss:.6f}" for loss in found["losses"].values())
    peak = f"; peak of ours {found['peak_gib']:.1f} GiB" if found["peak_gib"] else ""
    print(f"loss {losses}{peak}", flush=True)


# ---- What more negatives cost


def negatives_table(
    settings: Settings, model: Llama, device: torch.device, weights: int
) -> list[dict]:
    """Print and return a row for each number of negatives; weights: of the layers."""
    rows, first = [], ranks()[0] == 0
    if first:
        print(f"{'':>9} {'examples':>9}   {'tokens an example':<18} {'':>10}")
        names = ("negatives", "a step", "apart", "computed", "examples/s", "TFLOP/s", "full")
        print("{:>9} {:>9} {:>8} {:>9} {:>11} {:>8} {:>7}".format(*names), flush=True)
    for negatives in settings.negatives:
        rows.append(row := negatives_row(settings, model, negatives, device))
        row["flops"] = 4 * weights * row["examples_per_second"] * row["computed"]
        if first:
            cells = f"{negatives:>9} {row['examples']:>9} {row['apart']:>8.1f}"
            cells += f" {row['computed']:>9.1f} {row['examples_per_second']:>11.3f}"
            print(f"{cells} {row['flops'] / 1e12:>8.3f} {row['fill']:>7.1%}", flush=True)
    return rows


def negatives_row(
    settings: Settings, model: Llama, negatives: int, device: torch.device
) -> dict[str, float]:
    """Return the examples of a step, their tokens and the speed; a graph's memory is freed."""
    ours = Ours(settings, model, settings.trees(negatives, device), device)
    rate, filling, n = ours.measure(settings.repeats), ours.filling(), len(ours.examples)
    tokens = {"apart": sum(map(len, ours.examples)) / n, "computed": filling.tokens / n}
    row = {"negatives": negatives, "examples": n, **tokens}
    return row | {"examples_per_second": rate, "fill": filling.share}


if __name__ == "__main__":
    run_script(main)

"""Where the time of a step goes: the GPU's by kind of kernel, and the host's.

    python -m bench.profile --shape 100m --what train
    python -m bench.profile --shape 100m --what train --no-cuda-graphs
    python -m bench.profile --shape llama-2-7b --layers 8 --what score --kernels 10

A step is an optimizer step of bench.train, or the scoring of some users of bench.score. Its time is
measured without the profiler, which slows the host down; what the GPU computes is measured with it.
On a CPU the same table is made of torch's operators, each with its own time alone.

The floor is what the step has to take at the least. FLOP: those of the matrices, of the output head
and of attention's visible pairs, at the rate of a large matrix product in 16 bit, on a CPU in fp32.
Bytes: weights once in each pass over a pack, and the inputs and outputs of every product and of
attention, at a copy's rate; so norms, rotation, activation and dropout count as fused into what
they stand beside.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch

from bench import common, score, train
from bench.common import (
    CANDIDATES,
    ceiling,
    copy_rate,
    covered,
    device_name,
    make_models,
    random_trees,
    seconds,
)
from launch.command import option, parse_settings
from launch.numbers import natural, positive
from launch.processes import join_processes, run_script
from llama import Config
from ops.packs import Pack

# The first kind whose pattern is found in the name of a kernel, or of an operator.
KERNELS = {
    "FlexAttention backward": r"flex_attention_backward",
    "FlexAttention forward": r"triton_tem_.*flex_attention",
    "matrix products": r"nvjet|gemm|gemv|cutlass|cublas|splitK|xmma|triton_(tem|mm).*mm",
    "optimizer": r"multi_tensor_apply|adam|lpnorm",
    "copies": r"^Mem(cpy|set)|direct_copy|CatArrayBatchedCopy",
    "loss": r"SoftMax|softmax|exp_kernel|scatter|gather|nll",
    "fused elementwise": r"^triton_(poi|red|per)_",
}
OPERATORS = {
    "attention backward": r"scaled_dot_product\w*_backward|flash_attention\w*_backward",
    "attention forward": r"scaled_dot_product|flash_attention",
    "matrix products": r"^aten::(mm|addmm|bmm|matmul|linear|dot)$",
    "optimizer": r"Optimizer|_foreach|_fused_adam|lerp|addc(mul|div)|linalg|::sqrt",
    "copies": r"aten::(copy_|_to_copy|clone|cat|contiguous|index_select|fill_|zero_|embedding)",
    "loss": r"softmax|scatter|gather|exp_|nll",
    "elementwise": r"aten::(mul|add|sub|div|neg|silu|sigmoid|\w*norm|roll|cos|sin|\w*dropout"
    r"|bernoulli|rsqrt|pow|mean|sum)",
}
LAUNCH = r"^cu(da)?(GraphLaunch|Launch|Memcpy|Memset)"
WAIT = r"^cu(da)?\w*Synchronize"


@dataclass(frozen=True)
class Settings(common.PackSettings):
    """The flags."""

    what: str = option("train", "what a step does", choices=("train", "score"))
    users: int | None = option(None, "users in a step (unset: 32 on GPUs, 4 on CPUs)", positive)
    steps: int = option(4, "steps to time and to profile together", positive)
    kernels: int = option(0, "longest kernels to list by name", natural)


# ---- What a step does


class Work(NamedTuple):
    """A function that makes a given number of steps, and the packs of one."""

    steps: Callable[[int], object]
    packs: list[Pack]
    examples: int


def make_work(settings: Settings, device: torch.device, dtype: torch.dtype) -> Work:
    """Return the step that bench.train or bench.score times."""
    shared = {f.name: getattr(settings, f.name) for f in fields(common.PackSettings)}
    users = settings.users or (32 if device.type == "cuda" else 4)
    model, _ = make_models(settings, device, dtype, peer=False)
    if settings.what == "score":
        made = score.Settings(**shared, users=users)
        scorer, trees = score.Ours.of(made, model, device), random_trees(made, users, CANDIDATES)

        def score_often(times: int) -> None:
            for _ in range(times):
                scorer.score(trees)

        return Work(score_often, list(scorer.packs(trees)), users * CANDIDATES)

    made = train.Settings(**shared, users=users)
    train.make_trainable(made, model, device)
    trainer = train.Ours(made, model, made.trees(1, device), device)
    return Work(trainer.step, trainer.make().packs, len(trainer.examples))


@dataclass(frozen=True)
class Cost:
    """What a step has to compute, in FLOP, and to read and write, in bytes."""

    products: float
    attention: float
    head: float
    bytes: float

    @property
    def flops(self) -> float:
        """All FLOP."""
        return self.products + self.attention + self.head

    @classmethod
    def of(cls, config: Config, packs: Sequence[Pack], what: str, itemsize: int) -> "Cost":
        """Return what the packs cost; itemsize: bytes of a weight and of an activation."""
        c, d, layers = config.hidden_size, config.head_dim, config.num_hidden_layers
        q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
        up = (c, config.intermediate_size)
        shapes = [(c, q), (c, kv), (c, kv), (q, c), up, up, up[::-1]]  # of a layer's matrices
        weights = layers * sum(a * b for a, b in shapes)
        sides = layers * sum(a + b for a, b in shapes)

        tokens = sum(pack.tokens for pack in packs)
        pairs = sum(map(visible_pairs, packs))
        learn = what == "train"
        passes, again = (2, 3.5) if learn else (1, 1)  # attention's backward has 5 products to 2
        skipped = targets = 0.0
        if learn:
            targets = sum(int((pack.weights > 0).sum()) for pack in packs)  # others are padding
        else:  # the last layer's second half is computed for the candidates' last tokens alone
            rest = tokens - sum(len(pack.leaves) for pack in packs)
            skipped = rest * sum(a * b for a, b in shapes[3:])

        head = c * config.vocab_size  # read for the logits, and for the gradient of its input
        moved = passes * (len(packs) * weights + tokens * (sides + layers * 2 * (q + kv)))
        return cls(
            products=2.0 * passes * (weights * tokens - skipped),
            attention=4.0 * again * layers * q * pairs,
            head=4.0 * head * targets,
            bytes=itemsize * (moved + (2 * len(packs) * head if learn else 0)),
        )


def visible_pairs(pack: Pack) -> int:
    """Return how many pairs of a query and a key attention has to compute, without padding."""
    # A key is seen by the queries from its own row up to its end.
    ends = pack.ends[: pack.tokens].clamp(max=pack.tokens)
    return int((ends - torch.arange(pack.tokens)).sum())


# ---- What was seen


class Event(NamedTuple):
    """A kernel, an operator, or a call of the host to the GPU's driver; times in seconds."""

    name: str
    start: float
    end: float
    own: float  # without what it calls
    on_gpu: bool


def observed(make: Callable[[int], object], steps: int, device: torch.device) -> list[Event]:
    """Return the profiler's events of some steps."""
    gpu = device.type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if gpu else activities.CPU]) as profile:
        make(steps)
        if gpu:
            torch.cuda.synchronize()

    events = []
    for event in profile.events():
        on_gpu = event.device_type.name == "CUDA"
        if not getattr(event, "is_user_annotation", False):
            span = event.time_range
            own = span.elapsed_us() if on_gpu or gpu else event.self_cpu_time_total
            events.append(Event(event.name, span.start / 1e6, span.end / 1e6, own / 1e6, on_gpu))
    return events


class Row(NamedTuple):
    """The time and the number of some kernels or operators."""

    seconds: float
    count: int


def kind_of(name: str, kinds: dict[str, str]) -> str:
    """Return the kind of a kernel or operator; "other" if it fits none."""
    return next((kind for kind, wanted in kinds.items() if re.search(wanted, name)), "other")


def grouped(events: Iterable[Event], group_of: Callable[[str], str]) -> dict[str, Row]:
    """Return time and number of the events by the group of their name, the longest first."""
    found: dict[str, Row] = {}
    for event in events:
        before = found.get(group := group_of(event.name), Row(0.0, 0))
        found[group] = Row(before.seconds + event.own, before.count + 1)
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


@dataclass(frozen=True)
class Seen:
    """Where the time of a step went, in seconds."""

    wall: float  # without the profiler
    busy: float  # the device computed
    kinds: dict[str, Row]
    names: dict[str, Row]  # by kernel
    launches: Row  # the host's calls that start something on the GPU
    waits: Row  # and those that wait for it

    @classmethod
    def of(cls, events: list[Event], steps: int, wall: float, gpu: bool) -> "Seen":
        """Return what the events of some steps say."""
        done = [event for event in events if event.on_gpu or not gpu]
        host = [event for event in events if gpu and not event.on_gpu]

        def a_step(rows: dict[str, Row]) -> dict[str, Row]:
            return {name: Row(s / steps, round(n / steps)) for name, (s, n) in rows.items()}

        kinds = KERNELS if gpu else OPERATORS
        calls = {"launch": LAUNCH, "wait": WAIT}
        called = a_step(grouped(host, partial(kind_of, kinds=calls)))
        return cls(
            wall=wall,
            busy=covered((event.start, event.end) for event in done) / steps,
            kinds=a_step(grouped(done, partial(kind_of, kinds=kinds))),
            names=a_step(grouped(done, str)),
            launches=called.get("launch", Row(0.0, 0)),
            waits=called.get("wait", Row(0.0, 0)),
        )


# ---- The table


def main() -> None:
    """Profile a step and print the table."""
    settings = parse_settings(Settings, __doc__)
    _, _, device = join_processes()
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    work = make_work(settings, device, dtype)
    cost = Cost.of(Config(**settings.fields), work.packs, settings.what, dtype.itemsize)
    work.steps(3)  # compiles, captures and lets the allocator settle
    n = settings.steps
    wall = seconds(partial(work.steps, n), device, settings.repeats) / n
    seen = Seen.of(observed(work.steps, n, device), n, wall, gpu)
    rates = ceiling(device, dtype), copy_rate(device)

    where = f"{settings.precision(dtype)} on {device_name(device, 1)}, torch {torch.__version__}"
    print(f"{settings.shape}, {settings.what}, {settings.work}, {where}")
    tokens, packs = sum(pack.tokens for pack in work.packs), len(work.packs)
    print(f"a step: {work.examples} examples, {tokens} tokens in {packs} packs")
    report(seen, cost, rates, gpu, settings.kernels)
    if settings.json:
        print(json.dumps({"seen": seen.__dict__, "cost": cost.__dict__, "rates": rates}))


def report(seen: Seen, cost: Cost, rates: tuple[float, float], gpu: bool, longest: int) -> None:
    """Print where the time went, and the floor; rates: FLOP/s and bytes/s of the device."""
    total = sum(row.seconds for row in seen.kinds.values())
    unit, during = ("kernels", "the GPU computes in") if gpu else ("operators", "they run in")
    print(f"\n{'':<26}{'ms':>10}{'share':>8}{unit:>12}")
    for kind, (took, count) in seen.kinds.items():
        print(f"{kind:<26}{1e3 * took:>10.2f}{took / total:>8.1%}{count:>12}")
    count = sum(row.count for row in seen.kinds.values())
    print(f"{'together':<26}{1e3 * total:>10.2f}{'':>8}{count:>12}\n")

    print(f"{'a step takes':<26}{1e3 * seen.wall:>10.2f}")
    print(f"{during:<26}{1e3 * seen.busy:>10.2f}{seen.busy / seen.wall:>8.1%}")
    if gpu:
        for name, (took, n) in (("launching", seen.launches), ("waiting", seen.waits)):
            print(f"{f'the host is {name}':<26}{1e3 * took:>10.2f}{took / seen.wall:>8.1%}{n:>12}")

    limits = cost.flops / rates[0], cost.bytes / rates[1]
    parts = ", ".join(
        f"{name} {part / cost.flops:.0%}" for name, part in vars(cost).items() if name != "bytes"
    )
    print(f"\n{'the floor':<26}{1e3 * max(limits):>10.2f}{max(limits) / seen.wall:>8.1%}")
    print(f"{'  its FLOP':<26}{1e3 * limits[0]:>10.2f}  {cost.flops / 1e12:.3f} TFLOP ({parts})")
    print(f"{'':<38}at {rates[0] / 1e12:.3f} TFLOP/s")
    print(f"{'  its bytes':<26}{1e3 * limits[1]:>10.2f}  {cost.bytes / 1e9:.2f} GB", end=" ")
    print(f"at {rates[1] / 1e9:.1f} GB/s", flush=True)
    for name, (took, n) in list(seen.names.items())[:longest]:
        print(f"{1e3 * took:>10.2f} ms{n:>8}  {name[:76]}")


if __name__ == "__main__":
    run_script(main)

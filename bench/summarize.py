"""Time greedy generation: here, and transformers' generate at several batch sizes.

    python -m bench.summarize --shape 100m                      # fp32 on a CPU, bf16 on a GPU
    python -m bench.summarize --shape llama-2-7b --batch-size 96 --batches 1 32 64
    python -m bench.summarize --shape llama-2-7b --prompt-tokens 700 700 --new-tokens 128 128
    python -m bench.summarize --shape llama-30b --int8 --peer-layers 6
    torchrun --nproc_per_node 2 -m bench.summarize --shape llama-2-7b      # this project alone

Prompts have 300 to 1,200 tokens, of which the first 100 are the instruction, and outputs have 40 to
150, about as much as real ones vary. Random weights never end a text, so the length of each output
is given. A batch of transformers holds prompts of similar length and runs until its longest output
is written; tokens beyond an output's own length do not count. Bytes are those of the layers'
matrices once per step, and of the keys and values in use. With --int8, this project uses its int8
weights and transformers uses bitsandbytes' LLM.int8.
"""

import gc
import json
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from bench import common
from bench.common import (
    INSTRUCTION,
    copy_rate,
    device_name,
    layer_matrices,
    make_models,
    padded_left,
    seconds,
)
from launch.command import option, parse_settings
from launch.estimate import rows_that_fit
from launch.numbers import positive, real
from launch.processes import gather, join_processes, ranks, run_script, share_out
from llama import Llama, compile_layers
from ops.fp8 import use_fp8
from ops.int8 import bitsandbytes_linear, quantized, replace_linears
from ops.packs import common_prefix
from summarize import PREFILL_TOKENS, Generator, Row
from trsr import InputError


@dataclass(frozen=True)
class Settings(common.Settings):
    """The flags."""

    prompts: int | None = option(
        None, "prompts that this project answers (unset: four batches)", positive
    )
    prompt_tokens: tuple[int, int] = option(
        (300, 1200), "fewest and most tokens of a prompt", positive, nargs=2
    )
    new_tokens: tuple[int, int] = option(
        (40, 150), "fewest and most tokens of an output", positive, nargs=2
    )
    batch_size: int | None = option(
        None, "rows that decode together (unset: as in summarize.py)", positive
    )
    batches: tuple[int, ...] | None = option(
        None,
        "batch sizes of the peer (unset: 1 32 64 on GPUs, 1 8 16 on CPUs)",
        positive,
        nargs="+",
    )
    peer_layers: int | None = option(
        None, "layers to leave in the peer's model; its times are scaled up (unset: all)", positive
    )
    int8: bool = option(False, "8-bit weights on both sides")
    threshold: float = option(6.0, "bitsandbytes' threshold for outliers", real)
    no_peer: bool = option(False, "this project alone")


class Prompt(NamedTuple):
    """A prompt, and how many tokens its output has."""

    ids: list[int]
    new: int


Written = dict[int, list[int]]  # the output of each prompt, by its number


def random_prompts(settings: Settings, n: int) -> list[Prompt]:
    """Return n prompts of random tokens, the longest first; seeded."""
    rng = random.Random(f"bench {settings.seed}")

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, settings.vocabulary) for _ in range(n)]

    instruction = tokens(INSTRUCTION)
    sizes = []
    for _ in range(n):
        sizes.append((rng.randint(*settings.prompt_tokens), rng.randint(*settings.new_tokens)))
    prompts = [Prompt(instruction + tokens(size - INSTRUCTION), new) for size, new in sizes]
    return sorted(prompts, key=lambda prompt: -len(prompt.ids))


# ---- This project


class MeasuredGenerator(Generator):
    """Ends each text at its given length, and counts what decoding reads.

    Keys are (number, length).
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.reset()

    def reset(self) -> None:
        """Start counting again."""
        self.steps = self.cached = 0  # decoding steps, and the slots that they read
        self.decoding = 0.0  # seconds

    def ending(self, row: Row) -> str | None:
        """Return how the row ends: by its length."""
        _, length = row.key
        return "limit" if len(row.tokens) == length else None

    def _decode(self) -> list[int]:
        began = time.perf_counter()
        tokens = super()._decode()
        self.decoding += time.perf_counter() - began
        self.steps += 1
        self.cached += sum(row.length + 1 for row in self.rows)
        return tokens

    def write(self, prompts: dict[int, Prompt]) -> Written:
        """Return the outputs of numbered prompts."""
        self.reset()
        self.submit([((i, prompt.new), prompt.ids) for i, prompt in prompts.items()])
        written: Written = {}
        while len(written) < len(prompts):
            written |= {number: tokens for (number, _), tokens in self.step()}
        return written

    def bytes_per_second(self) -> float:
        """Return the rate at which decoding reads weights, keys and values."""
        head, config = self.model.lm_head.weight, self.model.config
        weights = sum(p.numel() * p.itemsize for p in layer_matrices(self.model))
        weights += head.numel() * head.itemsize
        heads = config.num_key_value_heads * config.head_dim
        slot = 2 * len(self.model.model.layers) * heads * head.itemsize
        return (self.steps * weights + self.cached * slot) / self.decoding


# ---- transformers


@torch.inference_mode()
def write_batches(model, prompts: list[Prompt], batch: int, device: torch.device) -> Written:
    """Return the outputs of transformers, `batch` prompts at a time."""
    written: Written = {}
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        longest = max(len(prompt.ids) for prompt in part)
        ids, mask = padded_left([prompt.ids for prompt in part], longest, device)
        options = {"max_new_tokens": max(prompt.new for prompt in part), "do_sample": False}
        out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        rows = out[:, longest:].tolist()
        for i, (row, prompt) in enumerate(zip(rows, part, strict=True)):
            written[start + i] = row[: prompt.new]
    return written


def chosen(n: int, batch: int) -> list[int]:
    """Return which prompts to use for a batch size: evenly spread, or a few of middle length."""
    if batch < 4:
        return list(range(n))[n // 2 :][:batch]
    return list(range(n))[:: max(1, n // batch)][:batch]


def measure_peer(
    model, prompts: list[Prompt], batch: int, device: torch.device
) -> tuple[float, Written]:
    """Return the new tokens/s of transformers, and its outputs."""
    short = [Prompt(ids, min(new, 8)) for ids, new in prompts]
    write_batches(model, short, batch, device)  # warm-up
    began = time.perf_counter()
    written = write_batches(model, prompts, batch, device)
    took = time.perf_counter() - began
    return sum(prompt.new for prompt in prompts) / took, written


def equal_share(a: Written, b: Written) -> float:
    """Return the mean share of b's tokens that a has too, up to the first that differs."""
    shares = [common_prefix((a[i], tokens)) / len(tokens) for i, tokens in b.items()]
    return sum(shares) / len(shares)


# ---- The comparison


@dataclass(frozen=True)
class Measured:
    """What was measured of this project: time and tokens of all processes, the rest of this one."""

    rows: int
    prompts: int
    tokens: int  # written
    seconds: float
    steps: int
    decoding: float  # seconds
    bytes_per_second: float
    copy: float  # a copy's bytes per second

    @property
    def tokens_per_second(self) -> float:
        """The new tokens per second."""
        return self.tokens / self.seconds

    def record(self) -> dict:
        """Return what the JSON object reports."""
        return {
            "rows": self.rows,
            "prompts": self.prompts,
            "tokens_per_second": self.tokens_per_second,
            "ms_a_step": 1000 * self.decoding / self.steps,
            "decoding_share": self.decoding / self.seconds,
            "bytes_per_second": self.bytes_per_second,
            "copy": self.copy,
        }


def main() -> None:
    """Print the new tokens/s of each, their ratios, and how close decoding is to a copy's rate."""
    settings = parse_settings(Settings, __doc__)
    if settings.int8 and settings.fp8:
        raise InputError("--int8 and --fp8: the matrices are held in one of them, choose one")
    rank, world, device = join_processes()
    gpu, peer = device.type == "cuda", not settings.no_peer and world == 1
    dtype = torch.bfloat16 if gpu else torch.float32
    ours, theirs = make_models(settings, device, dtype, peer)
    prepare_models(settings, ours, theirs, device)

    slots = settings.prompt_tokens[1] + settings.new_tokens[1]
    rows = settings.batch_size or rows_that_fit(ours, slots, PREFILL_TOKENS, device)
    prompts = random_prompts(settings, settings.prompts or 4 * rows * world)
    generator = MeasuredGenerator(ours, rows, settings.new_tokens[1], (), slots if gpu else 0)
    measured, written = measure_ours(settings, generator, prompts, device)
    if rank > 0:
        return
    kind = "int8" if settings.int8 else settings.precision(dtype)
    report_ours(measured, f"{settings.shape}, {kind} on {device_name(device, world)}", world)

    del generator
    gc.collect()
    torch.cuda.empty_cache()  # the cache's rows make room for the peer
    rates = {}
    if peer:
        speed = measured.tokens_per_second
        rates = measure_peers(settings, theirs, prompts, written, speed)
    if settings.json:
        about = {"shape": settings.shape, "kind": kind, "torch": torch.__version__}
        print(json.dumps(about | measured.record() | {"peers": rates}))


def prepare_models(settings: Settings, ours: Llama, theirs, device: torch.device) -> None:
    """Cut the peer's layers, quantize both models, and compile this project's."""
    if settings.peer_layers and theirs is not None:
        theirs.model.layers = theirs.model.layers[: settings.peer_layers]
        theirs.config.num_hidden_layers = settings.peer_layers
    if settings.int8:  # after the cut, since all layers may not fit in 16 and 8 bit at once
        replace_linears(ours, quantized)
    if settings.fp8:
        use_fp8(ours, "scoring")
    if settings.int8 and theirs is not None:
        replace_linears(theirs, partial(bitsandbytes_linear, threshold=settings.threshold))
        theirs.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        compile_layers(ours)


def measure_ours(
    settings: Settings, generator: MeasuredGenerator, prompts: list[Prompt], device: torch.device
) -> tuple[Measured, Written]:
    """Return what was measured, and this process's outputs."""
    # A token that is written costs about as much as reading eight.
    sizes = [len(prompt.ids) + 8 * prompt.new for prompt in prompts]
    rank, world = ranks()
    mine = {i: prompts[i] for i in sorted(share_out(sizes, world)[rank])}
    took = seconds(lambda: gather(generator.write(mine)), device, settings.repeats)
    written = generator.write(mine)
    measured = Measured(
        rows=generator.n_rows,
        prompts=len(prompts),
        tokens=sum(prompt.new for prompt in prompts),
        seconds=took,
        steps=generator.steps,
        decoding=generator.decoding,
        bytes_per_second=generator.bytes_per_second(),
        copy=copy_rate(device),
    )
    return measured, written


def report_ours(measured: Measured, what: str, world: int) -> None:
    """Print this project's part of the table."""
    found, peak = measured.record(), ""
    if torch.cuda.is_available():
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    print(f"{what}, torch {torch.__version__}{peak}")
    name = f"ours, {measured.rows} rows" + (" a GPU" if world > 1 else "")
    speed = f"{measured.tokens_per_second:>9.1f} new tokens/s"
    print(f"{name:<28}{speed}, {measured.prompts / measured.seconds:.2f} prompts/s")
    steps = f"{measured.steps} steps of {found['ms_a_step']:.2f} ms"
    print(f"{steps}, {found['decoding_share']:.0%} of the time; they read")
    read, limit = measured.bytes_per_second, measured.copy
    share = f"{read / limit:.0%} of a copy's {limit / 1e9:.1f} GB/s"
    print(f"{read / 1e9:.1f} GB/s, {share}", flush=True)


def measure_peers(
    settings: Settings, model, prompts: list[Prompt], written: Written, ours: float
) -> dict[int, float]:
    """Return the new tokens/s of transformers by batch size, and print a line for each.

    written, ours: this project's outputs and its new tokens/s. Raises InputError if outputs in fp32
    differ.
    """
    device, rates = model.device, {}
    sizes = settings.batches or ([1, 32, 64] if device.type == "cuda" else [1, 8, 16])
    scale, note = 1.0, ""
    if settings.peer_layers:
        scale = settings.peer_layers / settings.fields["num_hidden_layers"]
        note = f"from {settings.peer_layers} layers"
    for batch in sizes:
        numbers = chosen(len(prompts), batch)
        try:
            rate, theirs = measure_peer(model, [prompts[i] for i in numbers], batch, device)
        except torch.OutOfMemoryError:
            print(f"a batch of {batch} does not fit")
            continue
        rates[batch] = rate = rate * scale
        equal = equal_share({j: written[i] for j, i in enumerate(numbers)}, theirs)
        name, ratio = f"transformers, {batch} a batch", f"ours is {ours / rate:.1f} times as fast"
        line = f"{name:<28}{rate:>9.1f} new tokens/s   {ratio}"
        print(f"{line}; {note or f'{equal:.1%} of the tokens equal'}", flush=True)
        exact = model.dtype is torch.float32 and not (settings.int8 or settings.fp8)
        if exact and equal < 1:
            raise InputError("the tokens differ, so the times mean nothing")
    return rates


if __name__ == "__main__":
    run_script(main)

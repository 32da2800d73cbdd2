"""Run summarize, train and evaluate one after the other; print the time and peak memory of each.

    python -m bench.chain --data data/mind --shape llama-2-7b --tokenizer tokenizer.model \\
        --out runs/chain

The model has the given shape and random weights, so this shows whether a size runs and what it
takes, not what it learns.
"""

import re
import subprocess
import sys
import time
from argparse import SUPPRESS
from dataclasses import dataclass
from pathlib import Path

from bench.shapes import SHAPES
from launch.command import option, parse_settings, run_main
from launch.numbers import positive
from trsr import InputError


@dataclass(frozen=True)
class Settings:
    """The flags."""

    data: Path = option(SUPPRESS, "dataset folder made by prepare", Path, required=True)
    shape: str = option(SUPPRESS, "shape of the model's layers", choices=SHAPES, required=True)
    layers: int | None = option(None, "number of layers (unset: the shape's)", positive)
    tokenizer: Path = option(SUPPRESS, "the model's tokenizer.model", Path, required=True)
    out: Path = option(SUPPRESS, "folder for the model and the run", Path, required=True)
    dtype: str = option("bf16", "type of the weights", choices=("bf16", "fp32"))
    epochs: int = option(1, "epochs of train.py", positive)
    batch_size: int = option(32, "prompts that summarize.py decodes together", positive)
    max_new_tokens: int = option(150, "longest summary, in tokens", positive)
    int8: bool = option(False, "summarize with 8-bit weights")


@dataclass(frozen=True)
class Took:
    """What a stage took: seconds, and the peak memory that it reports."""

    name: str
    seconds: float
    peak: str


def run_stage(name: str, *arguments: object) -> Took:
    """Run a module as a command and show its output; InputError if it fails."""
    command, start = [name, *map(str, arguments)], time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    print(f"--- {' '.join(command)}\n{done.stdout}", flush=True)
    if done.returncode:
        raise InputError(f"{name} failed with exit status {done.returncode}")
    peak = re.search(r"peak (.*)$", done.stdout, re.MULTILINE)
    return Took(name, seconds, peak.group(1) if peak else "")


def main() -> None:
    """Run the chain."""
    settings = parse_settings(Settings, __doc__)
    model, run = settings.out / "model", settings.out / "run"
    dtype = ["--dtype", settings.dtype]
    shape = ["--shape", settings.shape, "--tokenizer", settings.tokenizer, *dtype]
    if settings.layers:
        shape += ["--layers", settings.layers]
    summary = ["--data", settings.data, "--model", model, "--run", run, *dtype]
    summary += ["--batch-size", settings.batch_size, "--max-new-tokens", settings.max_new_tokens]
    if settings.int8:
        summary.append("--int8")

    stages = [
        run_stage("bench.random_model", *shape, "--out", model),
        run_stage("summarize", *summary),
        run_stage("train", "--run", run, *dtype, "--epochs", settings.epochs),
        run_stage("evaluate", "--run", run),
    ]
    for took in stages:
        print(f"{took.name:<20}{took.seconds:>8.1f} s   {took.peak}")


if __name__ == "__main__":
    run_main(main)

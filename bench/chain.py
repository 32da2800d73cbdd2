"""Run summarize, train and evaluate one after the other and print time and peak memory of each.

    python -m bench.chain --data data/mind --shape llama-2-7b --tokenizer tokenizer.model --out runs/chain

The model has the given shape and random weights: this shows that a size runs and what it takes, not what it learns.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from bench.random_model import SHAPES
from launch.command import positive, run_main
from trsr import InputError


def stage(name: str, *arguments: object) -> tuple[str, float, str]:
    """Run a module as a command, showing its output; return its name, seconds and the peak that it reports."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", name, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    seconds = time.perf_counter() - start
    print(f"--- {name} {' '.join(map(str, arguments))}\n{done.stdout}", flush=True)
    if done.returncode:
        raise InputError(f"{name} failed with exit status {done.returncode}")
    peak = re.search(r"peak (.*)$", done.stdout, re.MULTILINE)
    return name, seconds, peak.group(1) if peak else ""


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=positive, help="another number of layers")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--batch-size", type=positive, default=32, help="of summarize.py")
    parser.add_argument("--max-new-tokens", type=positive, default=150)
    parser.add_argument("--int8", action="store_true", help="summarize with 8-bit weights")
    args = parser.parse_args()
    model, run = args.out / "model", args.out / "run"
    layers = ["--layers", args.layers] if args.layers else []
    shape = ["--shape", args.shape, *layers, "--tokenizer", args.tokenizer, "--dtype", args.dtype]
    summary = ["--data", args.data, "--model", model, "--run", run, "--dtype", args.dtype]
    summary += ["--batch-size", args.batch_size, "--max-new-tokens", args.max_new_tokens]
    stages = [
        stage("bench.random_model", *shape, "--out", model),
        stage("summarize", *summary, *(["--int8"] if args.int8 else [])),
        stage("train", "--run", run, "--dtype", args.dtype, "--epochs", args.epochs),
        stage("evaluate", "--run", run),
    ]
    for name, seconds, peak in stages:
        print(f"{name:<20}{seconds:>8.1f} s   {peak}")


if __name__ == "__main__":
    run_main(main)

"""metrics.jsonl: a line per training step and per epoch."""

from pathlib import Path

from files.jsonl import read_jsonl, write_jsonl


def drop_lines_after(run: Path, step: int, epoch: int) -> None:
    """Remove the lines after a checkpoint: their steps and validations are done again."""
    path, lines = run / "metrics.jsonl", []
    if path.is_file():
        lines = [r for _, r in read_jsonl(path, {"step": int, "epoch": int}, torn=True)]
    lines = [r for r in lines if r["step"] <= step]
    lines = [r for r in lines if "validation" not in r or r["epoch"] <= epoch]
    write_jsonl(path, lines)

"""Learning rates and ranks, chosen on the validation split by one rule for all methods.

One flag is chosen after the other, in the order of the grid: first a learning rate with the first
rank, then a rank with that learning rate. All values of a flag are trained with the first seed. The
one with the highest sum of validation recalls is taken, of equal ones the first. The sum is over
the cut-offs that the trainer validates with, at the epoch that it keeps. All seeds are run with
what was chosen, and the table shows only those runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from experiments.stages import Stage
from files.jsonl import read_json, read_jsonl
from trsr import InputError

NAMES = {"--lr": "learning rate", "--lora-r": "rank"}


@dataclass(frozen=True)
class Choice:
    """Values of the flags that are chosen from, such as (("--lr", 0.001),)."""

    values: tuple[tuple[str, float], ...] = ()

    @property
    def flags(self) -> list[object]:
        """The values as flags."""
        return [part for pair in self.values for part in pair]

    @property
    def names(self) -> list[str]:
        """The flags alone."""
        return [name for name, _ in self.values]

    def without(self, i: int) -> tuple[tuple[str, float], ...]:
        """Return all values but the one at index i."""
        return self.values[:i] + self.values[i + 1 :]

    @property
    def label(self) -> str:
        """The values as a part of a folder's name, such as `lr0.001-r8`; empty without any."""
        return "-".join(f"{name.split('-')[-1]}{value:g}" for name, value in self.values)

    def __str__(self) -> str:
        return ", ".join(f"{NAMES[name]} {value:g}" for name, value in self.values)


DEFAULTS = (Choice(),)  # nothing to choose: the trainers' own defaults


def combinations(grid: dict[str, Sequence]) -> list[Choice]:
    """Return all combinations of the flags' values; flags without values are left out."""
    named = [[(flag, value) for value in dict.fromkeys(grid[flag])] for flag in grid if grid[flag]]
    return [Choice(values) for values in product(*named)]


def recall_of(training: Stage) -> float:
    """Return the sum of validation recalls of a finished training, at the epoch that was kept."""
    if training.script != "train.py":
        path = training.run / "results.json"
        return recall_sum(path, read_json(path))
    path = training.run / "metrics.jsonl"
    sums = [recall_sum(where, r) for where, r in read_jsonl(path, {}) if "validation" in r]
    if not sums:
        way = f"remove {training.run} to have it made again"
        raise InputError(f"{path}: no line with field 'validation'; {way}")
    return max(sums)


def recall_sum(where: str | Path, record: dict) -> float:
    """Return the sum of a record's field `validation`; InputError unless it has recalls."""
    found = record.get("validation")
    values = list(found.values()) if isinstance(found, dict) else []
    if not values or not all(isinstance(value, float | int) for value in values):
        raise InputError(f"{where}: field 'validation': expected recalls by name")
    return sum(values)


def choose(
    choices: Sequence[Choice], recall: Callable[[Choice], float | None]
) -> tuple[list[Choice], Choice | None]:
    """Return the choices to try, as far as they are known, and the best one; None until it is.

    recall: the validation recalls of a choice; None until it has been tried.
    """
    best = choices[0]
    tried = [best]
    for i in range(len(best.values)):
        fixed = best.without(i)
        line = [choice for choice in choices if choice.without(i) == fixed]
        if len(line) == 1:
            continue  # nothing to choose

        tried += [choice for choice in line if choice not in tried]
        recalls = [recall(choice) for choice in line]
        if None in recalls:
            return tried, None
        best = line[recalls.index(max(recalls))]
    return tried, best

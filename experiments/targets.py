"""What every position as a target is worth, at equal examples and at equal time; not in the paper.

    python -m experiments.targets --trainings last all:1        # the demo, with models/tiny
    python -m experiments.targets --data data/games --trainings last all:1 last:4 last:14 \\
        --summarizer OWNER/MODEL --recommender OWNER/MODEL --seeds 0 1 2

A training is the positions of a user to learn from (train.py --targets: last, all or a number) and,
after a colon, its epochs (unset: those of --train). Choose them with --dry-run, which prints the
tokens of each. A user has about as many positions as items, so `last` with so many more epochs sees
as many examples as `all`. Below the table is what each training took, and how it differs from the
first one of its kind of prompt, user by user. Writes OUT/targets.md, OUT/targets.svg and
OUT/results.json. Runs are shared with the rows NAME+positions of experiments.table2.
"""

import statistics
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass

from batches.positions import Targets as Positions
from experiments.common import MODEL, SUMMARIZER, Experiment, run_command
from experiments.jobs import TOKENS
from experiments.rows import Row
from experiments.runs import LAST, LanguageModel, TunedSettings, language_model_run
from experiments.stages import SECONDS, Stage
from experiments.table2 import NAMES
from experiments.tables import table_line
from files.jsonl import read_json, read_jsonl
from launch.command import option, parse_settings
from launch.numbers import count_or, positive
from trsr import Example

ROWS = ("recent-only", "whole-history", "hierarchical", "recurrent")


@dataclass(frozen=True)
class Training:
    """The positions to learn from, as train.py --targets takes them, and the epochs if given."""

    targets: str
    epochs: int | None = None

    def __str__(self) -> str:
        return self.targets + (f":{self.epochs}" if self.epochs else "")

    @property
    def title(self) -> str:
        """What a table says of it."""
        kind = f"{self.targets} position" if self.targets == LAST else f"{self.targets} positions"
        if self.epochs is None:
            return kind
        return f"{kind}, {self.epochs} epoch{'' if self.epochs == 1 else 's'}"


def training(text: str) -> Training:
    """Return what a word of --trainings says; ArgumentTypeError if it says nothing."""
    targets, colon, epochs = text.partition(":")
    try:
        count_or(targets, last=1, all=2)
        return Training(targets, positive(epochs) if colon else None)
    except ArgumentTypeError as error:
        form = "expected last, all or a number, and if wanted :EPOCHS"
        raise ArgumentTypeError(f"{form}, not {text!r} ({error})") from None


@dataclass(frozen=True)
class Settings(TunedSettings):
    """The flags."""

    trainings: tuple[Training, ...] = option(
        (Training(LAST), Training("all", 1)),
        "positions to learn from, and epochs, such as last:14 or all:1; the first is compared with",
        training,
        group="rows",
        nargs="+",
    )
    rows: tuple[str, ...] = option(ROWS, "kinds of prompts", choices=ROWS, nargs="+")
    summarizer: str | None = option(None, SUMMARIZER)
    recommender: str | None = option(None, MODEL)


class Targets(Experiment):
    """Rows of several trainings, and what each of them took."""

    def parts(self, rows: list[Row]) -> list[str]:
        """Return the paragraphs of the text, with a second table."""
        table, notes, compared = self.costs(rows), self.notes(rows), super().parts(rows)
        return [compared[0], *notes, table, compared[-1]]

    def costs(self, rows: Sequence[Row]) -> str:
        """Return a table of what the trainings took."""
        lines = [table_line(["", "examples", "tokens", "tokens/s", "seconds of steps", "in all"])]
        lines.append("|---" * 6 + "|")
        for row in rows:
            found = [self.cost(trained(run)) for run in row.finished]
            means = [statistics.mean(column) for column in zip(*found, strict=True)]
            lines.append(table_line([row.name, *(f"{mean:,.0f}" for mean in means)]))
        how = "Seconds of steps: tokens divided by the median speed of the steps"
        return "\n".join(lines) + f"\n\n{how}. In all: with loading, compiling and validation."

    def cost(self, train: Stage) -> tuple[float, ...]:
        """Return a training's examples, tokens, tokens/s, and seconds of its steps and in all."""
        config = read_json(train.run / "config.json")["train"]
        users, epochs = self.splits["train"], config["epochs"]
        users = Positions(negatives=config.get("negatives")).limited(users)
        examples = epochs * sum(examples_of(user, config["targets"]) for user in users)
        tokens = epochs * read_json(train.run / TOKENS)[train.mark]
        steps = [line for _, line in read_jsonl(train.run / "metrics.jsonl", {})]
        speed = statistics.median(s["tokens_per_second"] for s in steps if "loss" in s)
        seconds = read_json(train.run / SECONDS)[train.mark]
        return examples, tokens, speed, tokens / speed, seconds


def trained(run: Sequence[Stage]) -> Stage:
    """Return the stage of a run that trains."""
    return next(stage for stage in run if stage.script == "train.py")


def examples_of(example: Example, most: int) -> int:
    """Return how many examples a user has with so many of the last positions as targets."""
    sequence, n = [*example.history, example.positive], len(example.history)
    places = [t for t in range(max(1, n + 1 - most), n) if sequence[t] not in sequence[:t]]
    return (1 + len(places)) * (1 + len(example.negatives))


def experiment_of(settings: Settings) -> Targets:
    """Return the experiment with its rows."""
    experiment = Targets("targets", settings)
    trainings = list(dict.fromkeys(settings.trainings))
    for key in dict.fromkeys(settings.rows):
        for each in trainings:
            more = f"--epochs {each.epochs}" if each.epochs else ""
            every = {"targets": each.targets, "more": more}
            model = LanguageModel.of(settings, key, settings.history_items, **every)
            found = experiment.runs(language_model_run, model)
            first = trainings[0].title
            against = {f"{first}, with the same kind of prompt": f"{NAMES[key]}: {first}"}
            name = f"{NAMES[key]}: {each.title}"
            row = Row(name, NAMES[key], each.title, found, against=against)
            experiment.rows.append(row)
    return experiment


def main() -> None:
    """Run every training of every kind of prompt; write the tables and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

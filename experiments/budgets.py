"""Do summaries help, when, and how much? Every kind of prompt within budgets of tokens.

    python -m experiments.budgets                               # the demo, with models/tiny
    python -m experiments.budgets --data data/office --budgets 256 512 1024 2048 --jobs 8 \\
        --summarizer OWNER/MODEL --recommender OWNER/MODEL --seeds 0 1 2

A prompt that is longer than the budget is cut by train.py --max-length: the whole history loses its
oldest items. A run that had to cut no prompt is shown for larger budgets too, where it would be the
same. Below the table are each row's differences from the whole history and from the recent items
within the same budget, user by user. Writes OUT/budgets.md, OUT/budgets.svg and OUT/results.json.
"""

from dataclasses import dataclass, replace

from experiments.common import MODEL, SUMMARIZER, Experiment, run_command
from experiments.rows import Row
from experiments.runs import RULE, LanguageModel, TunedSettings, language_model_run
from experiments.stages import split_flags
from launch.command import option, parse_settings
from launch.numbers import positive
from train import Settings as Training

WHOLE, RECENT = "whole-history", "recent-only"
ROWS = {
    WHOLE: "whole history",
    RECENT: "recent items only",
    "hierarchical": "hierarchical summary + recent",
    "recurrent": "recurrent summary + recent",
    "rule": "summary by rule + recent",
}
OTHERS = (ROWS[WHOLE], ROWS[RECENT])  # what all are compared with


@dataclass(frozen=True)
class Settings(TunedSettings):
    """The flags."""

    budgets: tuple[int, ...] = option(
        (256, 512, 1024, 2048), "tokens of the longest prompt", positive, "rows", nargs="+"
    )
    rows: tuple[str, ...] = option(tuple(ROWS), "kinds of prompts", choices=ROWS, nargs="+")
    summarizer: str | None = option(None, SUMMARIZER)
    recommender: str | None = option(None, MODEL)


def rows_of(experiment: Experiment, settings: Settings, key: str) -> list[Row]:
    """Return a kind of prompt's rows, one for each budget from the smallest."""
    paradigm = "hierarchical" if key == "rule" else key
    if key == "rule":
        settings = replace(settings, summarizer=RULE)
    rows: list[Row] = []
    for budget in sorted(set(settings.budgets)):
        # The trainer's own limit needs no flag, so such runs are shared with other experiments.
        limit = None if budget == Training.max_length else budget
        model = LanguageModel.of(settings, paradigm, settings.history_items, budget=limit)
        found = experiment.runs(language_model_run, model)
        against = {f"{what} within the same budget": f"{what}, {budget} tokens" for what in OTHERS}
        smaller = rows[-1] if rows else None
        name = f"{ROWS[key]}, {budget} tokens"
        rows.append(Row(name, budget, ROWS[key], found, smaller, against))
    return rows


def experiment_of(settings: Settings) -> Experiment:
    """Return the experiment with its rows."""
    split_flags("train", settings.train, ["--max-length"])  # it would not be the budget
    experiment = Experiment("budgets", settings, x_name="tokens of the longest prompt", log=True)
    kinds = [rows_of(experiment, settings, key) for key in dict.fromkeys(settings.rows)]
    # The smallest budgets come first, because larger ones wait for them.
    experiment.rows = [row for same_budget in zip(*kinds, strict=True) for row in same_budget]
    return experiment


def main() -> None:
    """Run every kind of prompt within every budget; write the table and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

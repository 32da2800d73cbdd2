"""Table 2 of the paper: every method on one dataset, with the paper's own values.

    python -m experiments.table2                                # the demo, with models/tiny
    python -m experiments.table2 --data data/mind --seeds 0 1 2 --nproc 8 \\
        --summarizer upstage/llama-30b-instruct-2048 --summarize=--int8 \\
        --recommender meta-llama/Llama-2-7b-hf --encoder google-bert/bert-base-uncased
    python -m experiments.table2 --data data/office --tune --jobs 8     # a small model, 8 at a time

After an interruption the same command resumes; with more rows or seeds it runs only the new ones.
The output of each stage is in a .log file in its run folder. Writes OUT/table2.md, OUT/table2.svg
and OUT/results.json. Below the table are the language models' differences from recent items only
and from the whole history, user by user.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baselines.models import MODELS
from experiments.common import MODEL, SUMMARIZER, Experiment, run_command
from experiments.rows import Row
from experiments.runs import (
    ALL,
    BaselineModel,
    LanguageModel,
    TunedSettings,
    baseline_run,
    language_model_run,
    model_of,
    untrained_run,
)
from experiments.tuning import Choice, combinations
from launch.command import option, parse_settings
from launch.numbers import positive, positive_real
from trsr import PARADIGMS, SUMMARIZED

POSITIONS, ALONE, UNTRAINED = "+positions", "-alone", "untrained"  # endings and names of rows
BASELINE_LRS = (3e-4, 1e-3, 3e-3)  # of --tune

NAMES = {
    UNTRAINED: "zero-shot, recent items",
    "recent-only": "recent items only",
    "whole-history": "TALLRec (whole history)",
    "hierarchical": "LLM-TRSR hierarchical",
    f"hierarchical{ALONE}": "hierarchical summary only",
    "recurrent": "LLM-TRSR recurrent",
    f"recurrent{ALONE}": "recurrent summary only",
    "none": "the candidate alone",
}
OWN = {name: name for name in PARADIGMS if name not in NAMES}  # yours: rows only if asked for
OWN |= {
    f"{name}{ALONE}": f"{name}, summary only"
    for name in OWN
    if name in SUMMARIZED and PARADIGMS[name] == "last"
}
BASELINES = {name: model.__name__ for name, model in MODELS.items()}
BASELINES |= {f"{key}{POSITIONS}": f"{name}, every position" for key, name in BASELINES.items()}
TITLES = BASELINES | NAMES | OWN
EVERY = {key + POSITIONS: f"{TITLES[key]}, every position" for key in PARADIGMS if key != "none"}
TITLES |= EVERY
ONCE = "the same row with one target a user"
AGAINST = {NAMES[key]: NAMES[key] for key in ("recent-only", "whole-history")}


@dataclass(frozen=True)
class Settings(TunedSettings):
    """The flags."""

    baseline_lrs: tuple[float, ...] = option(
        (), "learning rates to choose from for the baselines", positive_real, nargs="+"
    )
    positions_lrs: tuple[float, ...] = option(
        (),
        "likewise for the language models' rows NAME+positions (unset: --lrs)",
        positive_real,
        nargs="+",
    )
    positions_ranks: tuple[int, ...] = option(
        (), "ranks to choose from for these rows (unset: --ranks)", positive, nargs="+"
    )
    summarizer: str | None = option(None, SUMMARIZER, group="rows")
    recommender: str | None = option(None, MODEL)
    rows: tuple[str, ...] = option(
        tuple(key for key in BASELINES | NAMES if key != "none"),
        "besides random and popularity",
        choices=TITLES,
        nargs="+",
    )
    encoder: str | None = option(
        None, "of the items' texts, for the baselines (unset: llama:RECOMMENDER)"
    )
    baselines: str = option("", "more flags for the baselines", metavar="FLAGS")
    positions: str = option(
        "",
        "more flags for train.py in the rows NAME+positions, such as --positions='--epochs 1'",
        metavar="FLAGS",
    )

    def positions_grid(self) -> Sequence[Choice]:
        """Return what is chosen from for a language model that learns from every position."""
        lrs, ranks = self.positions_lrs or self.lrs, self.positions_ranks or self.ranks
        return replace(self, lrs=lrs, ranks=ranks).grid()

    def baseline_grid(self) -> Sequence[Choice]:
        """Return what is chosen from for a baseline, in order."""
        return combinations({"--lr": self.baseline_lrs or (BASELINE_LRS if self.tune else ())})


def baseline_row(experiment: Experiment, settings: Settings, key: str) -> Row:
    """Return the row of a baseline."""
    name = key.removesuffix(POSITIONS)
    encoder = settings.encoder or f"llama:{model_of(settings, 'recommender')}"
    model = BaselineModel(name, encoder, name != key, settings.baselines)
    found = experiment.runs(baseline_run, model, settings.baseline_grid())
    known = experiment.paper_row(key)  # the paper's learn from the last position
    return Row(TITLES[key], TITLES[key], choices=found, baseline=True, **known)


def language_model_row(experiment: Experiment, settings: Settings, key: str) -> Row:
    """Return the row of a language model."""
    shown = key.removesuffix(POSITIONS)
    items = 0 if shown.endswith(ALONE) else settings.history_items
    paradigm = "recent-only" if key == UNTRAINED else shown.removesuffix(ALONE)
    every = {"targets": ALL, "more": settings.positions} if shown != key else {}
    model = LanguageModel.of(settings, paradigm, items, **every)
    against = AGAINST | ({ONCE: TITLES[shown]} if shown != key else {})
    if key == UNTRAINED:
        # It is the same for all seeds, unless each has a model of its own.
        seeds = None if "{seed}" in model.recommender else experiment.settings.seeds[:1]
        found = experiment.runs(untrained_run, model, settings.grid()[:1], seeds)
    else:
        grid = settings.positions_grid() if every else settings.grid()
        found = experiment.runs(language_model_run, model, grid)
    known = experiment.paper_row(key)
    return Row(TITLES[key], TITLES[key], choices=found, against=against, **known)


def row_of(experiment: Experiment, settings: Settings, key: str) -> Row:
    """Return the row of a baseline or a language model."""
    make = baseline_row if key in BASELINES else language_model_row
    return make(experiment, settings, key)


def experiment_of(settings: Settings) -> Experiment:
    """Return the experiment with its rows."""
    experiment = Experiment("table2", settings)
    experiment.rows = [Row("random", "random"), Row("popularity", "popularity")]
    experiment.rows += [row_of(experiment, settings, key) for key in dict.fromkeys(settings.rows)]
    return experiment


def main() -> None:
    """Run the rows and write the table."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

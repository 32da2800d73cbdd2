"""Figure 9 of the paper: from 0 to 10 recent items in the prompt, in both paradigms.

    python -m experiments.figure9                               # the demo, with models/tiny
    python -m experiments.figure9 --data data/mind --nproc 8 --summarizer OWNER/MODEL \\
        --recommender OWNER/MODEL

Each paradigm's summaries are made once. With another experiment's --out, summaries and equal runs
are shared.
"""

from dataclasses import dataclass

from experiments import paper
from experiments.common import (
    MODEL,
    SUMMARIZER,
    Experiment,
    FigureSettings,
    run_command,
)
from experiments.rows import Row
from experiments.runs import LanguageModel, language_model_run
from launch.command import option, parse_settings
from launch.numbers import natural


@dataclass(frozen=True)
class Settings(FigureSettings):
    """The flags."""

    history_items: tuple[int, ...] = option(
        tuple(range(11)), "recent items in the prompt", natural, nargs="+"
    )
    summarizer: str | None = option(None, SUMMARIZER)
    recommender: str | None = option(None, MODEL)


def experiment_of(settings: Settings) -> Experiment:
    """Return the experiment with its rows."""
    experiment = Experiment("figure9", settings, x_name="recent items in the prompt")
    fewest = min(settings.history_items)
    for paradigm in settings.paradigms:
        against = {f"the same with {fewest}": f"{paradigm}, {fewest} items"}
        known = experiment.paper_row(paradigm)
        of_paper = {paper.HISTORY_ITEMS} if known["paper"] else set()
        for items in sorted({*settings.history_items, *of_paper}):
            runs, theirs = {}, known if items in of_paper else {}
            if items in settings.history_items:
                model = LanguageModel.of(settings, paradigm, items)
                runs = experiment.runs(language_model_run, model)
            more = theirs | {"against": against}
            experiment.rows.append(Row(f"{paradigm}, {items} items", items, paradigm, runs, **more))
    return experiment


def main() -> None:
    """Run every number of items; write the table and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

"""Figure 11 of the paper: summarizers of several sizes, judged by prompts without recent items.

    python -m experiments.figure11                              # the demo, with the embedded model
    python -m experiments.figure11 --data data/mind --summarizers SMALL LARGE \\
        --recommender OWNER/MODEL
"""

from dataclasses import dataclass

from experiments.common import MODEL, Experiment, FigureSettings, run_command
from experiments.runs import language_model_run
from experiments.tables import Row
from launch.command import option, parse_settings
from launch.numbers import natural


@dataclass(frozen=True)
class Settings(FigureSettings):
    """The flags."""

    history_items: int = option(0, "recent items in the prompt", natural)
    summarizers: tuple[str, ...] = option(("models/tiny",), MODEL, nargs="+")
    recommender: str = option("models/tiny", MODEL)


def main() -> None:
    """Run every summarizer; write the table and the figure."""
    settings = parse_settings(Settings, __doc__)
    experiment, rows = Experiment("figure11", settings), []
    for paradigm in settings.paradigms:
        for model in dict.fromkeys(settings.summarizers):
            values = paradigm, model, settings.recommender, settings.history_items
            runs = experiment.runs(language_model_run, *values)
            rows.append(Row(f"{paradigm}, {model}", model, paradigm, runs))
    experiment.finish(rows)


if __name__ == "__main__":
    run_command(main)

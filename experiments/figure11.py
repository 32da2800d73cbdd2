"""Figure 11 of the paper: summarizers of several sizes, judged by prompts without recent items.

    python -m experiments.figure11                              # the demo, with models/tiny
    python -m experiments.figure11 --data data/mind --summarizers SMALL LARGE \\
        --recommender OWNER/MODEL
"""

from dataclasses import dataclass

from experiments.common import MODEL, SUMMARIZER, Experiment, FigureSettings, run_command
from experiments.rows import Row
from experiments.runs import LanguageModel, language_model_run, model_of
from launch.command import option, parse_settings
from launch.numbers import natural


@dataclass(frozen=True)
class Settings(FigureSettings):
    """The flags."""

    history_items: int = option(0, "recent items in the prompt", natural)
    summarizers: tuple[str, ...] = option((), SUMMARIZER, nargs="+")
    recommender: str | None = option(None, MODEL)


def experiment_of(settings: Settings) -> Experiment:
    """Return the experiment with its rows."""
    experiment = Experiment("figure11", settings)
    recommender = model_of(settings, "recommender")
    names = settings.summarizers or (model_of(settings, "summarizers"),)
    for paradigm in settings.paradigms:
        against = {f"the same with {names[0]}": f"{paradigm}, {names[0]}"}
        for name in dict.fromkeys(names):
            model = LanguageModel(paradigm, name, recommender, settings.history_items)
            runs = experiment.runs(language_model_run, model)
            row = Row(f"{paradigm}, {name}", name, paradigm, runs, against=against)
            experiment.rows.append(row)
    return experiment


def main() -> None:
    """Run every summarizer; write the table and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

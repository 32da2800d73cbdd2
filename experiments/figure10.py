"""Figure 10 of the paper: recommenders of several sizes, with the same summaries.

    python -m experiments.figure10                              # the demo, with models/tiny
    python -m experiments.figure10 --data data/amazon-m2 --summarizer OWNER/MODEL \\
        --recommenders SMALL MIDDLE LARGE
"""

from dataclasses import dataclass

from experiments import paper
from experiments.common import MODEL, SUMMARIZER, Experiment, FigureSettings, run_command
from experiments.rows import Row
from experiments.runs import LanguageModel, language_model_run, model_of
from launch.command import option, parse_settings


@dataclass(frozen=True)
class Settings(FigureSettings):
    """The flags."""

    summarizer: str | None = option(None, SUMMARIZER)
    recommenders: tuple[str, ...] = option((), MODEL, nargs="+")


def experiment_of(settings: Settings) -> Experiment:
    """Return the experiment with its rows."""
    experiment = Experiment("figure10", settings)
    summarizer = model_of(settings, "summarizer")
    names = settings.recommenders or (model_of(settings, "recommenders"),)
    for paradigm in settings.paradigms:
        against = {f"the same with {names[0]}": f"{paradigm}, {names[0]}"}
        for name in dict.fromkeys(names):
            model = LanguageModel(paradigm, summarizer, name, settings.history_items)
            runs = experiment.runs(language_model_run, model)
            row = Row(f"{paradigm}, {name}", name, paradigm, runs, against=against)
            experiment.rows.append(row)

        theirs, known = paper.RECOMMENDER, experiment.paper_row(paradigm)
        if known["paper"]:
            experiment.rows.append(
                Row(f"{paradigm}, {theirs}", f"{theirs}, the paper", paradigm, **known)
            )
    return experiment


def main() -> None:
    """Run every recommender; write the table and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

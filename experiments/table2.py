"""Table 2 of the paper: every method on one dataset, with the paper's own values.

    python -m experiments.table2                                # the demo, with the embedded model
    python -m experiments.table2 --data data/mind --seeds 0 1 2 --nproc 8 \\
        --summarizer upstage/llama-30b-instruct-2048 --summarize=--int8 \\
        --recommender meta-llama/Llama-2-7b-hf --encoder google-bert/bert-base-uncased

After an interruption the same command resumes; with more rows or seeds it runs only the new ones.
The output of each stage is in a .log file in its run folder. Writes OUT/table2.md, OUT/table2.svg
and OUT/results.json.
"""

from dataclasses import dataclass

from baselines.models import MODELS
from experiments import paper, runs
from experiments.common import MODEL, Experiment, run_command
from experiments.runs import baseline_run, language_model_run
from experiments.tables import Row
from launch.command import option, parse_settings

NAMES = {name: model.__name__ for name, model in MODELS.items()} | {
    "whole-history": "TALLRec (whole history)",
    "hierarchical": "LLM-TRSR hierarchical",
    "recurrent": "LLM-TRSR recurrent",
    "recent-only": "recent items only",
    "none": "the candidate alone",
}


@dataclass(frozen=True)
class Settings(runs.Settings):
    """The flags."""

    summarizer: str = option("models/tiny", MODEL)
    recommender: str = option("models/tiny", MODEL)
    rows: tuple[str, ...] = option(
        tuple(paper.TABLE2), "besides random and popularity", choices=NAMES, nargs="+"
    )
    encoder: str | None = option(
        None, "of the items' texts, for the baselines (unset: llama:RECOMMENDER)"
    )
    baselines: str = option("", "more flags for the baselines", metavar="FLAGS")


def main() -> None:
    """Run the rows and write the table."""
    settings = parse_settings(Settings, __doc__)
    experiment = Experiment("table2", settings)
    encoder = settings.encoder or f"llama:{settings.recommender}"
    rows = [Row("random", "random"), Row("popularity", "popularity")]
    for key in dict.fromkeys(settings.rows):
        if key in MODELS:
            found = experiment.runs(baseline_run, key, encoder, settings.baselines)
        else:
            models = settings.summarizer, settings.recommender
            found = experiment.runs(language_model_run, key, *models, settings.history_items)
        rows.append(Row(NAMES[key], NAMES[key], runs=found, **experiment.paper_row(key)))
    experiment.finish(rows)


if __name__ == "__main__":
    run_command(main)

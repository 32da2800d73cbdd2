"""Table 2 of the paper: every method on one dataset, beside the paper's own values.

    python -m experiments.table2                                # the demo, with the embedded model
    python -m experiments.table2 --data data/mind --summarizer upstage/llama-30b-instruct-2048 --summarize=--int8 \\
        --recommender meta-llama/Llama-2-7b-hf --encoder google-bert/bert-base-uncased --seeds 0 1 2 --nproc 8

Interrupted, the same command goes on; with more rows or seeds it runs those alone. What a stage says is in its run's
folder, in a file ending in .log. Writes OUT/table2.md, OUT/table2.svg and OUT/results.json.
"""

from baselines.models import MODELS
from experiments import paper
from experiments.common import Experiment, Row, experiment_parser, run_command
from experiments.runs import baseline_run, language_model_run

NAMES = {name: model.__name__ for name, model in MODELS.items()} | {
    "whole-history": "TALLRec (whole history)",
    "hierarchical": "LLM-TRSR hierarchical",
    "recurrent": "LLM-TRSR recurrent",
    "recent-only": "recent items only",
    "none": "the candidate alone",
}


def main() -> None:
    """Run the rows and write the table."""
    parser, flag = experiment_parser(
        __doc__, "summarizer", "recommender", items=paper.HISTORY_ITEMS
    )
    flag(
        "--rows",
        nargs="+",
        choices=NAMES,
        default=list(paper.TABLE2),
        help="besides random and popularity",
    )
    flag(
        "--encoder",
        help="of items for the baselines, as python -m baselines has it; default: llama:RECOMMENDER",
    )
    flag("--baselines", default="", metavar="FLAGS", help="more flags for the baselines")
    args = parser.parse_args()
    experiment = Experiment("table2", args)
    rows = [Row("random", "random"), Row("popularity", "popularity")]
    for key in dict.fromkeys(args.rows):
        if key in MODELS:
            runs = experiment.runs(baseline_run, key)
        else:
            models = args.summarizer, args.recommender
            runs = experiment.runs(language_model_run, key, *models, args.history_items)
        rows.append(Row(NAMES[key], NAMES[key], runs=runs, **experiment.paper_row(key)))
    experiment.finish(rows)


if __name__ == "__main__":
    run_command(main)

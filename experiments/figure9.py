"""Figure 9 of the paper: how many recent items the prompt shows, 0 to 10, in both paradigms.

    python -m experiments.figure9                               # the demo, with the embedded model
    python -m experiments.figure9 --data data/mind --summarizer OWNER/MODEL --recommender OWNER/MODEL --nproc 8

A paradigm's summaries are made once; with the --out of another experiment they are shared, and so are equal runs.
"""

from experiments import paper
from experiments.common import Experiment, Row, add_paradigms, experiment_parser, run_command
from experiments.runs import language_model_run


def main() -> None:
    """Run every number of items and write the table and the figure."""
    parser, flag = experiment_parser(__doc__, "summarizer", "recommender", items=list(range(11)))
    add_paradigms(flag)
    args = parser.parse_args()
    experiment, rows = Experiment("figure9", args), []
    for paradigm in args.paradigms:
        for items in sorted({*args.history_items, paper.HISTORY_ITEMS}):
            settings = paradigm, args.summarizer, args.recommender, items
            runs = (
                experiment.runs(language_model_run, *settings)
                if items in args.history_items
                else []
            )
            known = experiment.paper_row(paradigm) if items == paper.HISTORY_ITEMS else {}
            rows.append(Row(f"{paradigm}, {items} items", items, paradigm, runs, **known))
    experiment.finish(rows, x_name="recent items in the prompt")


if __name__ == "__main__":
    run_command(main)

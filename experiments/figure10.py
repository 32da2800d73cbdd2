"""Figure 10 of the paper: recommenders of several sizes, over the same summaries.

python -m experiments.figure10                              # the demo, with the embedded model alone
python -m experiments.figure10 --data data/amazon-m2 --summarizer OWNER/MODEL --recommenders SMALL MIDDLE LARGE
"""

from experiments import paper
from experiments.common import Experiment, Row, add_paradigms, experiment_parser, run_command
from experiments.runs import language_model_run


def main() -> None:
    """Run every recommender and write the table and the figure."""
    parser, flag = experiment_parser(
        __doc__, "summarizer", "recommenders", items=paper.HISTORY_ITEMS
    )
    add_paradigms(flag)
    args = parser.parse_args()
    experiment, rows = Experiment("figure10", args), []
    for paradigm in args.paradigms:
        for model in dict.fromkeys(args.recommenders):
            runs = experiment.runs(
                language_model_run, paradigm, args.summarizer, model, args.history_items
            )
            rows.append(Row(f"{paradigm}, {model}", model, paradigm, runs))
        known = experiment.paper_row(paradigm)
        rows.append(
            Row(
                f"{paradigm}, {paper.RECOMMENDER}",
                f"{paper.RECOMMENDER}, the paper",
                paradigm,
                **known,
            )
        )
    experiment.finish(rows)


if __name__ == "__main__":
    run_command(main)

"""Figure 11 of the paper: summarizers of several sizes, judged by prompts that show the summary and no recent items.

python -m experiments.figure11                              # the demo, with the embedded model alone
python -m experiments.figure11 --data data/mind --summarizers SMALL LARGE --recommender OWNER/MODEL
"""

from experiments.common import Experiment, Row, add_paradigms, experiment_parser, run_command
from experiments.runs import language_model_run


def main() -> None:
    """Run every summarizer and write the table and the figure."""
    parser, flag = experiment_parser(__doc__, "summarizers", "recommender", items=0)
    add_paradigms(flag)
    args = parser.parse_args()
    experiment, rows = Experiment("figure11", args), []
    for paradigm in args.paradigms:
        for model in dict.fromkeys(args.summarizers):
            runs = experiment.runs(
                language_model_run, paradigm, model, args.recommender, args.history_items
            )
            rows.append(Row(f"{paradigm}, {model}", model, paradigm, runs))
    experiment.finish(rows)


if __name__ == "__main__":
    run_command(main)

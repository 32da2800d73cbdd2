"""What the experiments share: their flags, their rows, and the table and figure that they end in."""

import argparse
import hashlib
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trsr
from experiments import paper
from experiments.runs import Stage, pending_of, run_stages
from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl, write_json
from launch.command import Help, natural, positive, run_main
from llama import CheckpointError
from prepare.dataset import load_dataset, popularity
from runfolder.plots import bar_panel, line_panel, svg_file
from runfolder.scores import means_and_intervals, popularity_ranks, random_metrics
from state.settings import locked
from trsr import SUMMARIZED, InputError


def experiment_parser(
    description: str, *models: str, items: object
) -> tuple[argparse.ArgumentParser, Callable]:
    """Return a parser with the shared flags and the function that adds others.

    models: the flags of models, several for a name in the plural; items: the default of --history-items.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=Help)
    flag = parser.add_argument_group("experiment").add_argument
    flag("--data", default="data/demo", help="dataset folder, made by prepare")
    flag(
        "--out",
        type=Path,
        default=Path("runs/experiments"),
        help="for all run folders; experiments can share it",
    )
    for name in models:
        several = (
            {"nargs": "+", "default": ["models/tiny"]}
            if name.endswith("s")
            else {"default": "models/tiny"}
        )
        flag(
            f"--{name}",
            **several,
            help="model folder or hub id; {seed} in it stands for the run's seed",
        )
    several = {"nargs": "+"} if isinstance(items, list) else {}
    flag(
        "--history-items", type=natural, **several, default=items, help="recent items in the prompt"
    )
    flag(
        "--seeds",
        type=natural,
        nargs="+",
        default=[0],
        help="a run each; the table has their means",
    )
    flag("--k", type=positive, nargs="+", default=[3, 5, 10], help="cut-offs of the metrics")
    flag(
        "--nproc",
        type=positive,
        default=1,
        help="processes of summarize, train and evaluate, by torchrun",
    )
    flag(
        "--summarize",
        default="",
        metavar="FLAGS",
        help='more flags for it, as in "--int8 --batch-size 32"',
    )
    flag(
        "--train",
        default="",
        metavar="FLAGS",
        help="the same for train; a flag alone as --train=--no-compile",
    )
    return parser, flag


def add_paradigms(flag: Callable) -> None:
    """Add the figures' choice of paradigms."""
    flag(
        "--paradigms",
        nargs="+",
        choices=SUMMARIZED,
        default=list(SUMMARIZED),
        help="of the summaries",
    )


@dataclass
class Row:
    """A row of the table: the runs whose ranks make it, a seed each, and what the paper has beside it."""

    name: str
    group: object  # in the figure: a group of bars, or a number on the axis
    series: str = ""  # its color in the figure
    runs: list[list[Stage]] = field(
        default_factory=list
    )  # a run's stages; the last one's folder has the ranks
    paper: dict[str, float] = field(default_factory=dict)
    misprints: tuple[str, ...] = ()
    measured: dict[str, dict] = field(default_factory=dict)


def ranks_of(folder: Path, users: list[str]) -> list[int]:
    """Return the ranks that a run gave the users' positives; InputError where its users are others."""
    path = folder / "scores-test.jsonl"
    ranks = {r["user"]: r["rank"] for _, r in read_jsonl(path, {"user": str, "rank": int})}
    if ranks.keys() != set(users):
        raise InputError(
            f"{path}: not the users of test.jsonl; remove {folder} to have it made again"
        )
    return [ranks[user] for user in users]


# ---- The table and the figure


def markdown(rows: list[Row], names: list[str], dataset: str) -> str:
    """Return a markdown table: what was measured, the best of each column bold, and the paper's values in italics."""
    best = {
        name: max((row.measured[name]["mean"] for row in rows if row.measured), default=0)
        for name in names
    }
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]

    def measured(row: Row, name: str) -> str:
        mean, interval = row.measured[name]["mean"], row.measured[name].get("interval")
        text = f"**{mean:.4f}**" if f"{mean:.4f}" == f"{best[name]:.4f}" else f"{mean:.4f}"
        return text + (f" ({interval[0]:.3f}–{interval[1]:.3f})" if interval else "")

    def printed(row: Row, name: str) -> str:
        return (
            f"*{row.paper[name]:.4f}*{'†' * (name in row.misprints)}" if name in row.paper else ""
        )

    for row in rows:
        title = row.name.replace("|", "\\|")
        if row.measured:
            lines.append(f"| {title} | " + " | ".join(measured(row, name) for name in names) + " |")
        if row.paper:
            lines.append(
                f"| *{title}: the paper, {dataset}* | "
                + " | ".join(printed(row, n) for n in names)
                + " |"
            )
    return "\n".join(lines)


def figure(title: str, rows: list[Row], names: list[str], x_name: str) -> str:
    """Return an SVG file with a panel a metric: bars, or with x_name lines over the rows' groups, then numbers."""
    series = list(dict.fromkeys(row.series for row in rows))
    panels = {}
    for name in names:
        found = {(row.group, row.series): row.measured[name] for row in rows if row.measured}
        values = {
            at: (m["mean"], *m.get("interval", (m["mean"], m["mean"]))) for at, m in found.items()
        }
        marks = {(row.group, row.series): row.paper[name] for row in rows if name in row.paper}
        panels[name] = (
            line_panel(x_name, series, values, marks)
            if x_name
            else bar_panel(series, values, marks)
        )
    mark = "table 2 of the paper (other users and models)" if any(row.paper for row in rows) else ""
    return svg_file(title, panels, len(names) // 2, series, mark)


# ---- An experiment


class Experiment:
    """Runs with their table and figure, named as the paper names them; the dataset is read and checked first."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        args.seeds, args.k = list(dict.fromkeys(args.seeds)), sorted(set(args.k))
        _, _, self.splits = load_dataset(args.data, ("train", "val", "test"))
        self.domain = read_json(Path(args.data) / "meta.json")["domain"]
        self.dataset = paper.DATASETS[self.domain]

    def runs(self, make: Callable[..., list[Stage]], *settings: object) -> list[list[Stage]]:
        """Return for each seed the stages that make(args, *settings, seed) gives."""
        return [make(self.args, *settings, seed) for seed in self.args.seeds]

    def paper_row(self, key: str) -> dict:
        """Return the fields of a Row that hold the paper's table 2 on the dataset's domain."""
        values = paper.paper_values(self.domain, key)
        return {
            "paper": values,
            "misprints": tuple(n for n in values if (self.dataset, key, n) in paper.MISPRINTS),
        }

    def finish(self, rows: list[Row], x_name: str = "") -> None:
        """Run what is not done yet, and write and print the table and the figure."""
        args, title = self.args, self.name.replace("figure", "Figure ").replace("table", "Table ")
        stages = list(dict.fromkeys(stage for row in rows for run in row.runs for stage in run))
        pending, seeds = pending_of(stages), ", ".join(map(str, args.seeds))
        users = ", ".join(f"{len(examples)} {split}" for split, examples in self.splits.items())
        print(f"data    {args.data}: {users} users ({self.domain}, as the paper's {self.dataset})")
        for flag in ("summarizer", "summarizers", "recommender", "recommenders", "encoder"):
            if value := vars(args).get(flag):
                print(f"models  {flag}: {value if isinstance(value, str) else ', '.join(value)}")
        print(f"runs    {sum(len(row.runs) for row in rows)} in {args.out}, seeds {seeds}")
        print(
            f"stages  {len(stages)}: {len(stages) - len(pending)} done before, {len(pending) or 'nothing'} to run"
        )
        with locked(args.out):
            self.claim_data()
            run_stages(pending, args.nproc)
            self.measure(rows)
            names = [f"{metric}@{k}" for metric in ("Recall", "MRR") for k in args.k]
            notes = [
                f"{title}: {len(self.splits['test'])} test users of {args.data}, seeds {seeds}; in brackets 95 % "
            ]
            notes[0] += "intervals over users. Bold: the best that was measured."
            notes.append(paper.NOTES[self.name])
            if any(row.misprints for row in rows):
                notes.append("† A misprint of the paper: it is below the Recall@3 beside it.")
            text = "\n\n".join((markdown(rows, names, self.dataset), *notes)) + "\n"
            for suffix, content in (
                (".md", text),
                (".svg", figure(f"{title}, {args.data}", rows, names, x_name)),
            ):
                with atomic_write(args.out / f"{self.name}{suffix}") as file:
                    file.write(content)
            self.write_results(rows)
        print(f"\n{text}")
        print(
            f"wrote   {args.out / self.name}.md, {args.out / self.name}.svg, {args.out / 'results.json'}"
        )

    def claim_data(self) -> None:
        """Note the dataset in the folder; InputError where its runs were made with another."""
        digest = hashlib.sha256()
        for name in ("meta.json", "items.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"):
            digest.update((Path(self.args.data) / name).read_bytes())
        path, own = (
            self.args.out / "data.json",
            {"data": self.args.data, "sha256": digest.hexdigest()},
        )
        if path.is_file() and (old := read_json(path)) != own:
            what = (
                "its files have changed"
                if old.get("data") == own["data"]
                else f"not with {self.args.data}"
            )
            raise InputError(
                f"{self.args.out}: made with {old.get('data')}, {what}; choose another --out"
            )
        write_json(path, own)

    def measure(self, rows: list[Row]) -> None:
        """Fill in what the rows' ranks give: the metrics of each user's mean over the seeds."""
        test, ks = self.splits["test"], self.args.k
        for row in rows:
            if row.runs:
                ranks = [
                    ranks_of(run[-1].run, [example.user for example in test]) for run in row.runs
                ]
                row.measured = means_and_intervals(ranks, ks)
            elif row.name == "popularity":
                counts = popularity(self.splits["train"])
                row.measured = means_and_intervals(popularity_ranks(test, counts, 0), ks)
            elif row.name == "random":
                chance = random_metrics(1 + len(test[0].negatives), ks)
                row.measured = {name: {"mean": mean} for name, mean in chance.items()}

    def write_results(self, rows: list[Row]) -> None:
        """Write the rows to OUT/results.json, beside those of other experiments there."""
        path = self.args.out / "results.json"
        found = [asdict(row) | {"runs": [str(run[-1].run) for run in row.runs]} for row in rows]
        settings = {
            name: str(v) if isinstance(v, Path) else v for name, v in vars(self.args).items()
        }
        own = {
            "settings": settings,
            "domain": self.domain,
            "users": len(self.splits["test"]),
            "rows": found,
        }
        write_json(path, (read_json(path) if path.is_file() else {}) | {self.name: own})


def run_command(main: Callable[[], None]) -> None:
    """Run an experiment's main: what goes wrong ends it with one line; SIGTERM lets the stage save what it has."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_main(main, CheckpointError)

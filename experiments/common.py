"""An experiment from its settings to its table and figure."""

import hashlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import paper
from experiments.above import mark_above, note_above
from experiments.forecast import dataset, foresee
from experiments.jobs import Jobs, Machine
from experiments.rows import Row, Run, plan_of, stages_of
from experiments.runs import Settings, TunedSettings
from experiments.stages import Stage
from experiments.tables import figure, markdown, markdown_differences
from experiments.tuning import Choice
from files.atomic import atomic_write
from files.jsonl import read_json, read_jsonl, write_json
from files.sheet import TABLE, table_rows, write_csv
from launch.command import option, run_main
from launch.embedded import MODEL as EMBEDDED
from llama import CheckpointError
from prepare.dataset import SHOP, made_by, popularity
from runfolder.scores import (
    chance_metrics,
    means_and_intervals,
    paired_differences,
    popularity_ranks,
)
from state.settings import locked
from trsr import SUMMARIZED, Example, InputError

MODEL = "model folder or hub id, with the run's seed for `{seed}` (unset: models/tiny, on the demo)"
SUMMARIZER = f"{MODEL}; `rule`: summaries by experiments.rule"
MODEL_FLAGS = ("summarizer", "summarizers", "recommender", "recommenders", "encoder")


@dataclass(frozen=True)
class FigureSettings(TunedSettings):
    """The flags that all figures share."""

    # Tuned like the table, so that both share their runs.
    paradigms: tuple[str, ...] = option(
        ("hierarchical", "recurrent"),
        "of the summaries",
        choices=SUMMARIZED,
        nargs="+",
        group="rows",
    )


class Experiment:
    """The runs of one of the paper's tables or figures, and what is made of them.

    Reads and checks the dataset first.
    """

    def __init__(self, name: str, settings: Settings, x_name: str = "", log: bool = False):
        self.name = name
        self.x_name, self.log = x_name, log  # of the figure's axis, if it has one
        self.rows: list[Row] = []
        seeds, ks = tuple(dict.fromkeys(settings.seeds)), tuple(sorted(set(settings.k)))
        self.settings = replace(settings, seeds=seeds, k=ks)
        self.machine = Machine(settings.jobs, settings.nproc, settings.fresh)
        _, self.items, self.splits = dataset(settings.data)
        self.domain = read_json(Path(settings.data) / "meta.json")["domain"]
        self.dataset = paper.DATASETS.get(self.domain)  # None: the paper has none

    @property
    def title(self) -> str:
        """The name in the paper's words, such as `Figure 9`."""
        return self.name.replace("figure", "figure ").replace("table", "table ").capitalize()

    def runs(
        self,
        make: Callable[..., Run],
        model: object,
        choices: Sequence[Choice] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[Choice, list[Run]]:
        """Return the runs of make(settings, model, choice, seed) by choice, one for each seed.

        choices and seeds: None for the settings' own.
        """
        choices = self.settings.grid() if choices is None else choices
        seeds = seeds or self.settings.seeds
        return {c: [make(self.settings, model, c, seed) for seed in seeds] for c in choices}

    def paper_row(self, key: str) -> dict:
        """Return the fields of a Row that hold the paper's table 2 for the dataset's domain."""
        values = paper.paper_values(self.domain, key)
        misprints = tuple(n for n in values if (self.dataset, key, n) in paper.MISPRINTS)
        return {"paper": values, "misprints": misprints}

    def finish(self) -> None:
        """Run what is left to run; print the table, and write it with its figure.

        With --dry-run, print what that would take instead.
        """
        settings, rows = self.settings, self.planned
        stages, left = stages_of(rows)
        self.announce(len({run[-1].run for row in rows for run in row.expected}), stages, left)
        if settings.dry_run:
            return foresee(stages, left, settings.jobs, settings.speed)
        with locked(settings.out):
            self.claim_data()
            Jobs(lambda: plan_of(rows), self.machine, len(left)).run()
            text, wrote = self.write()
        print(f"\n{text}")
        print(f"wrote   {', '.join(map(str, wrote))}")

    def write(self) -> tuple[str, list[Path]]:
        """Write the table of the runs that have finished, and its figure; return text and files."""
        rows, out = self.rows, self.settings.out
        shown = self.measure()
        drawing = self.figure(shown)
        text = "\n\n".join(filter(None, self.parts(shown))) + "\n"
        wrote = []
        for suffix, content in ((".md", text), (".svg", drawing)):
            wrote.append(out / f"{self.name}{suffix}")
            with atomic_write(wrote[-1]) as file:
                file.write(content)
        wrote.append(out / f"{self.name}.csv")
        cells = {row.name: row.measured for row in shown if row.measured}
        write_csv(wrote[-1], TABLE, table_rows(cells))
        wrote.append(self.write_results(rows))
        return text, wrote

    @property
    def metrics(self) -> list[str]:
        """The columns of the table."""
        return [f"{metric}@{k}" for metric in ("Recall", "MRR") for k in self.settings.k]

    def parts(self, rows: list[Row]) -> list[str]:
        """Return the paragraphs of the text, of which some may be empty."""
        compared = markdown_differences(rows, self.metrics[0])
        table = markdown(rows, self.metrics, self.dataset)
        return [table, *self.notes(rows), note_above(rows), compared]

    def figure(self, rows: list[Row]) -> str:
        """Return the figure as the content of an SVG file."""
        title = f"{self.title}, {self.settings.data}"
        return figure(title, rows, self.metrics, self.x_name, self.log)

    @property
    def planned(self) -> list[Row]:
        """The rows whose runs are to be made."""
        return self.rows

    def announce(self, n_runs: int, stages: list[Stage], pending: list[Stage]) -> None:
        """Print what is about to be run."""
        n_stages, n_pending = len(stages), len(pending)
        settings = self.settings
        users = ", ".join(f"{len(examples)} {split}" for split, examples in self.splits.items())
        domain = self.domain + (f", as the paper's {self.dataset}" if self.dataset else "")
        print(f"data    {settings.data}: {users} users ({domain})")
        for flag in MODEL_FLAGS:
            if value := getattr(settings, flag, None):
                print(f"models  {flag}: {value if isinstance(value, str) else ', '.join(value)}")
        if made_by(settings.data) == SHOP:
            print(f"models  {EMBEDDED} where none is named")
        print(f"runs    {n_runs} in {settings.out}, seeds {listed(settings.seeds)}")
        left = f"{n_stages - n_pending} done before, {n_pending or 'nothing'} to run"
        print(f"stages  {n_stages}: {left}")

    def notes(self, rows: list[Row]) -> list[str]:
        """Return the paragraphs below the table."""
        users = f"{len(self.splits['test'])} test users of {self.settings.data}"
        intervals = "in brackets 95 % intervals over users"
        best = "Bold: the best measured value."
        found = f"{self.title}: {users}, seeds {listed(self.settings.seeds)}; {intervals}. {best}"
        theirs = paper.NOTES.get(self.name) if self.dataset else None
        notes = [found, *filter(None, [theirs])]
        if any(row.misprints for row in rows):
            notes.append("† A misprint in the paper: the value is below the Recall@3 next to it.")
        return [*notes, *self.choices_of(rows)]

    def choices_of(self, rows: list[Row]) -> list[str]:
        """Return the paragraphs that say which runs are shown."""
        notes = []
        if fewer := [row for row in rows if len(row.finished) < len(row.runs)]:
            counts = "; ".join(f"{row.name}: {len(row.finished)}" for row in fewer)
            notes.append(f"Not all seeds have finished. {counts}.")
        chosen = [f"{row.name}: {row.chosen}" for row in rows if row.tried()]
        if chosen:
            how = f"Chosen by validation recall with seed {self.settings.seeds[0]}"
            notes.append(f"{how}. {'; '.join(chosen)}.")
        reused = [f"{row.name}: {row.reused.name}" for row in rows if row.reused]
        if reused:
            why = "Runs with a smaller budget that cut no prompt, so that a larger one is the same"
            notes.append(f"{why}. {'; '.join(reused)}.")
        return notes

    def claim_data(self) -> None:
        """Record the dataset in the folder; InputError if its runs were made with another one."""
        data, out = self.settings.data, self.settings.out
        digest = hashlib.sha256()
        for name in ("meta.json", "items.jsonl", "train.jsonl", "val.jsonl", "test.jsonl"):
            digest.update((Path(data) / name).read_bytes())
        path, own = out / "data.json", {"data": data, "sha256": digest.hexdigest()}
        if path.is_file() and (old := read_json(path)) != own:
            changed = old.get("data") == data
            what = "its files have changed" if changed else f"not with {data}"
            raise InputError(f"{out}: made with {old.get('data')}, {what}; choose another --out")
        write_json(path, own)

    def measure(self) -> list[Row]:
        """Fill in each row's metrics and differences; a user's are averaged over the seeds.

        Returns the rows to show: those without any finished run are left out.
        """
        test, ks, rows = self.splits["test"], self.settings.k, self.rows
        for row in rows:
            row.wanted()  # which chooses, if that was not done yet
            if finished := row.finished:
                row.ranks = [ranks_of(run[-1], test) for run in finished]
                row.measured = means_and_intervals(row.ranks, ks)
            elif row.name == "popularity":
                counts = popularity(self.splits["train"])
                row.measured = means_and_intervals(popularity_ranks(test, counts, 0), ks)
            elif row.name == "random":
                chance = chance_metrics(test, ks)
                row.measured = {name: {"mean": mean} for name, mean in chance.items()}

        # Each row against others, as far as those are in the table.
        ranks = {row.name: row.ranks for row in rows if row.ranks}
        for row in rows:
            for column, other in row.against.items():
                if row.ranks and other in ranks and other != row.name:
                    found = paired_differences(row.ranks, ranks[other], ks)
                    row.differences[column] = found
        mark_above(rows, ks)
        return [row for row in rows if row.measured or row.paper]

    def write_results(self, rows: list[Row]) -> Path:
        """Write the rows to OUT/results.json, which keeps those of other experiments."""
        path = self.settings.out / "results.json"
        found = [row.record() for row in rows]
        settings = json.loads(json.dumps(vars(self.settings), default=str))
        own = {"settings": settings, "domain": self.domain, "users": len(self.splits["test"])}
        others = read_json(path) if path.is_file() else {}
        write_json(path, others | {self.name: own | {"rows": found}})
        return path


def listed(numbers: Sequence[int]) -> str:
    """Return numbers separated by commas."""
    return ", ".join(map(str, numbers))


def ranks_of(stage: Stage, examples: Sequence[Example]) -> list[int]:
    """Return the ranks of the examples' positives that a stage found.

    InputError if it has not ranked for all of these users.
    """
    path = stage.run / stage.makes[0]
    ranks = {r["user"]: r["rank"] for _, r in read_jsonl(path, {"user": str, "rank": int})}
    if not ranks.keys() >= {example.user for example in examples}:
        way = f"remove {stage.run} to have it made again"
        raise InputError(f"{path}: not the users of test.jsonl; {way}")
    return [ranks[example.user] for example in examples]


def run_command(main: Callable[[], None]) -> None:
    """Run an experiment's main; an error ends it with one line.

    SIGTERM ends it too, after the stage under way has saved what it has.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_main(main, CheckpointError)

"""The order of the methods, with the dataset's candidates and among all items; not in the paper.

    python -m experiments.rankings                              # the demo, with models/tiny
    python -m experiments.rankings --data data/games --users 200 --rows untrained recent-only \\
        hierarchical ncf core --summarizer OWNER/MODEL --recommender OWNER/MODEL

Metrics on a few sampled candidates can put methods in another order than the full ranking does
(Krichene and Rendle, KDD 2020). The rows, their flags and their runs are those of
experiments.table2; each trained model also ranks all items (evaluate.py --candidates). Only the
first --users test users count, here in both rankings. For baselines to share their trainings, give
table2 `--baselines "--candidates all --users 200"` too. Writes OUT/rankings.md, OUT/rankings.svg
and OUT/results.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from batches.candidates import Choice as Candidates
from batches.candidates import choice, name_of, with_candidates
from experiments.common import Experiment, ranks_of, run_command
from experiments.rows import Row, Run
from experiments.runs import evaluation
from experiments.stages import make_stage
from experiments.table2 import Settings as TableSettings
from experiments.table2 import row_of
from experiments.tables import figure, measured_cell, table_line
from launch.command import option, parse_settings
from launch.numbers import positive
from prepare.dataset import popularity
from runfolder.results import Question, parts_of
from runfolder.scores import (
    chance_metrics,
    means_and_intervals,
    popularity_ranks,
    tested_metric,
    told_apart,
    user_metrics,
)
from runfolder.told_apart import DIGITS, LEVEL, holm, wilcoxon

SAMPLED = "with the dataset's candidates"


@dataclass(frozen=True)
class Settings(TableSettings):
    """The flags."""

    candidates: Candidates = option(
        "all", "what to rank besides: all items, N drawn ones, or a file's", choice, "rankings"
    )
    users: int | None = option(
        None, "only the first so many test users, in both rankings (unset: all)", positive
    )
    among_k: tuple[int, ...] = option(
        (10, 50, 100), "cut-offs of the metrics among those candidates", positive, nargs="+"
    )

    @property
    def flags(self) -> list[str]:
        """What asks a script for the other ranking."""
        users = ["--users", str(self.users)] if self.users else []
        return ["--candidates", str(self.candidates), *users]

    @property
    def names(self) -> list[str]:
        """What the names of its files say."""
        return parts_of(self.candidates, self.users)


class Rankings(Experiment):
    """Rows of table 2, each with the ranks of both rankings.

    self.rows are ranked among the other candidates, self.sampled among the dataset's own.
    """

    def __init__(self, settings: Settings):
        super().__init__("rankings", settings)
        self.sampled: list[Row] = []

    @property
    def planned(self) -> list[Row]:
        """The rows whose runs are to be made."""
        return [*self.sampled, *self.rows]

    def among(self, run: Run) -> Run:
        """Return the run that ends with the other candidates instead of the dataset's own."""
        settings, last = self.settings, run[-1]
        bare = "--untrained" in last.flags
        if last.script != "evaluate.py":  # a baseline, which ranks both
            makes = (Question(last.run, parts=settings.names).scores.name,)
            return [*run[:-1], replace(last, makes=makes)]
        flags, makes = evaluation(settings, *(["untrained"] if bare else []), *settings.names)
        flags += [*(["--untrained"] if bare else []), *settings.flags]
        flags += ["--run-dir", last.run, "--k", *settings.among_k]
        own = {"settings_of": last.settings_of, "label": "-".join(settings.names)}
        stage = make_stage(last.run, last.script, flags, makes, None, run[-2].key, **own)
        return [*run[:-1], stage]

    def measure(self) -> list[Row]:
        """Fill in the ranks and metrics of both rankings; return the rows that have both."""
        settings, shown = self.settings, []
        test = self.splits["test"][: settings.users]
        others = with_candidates(settings.candidates, test, self.items)
        counts = popularity(self.splits["train"])
        kinds = ((self.sampled, test, settings.k), (self.rows, others, settings.among_k))
        for rows, examples, ks in kinds:
            for row in rows:
                row.wanted()
                row.ranks = [ranks_of(run[-1], examples) for run in row.finished]
                if row.name == "popularity":
                    row.ranks = [popularity_ranks(examples, counts, 0)]
                if row.ranks:
                    row.measured = means_and_intervals(row.ranks, ks)
                elif row.name == "random":
                    chance = chance_metrics(examples, ks)
                    row.measured = {name: {"mean": mean} for name, mean in chance.items()}
        for one, other in zip(self.sampled, self.rows, strict=True):
            if one.measured and other.measured:
                shown.append(other)
        return shown

    def parts(self, rows: list[Row]) -> list[str]:
        """Return the paragraphs of the text: one table of both rankings, and what it shows."""
        both = self.both(rows)
        columns = [Column(*pair) for pair in zip(both, self.cut_offs, strict=True)]
        head = ["", *(name for column in columns for name in (*column.metrics, "place"))]
        lines = [table_line(head), "|---" * len(head) + "|"]
        for i, row in enumerate(rows):
            cells = [cell for column in columns for cell in column.cells(i)]
            lines.append(table_line([row.name, *cells]))
        table = "\n".join(lines)
        seeds = ", ".join(map(str, self.settings.seeds))
        users = f"{self.n_users} test users of {self.settings.data}, seeds {seeds}"
        what = f"the first three columns {SAMPLED}, the others among {self.among_what()}"
        how = "= no significant difference from the first place, by Wilcoxon's test on that metric"
        marks = f"Rankings: {users}; {what}. {how}, with Holm's correction (p above {LEVEL})."
        return [table, marks, *self.choices_of(rows), order_of(columns)]

    @property
    def n_users(self) -> int:
        """How many users are ranked for."""
        return len(self.splits["test"][: self.settings.users])

    @property
    def cut_offs(self) -> tuple[Sequence[int], Sequence[int]]:
        """The cut-offs of both rankings."""
        return self.settings.k, tuple(sorted(set(self.settings.among_k)))

    def both(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        """Return the rows of both rankings that are shown."""
        names = {row.name for row in rows}
        return [row for row in self.sampled if row.name in names], rows

    def among_what(self) -> str:
        """Return what the second ranking is among, in words."""
        candidates = self.settings.candidates
        return "all items" if candidates == "all" else name_of(candidates)

    def figure(self, rows: list[Row]) -> str:
        """Return bars of the second ranking."""
        title = f"Among {self.among_what()}, {self.settings.data}"
        ks = self.cut_offs[1]
        return figure(title, rows, [f"Recall@{k}" for k in ks] + [tested_metric(ks)], "")


class Column:
    """One ranking of the rows: their metrics, places, and which differ from the first."""

    def __init__(self, rows: Sequence[Row], ks: Sequence[int]):
        self.rows, self.ks, self.tested = rows, ks, tested_metric(ks)
        self.metrics = f"Recall@{min(ks)}", self.tested
        self.values = [round(row.measured[self.tested]["mean"], DIGITS) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: -self.values[i])
        self.places = [1 + sum(other > value for other in self.values) for value in self.values]
        self.first = rows[order[0]]
        others = [i for i in order[1:] if rows[i].ranks] if self.first.ranks else []
        tests = told_apart(self.first.ranks, [rows[i].ranks for i in others], ks) if others else []
        self.near = {i for i, t in zip(others, tests, strict=True) if t["holm"] > LEVEL}

    def cells(self, i: int) -> list[str]:
        """Return a row's cells."""
        row = self.rows[i]
        means = [measured_cell(row.measured[name], best="") for name in self.metrics]
        return [*means, f"{self.places[i]}{' =' if i in self.near else ''}"]

    def apart(self, pairs: Sequence[tuple[int, int]]) -> list[bool]:
        """Return which pairs of rows differ significantly, by Holm over all pairs."""
        places = {place for pair in pairs for place in pair}
        values = {i: user_metrics(self.rows[i].ranks, self.ks)[self.tested] for i in places}
        return [p <= LEVEL for p in holm([wilcoxon(values[a] - values[b]) for a, b in pairs])]


def order_of(columns: Sequence[Column]) -> str:
    """Return how the orders of two rankings differ, in words."""
    one, other = columns
    ranked = [i for i, row in enumerate(one.rows) if row.ranks]
    pairs = list(combinations(ranked, 2))
    if not pairs:
        return ""
    turned = [
        (one.values[a] - one.values[b]) * (other.values[a] - other.values[b]) < 0 for a, b in pairs
    ]
    known = zip(turned, one.apart(pairs), other.apart(pairs), strict=True)
    sure = sum(all(each) for each in known)
    what = f"{sum(turned)} of {len(pairs)} pairs of rows are in another order"
    return f"The two rankings: {what}; {sure} of these differ significantly in both."


def experiment_of(settings: Settings) -> Rankings:
    """Return the experiment with its rows."""
    asked = " ".join(settings.flags)
    if f" {asked} " not in f" {settings.baselines} ":
        settings = replace(settings, baselines=f"{settings.baselines} {asked}".strip())
    experiment = Rankings(settings)
    experiment.sampled = [Row("random", "random"), Row("popularity", "popularity")]
    experiment.rows = [Row("random", "random"), Row("popularity", "popularity")]
    for key in dict.fromkeys(settings.rows):
        row = row_of(experiment, experiment.settings, key)
        chosen = {c: [experiment.among(run) for run in runs] for c, runs in row.choices.items()}
        experiment.rows.append(replace(row, choices=chosen, paper={}, misprints=(), against={}))
        experiment.sampled.append(row)
    return experiment


def main() -> None:
    """Rank with both; write the table and the figure."""
    experiment_of(parse_settings(Settings, __doc__)).finish()


if __name__ == "__main__":
    run_command(main)

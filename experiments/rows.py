"""A row of an experiment's table: its runs, and which of them it shows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.jobs import untrimmed
from experiments.stages import Stage, missing, missing_of
from experiments.tuning import Choice, choose, recall_of

Run = list[Stage]  # from the data to the ranks, which the last stage makes


@dataclass
class Row:
    """A row: the runs of each choice, one per seed, and the paper's values."""

    name: str
    group: object  # in the figure: a group of bars, or a number on the axis
    series: str = ""  # its color in the figure
    choices: dict[Choice, list[Run]] = field(default_factory=dict)
    smaller: "Row | None" = None  # the same row with a smaller budget
    against: dict[str, str] = field(default_factory=dict)  # other rows' names, by column
    paper: dict[str, float] = field(default_factory=dict)
    misprints: tuple[str, ...] = ()
    baseline: bool = False  # what the other rows are to be above

    # What comes out.
    chosen: Choice | None = None
    reused: "Row | None" = None  # whose runs it shows, since a larger budget changes nothing
    ranks: list[list[int]] = field(default_factory=list)  # a list per seed
    measured: dict[str, dict] = field(default_factory=dict)
    differences: dict[str, dict] = field(default_factory=dict)  # metrics by column
    above: dict = field(default_factory=dict)  # whether it is above the best baseline, and p

    @property
    def runs(self) -> list[Run]:
        """The runs that the table shows, one per seed; none until they are known."""
        if self.reused:
            return self.reused.runs
        return self.choices[self.chosen] if self.chosen else []

    @property
    def finished(self) -> list[Run]:
        """Those of them that have finished."""
        return [run for run in self.runs if not missing(run)]

    @property
    def is_untrained(self) -> bool:
        """Whether it shows the model without what was trained, so that no choice matters."""
        return any("--untrained" in run[-1].flags for run in self.expected)

    @property
    def expected(self) -> list[Run]:
        """The runs that the table will show, or as many others."""
        return self.runs or next(iter(self.choices.values()), [])

    def trial(self, choice: Choice) -> Run:
        """Return the first seed's run of a choice, up to its training."""
        return up_to_training(self.choices[choice][0])

    def recall(self, choice: Choice) -> float | None:
        """Return the validation recalls of a choice's trial; None until it has finished."""
        training = self.trial(choice)[-1]
        return recall_of(training) if training.finished() else None

    @property
    def trials(self) -> list[Run]:
        """Until the choice is made, the runs that it takes, as a forecast needs them.

        What follows an unfinished one is unknown: it counts as the worst.
        """
        if not self.choices or self.reused or self.chosen:
            return []
        to_try, _ = choose(list(self.choices), lambda choice: self.recall(choice) or 0.0)
        return [self.trial(choice) for choice in to_try]

    def wanted(self) -> list[Run]:
        """Return the runs to make, as far as they are known; choose, once that is possible."""
        if not self.choices or self.reused:
            return []
        if self.smaller:
            if not (known := self.smaller.runs) or missing_of(known):
                return []  # only then it is known whether anything was cut
            if all(map(untrimmed, known)):
                self.reused = self.smaller.reused or self.smaller
                return []
        if self.chosen is None:
            to_try, self.chosen = choose(list(self.choices), self.recall)
            if self.chosen is None:
                return [trial for trial in map(self.trial, to_try) if not trial[-1].finished()]
        return self.runs

    def tried(self) -> list[dict]:
        """Return the choices that were tried, with their sums of validation recalls."""
        if self.chosen is None or len(self.choices) < 2 or self.reused or self.is_untrained:
            return []
        to_try, _ = choose(list(self.choices), self.recall)
        return [dict(choice.values) | {"validation": self.recall(choice)} for choice in to_try]

    def record(self) -> dict:
        """Return what results.json says of it."""
        names = ("name", "group", "series", "measured", "differences", "above")
        names += ("paper", "misprints")
        found = {name: getattr(self, name) for name in names}
        found["runs"] = [str(run[-1].run) for run in self.finished]
        if self.chosen and self.chosen.values and not self.is_untrained:
            found |= {"chosen": dict(self.chosen.values), "tried": self.tried()}
        return found | ({"reused": self.reused.name} if self.reused else {})


def up_to_training(run: Run) -> Run:
    """Return the stages of a run without those that rank the test users afterwards."""
    ends = [i for i, stage in enumerate(run, 1) if stage.script != "evaluate.py"]
    return run[: ends[-1]]


def plan_of(rows: Sequence[Row]) -> list[Stage]:
    """Return the stages that are left, as far as they are known.

    Summaries come first, because many stages wait for them, and the short baselines last, because
    they fill the time in which the last long stages end.
    """
    left = missing_of(run for row in rows for run in row.wanted())
    places = {"baselines": 2, "train.py": 1, "evaluate.py": 1}
    return sorted(left, key=lambda stage: places.get(stage.script, 0))


def stages_of(rows: Sequence[Row]) -> tuple[list[Stage], list[Stage]]:
    """Return all stages of the rows, and those of them that are left."""
    runs = [run for row in rows for run in (*row.wanted(), *row.trials, *row.expected)]
    left = dict.fromkeys(stage for run in runs for stage in missing(run))
    return list(dict.fromkeys(stage for run in runs for stage in run)), list(left)

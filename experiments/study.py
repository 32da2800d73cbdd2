"""Run a plan of experiments within a time limit, and archive its results.

    python -m experiments.study --plan smollm2 --out runs/study --minutes 9
    python -m experiments.study --plan smollm2 --out runs/study --dry-run
    python -m experiments.study --plan smollm2 --out runs/study --unpack study.tar.gz

A plan is a file of experiments/plans/, or any such file: one experiment after the other, the most
important first. Its stages run in this order, each once. A stage starts only if it is expected to
end in time. The estimate comes from its tokens and the plan's speeds, corrected by the times of
finished stages. If the next stage is too long, a shorter one of those after it is run; but with
--carry-on trainings start anyway, and the next call on this machine continues what they have saved
when the time was up. Every call ends with the tables of what has finished so far, and with two
archives:

    OUT/study.tar.gz     tables, figures, settings, metrics, the users' ranks; no texts
    OUT/texts.tar.gz     the summaries, so that no other machine has to write them again

The same command resumes. On another machine, --unpack first unpacks archives into --out. With
--cpu-jobs, so many baselines run at the same time on the CPU.
"""

import math
import shlex
import statistics
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from string import Template

from baselines.encode import cache_path
from experiments.archive import pack_up, unpack
from experiments.common import Experiment, run_command
from experiments.forecast import Forecast, Work, settings_of
from experiments.jobs import Jobs, Machine
from experiments.rows import plan_of, stages_of
from experiments.stages import SECONDS, Stage, make_stage
from files.jsonl import read_json, write_json
from launch.command import option, parse_settings
from launch.numbers import natural, positive, positive_real
from state.settings import locked
from trsr import InputError

PLANS = Path(__file__).parent / "plans"
COMMANDS = ("table2", "targets", "budgets", "rankings", "figure9", "figure10", "figure11")
SPEEDS = (
    "learned",
    "scored",
    "written",
    "stage",
)  # tokens/s, and seconds that a stage takes besides
ENCODE = "baselines.encode"
CPU = ""  # the name of no GPU, as CUDA_VISIBLE_DEVICES has it


@dataclass(frozen=True)
class Settings:
    """The flags."""

    plan: str = option("smollm2", "a name in experiments/plans, or a file", group="study")
    out: Path = option(Path("runs/study"), "folder for a folder per dataset", Path)
    minutes: float = option(60.0, "that this call may take", positive_real)
    reserve: float = option(0.5, "of these minutes for tables and archives", positive_real)
    carry_on: bool = option(False, "also start trainings that only the next call will finish")
    unpack: tuple[Path, ...] = option((), "archives to unpack into --out first", Path, nargs="+")
    jobs: int = option(1, "stages that run at once on the GPUs", positive, "machine")
    cpu_jobs: int = option(0, "baselines that run at once on the CPU (0: on the GPUs)", natural)
    dry_run: bool = option(False, "report what is left, in tokens and minutes, and stop")


# ---- The plan


@dataclass(frozen=True)
class Plan:
    """Experiments in order, by their command lines, and the speeds to begin with."""

    path: Path
    lines: list[list[str]]
    speeds: dict[str, float]

    @classmethod
    def read(cls, name: str) -> "Plan":
        """Return the plan of a name or file; InputError, which names the field that is wrong."""
        path = PLANS / f"{name}.toml"
        if not path.is_file() and not (path := Path(name)).is_file():
            known = ", ".join(sorted(p.stem for p in PLANS.glob("*.toml")))
            raise InputError(f"--plan {name}: no such file, and no plan of {known}")
        try:
            found = tomllib.loads(path.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {error}") from None
        for key, kind in (("speeds", dict), ("flags", dict), ("experiments", list)):
            if not isinstance(found.setdefault(key, kind()), kind):
                form = "a list of texts" if kind is list else f"a table, [{key}]"
                raise InputError(f"{path}: {key}: expected {form}")
        speeds, flags = found["speeds"], {}
        for key in SPEEDS:
            if not is_speed(speeds.get(key)):
                raise InputError(f"{path}: speeds.{key}: expected a number above 0")
        for key, text in found["flags"].items():
            flags[key] = substituted(f"{path}: flags.{key}", text, flags)
        texts = enumerate(found["experiments"], 1)
        lines = [words_of(f"{path}: experiment {number}", text, flags) for number, text in texts]
        if not lines:
            raise InputError(f"{path}: no experiments")
        return cls(path, lines, speeds)

    def experiments(self, out: Path) -> list[Experiment]:
        """Return the experiments, each with a folder in out: --out, or named after its dataset."""
        made = []
        for number, (name, *flags) in enumerate(self.lines, 1):
            module = import_module(f"experiments.{name}")
            try:
                settings = settings_of(module.Settings, name, flags)
                given = settings.out != module.Settings.out
                folder = settings.out if given else Path(settings.data).name
                made.append(module.experiment_of(replace(settings, out=out / folder)))
            except InputError as error:
                raise InputError(f"{self.path}: experiment {number}: {error}") from None
        return made


def is_speed(value: object) -> bool:
    """Return whether a value of a plan is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def words_of(where: str, text: object, flags: dict[str, str]) -> list[str]:
    """Return the words of an experiment's line; InputError unless it begins with a command."""
    line = substituted(where, text, flags)
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if not words or words[0] not in COMMANDS:
        raise InputError(f"{where}: expected one of {', '.join(COMMANDS)} at its beginning")
    return words


def substituted(where: str, text: object, flags: dict[str, str]) -> str:
    """Return a text with its $NAMES replaced; InputError for a name that is not there."""
    try:
        return Template(text).substitute(flags)
    except (KeyError, ValueError, TypeError) as error:
        what = f"no flags above have the name {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{where}: {what}") from None


# ---- What a stage takes


class Pace:
    """Estimates the seconds of stages: from their tokens, and from those that have finished.

    Tokens are kept in a file, since counting them takes seconds for each kind of prompt. Baselines
    have none: each counts like one that takes the plan's `stage` seconds.
    """

    def __init__(self, speeds: dict[str, float], path: Path, experiments: Sequence[Experiment]):
        self.speeds, self.path = speeds, path
        self.experiments = experiments
        self.look_up()
        known = read_json(path) if path.is_file() else {}
        self.forecast = Forecast({key: Work(*parts) for key, parts in known.items()})
        self.works: dict[str, Work] = {}  # by the stages' keys
        # Seconds and estimated ones by kind, and by the stages' keys.
        self.seen: dict[str, dict[str, tuple[float, float]]] = {}

    def look_up(self) -> None:
        """Find out which stages there are by now: finished ones choose the settings of others."""
        self.stages = [s for each in self.experiments for s in stages_of(each.planned)[0]]

    def work(self, stage: Stage) -> Work:
        """Return the tokens of a stage."""
        if stage.key not in self.works:
            if stage not in self.stages:
                self.look_up()
            known = len(self.forecast.known)
            self.works[stage.key] = self.forecast.work(stage, self.stages)
            if len(self.forecast.known) > known:
                found = {key: work.parts for key, work in self.forecast.known.items()}
                write_json(self.path, found)
        return self.works[stage.key]

    def foreseen(self, stage: Stage) -> float:
        """Return the seconds of a stage at the plan's speeds."""
        rates = [self.speeds[name] for name in SPEEDS[:3]]
        parts = zip(self.work(stage).parts, rates, strict=True)
        return self.speeds["stage"] + sum(tokens / rate for tokens, rate in parts)

    def observe(self, stage: Stage) -> None:
        """Take note of how long a finished stage took."""
        path = stage.run / SECONDS
        taken = read_json(path).get(stage.mark) if path.is_file() and stage.finished() else None
        if taken is not None:
            self.seen.setdefault(kind(stage), {})[stage.key] = taken, self.foreseen(stage)

    def seconds(self, stage: Stage) -> float:
        """Return the seconds of a stage, corrected by the finished ones of its kind."""
        # The median, since now and then one has kernels to compile.
        pairs = self.seen.get(kind(stage), {}).values()
        ratios = [taken / foreseen for taken, foreseen in pairs]
        return self.foreseen(stage) * (statistics.median(ratios) if ratios else 1)


def kind(stage: Stage) -> str:
    """Return the script of a stage; of a baseline its model too, and whether it has all positions.

    One that reads a history item by item, for every position, takes a hundred times as long.
    """
    if stage.script != "baselines":
        return stage.script
    model = stage.flags[stage.flags.index("--models") + 1]
    return f"{stage.script} {model} {'--every-position' in stage.flags}"


# ---- One call


class Study:
    """The stages of all experiments of a plan, as one list of jobs."""

    def __init__(self, settings: Settings, plan: Plan):
        self.settings = settings
        self.experiments = plan.experiments(settings.out)
        self.folders = list(dict.fromkeys(each.settings.out for each in self.experiments))
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.pace = Pace(plan.speeds, settings.out / "forecast.json", self.experiments)
        for stage in self.pace.stages:
            self.pace.observe(stage)
        self.check_flags()

    def check_flags(self) -> None:
        """Raise InputError if two experiments want other flags for the same run, chosen or not."""
        rows = [row for each in self.experiments for row in each.planned]
        runs = [run for row in rows for choice in row.choices.values() for run in choice]
        known: dict[tuple[Path, str], str] = {}
        for stage in (stage for run in runs for stage in run):
            if known.setdefault((stage.run, stage.mark), stage.key) != stage.key:
                what = f"two experiments want {stage.mark} here with different flags"
                raise InputError(f"{stage.run}: {what}; give one of them another --out in the plan")

    def plan(self) -> list[Stage]:
        """Return the stages that are left, as far as they are known, the most important first."""
        left = [stage for each in self.experiments for stage in plan_of(each.planned)]
        if not self.settings.cpu_jobs:
            return list(dict.fromkeys(left))
        # On the CPU, a baseline would take an hour to encode the items.
        found = [
            encoding(each, stage.flags[stage.flags.index("--encoder") + 1])
            for each in self.experiments
            for stage in plan_of(each.planned)
            if stage.script == "baselines"
        ]
        encoders = [stage for stage in found if not stage.made()]
        waiting = [
            replace(stage, after=stage.run.parent) if stage.script == "baselines" else stage
            for stage in left
        ]
        return list(dict.fromkeys([*encoders, *waiting]))

    def foresee(self) -> None:
        """Print what is left of each experiment, and an estimate of its minutes."""
        known: dict[Stage, None] = {}
        lane: dict[bool, float] = {True: 0.0, False: 0.0}  # on the CPU or not
        for each in self.experiments:
            stages, left = stages_of(each.planned)
            new = [stage for stage in left if stage not in known]
            known |= dict.fromkeys(new)
            for stage in new:
                on_cpu = bool(self.settings.cpu_jobs) and stage.script == "baselines"
                lane[on_cpu] += self.pace.seconds(stage) / (self.settings.cpu_jobs if on_cpu else 1)
            tokens = sum((self.pace.work(stage) for stage in new), Work())
            what = f"{each.settings.out.name}: {each.name}"
            print(f"{what:<24}{len(new)} of {len(stages)} stages  {tokens or ''}")
            minutes = f"{lane[False] / 60:.1f} minutes up to here"
            print(f"{'':<24}{minutes}; on the CPU at the same time {lane[True] / 60:.1f}")

    def run(self, until: float) -> None:
        """Run stages up to a moment of time.monotonic(); InputError for those that failed."""
        settings, left = self.settings, self.plan()
        machine = Machine(settings.jobs, cpu_jobs=settings.cpu_jobs)

        def fits(stage: Stage) -> bool:
            goes_on = settings.carry_on and stage.script == "train.py"
            seconds = self.pace.speeds["stage"] if goes_on else self.pace.seconds(stage)
            return time.monotonic() + seconds <= until

        jobs = Jobs(self.plan, machine, len(left), fits, until, self.pace.observe)
        try:
            jobs.run()
        finally:
            print(f"stages  {jobs.ended} ended in this call, {len(self.plan())} left", flush=True)

    def tables(self) -> None:
        """Write the tables of what has finished."""
        # The last experiment of a name has all rows of those before it.
        last = {(each.settings.out, each.name): each for each in self.experiments}
        for each in last.values():
            if any(row.finished for row in each.planned):
                _, wrote = each.write()
                print(f"wrote   {wrote[0]}")


@cache
def encoding(experiment: Experiment, encoder: str) -> Stage:
    """Return the stage that encodes the items' texts for an experiment's baselines."""
    settings = experiment.settings
    run = settings.out / "baselines"
    flags = ["--data", settings.data, "--run", settings.out, "--encoder", encoder]
    path = cache_path(encoder, experiment.items, run)
    return make_stage(run, ENCODE, flags, (path.name,), None)


# ---- The command


def main() -> None:
    """Run what fits into the time, then write tables and archives."""
    began = time.monotonic()
    settings = parse_settings(Settings, __doc__)
    if settings.minutes <= settings.reserve:
        what = f"no time is left besides --reserve {settings.reserve:g}"
        raise InputError(f"--minutes {settings.minutes:g}: {what}; give it more")
    plan = Plan.read(settings.plan)
    settings.out.mkdir(parents=True, exist_ok=True)
    with locked(settings.out):
        unpack(settings.unpack, settings.out)
        study = Study(settings, plan)
        if settings.dry_run:
            return study.foresee()
        for each in study.experiments:
            each.claim_data()
        try:
            study.run(began + 60 * (settings.minutes - settings.reserve))
        finally:
            try:
                study.tables()
            finally:
                for path in pack_up(settings.out):
                    print(f"wrote   {path} ({path.stat().st_size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    run_command(main)

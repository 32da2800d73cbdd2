"""The runs of an experiment, in stages; a stage is one call of a script.

A finished stage leaves a mark in its run folder: a hash of its command, its model and the stages
before it. A stage whose mark is already there is skipped. Otherwise its script is called, which
resumes where it stopped, or refuses in one line to continue work begun with other settings.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from experiments import paper
from files.jsonl import read_json, write_json
from launch.command import option
from launch.numbers import natural, positive, seed_number
from models.hub import find_model
from ops.checkpoint import fingerprint
from state.summaries import share_summaries
from trsr import SUMMARIZED, InputError, content_hash

ROOT = Path(__file__).parent.parent
MARKS = "stages.json"  # in a run folder: the keys of the stages that finished there, in order

# The flags that an experiment sets itself, so --train and the like cannot have them.
OWN = (
    "--data",
    "--model",
    "--run",
    "--run-dir",
    "--paradigm",
    "--history-items",
    "--seed",
    "--models",
    "--seeds",
)


@dataclass(frozen=True)
class Settings:
    """The flags that all experiments share; each adds its models and what it varies."""

    data: str = option("data/demo", "dataset folder made by prepare", group="experiment")
    out: Path = option(
        Path("runs/experiments"), "folder for all run folders; experiments can share it", Path
    )
    history_items: int = option(paper.HISTORY_ITEMS, "recent items in the prompt", natural)
    seeds: tuple[int, ...] = option(
        (0,), "one run per seed; the table shows the means", seed_number, nargs="+"
    )
    k: tuple[int, ...] = option((3, 5, 10), "cut-offs of the metrics", positive, nargs="+")
    nproc: int = option(
        1, "processes of summarize.py, train.py and evaluate.py, started by torchrun", positive
    )
    summarize: str = option(
        "", 'more flags for summarize.py, such as "--int8 --batch-size 32"', metavar="FLAGS"
    )
    train: str = option(
        "", "more flags for train.py; write a single one as --train=--no-compile", metavar="FLAGS"
    )


@dataclass(frozen=True)
class Stage:
    """One call of a script."""

    run: Path
    script: str
    flags: tuple[str, ...]
    makes: tuple[str, ...]  # in the run folder; one of them exists once it has finished
    key: str  # a hash of the command, its model and the stages before it
    summaries: Path | None = None  # the run folder whose summaries it uses

    def marks(self) -> dict[str, str]:
        """Return the keys of what has finished in the run folder, by script."""
        return read_json(self.run / MARKS) if (self.run / MARKS).is_file() else {}

    def made(self) -> bool:
        """Return whether the result exists."""
        return any((self.run / name).exists() for name in self.makes)

    def done(self) -> bool:
        """Return whether it has finished with this very command."""
        return self.made() and self.marks().get(self.script) == self.key


# ---- The stages of a run


def split_flags(name: str, text: str) -> list[str]:
    """Return the value of a flag such as --train as flags; InputError for one that is in OWN."""
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{name}: {error}") from None
    if own := [flag for flag in flags if flag.split("=")[0] in OWN]:
        raise InputError(f"--{name}: the experiment sets {own[0]} itself; leave it out")
    return flags


@cache
def model_key(name: str, revision: str | None) -> str:
    """Return a hash that identifies a model.

    A hub id is downloaded now, so that a wrong name is found before any work is done.
    """
    return fingerprint(find_model(name, revision))


def slug(*parts: object) -> str:
    """Return parts as the name of a folder."""
    return "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-.") for part in parts)


def make_stage(
    run: Path, script: str, flags: list, makes: tuple, model: str | None, before: str = "", **more
) -> Stage:
    """Return a stage; model: what it reads; before: the key of the stage that it builds on."""
    flags = [str(flag) for flag in flags]
    revision = flags[flags.index("--revision") + 1] if "--revision" in flags[:-1] else None
    key = content_hash([script, flags, model and model_key(model, revision), before])
    return Stage(run, script, tuple(flags), makes, key, **more)


def language_model_run(
    settings: Settings, paradigm: str, summarizer: str, recommender: str, items: int, seed: int
) -> list[Stage]:
    """Return the stages from the data to the ranks of a language model, which the last one makes.

    `{seed}` in a model's name becomes the seed. Runs that differ only in seed, items or recommender
    share their summaries.
    """
    summarizer, recommender = (n.replace("{seed}", str(seed)) for n in (summarizer, recommender))
    common = ["--data", settings.data, "--paradigm", paradigm]
    parts: list[object] = [paradigm]  # of the run folder's name
    stages, shared = [], {}
    if paradigm in SUMMARIZED:
        stages.append(summary_stage(settings, paradigm, summarizer))
        shared = {"summaries": stages[0].run, "before": stages[0].key}
        parts.append(summarizer)

    parts.append(recommender)
    if paradigm in (*SUMMARIZED, "recent-only"):
        parts.append(f"items{items}")
    run = settings.out / slug(*parts, f"seed{seed}")
    own = [*common, "--model", recommender, "--run-dir", run]
    own += ["--seed", seed, "--history-items", items]
    flags = [*split_flags("train", settings.train), *own]
    train = make_stage(run, "train.py", flags, ("adapter", "model"), recommender, **shared)

    flags = ["--run-dir", run, "--k", *settings.k]
    ranks = make_stage(run, "evaluate.py", flags, ("scores-test.jsonl",), None, train.key)
    return [*stages, train, ranks]


def summary_stage(settings: Settings, paradigm: str, summarizer: str) -> Stage:
    """Return the stage that makes the summaries, in a run folder of their own."""
    run = settings.out / slug("summaries", paradigm, summarizer)
    own = ["--data", settings.data, "--paradigm", paradigm]
    own += ["--model", summarizer, "--run-dir", run]
    flags = [*split_flags("summarize", settings.summarize), *own]
    return make_stage(run, "summarize.py", flags, ("summaries.jsonl",), summarizer)


def baseline_run(settings: Settings, name: str, encoder: str, more: str, seed: int) -> list[Stage]:
    """Return the one stage of a baseline; more: the value of --baselines."""
    encoder = encoder.replace("{seed}", str(seed))
    own = ["--data", settings.data, "--run", settings.out, "--encoder", encoder]
    own += ["--models", name, "--seeds", seed]
    flags = [*split_flags("baselines", more), *own, "--k", *settings.k]
    model = encoder.removeprefix("llama:") if encoder.startswith("llama:") else None
    run = settings.out / "baselines" / f"{name}-{seed}"
    return [make_stage(run, "baselines", flags, ("scores-test.jsonl",), model)]


# ---- Running them


def pending_of(stages: list[Stage]) -> list[Stage]:
    """Return the stages to run: those not done, and those after them in the same run folder."""
    pending: list[Stage] = []
    for stage in stages:
        if not stage.done() or any(other.run == stage.run for other in pending):
            pending.append(stage)
    return pending


def command_of(script: str, flags: tuple[str, ...], processes: int) -> list[str]:
    """Return the command that starts a script, under torchrun if it has several processes."""
    if script == "baselines":
        return [sys.executable, "-m", script, *flags]
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return [sys.executable, *torchrun, str(ROOT / script), *flags]


def launch(script: str, flags: tuple[str, ...], processes: int, log: Path) -> tuple[int, str]:
    """Run a script; return its exit status and the end of its output.

    The output goes to log and, on a terminal, to stderr.
    """
    command = command_of(script, flags, processes)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = b""
    try:
        with open(log, "wb") as file:
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                file.write(chunk)
                file.flush()
                output = (output + chunk)[-(1 << 16) :]
                if sys.stderr.isatty():
                    sys.stderr.write(chunk.decode("utf-8", "replace"))
                    sys.stderr.flush()
        return process.wait(), output.decode("utf-8", "replace")
    finally:
        if process.poll() is None:  # interrupted: the script saves what it has
            process.terminate()
            process.wait()
        process.stdout.close()


def reason(script: str, output: str) -> str:
    """Return why a script failed: its own error line if it wrote one, else its last line."""
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    form = re.compile(rf"(?:{Path(script).stem}|__main__)(?:\.py)?: (?:error: )?(.+)")
    own = [match for line in lines if (match := form.match(line))]
    if own:
        return own[-1].group(1)
    return lines[-1] if lines else "it printed nothing"


def execute(stage: Stage, processes: int) -> None:
    """Run a stage and mark it as finished; InputError, which names the stage, if it fails."""
    marks, log = stage.marks(), stage.run / f"{Path(stage.script).stem}.log"
    stage.run.mkdir(parents=True, exist_ok=True)
    if stage.script == "train.py" and stage.script in marks and not stage.made():
        # The training had finished, but its result is gone.
        shutil.rmtree(stage.run / "checkpoint", ignore_errors=True)

    # The stages after this one lose their marks: they have to be run again.
    names = list(marks)
    if stage.script in names:
        names = names[: names.index(stage.script)]
    before = {name: marks[name] for name in names}
    write_json(stage.run / MARKS, before)
    if stage.summaries:
        share_summaries(stage.summaries, stage.run)
    status, output = launch(stage.script, stage.flags, processes, log)
    if status or not stage.made():
        why = reason(stage.script, output) if status else f"it made no {' or '.join(stage.makes)}"
        raise InputError(f"{stage.run}: {stage.script} failed: {why} (its output is in {log})")
    write_json(stage.run / MARKS, before | {stage.script: stage.key})


def run_stages(stages: list[Stage], processes: int) -> None:
    """Run stages one after the other, with a line each."""
    for number, stage in enumerate(stages, 1):
        start = time.perf_counter()
        # On a terminal the stage's own output follows, on lines of its own.
        end = "\n" if sys.stderr.isatty() else ""
        place = f"{number}/{len(stages)}"
        print(f"{place:<8}{stage.run.name}: {stage.script}", end=end, flush=True)
        try:
            execute(stage, processes)
        finally:
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)

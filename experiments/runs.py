"""The stages of runs: this project's own scripts as processes, each with a mark in its run folder once it has finished.

A stage whose mark tells the same command on the same model is not run again. Any other is given to its script, which
goes on where it stopped, or refuses in one line what was begun with other settings.
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

from files.jsonl import read_json, write_json
from models.hub import find_model
from ops.checkpoint import fingerprint
from state.summaries import share_summaries
from trsr import SUMMARIZED, InputError, content_hash

ROOT = Path(__file__).parent.parent
MARKS = "stages.json"  # in a run folder: the keys of the stages that have finished there, in their order
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
class Stage:
    """One call of a script."""

    run: Path
    script: str
    flags: tuple[str, ...]
    makes: tuple[str, ...]  # in the run folder; one of them is there when it has finished
    key: str  # a hash of the command, its model and the stages before it
    summaries: Path | None = None  # the run folder that lends them

    def marks(self) -> dict[str, str]:
        """Return what has finished in the run folder."""
        return read_json(self.run / MARKS) if (self.run / MARKS).is_file() else {}

    def made(self) -> bool:
        """Return whether the result is there."""
        return any((self.run / name).exists() for name in self.makes)

    def done(self) -> bool:
        """Return whether it has finished with this very command."""
        return self.made() and self.marks().get(self.script) == self.key


# ---- The stages of a run


def split_flags(name: str, text: str) -> list[str]:
    """Return the text of a flag such as --train as flags; InputError where the experiment sets one of them itself."""
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{name}: {error}") from None
    if own := [flag for flag in flags if flag.split("=")[0] in OWN]:
        raise InputError(f"--{name}: the experiment sets {own[0]} itself; leave it out")
    return flags


@cache
def model_key(name: str, revision: str | None) -> str:
    """Return what tells a model apart. A hub id is fetched now, so that a wrong name ends all before any work."""
    return fingerprint(find_model(name, revision))


def slug(*parts: object) -> str:
    """Return parts as the name of a folder."""
    return "-".join(re.sub(r"[^\w.]+", "-", str(part)).strip("-.") for part in parts)


def make_stage(
    run: Path, script: str, flags: list, makes: tuple, model: str | None, before: str = "", **more
) -> Stage:
    """Return a stage; model: what it reads, before: the key of the stage that it builds on."""
    flags = [str(flag) for flag in flags]
    revision = flags[flags.index("--revision") + 1] if "--revision" in flags[:-1] else None
    key = content_hash([script, flags, model and model_key(model, revision), before])
    return Stage(run, script, tuple(flags), makes, key, **more)


def language_model_run(
    args, paradigm: str, summarizer: str, recommender: str, items: int, seed: int
) -> list[Stage]:
    """Return the stages from the data to the ranks of one language model; the last one's folder holds them.

    `{seed}` in a model's name stands for the seed. Runs that differ in seed, items or recommender alone share their
    summaries.
    """
    summarizer, recommender = (
        name.replace("{seed}", str(seed)) for name in (summarizer, recommender)
    )
    stages, shared = [], {}
    common = ["--data", args.data, "--paradigm", paradigm]
    if paradigm in SUMMARIZED:
        folder = args.out / slug("summaries", paradigm, summarizer)
        own = [*common, "--model", summarizer, "--run-dir", folder]
        flags = split_flags("summarize", args.summarize)
        stages = [
            make_stage(folder, "summarize.py", [*flags, *own], ("summaries.jsonl",), summarizer)
        ]
        shared = {"summaries": folder, "before": stages[0].key}
    shown = [f"items{items}"] if paradigm in (*SUMMARIZED, "recent-only") else []
    run = args.out / slug(
        paradigm, *([summarizer] if shared else []), recommender, *shown, f"seed{seed}"
    )
    own = [
        *common,
        "--model",
        recommender,
        "--run-dir",
        run,
        "--seed",
        seed,
        "--history-items",
        items,
    ]
    flags = split_flags("train", args.train)
    train = make_stage(run, "train.py", [*flags, *own], ("adapter", "model"), recommender, **shared)
    made = ("scores-test.jsonl",)
    return [
        *stages,
        train,
        make_stage(run, "evaluate.py", ["--run-dir", run, "--k", *args.k], made, None, train.key),
    ]


def baseline_run(args, name: str, seed: int) -> list[Stage]:
    """Return the one stage of a baseline."""
    encoder = (args.encoder or f"llama:{args.recommender}").replace("{seed}", str(seed))
    own = [
        "--data",
        args.data,
        "--run",
        args.out,
        "--encoder",
        encoder,
        "--models",
        name,
        "--seeds",
        seed,
    ]
    flags = [*split_flags("baselines", args.baselines), *own, "--k", *args.k]
    model = encoder.removeprefix("llama:") if encoder.startswith("llama:") else None
    return [
        make_stage(
            args.out / "baselines" / f"{name}-{seed}",
            "baselines",
            flags,
            ("scores-test.jsonl",),
            model,
        )
    ]


# ---- Running them


def pending_of(stages: list[Stage]) -> list[Stage]:
    """Return the stages to run: those that are not done, and those of the same run folder after them."""
    pending: list[Stage] = []
    for stage in stages:
        if not stage.done() or any(other.run == stage.run for other in pending):
            pending.append(stage)
    return pending


def launch(script: str, flags: tuple[str, ...], processes: int, log: Path) -> tuple[int, str]:
    """Run a script, its output to log and, where that is a terminal, to stderr; return exit status and output."""
    command = [sys.executable]
    if script == "baselines":
        command += ["-m", script]
    else:
        several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        several += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += [*(several if processes > 1 else []), str(ROOT / script)]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
    """Return why a script failed: its own line for that, or its last."""
    lines = [line for line in re.split(r"[\r\n]+", output) if line.strip()]
    form = re.compile(rf"(?:{Path(script).stem}|__main__)(?:\.py)?: (?:error: )?(.+)")
    own = [match for line in lines if (match := form.match(line))]
    return own[-1].group(1) if own else lines[-1] if lines else "no word"


def execute(stage: Stage, processes: int) -> None:
    """Run a stage and mark it as finished; InputError, which names the stage, where it fails."""
    marks, log = stage.marks(), stage.run / f"{Path(stage.script).stem}.log"
    stage.run.mkdir(parents=True, exist_ok=True)
    if stage.script == "train.py" and stage.script in marks and not stage.made():
        shutil.rmtree(
            stage.run / "checkpoint", ignore_errors=True
        )  # a training that ended, but its result is gone
    names = list(marks)
    before = names[: names.index(stage.script)] if stage.script in names else names
    write_json(
        stage.run / MARKS, {name: marks[name] for name in before}
    )  # what comes after is to be done again
    if stage.summaries:
        share_summaries(stage.summaries, stage.run)
    status, output = launch(stage.script, stage.flags, processes, log)
    if status or not stage.made():
        why = reason(stage.script, output) if status else f"it made no {' or '.join(stage.makes)}"
        raise InputError(f"{stage.run}: {stage.script} failed: {why} (all it said is in {log})")
    write_json(
        stage.run / MARKS, {name: marks[name] for name in before} | {stage.script: stage.key}
    )


def run_stages(stages: list[Stage], processes: int) -> None:
    """Run stages one after the other, with a line each."""
    for number, stage in enumerate(stages, 1):
        start = time.perf_counter()
        # Where the stage's own output is shown, it begins on a line of its own.
        end = "\n" if sys.stderr.isatty() else ""
        print(
            f"{f'{number}/{len(stages)}':<8}{stage.run.name}: {stage.script}", end=end, flush=True
        )
        try:
            execute(stage, processes)
        finally:
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)

"""A stage of a run: one call of a script, and the mark that it leaves once it has finished.

The mark is a hash of the stage's command, its model and the stages before it, in a file of the run
folder. A run whose last stage has its mark and its result is done: nothing of it is made again,
even if the adapter or the summaries that led to the result are gone by now.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from files.jsonl import read_json
from models.hub import find_model
from ops.checkpoint import fingerprint
from trsr import InputError, content_hash

MARKS = "stages.json"  # in a run folder: the keys of the stages that finished there, in order
SECONDS = "seconds.json"  # in a run folder: how long each script took, when it last finished

# The flags that an experiment sets itself, so --train and the like cannot have them.
OWN = (
    "--data",
    "--model",
    "--run",
    "--run-dir",
    "--summaries",
    "--paradigm",
    "--history-items",
    "--seed",
    "--models",
    "--seeds",
    "--every-position",
    "--label",
    "--untrained",
)


@dataclass(frozen=True)
class Stage:
    """One call of a script."""

    run: Path
    script: str
    flags: tuple[str, ...]
    # In the run folder; one of them exists once it has finished.
    makes: tuple[str, ...] = field(compare=False)
    key: str  # a hash of the command, its model and the stages before it
    summaries: Path | None = None  # the run folder whose summaries it uses
    after: Path | None = None  # another run folder whose stages it has to wait for
    label: str = ""  # what tells it from another call of its script in the run folder
    settings_of: Path | None = None  # the run folder whose config.json it takes over

    @property
    def mark(self) -> str:
        """Its name among the stages of the run folder."""
        return f"{self.script} {self.label}".rstrip()

    def marks(self) -> dict[str, str]:
        """Return the keys of what has finished in the run folder, by mark."""
        return read_json(self.run / MARKS) if (self.run / MARKS).is_file() else {}

    def made(self) -> bool:
        """Return whether the result exists."""
        return any((self.run / name).exists() for name in self.makes)

    def finished(self) -> bool:
        """Return whether it has once finished with this very command."""
        return self.marks().get(self.mark) == self.key

    def done(self) -> bool:
        """Return whether it has finished with this very command, and its result exists."""
        return self.made() and self.finished()

    def follows(self, other: "Stage") -> bool:
        """Return whether it has to wait for the other one, which comes before it."""
        return other.run in (self.run, self.summaries, self.settings_of, self.after)


def missing(run: Sequence[Stage]) -> list[Stage]:
    """Return the stages of a run that are left: those after the last one that is done."""
    left: list[Stage] = []
    for stage in reversed(run):
        # The settings of a training outlive its adapter.
        if stage.done() or (left and left[0].settings_of and stage.finished()):
            break
        left.insert(0, stage)
    return left


def missing_of(runs: Iterable[Sequence[Stage]]) -> list[Stage]:
    """Return the stages that are left of several runs, each stage once."""
    return list(dict.fromkeys(stage for run in runs for stage in missing(run)))


# ---- How they are made


def split_flags(name: str, text: str, own: Sequence[str] = ()) -> list[str]:
    """Return the value of a flag such as --train as flags.

    own: flags that the experiment sets, besides OWN; InputError if the value has one of them.
    """
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{name}: {error}") from None
    for flag in flags:
        # argparse takes the beginning of a flag for it.
        begin = flag.split("=")[0]
        taken = [each for each in (*OWN, *own) if begin[:2] == "--" and each.startswith(begin)]
        if taken:
            raise InputError(f"--{name}: the experiment sets {taken[0]} itself; leave it out")
    return flags


@cache
def model_key(name: str, revision: str | None) -> str:
    """Return a hash that identifies a model.

    A hub id is downloaded now, so that a wrong name is found before any work is done.
    """
    return fingerprint(find_model(name, revision))


def slug(*parts: object) -> str:
    """Return parts as the name of a folder."""
    return "-".join(re.sub(r"[^\w.+]+", "-", str(part)).strip("-.") for part in parts)


def make_stage(
    run: Path, script: str, flags: list, makes: tuple, model: str | None, before: str = "", **more
) -> Stage:
    """Return a stage; model: what it reads; before: the key of the stage that it builds on."""
    flags = [str(flag) for flag in flags]
    revision = flags[flags.index("--revision") + 1] if "--revision" in flags[:-1] else None
    # Where it works is no part of the key, so that the folder of an experiment can be moved.
    what = [f for f, b in zip(flags, ["", *flags], strict=False) if b not in ("--run", "--run-dir")]
    key = content_hash([script, what, model and model_key(model, revision), before])
    return Stage(run, script, tuple(flags), makes, key, **more)

"""A run folder's lock, and config.json: the settings that each script worked with."""

import fcntl
import json
from contextlib import contextmanager
from pathlib import Path

from files.jsonl import check_fields, read_json, write_json
from trsr import PARADIGMS, InputError

# What later scripts need of each section of config.json.
_SHARED = {
    "data": str,
    "model": str,
    "paradigm": str,
    "dtype": str,
    "fingerprint": str,
    "max_length": int,
}
# What to say of settings whose values say nothing to a reader.
_CHANGES = {
    "content": "the dataset's texts or users are other ones now",
    "fingerprint": "the model's files are other ones now",
    "prompt": "the prompt has other words now",
    "prompts": "the prompts have other words now",
}
SECTIONS = {"summarize": _SHARED, "train": _SHARED | {"history_items": int, "lora_r": int}}


@contextmanager
def locked(run: Path, hold: bool = True):
    """Create the run folder and, if hold, keep its lock; InputError if another process has it."""
    run.mkdir(parents=True, exist_ok=True)
    if not hold:
        yield
        return
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another process is working in this run folder"
            raise InputError(f"{run}: {what}; wait, or choose another --run") from None
        remove_torn(run)
        yield


def remove_torn(run: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote one."""
    for path in run.rglob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)


def read_config(run: Path) -> dict:
    """Return the settings of the scripts that worked in the run folder, by script."""
    path = run / "config.json"
    config = read_json(path) if path.is_file() else {}
    for name, section in config.items():
        where = f"{path}: in {name!r}"
        check_fields(where, section, SECTIONS.get(name, {}))
        if name not in SECTIONS:
            what = "no settings that a script of this project would write"
            raise InputError(f"{where}: {what}; choose another --run")
        if section["paradigm"] not in PARADIGMS:
            what = f"paradigm {section['paradigm']!r} is unknown"
            way = "put the file that registers it into paradigms/, or choose another --run"
            raise InputError(f"{where}: {what}; {way}")
    return config


def claim_config(run: Path, section: str, settings: dict, started: bool) -> None:
    """Write settings to a section of the run's config.json; InputError if work began with others.

    A run folder has one set of settings per script, so nothing is ever resumed or scored with
    settings other than those it was made with.
    """
    config, settings = read_config(run), json.loads(json.dumps(settings))
    if started:
        check_settings(run, section, settings)
    write_json(run / "config.json", config | {section: settings})


_ADDED = {"learned", "learned_texts"}  # which runs of earlier versions have not recorded


def check_settings(run: Path, section: str, settings: dict) -> None:
    """Raise InputError, which names what differs, if the run's section has other settings."""
    settings = json.loads(json.dumps(settings))
    old = read_config(run).get(section, settings)
    names = sorted({*old, *(settings.keys() - _ADDED)})
    differing = [name for name in names if old.get(name) != settings.get(name)]
    if differing:
        told = [_CHANGES[name] for name in differing if name in _CHANGES]
        shown = [name for name in differing if name not in _CHANGES]
        values = ", ".join(f"{n} {old.get(n)!r} (now {settings.get(n)!r})" for n in shown)
        what = "; ".join([*([f"{section}.py worked here with {values}"] if shown else []), *told])
        raise InputError(f"{run}: {what}; use what it was made with, or another --run")

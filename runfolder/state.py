"""The run folder: its lock, the settings and the model that were used in it, and the summaries."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import trsr
from llama import CheckpointError, weight_files
from prepare.dataset import check_fields, read_json, read_jsonl, write_json, write_jsonl

# A line of summaries.jsonl; key is a hash of all that determines the summary: the settings and the history's texts.
FIELDS = {"user": str, "paradigm": str, "key": str, "summary": str, "tree": dict}
# What later scripts need of a section of config.json.
_OF_ALL = {"data": str, "model": str, "paradigm": str, "dtype": str, "fingerprint": str, "max_length": int}
SETTINGS = {"summarize": _OF_ALL, "train": _OF_ALL | {"history_items": int, "lora_r": int}}


@contextmanager
def locked(run: Path, hold: bool = True):
    """Make the run folder and hold its lock (if hold); InputError where another process holds it."""
    run.mkdir(parents=True, exist_ok=True)
    if not hold:
        yield
        return
    with open(run / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise trsr.InputError(
                f"{run}: another process is working in this run folder; wait, or choose another"
            ) from None
        yield


def read_config(run: Path) -> dict:
    """Return the settings of the scripts that ran in the run folder, by script."""
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    for name, section in config.items():
        where = f"{run / 'config.json'}: in {name!r}"
        check_fields(where, section, SETTINGS.get(name, {}))
        if name not in SETTINGS or section["paradigm"] not in trsr.PARADIGMS:
            raise trsr.InputError(f"{where}: no settings that a script here would write; choose another --run")
    return config


def claim_config(run: Path, section: str, settings: dict, started: bool) -> None:
    """Write settings to the section of the run's config.json; InputError where work was started with others.

    One run folder has one set of settings a script, so that nothing is ever continued or scored with another.
    """
    config, settings = read_config(run), json.loads(json.dumps(settings))
    old = config.get(section, settings)
    differing = [name for name in sorted({*old, *settings}) if old.get(name) != settings.get(name)]
    if started and differing:
        values = ", ".join(f"{n} {old.get(n)!r} (now {settings.get(n)!r})" for n in differing)
        raise trsr.InputError(f"{run}: {section}.py worked here with {values}; use those, or another --run")
    write_json(run / "config.json", config | {section: settings})


def collect_records(run: Path) -> dict[str, dict]:
    """Return all finished records by user, after gathering what the processes wrote into one summaries.jsonl."""
    path, parts = run / "summaries.jsonl", sorted(run.glob("summaries.part*.jsonl"))
    sources = [path, *parts] if path.is_file() else parts
    found = {r["user"]: r for source in sources for _, r in read_jsonl(source, FIELDS, torn=source in parts)}
    write_jsonl(path, found.values())
    for part in parts:
        part.unlink()
    return found


def load_summaries(run: Path, items: dict[str, str], examples: Iterable[trsr.Example]) -> dict[str, str]:
    """Return each user's summary from the run; InputError where one is missing or is not of the user's history."""
    path, settings = run / "summaries.jsonl", read_config(run).get("summarize", {})
    again = f"run python summarize.py --run {run} (with --data and --model), or choose --paradigm recent-only"
    if not path.is_file():
        raise trsr.InputError(f"{path}: no summaries; {again}")
    found = {record["user"]: record for _, record in read_jsonl(path, FIELDS)}
    for example in examples:
        record = found.get(example.user)
        if record is None or record["key"] != trsr.content_hash([settings, [items[i] for i in example.history]]):
            what = "no summary" if record is None else "the summary is of another history"
            raise trsr.InputError(f"{path}: user {example.user!r}: {what}; {again}")
    return {example.user: found[example.user]["summary"] for example in examples}


def share_summaries(source: Path, run: Path) -> None:
    """Give the run folder the summaries of another, source, with the settings that they were made with.

    InputError where the run was trained with other summaries.
    """
    run.mkdir(parents=True, exist_ok=True)
    claim_config(run, "summarize", read_config(source).get("summarize", {}), started=(run / "checkpoint").is_dir())
    path = run / "summaries.jsonl"
    path.unlink(missing_ok=True)
    try:  # one file under two names is safe, since summaries are replaced whole and never written into
        os.link(source / path.name, path)
    except OSError:
        shutil.copyfile(source / path.name, path)


def fingerprint(folder: Path) -> str:
    """Return a hash that tells models apart: config, tokenizer, and of every shard its header and 4 KiB a tensor."""
    state = hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer.json"):
        state.update((folder / name).read_bytes() if (folder / name).is_file() else b"-")
    for path in weight_files(folder):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise CheckpointError(f"{path}: not a safetensors file, or cut short; fetch it again")
            header = file.read(size)
            state.update(header)
            try:
                starts = [entry["data_offsets"][0] for name, entry in json.loads(header).items() if name[:2] != "__"]
                for start in starts:
                    file.seek(8 + size + start)
                    state.update(file.read(4096))
            except (AttributeError, LookupError, TypeError, ValueError, OverflowError, OSError) as error:
                raise CheckpointError(f"{path}: not a safetensors file ({error}); fetch it again") from None
    return state.hexdigest()[:32]

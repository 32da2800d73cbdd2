"""A model folder that a command writes: as a whole or not at all, and over nothing but its own."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from files.jsonl import read_json
from trsr import InputError


def check_out(out: Path, command: str, origin: str, written: set[str]) -> None:
    """Raise InputError if out holds anything that a command did not write.

    origin: the JSON file whose field `made_by` names the command. written: the names of its files,
    besides those that the origin file lists as `files`.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: not a folder; choose another --out")
    found = {path.name for path in out.iterdir()}
    record = read_json(out / origin) if origin in found else {}
    listed = record.get("files", [])
    ours = written | {origin, *(map(str, listed) if isinstance(listed, list) else ())}
    if others := sorted(found - ours if record.get("made_by") == command else found):
        what = f"holds files that python -m {command} did not write ({', '.join(others[:5])})"
        raise InputError(f"{out}: {what}; choose another --out, or delete them first")
    if found:
        print(f"{out}: replacing the model that python -m {command} wrote there")


@contextmanager
def replacement(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside out, which takes its place on success, and goes otherwise."""
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        fresh.mkdir()
        yield fresh
        for path in fresh.iterdir():
            path.chmod(0o666 & ~mask())  # safetensors makes its file for the owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: not written ({error}); nothing was changed there") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def mask() -> int:
    """Return the permissions that new files do not get."""
    found = os.umask(0)
    os.umask(found)
    return found

"""Folders that a command has written, which alone it may replace."""

from pathlib import Path

from files.jsonl import read_json
from trsr import InputError


def check_out(out: Path, command: str, origin: str, written: set[str], kind: str = "model") -> None:
    """Raise InputError if out holds anything that a command did not write.

    origin: the JSON file whose field `made_by` names the command. written: the names of its files,
    besides those that the origin file lists as `files`. kind: what they are together.
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
        print(f"{out}: replacing the {kind} that python -m {command} wrote there")

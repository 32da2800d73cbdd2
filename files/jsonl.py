"""JSON and JSON Lines, with errors that name the file, the line and the field."""

import json
import re
import sys
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from pathlib import Path

from files.atomic import atomic_write
from trsr import InputError

# ---- JSON


def read_json(path: Path) -> dict:
    """Return the JSON object in path; InputError if there is none."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8"), object_pairs_hook=unique))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: no JSON object here ({error})") from None


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of JSON; ValueError if it has a field twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def write_json(path: Path, value: dict) -> None:
    """Write value to path, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


# ---- JSON Lines


def read_jsonl(
    path: Path, fields: dict[str, type], torn: bool = False
) -> Iterator[tuple[str, dict]]:
    """Yield (`file:line`, object) for each line; InputError for a line without these fields.

    torn: the file is appended to, so a last line without its newline is what an interruption left;
    it is reported and skipped.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if torn and not line.endswith(b"\n"):
                print(f"{where}: dropped, an interruption cut this line short", file=sys.stderr)
                return
            record = parse_line(where, line)
            check_fields(where, record, fields)
            yield where, record


def parse_line(where: str, line: bytes) -> object:
    """Return the JSON value of a line; InputError if it is not JSON or not valid text."""
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None

    # A lone surrogate is valid JSON but cannot be written again as UTF-8.
    surrogate = b"\\ud" in line.lower()
    if surrogate and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
        raise InputError(f"{where}: a text holds half of a character (\\ud800 to \\udfff)")
    return record


def article(name: str) -> str:
    """Return a name of a type with its article: a str, an int."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def check_fields(where: object, record: object, fields: dict[str, type]) -> None:
    """Raise InputError, starting with where, unless record is an object with these fields."""
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is {article(type(value).__name__)}"
            raise InputError(f"{where}: field {name!r} {found}, expected {kind.__name__}")
        if kind is list and not all(isinstance(entry, str) for entry in value):
            raise InputError(f"{where}: field {name!r} holds something that is not a text")


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write one record per line to path, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_jsonl(path: Path, record: dict) -> None:
    """Append record to path as a line; if writing fails, only this last line is broken."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        why = f"{path}: not written ({error.strerror})"
        raise InputError(f"{why}; the same command resumes from there") from None

"""The dataset on disk: the schema that every `prepare` module writes and every script reads, checked line by line.

Here too are the two ways in which the project writes and reads any file of its own: whole or not at all, and with an
error that names the line.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trsr import DOMAINS, Domain, Example, InputError, item_text


@contextmanager
def atomic_write(path: Path, mode: str = "w"):
    """Open a temporary sibling of path for writing; on success it replaces path, on failure path is untouched.

    InputError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
        with open(temporary, "rb") as file:  # anew: what writes by name may have put another file there
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror or error}); what was there before is whole") from None
    finally:
        temporary.unlink(missing_ok=True)


def append_jsonl(path: Path, record: dict) -> None:
    """Append record to path as a line, which is the file's last if writing breaks off."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"{path}: not written ({error.strerror}); the same command goes on from there") from None


def read_json(path: Path) -> dict:
    """Return the JSON object in path; InputError where there is none."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: no JSON object here ({error})") from None


def write_json(path: Path, value: dict) -> None:
    """Write value to path, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_jsonl(path: Path, fields: dict[str, type], torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Yield (`file:line`, object) for each line; InputError where a line is no JSON object with these fields.

    torn: the file was appended to, so a last line without its end is what an interruption left, and is passed over.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if torn and not line.endswith(b"\n"):
                print(f"{where}: dropped, an interruption cut this line short", file=sys.stderr)
                return
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                raise InputError(f"{where}: not UTF-8 text") from None
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error})") from None
            if b"\\ud" in line.lower() and re.search("[\ud800-\udfff]", json.dumps(record, ensure_ascii=False)):
                raise InputError(f"{where}: a text holds half of a character (\\ud800 to \\udfff)")
            check_fields(where, record, fields)
            yield where, record


def check_fields(where: object, record: object, fields: dict[str, type]) -> None:
    """Raise InputError, which begins with where, unless record is an object that has these fields."""
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is a {type(value).__name__}"
            raise InputError(f"{where}: field {name!r} {found}, expected {kind.__name__}")
        if kind is list and not all(isinstance(entry, str) for entry in value):
            raise InputError(f"{where}: field {name!r} holds something that is not a text")


def write_jsonl(path: Path, records: Iterable[dict]) -> None:
    """Write records to path, a line each, whole or not at all."""
    with atomic_write(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def load_dataset(folder: Path, splits: Iterable[str]) -> tuple[Domain, dict[str, str], dict[str, list[Example]]]:
    """Return (the domain, item texts by id, examples by split) of a folder that `prepare` wrote."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise InputError(f"{folder}: no dataset (no meta.json); make one with python -m prepare.demo --out {folder}")
    domain = read_json(folder / "meta.json").get("domain")
    if domain not in DOMAINS:
        raise InputError(f"{folder / 'meta.json'}: field 'domain' is {domain!r}, expected one of {sorted(DOMAINS)}")
    items: dict[str, str] = {}
    for where, record in read_jsonl(folder / "items.jsonl", {"id": str, "attributes": dict}):
        if record["id"] in items:
            raise InputError(f"{where}: field 'id': item {record['id']!r} is there twice")
        if not all(isinstance(value, str) for value in record["attributes"].values()):
            raise InputError(f"{where}: field 'attributes' holds something that is not a text")
        items[record["id"]] = item_text(record["attributes"])
    users: set[str] = set()
    examples = {split: list(_load_examples(folder / f"{split}.jsonl", items, users)) for split in splits}
    if empty := [split for split, found in examples.items() if not found]:
        raise InputError(f"{folder / empty[0]}.jsonl: no users in it; prepare the dataset again, with looser filters")
    return DOMAINS[domain], items, examples


def _load_examples(path: Path, items: dict[str, str], users: set[str]) -> Iterator[Example]:
    for where, record in read_jsonl(path, {"user": str, "history": list, "positive": str, "negatives": list}):
        example = Example(record["user"], record["history"], record["positive"], record["negatives"])
        if example.user in users:
            raise InputError(f"{where}: field 'user': {example.user!r} is there twice")
        users.add(example.user)
        candidates = [example.positive, *example.negatives]
        if unknown := [i for i in [*example.history, *candidates] if i not in items]:
            raise InputError(f"{where}: item {unknown[0]!r} is not in items.jsonl")
        if example.positive in example.history:
            raise InputError(f"{where}: field 'history' holds the target {example.positive!r}")
        if not example.negatives or len(set(candidates)) < len(candidates):
            raise InputError(f"{where}: field 'negatives' is empty, repeats an item or holds the target")
        yield example


def popularity(examples: Iterable[Example]) -> Counter:
    """Return how often each item was chosen, in histories and as target."""
    return Counter(item for example in examples for item in [*example.history, example.positive])


def save_dataset(out: Path, splits: dict[str, list[dict]], items: Iterable[dict], meta: dict) -> dict:
    """Write items.jsonl, a file for each split, and meta.json with the counts of what was written added; return meta.

    meta.json goes first and comes back last, so that a folder that has one is whole.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)
    names: Counter = Counter()
    n_items = 0
    with atomic_write(out / "items.jsonl") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
            names.update(item["attributes"].keys())
            n_items += 1
    for split, examples in splits.items():
        write_jsonl(out / f"{split}.jsonl", examples)
    lengths = [len(example["history"]) for examples in splits.values() for example in examples]
    meta = meta | {
        "examples": {split: len(examples) for split, examples in splits.items()},
        "items": n_items,
        "mean_history": round(sum(lengths) / max(1, len(lengths)), 2),
        "attributes": len(names),
        "mean_attributes": round(names.total() / max(1, n_items), 2),
    }
    write_json(out / "meta.json", meta)
    return meta

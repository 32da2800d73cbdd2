"""A run folder's summaries: gathering what processes wrote, reading, and lending to other runs."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from files.jsonl import append_jsonl, read_jsonl, write_jsonl
from state.settings import claim_config, read_config
from trsr import Example, InputError, Node, content_hash

# A line of summaries.jsonl. key: a hash of everything that determines the summary, which is the
# settings of summarize.py and the history's texts. Also `ends`, how many of the user's texts ended
# by themselves ("end"), at the limit ("limit"), or where another turn began ("turn").
FIELDS = {"user": str, "paradigm": str, "key": str, "summary": str, "tree": dict}


def collect_records(run: Path) -> dict[str, dict]:
    """Return all finished records by user, and merge what each process wrote into one file."""
    path, parts = run / "summaries.jsonl", sorted(run.glob("summaries.part*.jsonl"))
    found = {}
    for source in [path, *parts] if path.is_file() else parts:
        for _, record in read_jsonl(source, FIELDS, torn=source in parts):
            found[record["user"]] = record
    write_jsonl(path, found.values())
    for part in parts:
        part.unlink()
    return found


def users_left(run: Path, keys: dict[str, str]) -> list[str]:
    """Return the users, of keys, without a summary that has their key."""
    records = read_jsonl(run / "summaries.jsonl", FIELDS)
    done = {record["user"]: record["key"] for _, record in records}
    return [user for user in keys if done.get(user) != keys[user]]


def known_summaries(run: Path) -> dict[str, str]:
    """Return the run's summaries by key; none if there is no file."""
    path = run / "summaries.jsonl"
    records = read_jsonl(path, FIELDS) if path.is_file() else ()
    return {record["key"]: record["summary"] for _, record in records}


def append_record(run: Path, rank: int, about: dict, root: Node, ends: dict[str, int]) -> None:
    """Append a finished user to a process's part of summaries.jsonl.

    about: user, paradigm and key. ends: how many of the user's texts ended in which way.
    """
    # Sorted, since texts end in another order if some of them are known from before.
    record = about | {"summary": root["summary"], "tree": root, "ends": dict(sorted(ends.items()))}
    append_jsonl(run / f"summaries.part{rank}.jsonl", record)


def load_summaries(run: Path, items: dict[str, str], examples: Iterable[Example]) -> dict[str, str]:
    """Return each user's summary; InputError if one is missing or is of a different history."""
    path, settings = run / "summaries.jsonl", read_config(run).get("summarize", {})
    command = f"run python summarize.py --run {run} (with --data and --model)"
    again = f"{command}, or choose --paradigm recent-only"
    if not path.is_file():
        raise InputError(f"{path}: no summaries; {again}")

    found = {record["user"]: record for _, record in read_jsonl(path, FIELDS)}
    for example in examples:
        record = found.get(example.user)
        if record is None:
            raise InputError(f"{path}: user {example.user!r}: no summary; {again}")
        if record["key"] != content_hash([settings, [items[i] for i in example.history]]):
            what = "the summary is of another history"
            raise InputError(f"{path}: user {example.user!r}: {what}; {again}")
    return {example.user: found[example.user]["summary"] for example in examples}


def known_before(tree: Node) -> list[tuple[int, str]]:
    """Return (items, summary) after each block but the last, the first blocks first.

    tree: what summarize.py keeps of a user. InputError if it has no summaries of the blocks before.
    """
    if "before" in tree:
        return [(int(items), summary) for items, summary in tree["before"]]
    if "children" in tree:
        what = "the summaries of the blocks before are missing"
        raise InputError(f"{what}; run summarize.py --every-block, or --targets last")
    chain = []
    while "previous" in tree:
        tree = tree["previous"]
        chain.append((tree["items"][1], tree["summary"]))
    return chain[::-1]


def load_before(run: Path, examples: Iterable[Example]) -> dict[str, list[tuple[int, str]]]:
    """Return (items, summary) of the blocks before each user's last one, from a checked file.

    InputError if a user's are missing, as those of a hierarchy are without --every-block.
    """
    path = run / "summaries.jsonl"
    trees = {record["user"]: record["tree"] for _, record in read_jsonl(path, FIELDS)}
    found = {}
    for example in examples:
        try:
            found[example.user] = known_before(trees[example.user])
        except InputError as error:
            raise InputError(f"{path}: user {example.user!r}: {error}") from None
    return found


def share_summaries(source: Path, run: Path) -> None:
    """Give the run folder the summaries of another, source, and the settings they were made with.

    Raises InputError if the run was trained with other summaries.
    """
    run.mkdir(parents=True, exist_ok=True)
    settings = read_config(source).get("summarize", {})
    claim_config(run, "summarize", settings, started=(run / "checkpoint").is_dir())
    path = run / "summaries.jsonl"
    if path.is_file() and path.samefile(source / path.name):  # it has them already
        return
    path.unlink(missing_ok=True)
    # A hard link is safe: summaries are replaced as a whole and never written into.
    try:
        os.link(source / path.name, path)
    except OSError:
        shutil.copyfile(source / path.name, path)

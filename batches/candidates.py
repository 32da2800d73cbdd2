"""Which items are ranked for each user: the dataset's own, all of the catalogue, some, or a file's.

An example's negatives are what its positive is ranked among. Other candidates are other negatives,
so the metrics, popularity and chance need not know where they come from.
"""

import argparse
import hashlib
import random
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from files.jsonl import check_fields, parse_line
from launch.numbers import positive
from trsr import Example, InputError, content_hash

ALL = "all"
Choice = str | int | Path | None  # ALL, how many to draw, a file, or None for the dataset's own


def choice(text: str) -> str | int | Path:
    """Return the value of --candidates: ALL, a number or a file, for argparse."""
    if text == ALL:
        return text
    if text.isascii() and text.lstrip("-").isdecimal():
        return positive(text)
    if not Path(text).is_file():
        what = f"expected {ALL}, a number or a file, not {text!r}"
        raise argparse.ArgumentTypeError(what)
    return Path(text)


def name_of(chosen: Choice, seed: int = 0) -> str:
    """Return what file names say of a choice; nothing for the dataset's own."""
    if chosen is None:
        return ""
    if isinstance(chosen, Path):
        return f"candidates-{chosen.stem}"
    if chosen == ALL:
        return ALL
    return f"{chosen}-drawn" + (f"-seed{seed}" if seed else "")


def about_candidates(chosen: Choice, examples: Sequence[Example], seed: int = 0) -> dict:
    """Return what a table's file says of the candidates: of the dataset's own a hash alone."""
    ranked = {"ranked": ranked_hash(examples)}
    if chosen is None:
        return ranked
    mean = sum(1 + len(example.negatives) for example in examples) / len(examples)
    file = {"candidates_file": str(chosen)} if isinstance(chosen, Path) else {}
    return ranked | {"candidates": name_of(chosen, seed), "mean_candidates": mean} | file


def ranked_hash(examples: Sequence[Example]) -> str:
    """Return a hash of who is ranked: each user's positive, and what it is ranked among."""
    lists: dict[int, str] = {}  # of the lists that users share
    digest = hashlib.sha256()
    for example in examples:
        others = example.negatives
        if isinstance(others, Others):
            if id(others.items) not in lists:
                lists[id(others.items)] = content_hash(sorted(others.items))
            among = [lists[id(others.items)], sorted(others.without)]
        else:
            among = sorted(others)
        digest.update(content_hash([example.user, example.positive, among]).encode())
    return digest.hexdigest()[:32]


def with_candidates(
    chosen: Choice, examples: Sequence[Example], items: Iterable[str], seed: int = 0
) -> list[Example]:
    """Return the examples with the negatives that are chosen, of which none is in the history.

    items: the ids of the catalogue. Raises InputError for a file that does not fit, or if there are
    fewer items than asked for.
    """
    if chosen is None:
        return list(examples)
    items = list(dict.fromkeys(items))
    if isinstance(chosen, int):
        return [replace(e, negatives=drawn(e, items, chosen, seed)) for e in examples]
    if chosen == ALL:
        lists = dict.fromkeys((e.user for e in examples), items)
    else:
        lists = read_candidates(chosen, [e.user for e in examples], set(items))
    made = [replace(e, negatives=Others(lists[e.user], e)) for e in examples]
    if alone := [e.user for e in made if not e.negatives]:
        what = "no item to rank besides the positive that is not in the history"
        raise InputError(f"--candidates {chosen}: user {alone[0]!r}: {what}")
    return made


class Others(Sequence):
    """A list that many users share, without a user's history and positive."""

    def __init__(self, items: list[str], example: Example):
        self.items, self.without = items, {*example.history, example.positive}
        self.length = len(items) - sum(item in self.without for item in items)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return (item for item in self.items if item not in self.without)

    def __getitem__(self, place):
        return list(self)[place]


def drawn(example: Example, items: Sequence[str], n: int, seed: int) -> list[str]:
    """Return n items, uniformly drawn, as the seed and the user determine."""
    excluded = {*example.history, example.positive}
    free = len(items) - sum(item in excluded for item in items)
    if free < n:
        what = f"only {free} items that are neither the positive nor in the history"
        raise InputError(f"--candidates {n}: user {example.user!r} has {what}; choose {ALL}")
    rng = random.Random(f"candidates {seed} {example.user}")
    # Python promises the same numbers in every version for random() only.
    places, found = list(range(len(items))), []
    while len(found) < n:
        # What is drawn goes to the end, so that it is not drawn again.
        last = len(places) - 1
        place = int(rng.random() * len(places))
        places[place], places[last] = places[last], places[place]
        item = items[places.pop()]
        if item not in excluded:
            found.append(item)
    return found


# ---- Files


def read_candidates(path: Path, users: Sequence[str], known: set[str]) -> dict[str, list[str]]:
    """Return the candidates of each user from a file.

    Either every line is an item for all users, as plain text, as a JSON text or as an object with
    "id", like those of items.jsonl; or every line is {"user", "candidates"}. Raises InputError,
    which names the line, for an unknown or repeated item, and for a user who is missing.
    """
    common: dict[str, None] = {}
    own: dict[str, list[str]] = {}
    for where, value in read_lines(path):
        if isinstance(value, dict) and "user" in value:
            check_fields(where, value, {"user": str, "candidates": list})
            if value["user"] in own:
                raise InputError(f"{where}: field 'user': {value['user']!r} is there twice")
            own[value["user"]] = found = value["candidates"]
        else:
            if isinstance(value, dict):
                check_fields(where, value, {"id": str})
                value = value["id"]
            if value in common:
                raise InputError(f"{where}: item {value!r} is there twice")
            found = [value]
            common[value] = None
        check_items(where, found, known)
        if common and own:
            what = "an item for all users in one line, the candidates of a user in another"
            raise InputError(f"{where}: {what}; use one kind of line")

    if not own and not common:
        raise InputError(f"{path}: no candidates in it")
    if missing := [user for user in users if own and user not in own]:
        raise InputError(f"{path}: user {missing[0]!r} is missing")
    shared = list(common)  # one list, however many users
    return own or dict.fromkeys(users, shared)


def read_lines(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (`file:line`, text or JSON object) of each line that is not empty."""
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        raise InputError(f"{path}: not read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        where, text = f"{path}:{number}", line.strip()
        if text[:1] in (b"{", b'"'):
            yield where, parse_line(where, text)
        elif text:
            try:
                yield where, text.decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{where}: not UTF-8 text") from None


def check_items(where: str, found: list[str], known: set[str]) -> None:
    """Raise InputError if a line names an item that is not in the catalogue, or names one twice."""
    if unknown := [item for item in found if item not in known]:
        raise InputError(f"{where}: item {unknown[0]!r} is not in items.jsonl")
    if len(set(found)) < len(found):
        twice = next(item for item in found if found.count(item) > 1)
        raise InputError(f"{where}: field 'candidates' names {twice!r} twice")

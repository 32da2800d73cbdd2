"""A file of interactions in memory: four numbers for each, whatever the length of the ids."""

import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from prepare.common import SPLITS, Session
from prepare.rows import Rows
from prepare.tables import MISSING
from prepare.times import Times
from trsr import InputError

MISSING_VALUES = "interactions with a missing value"
REPEATS = "repeats of an item of the same user"


@dataclass
class Events:
    """Interactions, sorted by user and time; simultaneous ones keep the order of the file.

    user, item: positions in users and items, which are in the order of their first interaction.
    time: orders the interactions.
    row: the number that rows.read gave.
    """

    rows: Rows
    users: list[str]
    items: list[str]
    user: np.ndarray  # int32, as item
    item: np.ndarray
    time: np.ndarray  # int64
    row: np.ndarray  # int32

    def take(self, chosen: np.ndarray) -> None:
        """Keep these interactions, in this order."""
        for name in ("user", "item", "time", "row"):  # one by one, so that memory is freed
            setattr(self, name, getattr(self, name)[chosen])

    def place(self, event: int) -> str:
        """Return `file:line` of an interaction."""
        return self.rows.place(int(self.row[event]))

    def repeats(self) -> np.ndarray:
        """Return which interactions are of an item that the same user has had before."""
        pair = self.user.astype(np.int64) * len(self.items) + self.item
        order = np.argsort(pair, kind="stable")
        pair = pair[order]
        found = np.zeros(len(pair), bool)
        found[order[1:]] = pair[1:] == pair[:-1]
        return found

    def sessions(self, periods: np.ndarray | None = None) -> Iterator[Session]:
        """Yield each user's interactions as a session without a target.

        periods: the number of each interaction's split, for splits by time.
        """
        starts = np.flatnonzero(np.diff(self.user, prepend=-1))
        for start, end in zip(starts, np.append(starts[1:], len(self.user)), strict=True):
            history = [self.items[n] for n in self.item[start:end].tolist()]
            of_items = () if periods is None else periods[start:end].tolist()
            places = Places(self.rows, self.row[start:end])
            user = self.users[self.user[start]]
            yield Session(places, user, history, None, periods=of_items)


FLOAT = re.compile(r"-?\d+(\.\d+)?e\+\d+|-?\d+\.0")  # how programs write large floats


def is_rounded(name: str) -> bool:
    """Return whether an id is written as a float that stands for several whole numbers."""
    return bool(FLOAT.fullmatch(name)) and ("e" in name or abs(float(name)) >= 2**53)


class Places(Sequence):
    """The `file:line` of rows, made when asked for."""

    def __init__(self, rows: Rows, numbers: np.ndarray):
        self.rows, self.numbers = rows, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> str:
        return self.rows.place(int(self.numbers[position]))


def is_missing(text: str) -> bool:
    """Return whether a value is empty, or nothing but NaN, NaT, <NA>, None or NULL."""
    text = text.strip().lower()
    return not text or text in MISSING


def read_events(
    rows: Rows, columns: Sequence[str], drop_missing: bool, dropped: Counter
) -> tuple[Events, Times]:
    """Return the interactions, in the order of the file, and their times.

    columns: of user, item and time. Raises InputError for a bad time, and for a missing value
    unless drop_missing.
    """
    users, items = Codes(), Codes()
    user, item, row, times = array("i"), array("i"), array("i"), Times()
    for number, texts in rows.read(columns):
        u, i = users.code(texts[0]), items.code(texts[1])
        if u < 0 or i < 0 or not texts[2] or (not texts[2].isdecimal() and is_missing(texts[2])):
            report_missing(rows.place(number), columns, texts, drop_missing, dropped)
            continue
        try:
            times.add(texts[2])
        except InputError as error:
            raise InputError(f"{rows.place(number)}: column {columns[2]!r}: {error}") from None
        user.append(u)
        item.append(i)
        row.append(number)
    if not row:
        raise InputError(f"{rows.path}: no interactions in it")
    report_inexact(rows, columns[0], users.names(), user, row)
    report_inexact(rows, columns[1], items.names(), item, row)
    report_twins(rows, columns[0], users.names(), user, row)
    if pair := times.other_unit():
        (first, other), (place, where) = map(times.text, pair), (rows.place(row[n]) for n in pair)
        what = f"{other} and {first} at {place} differ in unit"
        way = "write all times in seconds, or all in milliseconds"
        raise InputError(f"{where}: column {columns[2]!r}: {what}; {way}")

    arrays = [np.frombuffer(numbers, np.int32) for numbers in (user, item)]
    keys, lines = times.keys(), np.frombuffer(row, np.int32)
    return Events(rows, users.names(), items.names(), *arrays, keys, lines), times


def report_missing(
    where: str, columns: Sequence[str], texts: Sequence[str], drop: bool, dropped: Counter
) -> None:
    """Count an interaction with a missing value, and print the first; InputError unless drop."""
    column = next(name for name, text in zip(columns, texts, strict=True) if is_missing(text))
    if not drop:
        what = f"column {column!r} has no value; --missing drop leaves such rows out"
        raise InputError(f"{where}: {what}")
    if not dropped[MISSING_VALUES]:
        print(f"{where}: column {column!r} has no value; such rows are left out")
    dropped[MISSING_VALUES] += 1


def report_inexact(
    rows: Rows, column: str, names: Sequence[str], codes: Sequence[int], numbers: Sequence[int]
) -> None:
    """Raise InputError for an id that is a float for several whole numbers, like 1.5e+17.

    codes, numbers: the id and the row of each interaction.
    """
    for code, name in enumerate(names):
        if is_rounded(name):
            what = f"{name} is a rounded number, so several ids may have become one"
            place = rows.place(numbers[codes.index(code)])
            raise InputError(f"{place}: column {column!r}: {what}; write ids as whole numbers")


def report_twins(
    rows: Rows, column: str, names: Sequence[str], users: Sequence[int], numbers: Sequence[int]
) -> None:
    """Raise InputError if two user ids are spellings of one: blanks, `.0`, Unicode's forms.

    users, numbers: the user and the row of each interaction.
    """
    known, spelled = set(names), {}
    for name in names:
        plain = unicodedata.normalize("NFC", name.strip())
        plain = plain.removesuffix(".0") if plain.removesuffix(".0").isdecimal() else plain
        if plain == name:
            continue
        other = plain if plain in known else spelled.setdefault(plain, name)
        if other != name:
            pair = [names.index(other), names.index(name)]
            first, second = (rows.place(numbers[users.index(n)]) for n in pair)
            what = f"user {name!r} is {names[pair[0]]!r} of {first} in another spelling"
            raise InputError(f"{second}: column {column!r}: {what}; write both alike")


class Codes:
    """Numbers from 0 for ids, in the order of their first appearance; -1 for a missing one."""

    def __init__(self):
        self.known: dict[str, int] = {}
        self.n_missing = 0

    def code(self, text: str) -> int:
        """Return the number of an id."""
        code = self.known.get(text)
        if code is None:
            code = -1 if is_missing(text) else len(self.known) - self.n_missing
            self.n_missing += code < 0
            self.known[text] = code
        return code

    def names(self) -> list[str]:
        """Return the ids by their numbers."""
        return [text for text, code in self.known.items() if code >= 0]


# ---- One moment for all users


def moments(time: np.ndarray, fractions: Sequence) -> list[int]:
    """Return, for each fraction, the row of the first time up to which so many interactions lie.

    fractions: exact, such as Fraction("0.8"), above 0 and below 1.
    """
    places = [-(-share.numerator * len(time) // share.denominator) - 1 for share in fractions]
    sorted_there = np.partition(time, places)
    return [int(np.flatnonzero(time == sorted_there[place])[0]) for place in places]


def used_by(events: Events, periods: np.ndarray) -> dict[str, list[str]]:
    """Return the items that somebody has chosen by the end of each split's time."""
    first = np.full(len(events.items), len(SPLITS))
    for number in reversed(range(len(SPLITS))):
        first[events.item[periods == number]] = number
    found = {}
    for number, split in enumerate(SPLITS):
        found[split] = [events.items[n] for n in np.flatnonzero(first <= number).tolist()]
    return found

"""Raw files with columns, read row by row; errors name the file and the line."""

import csv
import hashlib
import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from launch.bars import Bar
from trsr import InputError

FIELD_LIMIT = 2**24  # characters; an unclosed quote fails here instead of swallowing the file


def split_tabs(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, columns) of tab-separated lines, in which quotes mean nothing special."""
    for number, line in enumerate(lines, 1):
        yield number, line.rstrip("\r\n").split("\t")


def split_csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the first line, columns) of comma-separated rows.

    A quoted text may span lines.
    """
    csv.field_size_limit(FIELD_LIMIT)
    reader, number = csv.reader(lines, strict=True), 1
    try:
        for fields in reader:
            yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        what = f"not comma-separated text ({error}); is the file whole?"
        raise InputError(f"{path}:{number}: {what}") from None


class Table:
    """A raw file with columns. Iterating yields (`file:line`, {column: text}) and counts `rows`.

    header: whether the first line names the columns, which must then include `columns`.
    split: turns lines into (number of the first line, columns).
    header_words: with header False, what the first column says if the file has a header after all;
    that line is skipped.
    Raises InputError at once for a missing file or column, and for a broken row when reached.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str] = (),
        header: bool = True,
        split: Callable = split_tabs,
        header_words: Sequence[str] = (),
    ):
        self.path, self.header, self.split = path, header, split
        self.columns: Sequence[str] = columns
        self.rows = 0
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        if header:
            _, self.columns = next(split(self._lines(), path), (1, []))
            self._check_header(columns)
        elif header_words:
            _, first = next(split(self._lines(), path), (1, [""]))
            if first[0].strip().lower().replace("_", " ") in header_words:
                self.header = True
                print(f"{path}:1: a header line, passed over ({', '.join(first)})")

    def _check_header(self, required: Sequence[str]) -> None:
        if missing := [name for name in required if name not in self.columns]:
            expected, found = ", ".join(required), ", ".join(self.columns) or "an empty file"
            what = f"no column {missing[0]!r}; expected {expected}, found {found}"
            raise InputError(f"{self.path}:1: {what}")
        if len(set(self.columns)) < len(self.columns):
            what = f"two columns of one name among {', '.join(self.columns)}"
            raise InputError(f"{self.path}:1: {what}")

    def __iter__(self) -> Iterator[tuple[str, dict[str, str]]]:
        self.rows = 0
        records = self.split(self._lines(), self.path)
        if self.header:
            next(records)
        for number, fields in records:
            where = f"{self.path}:{number}"
            if len(fields) != len(self.columns):
                expected = f"{len(self.columns)} ({', '.join(self.columns)})"
                what = f"{len(fields)} columns, expected {expected}; is the file whole?"
                raise InputError(f"{where}: {what}")
            self.rows += 1
            yield where, dict(zip(self.columns, fields, strict=True))

    def _lines(self) -> Iterator[str]:
        """Yield the file's lines as text, with a progress bar if it takes long."""
        options = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1}
        size, name = self.path.stat().st_size, self.path.name
        with open(self.path, "rb") as file, Bar(total=size, desc=name, **options) as bar:
            for number, line in enumerate(file, 1):
                bar.update(len(line))
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise InputError(f"{self.path}:{number}: not UTF-8 text") from None

    def source(self) -> dict:
        """Return what meta.json records of the file: name, sha256, rows of the last reading."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": digest, "rows": self.rows}


MISSING = {"nan", "nat", "<na>", "none", "null"}  # how programs write a value that is not there
ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|\w+);")  # not R&D or Oven&microwave


def attributes(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the (name, raw text) pairs that have a text, with HTML entities decoded.

    A text that is nothing but NaN, NaT, <NA>, None or NULL, in any case, is a missing value.
    """
    found = {}
    for name, raw in pairs:
        text = ENTITY.sub(lambda found: html.unescape(found[0]), raw)
        if text.strip() and text.strip().lower() not in MISSING:
            found[name] = text
    return found


def shown_name(column: str) -> str:
    """Return the name of a column's attribute in prompts: `Release year` of release_year."""
    return (column[:1].upper() + column[1:]).replace("_", " ")


def shown_names(path: Path, columns: dict[str, str]) -> dict[str, str]:
    """Return the column of each attribute, for columns by name.

    Raises InputError if two columns become the same attribute.
    """
    found: dict[str, str] = {}
    for name, column in columns.items():
        shown = shown_name(name)
        if shown in found:
            what = f"columns {found[shown]!r} and {column!r} both become {shown!r}; rename one"
            raise InputError(f"{path}:1: {what}")
        found[shown] = column
    return found

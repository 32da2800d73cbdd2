"""Tables in the usual forms, read row by row: CSV, TSV, JSON Lines and Parquet, gzipped or not.

`open_rows` chooses the form by the file's name, and Parquet and gzip by the file's first bytes.
Whatever the form, a row is a list of texts; a value that is not there is an empty text.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from gzip import BadGzipFile, GzipFile
from io import BufferedReader
from itertools import islice
from pathlib import Path

from files.jsonl import article, unique
from launch.bars import Bar
from prepare.tables import split_csv, split_tabs
from trsr import InputError

COMMAS, TABS = (".csv",), (".tsv", ".tab", ".inter", ".item")
JSON_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = ", ".join((*COMMAS, *TABS, *JSON_LINES, ".parquet"))
FIRST = 1000  # lines of a JSON Lines file whose fields count as its columns
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"  # the first bytes of such files
HALF = re.compile("[\ud800-\udfff]")  # of a character; JSON can write it, UTF-8 cannot


# ---- Text


def text_lines(path: Path, start: bytes) -> Iterator[str]:
    """Yield the lines of a file that is text, or gzipped text; start: its first bytes.

    Shows a progress bar if it takes long. Raises InputError, with the line, for what is no text.
    """
    options = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1}
    number = 0
    size, name = path.stat().st_size, path.name
    with open(path, "rb") as raw, Bar(total=size, desc=name, **options) as bar:
        file = BufferedReader(GzipFile(fileobj=raw)) if start.startswith(GZIP) else raw
        try:
            for number, line in enumerate(file, 1):
                if number % 1000 == 0:
                    bar.update(raw.tell() - bar.n)
                if b"\0" in line:
                    raise InputError(f"{path}:{number}: not text (a zero byte); is this a table?")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}:{number}: not UTF-8 text") from None
        except (EOFError, BadGzipFile, zlib.error) as error:
            what = f"the gzip file is broken here ({error}); is it whole?"
            raise InputError(f"{path}:{number + 1}: {what}") from None


class Rows:
    """A table. `read` yields its rows from the beginning each time, and counts them in `rows`.

    columns: their names, as the file has them.
    """

    heading = ":1"  # where the columns are named

    def __init__(self, path: Path, start: bytes, columns: Sequence[str]):
        self.path, self.start, self.columns, self.rows = path, start, list(columns), 0
        if len(set(self.columns)) < len(self.columns):
            what = f"two columns of one name among {', '.join(self.columns)}"
            raise InputError(f"{path}{self.heading}: {what}")

    def place(self, number: int) -> str:
        """Return `file:line` of a row by the number that `read` gave to it."""
        return f"{self.path}:{number}"

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield (the row's number, the texts in the columns of these names)."""
        raise NotImplementedError

    def source(self) -> dict:
        """Return what meta.json records of the file: name, sha256, rows of the last reading."""
        with open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "sha256": digest, "rows": self.rows}


class Separated(Rows):
    """Lines with separators and a header; split turns lines into (line number, texts)."""

    def __init__(self, path: Path, start: bytes, split: Callable):
        self.split = split
        _, header = next(split(text_lines(path, start), path), (1, []))
        if not any(name.strip() for name in header):
            raise InputError(f"{path}:1: an empty line, expected the names of the columns")
        super().__init__(path, start, header)

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield (the row's first line, the texts in the columns of these names)."""
        self.rows, width = 0, len(self.columns)
        wanted = [self.columns.index(name) for name in names]
        records = self.split(text_lines(self.path, self.start), self.path)
        next(records)
        for number, texts in records:
            if len(texts) != width:
                if not any(texts):
                    continue  # an empty line
                expected = f"{width} ({', '.join(self.columns)})"
                what = f"{len(texts)} columns, expected {expected}; is the file whole?"
                raise InputError(f"{self.path}:{number}: {what}")
            if texts == self.columns:
                what = "the header again, as in files that were put together; remove this line"
                raise InputError(f"{self.path}:{number}: {what}")
            self.rows += 1
            yield number, [texts[n] for n in wanted]


# ---- JSON Lines and Parquet: values of types


def as_text(value: object) -> str:
    """Return a value as text: a list with commas, a whole number without a point, None as empty.

    Raises InputError for an object.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, float):
        # From 2^53 on, a float stands for several whole numbers: its point says so.
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(as_text, value)))
    if isinstance(value, dict | bytes):
        raise InputError(f"holds a {type(value).__name__}, expected a text, a number or a list")
    return str(value)


def as_texts(values: Sequence[object], names: Sequence[str], where: str) -> list[str]:
    """Return a row's values as texts; InputError that names the place and the column."""
    texts = []
    for name, value in zip(names, values, strict=True):
        try:
            texts.append(as_text(value))
        except InputError as error:
            raise InputError(f"{where}: column {name!r} {error}") from None
    return texts


class JsonLines(Rows):
    """One JSON object per line; a field that a line does not have is an empty text."""

    # Numbers with a point stay as they are written, since a float may not hold all their digits.
    decode = json.JSONDecoder(parse_float=str, parse_constant=str, object_pairs_hook=unique).decode

    def __init__(self, path: Path, start: bytes):
        self.path, self.start = path, start
        first = (record for _, record in islice(self._records(), FIRST))
        columns = dict.fromkeys(name for record in first for name in record)
        if not columns:
            raise InputError(f"{path}:1: no JSON object with fields in the file")
        super().__init__(path, start, columns)

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield (the line's number, the texts in the fields of these names)."""
        self.rows = 0
        for number, record in self._records():
            self.rows += 1
            values = [record.get(name) for name in names]
            if not all(type(value) is str for value in values):
                values = as_texts(values, names, self.place(number))
            yield number, values

    def _records(self) -> Iterator[tuple[int, dict]]:
        for number, line in enumerate(text_lines(self.path, self.start), 1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                record = self.decode(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}); one object per line") from None
            if not isinstance(record, dict):
                what = f"{article(type(record).__name__)}, expected one JSON object per line"
                raise InputError(f"{where}: {what}")
            if "\\u" in line and HALF.search(json.dumps(record, ensure_ascii=False)):
                what = "a text holds half of a character (\\ud800 to \\udfff)"
                raise InputError(f"{where}: {what}")
            yield number, record


class Parquet(Rows):
    """A Parquet file, for which pyarrow is needed."""

    heading = ""

    def __init__(self, path: Path, start: bytes):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            way = "pip install -e '.[parquet]', or save the table as CSV"
            raise InputError(f"{path}: a Parquet file needs pyarrow; {way}") from None
        self.arrow, self.open = pyarrow, lambda: pyarrow.parquet.ParquetFile(path)
        try:
            with self.open() as file:
                columns = file.schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            what = str(error).splitlines()[0]
            raise InputError(f"{path}: not a whole Parquet file ({what})") from None
        super().__init__(path, start, columns)

    def place(self, number: int) -> str:
        """Return the file and the row, from 1."""
        return f"{self.path}: row {number}"

    def read(self, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield (the row's number from 1, the texts in the columns of these names)."""
        self.rows = 0
        options = {"unit": "rows", "unit_scale": True, "disable": None, "delay": 1}
        try:
            with self.open() as file, Bar(desc=self.path.name, **options) as bar:
                for batch in file.iter_batches(columns=list(dict.fromkeys(names))):
                    columns = [self._values(batch.column(name)) for name in names]
                    for values in zip(*columns, strict=True):
                        self.rows += 1
                        yield self.rows, as_texts(values, names, self.place(self.rows))
                    bar.update(len(batch))
        except (self.arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            what = f"not readable ({str(error).splitlines()[0]}); is the file whole?"
            raise InputError(f"{self.place(self.rows + 1)}: {what}") from None

    def _values(self, column: object) -> list:
        """Return a column's values; times as ISO 8601, as exact as they are."""
        types = self.arrow.types
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        is_time = types.is_temporal(column.type) and not types.is_duration(column.type)
        if is_time or types.is_binary(column.type) or types.is_large_binary(column.type):
            column = column.cast(self.arrow.string())
        return column.to_pylist()


# ---- Which form


def open_rows(path: Path) -> Rows:
    """Return the table in a file; InputError if there is none, or if its form is unknown."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        start = file.read(len(PARQUET))
    if not start:
        raise InputError(f"{path}:1: the file is empty")

    name = path.name.lower().removesuffix(".gz")
    if start == PARQUET or name.endswith((".parquet", ".pq")):
        return Parquet(path, start)
    if name.endswith(JSON_LINES):
        return JsonLines(path, start)
    for suffixes, split in ((COMMAS, split_csv), (TABS, split_tabs)):
        if name.endswith(suffixes):
            return Separated(path, start, split)
    what = f"the name does not tell the form; known are {SUFFIXES}; text may end in .gz too"
    raise InputError(f"{path}: {what}")

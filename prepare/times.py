"""Times as they stand in tables: numbers, exact however large, or ISO 8601.

A time is kept as two whole numbers: the seconds (or whatever the numbers count) rounded down, and
the rest in units of 1e-18. So no digit is lost, and times compare as they should.
"""

import re
from array import array
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

import numpy as np

from trsr import InputError

UNIT = 10**18  # of the part after the point
LARGEST = 2**63
UNIX = 10**8  # seconds since 1970 have so many since 1973, and smaller numbers are no Unix times
DATES = 19000101, 21001231  # as numbers
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NUMBER, ZONED, LOCAL = "a number", "ISO 8601 with a time zone", "ISO 8601 without a time zone"
LONGEST = 60  # characters
ISO = re.compile(
    r"(\d{4}-\d\d-\d\d)"
    r"(?:[T ](\d\d:\d\d(?::\d\d(?:[.,](\d{1,18})0*)?)?) ?(Z|UTC|[+-]\d\d(?::?\d\d)?)?)?",
    re.IGNORECASE | re.ASCII,
)


def parse_time(text: str) -> tuple[str, int, int]:
    """Return (kind, whole, rest in units of 1e-18) of a time; InputError if text is none."""
    text = text.strip()
    if len(text) <= LONGEST and (match := ISO.fullmatch(text)):
        return parse_iso(text, *match.groups())
    return NUMBER, *parse_number(text)


def parse_iso(
    text: str, date: str, clock: str | None, rest: str | None, zone: str | None
) -> tuple[str, int, int]:
    """Return what parse_time returns, of the parts of a text in ISO 8601."""
    shift = "+00:00" if (zone or "Z").upper() in ("Z", "UTC") else zone
    try:
        moment = datetime.fromisoformat(f"{date}T{(clock or '00:00')[:8]}{shift}")
    except ValueError:
        raise InputError(f"{text!r} is no time: such a day, hour or zone does not exist") from None
    seconds = (moment - EPOCH) // timedelta(seconds=1)
    return (ZONED if zone else LOCAL), seconds, int((rest or "").ljust(18, "0"))


def parse_number(text: str) -> tuple[int, int]:
    """Return (whole, rest in units of 1e-18) of a decimal number; InputError if text is none."""
    try:
        number = Decimal("nan" if "_" in text or len(text) > LONGEST else text)
    except InvalidOperation:
        number = Decimal("nan")
    if not number.is_finite():
        example = "2026-01-31T12:00:00Z"
        raise InputError(f"{text[:LONGEST]!r} is neither a number nor ISO 8601 such as {example}")
    if not number:
        return 0, 0
    if number.adjusted() > 18:
        raise InputError(f"{text!r} is larger than 64 bits hold")
    if number.adjusted() < -18:
        raise InputError(f"{text!r} has more than 18 digits after the point")

    sign, digits, exponent = number.as_tuple()
    value, shift = int("".join(map(str, digits))), exponent + 18
    scaled, lost = (value * 10**shift, 0) if shift >= 0 else divmod(value, 10**-shift)
    if lost:
        raise InputError(f"{text!r} has more than 18 digits after the point")
    return divmod(-scaled if sign else scaled, UNIT)


def exact(whole: int, rest: int) -> str:
    """Return the number with these parts as text, such as `-0.5` for -1 and half of UNIT."""
    scaled = whole * UNIT + rest
    digits = f"{abs(scaled):019d}"
    number = f"{digits[:-18]}.{digits[-18:]}".rstrip("0").rstrip(".")
    return f"-{number}" if scaled < 0 else number


class Times:
    """A column of times, all of one kind. `add` takes them one by one."""

    def __init__(self):
        self.kind: str | None = None
        self.whole = array("q")
        self.rests: array | None = None  # made when the first rest appears

    def add(self, text: str) -> None:
        """Add a time; InputError if it is none, or of another kind than those before."""
        if text.isdecimal() and self.rests is None and self.kind is NUMBER and len(text) < 19:
            self.whole.append(int(text))  # nearly all are like this
            return
        kind, whole, rest = parse_time(text)
        if self.kind not in (None, kind):
            raise InputError(f"{text!r} is {kind}, the times before it are {self.kind}")
        if not -LARGEST <= whole < LARGEST:
            raise InputError(f"{text!r} is larger than 64 bits hold")
        self.kind = kind
        if rest and self.rests is None:
            self.rests = array("q", bytes(8 * len(self.whole)))
        if self.rests is not None:
            self.rests.append(rest)
        self.whole.append(whole)

    def keys(self) -> np.ndarray:
        """Return an int64 array that orders as the times do: they themselves if all are whole."""
        whole = np.frombuffer(self.whole, np.int64)
        if self.rests is None:
            return whole
        rests = np.frombuffer(self.rests, np.int64)
        order = np.lexsort((rests, whole))
        later = (np.diff(whole[order]) != 0) | (np.diff(rests[order]) != 0)
        keys = np.empty(len(whole), np.int64)
        keys[order] = np.concatenate([[0], np.cumsum(later)])
        return keys

    def other_unit(self) -> tuple[int, int] | None:
        """Return the first two rows whose numbers count in different units, if there are any.

        The units of Unix times are a factor of 1000 apart. Numbers that count anything else lie
        closer together, so what matters is a gap of 100 between two neighbors in size. Beside
        Unix times, 20260131 is a date, and 0 or -1 a time that is missing.
        """
        if self.kind is not NUMBER:
            return None
        whole = np.frombuffer(self.whole, np.int64)
        rows = np.flatnonzero(whole >= UNIX)
        large = np.unique(whole[rows])
        odd = np.flatnonzero(whole < UNIX)
        dates = (whole[odd] >= DATES[0]) & (whole[odd] <= DATES[1])
        if len(odd) and len(large) and (dates | np.isin(whole[odd], (0, -1))).all():
            return int(rows[0]), int(odd[0])
        gaps = np.flatnonzero(large[1:] // 100 > large[:-1])
        if not len(gaps):
            return None
        unit = np.searchsorted(large[gaps + 1], whole[rows], side="right")
        return int(rows[0]), int(rows[np.flatnonzero(unit != unit[0])[0]])

    def text(self, row: int) -> str:
        """Return the time of a row as text, as exact as it was."""
        whole, rest = self.whole[row], self.rests[row] if self.rests is not None else 0
        return exact(whole, rest)

    def iso(self, row: int) -> str | None:
        """Return the time of a row as ISO 8601 in seconds; None for a number that is no Unix time.

        Numbers from 1e8 on count seconds since 1970, from 1e11 on milliseconds, from 1e14 on
        microseconds, from 1e17 on nanoseconds.
        """
        seconds = self.whole[row]
        if self.kind is NUMBER:
            if seconds < UNIX:
                return None
            while seconds >= 10**11:
                seconds //= 1000
        try:
            moment = (EPOCH + timedelta(seconds=seconds)).isoformat()
        except OverflowError:  # a zone has moved it out of the years 1 to 9999
            return None
        return moment.replace("+00:00", "" if self.kind is LOCAL else "Z")

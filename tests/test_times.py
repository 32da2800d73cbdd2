"""prepare/times.py: numbers are exact, ISO 8601 is what datetime says, and nothing is mixed."""

import random
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest

from prepare.times import LOCAL, NUMBER, UNIT, ZONED, Times, parse_time
from trsr import InputError


@pytest.mark.parametrize(
    "text", ["0", "-1", "7", "1.5", "-0.25", "1e3", "9223372036854775807", "0.000000000000000001"]
)
def test_numbers_are_exact(text):
    kind, whole, rest = parse_time(text)
    assert (kind, whole + Fraction(rest, UNIT)) == (NUMBER, Fraction(text))
    assert 0 <= rest < UNIT


def test_iso_8601_agrees_with_datetime():
    rng = random.Random(0)
    for _ in range(300):
        moment = datetime(1950, 1, 1) + timedelta(seconds=rng.randrange(4 * 10**9))
        since = (moment - datetime(1970, 1, 1)) // timedelta(seconds=1)
        assert parse_time(moment.isoformat()) == (LOCAL, since, 0)
        assert parse_time(moment.isoformat(" ") + " UTC") == (ZONED, since, 0)
        hours = rng.randrange(-12, 13)
        shifted = f"{moment.isoformat()}.5{hours:+03d}:30"
        minutes = 60 * hours + (30 if hours >= 0 else -30)
        if shifted[20] != "-" or hours:  # -00:30 is written as it is
            assert parse_time(shifted) == (ZONED, since - 60 * minutes, UNIT // 2)
    assert parse_time("1970-01-02") == (LOCAL, 86400, 0)
    assert parse_time("1970-01-01T00:01Z") == (ZONED, 60, 0)
    assert parse_time("1970-01-01 00:00:01,000000001Z") == (ZONED, 1, 10**9)


@pytest.mark.parametrize(
    "text",
    [
        *("", "noon", "nan", "inf", "1_000", "1 2", "2020-13-01", "2020-02-30", "01/02/2020"),
        *("2020-01-01T25:00", "2020-01-01T10:00.5", "2020-01-01Z", "2020-01-01T10:00:00+99:00"),
        *("9" * 5000, "1e999999999", "0x10", "9223372036854775808", "1e-19", "1e-999999999"),
    ],
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(InputError) as error:
        Times().add(text)
    assert len(str(error.value)) < 150


def test_kinds_are_not_mixed():
    for first, second in (("1", "2020-01-01"), ("2020-01-01", "2020-01-01T00:00Z")):
        times = Times()
        times.add(first)
        with pytest.raises(InputError, match="the times before it are"):
            times.add(second)


@pytest.mark.parametrize(
    ("column", "rows"),
    [
        ([5, 1700000000], None),  # a counter, perhaps
        ([10**8 * n for n in range(1, 3000)], None),  # counts that pass from one unit to the next
        ([1700000000, 950000000, 1600000000000], (0, 2)),
        ([3, 1600000000000, 4, 1700000000], (1, 3)),
        ([1600000000, 1600000000 * 10**6], (0, 1)),
        ([20170714, 1500000000, 20170715], (1, 0)),  # dates beside seconds
        ([20170714, 20170714120000], (1, 0)),
        ([1500000000, 0, 1500000001, -1], (0, 1)),
        ([20170714, 20170715], None),
        ([0, 5, 1500000000], None),
        (["2020-01-01", "0001-01-01"], None),
    ],
)
def test_numbers_in_another_unit_are_found(column, rows):
    times = Times()
    for text in column:
        times.add(str(text))
    assert times.other_unit() == rows


def test_a_moment_out_of_the_calendar_has_no_iso_form():
    times = Times()
    times.add("9999-12-31T23:59:59-05:00")
    assert times.iso(0) is None


def test_keys_order_as_the_times_do():
    rng = random.Random(1)
    texts = [f"{rng.randrange(-3, 3)}.{rng.randrange(4)}" for _ in range(200)] + ["1", "1.0"]
    times = Times()
    for text in texts:
        times.add(text)
    keys = times.keys().tolist()
    values = [Fraction(text) for text in texts]
    for a, key_a in zip(values, keys, strict=True):
        for b, key_b in zip(values, keys, strict=True):
            assert (a < b, a == b) == (key_a < key_b, key_a == key_b)


def test_whole_times_beyond_what_a_float_holds_are_their_own_keys():
    times = Times()
    for n in (3, 1, 2):
        times.add(str(2**60 + n))
    assert times.keys().tolist() == [2**60 + 3, 2**60 + 1, 2**60 + 2]


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("1500000000", "2017-07-14T02:40:00Z"),
        ("1500000000123", "2017-07-14T02:40:00Z"),
        ("1500000000123456789", "2017-07-14T02:40:00Z"),
        ("2017-07-14T04:40:00.5+02:00", "2017-07-14T02:40:00Z"),
        ("2017-07-14", "2017-07-14T00:00:00"),
        ("1234", None),
        ("-5", None),
    ],
)
def test_a_moment_is_told_as_iso_8601_if_it_can_be(text, iso):
    times = Times()
    times.add(text)
    assert times.iso(0) == iso
    assert datetime.fromisoformat(iso).tzinfo in (UTC, None) if iso else True


@pytest.mark.parametrize("text", ["0", "-1", "12", "-0.5", "1.25", "-7.000000000000000001"])
def test_a_time_is_told_as_exactly_as_it_was(text):
    times = Times()
    times.add(text)
    assert times.text(0) == text

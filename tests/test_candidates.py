"""batches/candidates.py: which items are ranked: all, drawn ones, or those that a file names."""

import pytest

from batches.candidates import ALL, name_of, with_candidates
from trsr import Example, InputError

ITEMS = [f"i{n}" for n in range(30)]
USERS = [
    Example("a", ["i0", "i1", "i0"], "i2", ["i3"]),
    Example("b", ["i4"], "i5", ["i6", "i7"]),
]


def test_all_are_those_that_the_user_has_not_had():
    a, b = with_candidates(ALL, USERS, ITEMS)
    assert list(a.negatives) == ITEMS[3:]
    assert len(a.negatives) == 27
    assert set(b.negatives) == set(ITEMS) - {"i4", "i5"}
    assert (a.user, a.history, a.positive) == ("a", ["i0", "i1", "i0"], "i2")
    assert with_candidates(None, USERS, ITEMS) == USERS


def test_drawn_ones_depend_on_seed_and_user_alone():
    a, b = with_candidates(20, USERS, ITEMS)
    assert len(set(a.negatives)) == 20
    assert not {*a.history, a.positive} & set(a.negatives)
    assert with_candidates(20, USERS[::-1], ITEMS) == [b, a]
    assert with_candidates(20, USERS, ITEMS, seed=1)[0].negatives != a.negatives
    same = Example("c", a.history, a.positive, [])
    assert with_candidates(20, [same], ITEMS)[0].negatives != a.negatives
    assert set(with_candidates(27, USERS, ITEMS)[0].negatives) == set(ITEMS[3:])
    with pytest.raises(InputError, match="user 'a' has only 27 items"):
        with_candidates(28, USERS, ITEMS)


def test_drawing_is_uniform():
    users = [Example(f"u{n}", ["i0"], "i1", []) for n in range(2800)]
    drawn = [item for e in with_candidates(1, users, ITEMS) for item in e.negatives]
    for item in ITEMS[2:]:
        assert drawn.count(item) == pytest.approx(100, abs=45)


@pytest.mark.parametrize(
    "text",
    [
        "i2\ni1\n\ni9\ni6\n",
        "\ufeffi2\ni1\n\ni9\ni6\n",
        '"i2"\n"i1"\n"i9"\n"i6"\n',
        '{"id": "i2", "attributes": {}}\n{"id": "i1"}\n{"id": "i9"}\n{"id": "i6"}',
    ],
)
def test_a_file_for_all_users(tmp_path, text):
    (tmp_path / "c").write_text(text)
    a, b = with_candidates(tmp_path / "c", USERS, ITEMS)
    assert list(a.negatives) == ["i9", "i6"]  # without its positive and its history
    assert list(b.negatives) == ["i2", "i1", "i9", "i6"]


def test_a_file_with_a_line_for_each_user(tmp_path):
    lines = '{"user": "b", "candidates": ["i9"]}\n{"user": "a", "candidates": ["i2", "i8"]}\n'
    (tmp_path / "c").write_text(lines + '{"user": "z", "candidates": ["i1"]}\n')
    a, b = with_candidates(tmp_path / "c", USERS, ITEMS)
    assert (list(a.negatives), list(b.negatives)) == (["i8"], ["i9"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no candidates in it"),
        ("i1\nx9\n", r"c:2: item 'x9' is not in items\.jsonl"),
        ("i1\ni2\ni1\n", "c:3: item 'i1' is there twice"),
        ('{"user": "a", "candidates": ["i8"]}\n', "user 'b' is missing"),
        ('{"user": "a", "candidates": ["i8", "i8"]}\n', "c:1: .*names 'i8' twice"),
        ('{"user": "a", "candidates": "i8"}\n', "c:1: field 'candidates'"),
        ('{"user": "a", "candidates": ["i8"]}\n' * 2, "c:2: .*'a' is there twice"),
        ('{"user": "a", "candidates": ["i8"]}\ni1\n', "c:2: .*one kind of line"),
        ('{"item": "i8"}\n', "c:1: field 'id' is missing"),
        ('{"id": "i8"\n', "c:1: not JSON"),
        ("i0\ni1\n", "user 'a': no item to rank"),
        (b"\xff\xfe\n", "c:1: not UTF-8"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "c"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        with_candidates(path, USERS, ITEMS)


def test_names_of_files(tmp_path):
    assert [name_of(c) for c in (None, ALL, 50)] == ["", "all", "50-drawn"]
    assert name_of(50, seed=3) == "50-drawn-seed3"
    assert name_of(tmp_path / "shelf.txt", seed=3) == "candidates-shelf"

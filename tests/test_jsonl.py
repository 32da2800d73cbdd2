"""files/jsonl.py: JSON and JSON Lines, with errors that name file, line and field."""

import pytest
from helpers import write_dataset

from files.jsonl import append_jsonl, read_json, read_jsonl, write_jsonl
from prepare.dataset import load_dataset
from trsr import InputError


def test_read_json_names_what_is_no_object(tmp_path):
    for text in ("", "[1]", '"x"', "nan", "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=r"x\.json: no JSON object"):
            read_json(tmp_path / "x.json")


def test_lines_are_read_as_they_were_written_and_appended(tmp_path):
    path, records = tmp_path / "x.jsonl", [{"text": "é\n\u2028"}, {"text": "", "n": 1.5}]
    write_jsonl(path, records)
    append_jsonl(path, {"text": "last"})
    found = list(read_jsonl(path, {"text": str}))
    assert found == [(f"{path}:{n}", r) for n, r in enumerate([*records, {"text": "last"}], 1)]


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"n": 1}\n\ufeff{"n": 2}\n', "utf-8")
    lines = read_jsonl(path, {"n": int})
    assert next(lines) == (f"{path}:1", {"n": 1})
    with pytest.raises(InputError, match=r"x\.jsonl:2: not JSON"):
        next(lines)


def test_a_line_cut_short_is_dropped_only_where_that_can_happen(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    assert [record for _, record in read_jsonl(path, {"n": int}, torn=True)] == [{"n": 1}]
    assert "x.jsonl:2: dropped, an interruption cut this line short" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"x\.jsonl:2: not JSON"):
        list(read_jsonl(path, {"n": int}))


def test_a_field_that_is_there_twice_is_named(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text('{"a": 1}\n{"a": {"b": 1, "b": 2}}\n')
    with pytest.raises(InputError, match=r"twice\.jsonl:2: not JSON \(field 'b' is there twice\)"):
        list(read_jsonl(path, {}))
    path.write_text('{"a": 1, "a": 1}')
    with pytest.raises(InputError, match=r"no JSON object here \(field 'a' is there twice\)"):
        read_json(path)


def test_half_a_character_is_named(tmp_path):
    data = write_dataset(tmp_path)
    ends = (("x", "\\udfae"), ("y", ""))
    whole, half = (
        f'{{"id": "{i}", "attributes": {{"Title": "\\ud83c{end}"}}}}\n' for i, end in ends
    )
    with open(data / "items.jsonl", "a") as file:
        file.write(whole + half)
    with pytest.raises(InputError, match=r"items.jsonl:62: a text holds half of a character"):
        load_dataset(data, ("train",))

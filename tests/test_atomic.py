"""files/atomic.py: a file is replaced as a whole, or not at all."""

import pytest

from files.atomic import atomic_write
from files.jsonl import write_json
from trsr import InputError


def test_atomic_write_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with atomic_write(path) as file:
        file.write("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines(["half of the new", 7])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_where_nothing_can_be_written_is_one_line(tmp_path):
    with pytest.raises(InputError, match="not written"):
        write_json(tmp_path / "no" / "such" / "folder.json", {})

    def break_off():
        with atomic_write(tmp_path / "x") as file:
            file.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert not list(tmp_path.iterdir())

"""launch/bars.py: a line now and then where stderr is no terminal, and what is foreseen."""

import io
import sys

import pytest

from launch import bars
from launch.bars import Bar, WritingBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def count(clock, capsys, seconds, n=100, **options):
    for _ in Bar(range(n), unit="user", **options):
        clock[0] += seconds
    return capsys.readouterr().err.splitlines()


def test_a_file_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    lines = count(clock, capsys, 1.0, desc="prompts")
    assert len(lines) == 4  # after 30, 60, 90 and 100 seconds
    assert all(line.startswith("prompts: ") and len(line) <= 100 for line in lines)
    assert lines[0].startswith("prompts: 30 %, 30 of 100 users, ")
    assert lines[-1].startswith("prompts: 100 %, 100 of 100 users, 01:40 so far")


def test_what_is_short_hidden_or_not_to_be_left_ends_without_a_line(clock, capsys):
    assert len(count(clock, capsys, 0.01)) == 1
    assert count(clock, capsys, 0.001, delay=1, disable=None) == []
    assert count(clock, capsys, 0.1, leave=False) == []
    assert count(clock, capsys, 1.0, disable=True) == []
    assert count(clock, capsys, 1.0, n=0) == []


def test_a_long_line_is_cut_and_other_lines_go_between(clock, capsys):
    with Bar(total=2) as bar:
        bar.set_postfix_str("x" * 300)
        clock[0] += 31
        bar.update()
        bar.write("told")
        bar.update()
    out, err = capsys.readouterr()
    assert out == "told\n"
    assert [len(line) for line in err.splitlines()] == [100, 100]
    assert "\r" not in err


def test_a_terminal_gets_a_drawn_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in Bar(range(3), file=sys.stderr):
        pass
    assert "\r" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()


def test_tokens_are_foreseen_by_the_limit_and_then_by_the_texts_that_are_done(clock, capsys):
    # 12 items are 3 blocks and a merge, 4 items one block alone, and nobody asks of no items.
    with WritingBar([12, 4, 0], 5, merged=True, limit=100, hidden=False) as bar:
        assert bar.total == 500
        bar.wrote(0, 0, under_way=50)
        assert (bar.n, bar.total) == (50, 500)
        bar.wrote(40, 2, under_way=20)
        assert (bar.n, bar.total) == (60, 100)  # three more of 20 tokens
        for _ in range(3):
            bar.user_done()
        bar.wrote(90, 5, under_way=0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("100 %, 90 of 90 tokens, ")
    assert line.endswith("3 of 3 users")
    assert bars.WritingBar([12], 5, merged=False, limit=100, hidden=True).texts == 3

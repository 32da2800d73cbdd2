"""launch/command.py: the fields of a dataclass as flags, and help that shows their defaults."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import evaluate
import summarize
import train
from launch.command import Shared, option, parse_settings
from launch.numbers import natural, positive


@dataclass(frozen=True)
class Settings(Shared):
    epochs: int = option(8, "passes", positive, "optimization")
    k: tuple[int, ...] = option((3, 5), "cut-offs", positive, nargs="+")
    dry_run: bool = option(False, "stop at once")
    resolved: str = ""  # no flag


def parse(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    return parse_settings(Settings, "What it does.\n\n    python script.py")


def test_each_default_and_each_flag_becomes_a_field(monkeypatch):
    assert parse(monkeypatch) == Settings()
    assert parse(monkeypatch, "--epochs", "8").given == {"epochs"}
    flags = ["--epochs", "2", "--k", "1", "10", "--dry-run", "--run-dir", "r", "--no-compile"]
    found = parse(monkeypatch, *flags)
    assert (found.epochs, found.k, found.dry_run) == (2, [1, 10], True)
    assert (found.run, found.no_compile, found.resolved) == (Path("r"), True, "")


def test_help_shows_groups_defaults_and_the_docstring_as_written(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    shown = capsys.readouterr().out
    assert "\n\n    python script.py\n" in shown
    assert "optimization:\n" in shown
    assert "passes (default: 8)" in shown
    assert "resolved" not in shown


TORCHRUN = {
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", "0"), "argument --epochs: expected a whole number from 1 to "),
        (("--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
        (("--resolved", "x"), "unrecognized arguments: --resolved x"),
    ],
)
def test_a_wrong_flag_ends_the_script_and_one_process_per_node_says_why(
    monkeypatch, capsys, flags, message
):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            parse(monkeypatch, *flags)
        assert end.value.code == 2
        assert (message in capsys.readouterr().err) == said


def test_whole_numbers():
    assert (natural("0"), positive("1")) == (0, 1)
    for kind, text in ((natural, "-1"), (positive, "0"), (natural, "1.5"), (natural, "")):
        with pytest.raises(ArgumentTypeError, match="expected a whole number"):
            kind(text)


@pytest.mark.parametrize("script", [summarize, train, evaluate], ids=lambda s: s.__name__)
def test_every_flag_of_a_script_has_a_help(script):
    for setting in fields(script.Settings):
        if flag := setting.metadata.get("flag"):
            assert flag["help"], setting.name

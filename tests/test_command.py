"""launch/command.py: the fields of a dataclass as flags, and help that shows their defaults."""

import importlib
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from helpers import ROOT

import evaluate
import summarize
import train
from launch.command import Shared, option, parse_settings, tell_next
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


# ---- The help of every command


def commands():
    """The modules that read flags when they are run, by their names."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
    texts = {path.relative_to(ROOT).with_suffix(""): path.read_text("utf-8") for path in paths}
    run = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    flags = re.compile(r"\bparse_settings\(\w+, __doc__\)|\.parse_args\(")
    return sorted(
        ".".join(path.parts) for path, t in texts.items() if run.search(t) and flags.search(t)
    )


COMMANDS = commands()


def test_all_commands_are_found():
    assert {"train", "prepare.table", "bench.train", "experiments.study"} <= {*COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_command_is_described_and_no_default_is_none(monkeypatch, capsys, name):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python ")
    assert not re.search(r"default:\s+(None|\(|\[|False)", shown)
    flags = re.split(r"\n(?=  -)", shown[shown.index("\noptions:") :])[1:]
    assert len(flags) > 1
    for flag in flags:
        what, _, text = flag.strip().partition("  ")
        assert text.strip() or "\n" in what, flag


def test_a_default_of_zero_is_shown_and_lists_are_as_one_types_them(monkeypatch, capsys):
    @dataclass(frozen=True)
    class More:
        seed: int = option(0, "of the order", natural)
        rate: float = option(600.0, "of steps")
        ks: tuple[int, ...] = option((3, 5), "cut-offs", positive, nargs="+")
        none: tuple[int, ...] = option((), "to choose from", positive, nargs="+")

    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_settings(More, "What it does.")
    shown = capsys.readouterr().out
    for text in ("of the order (default: 0)", "(default: 600)", "(default: 3 5)", "choose from\n"):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "usage"),
    [
        (["train.py"], "usage: python train.py [flags]"),
        (["-m", "runfolder.show"], "usage: python -m runfolder.show RUN [flags]"),
    ],
    ids=str,
)
def test_the_help_begins_with_the_command_as_one_types_it(arguments, usage):
    line = [sys.executable, *arguments, "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == usage


def test_the_next_command_is_left_to_whoever_tells_the_steps(monkeypatch, capsys):
    tell_next("python train.py")
    monkeypatch.setenv("TRSR_STEPS", "told")
    tell_next("python train.py")
    assert capsys.readouterr().out == "next    python train.py\n"

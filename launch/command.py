"""What the command lines share: flags, and how an error becomes one line."""

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypeVar

import paradigms  # noqa: F401  (registers the user's own)
from launch.numbers import positive_real
from trsr import InputError

Settings = TypeVar("Settings")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is written, and the default of a flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, "", argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


# ---- Settings: a frozen dataclass whose fields are flags


def option(default: object, help: str, type: Callable | None = None, group: str = "", **more):
    """Return a dataclass field that is a flag of that default, help and type.

    A False default makes a switch. group: the heading in --help, for this field and those after
    it. more: as for argparse's add_argument.
    """
    flag = more | {"help": help} | ({"type": type} if type else {})
    return field(default=default, metadata={"flag": flag, "group": group})


@dataclass(frozen=True)
class Shared:
    """The settings that summarize, train and evaluate share."""

    data: str | None = option(
        None, "dataset folder made by prepare (unset: the run's, else data/demo)", group="files"
    )
    model: str | None = option(
        None, "Llama or Pythia folder, or hub id (unset: the run's, else models/tiny)"
    )
    revision: str | None = option(None, "commit, tag or branch of a hub id")
    run: Path = option(Path("runs/demo"), "run folder", Path)
    dtype: str = option(
        "auto",
        "auto: bf16 on GPUs, fp32 on CPUs",
        choices=("auto", "bf16", "fp32"),
        group="machine",
    )
    no_compile: bool = option(
        False, "on GPUs, do not compile the layers: slower, but starts at once"
    )
    timeout: float = option(
        600.0, "seconds that a process waits for the others to start", positive_real
    )
    given: frozenset[str] = frozenset()  # the names of the flags on the command line

    def dtype_on(self, device: str) -> str:
        """Return bf16 or fp32: what was asked for, or what suits the type of device."""
        return {"cuda": "bf16"}.get(device, "fp32") if self.dtype == "auto" else self.dtype

    def inherit(self, recorded: dict) -> "Shared":
        """Return the settings with what a run has recorded in the place of flags not given."""
        names = {setting.name for setting in fields(self)} - self.given
        return replace(self, **{n: value for n, value in recorded.items() if n in names})


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, from one process."""

    def error(self, message: str) -> None:
        """End the script with exit status 2."""
        # All of torchrun's processes read the same flags, so one of them reports.
        reports = torchrun_variables().get("LOCAL_RANK", 0) == 0
        self.exit(2, f"{self.prog}: {message}; --help lists the flags\n" if reports else None)


def torchrun_variables() -> dict[str, int]:
    """Return the ranks and sizes that torchrun sets; nothing unless all are there and agree."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [os.environ.get(name, "") for name in names]
    if not all(text.isascii() and text.isdecimal() for text in texts):
        return {}
    found = dict(zip(names, map(int, texts), strict=True))
    meeting = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    within = found["RANK"] < found["WORLD_SIZE"] and found["LOCAL_RANK"] < found["LOCAL_WORLD_SIZE"]
    return found if meeting and within else {}


def parse_settings(form: type[Settings], description: str) -> Settings:
    """Return the settings that the command line asks for; ends the script on a wrong flag."""
    parser = Parser(description=description, formatter_class=Help)
    group = parser
    for setting in fields(form):
        if not (flag := setting.metadata.get("flag")):
            continue  # not a flag: resolved later
        if title := setting.metadata["group"]:
            group = parser.add_argument_group(title)
        names = ["--" + setting.name.replace("_", "-")]
        if setting.name == "run":
            # torchrun reads --run as an abbreviation of its own --run-path.
            names.append("--run-dir")
        switch = {"action": "store_true"} if setting.default is False else {}
        group.add_argument(*names, default=setting.default, **flag, **switch)
    asked = vars(parser.parse_args())
    if issubclass(form, Shared):
        asked["given"] = frozenset(flags_given(parser))
    return form(**asked)


def flags_given(parser: argparse.ArgumentParser) -> set[str]:
    """Return the destinations of the flags that are on the command line."""
    quiet = copy.deepcopy(parser)
    for action in quiet._actions:
        action.default = argparse.SUPPRESS
    return set(vars(quiet.parse_args()))


# ---- The end of a command


def run_main(
    main: Callable[[], None], *errors: type[Exception], reports: Callable[[], bool] = lambda: True
) -> None:
    """Run a script's main; a fixable user error, or one of errors, ends it with one line.

    The exit status is then 2. reports: whether this process is the one that prints the line.
    """
    try:
        main()
    except (InputError, OSError, *errors) as error:
        if reports():
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if reports():
            what = "interrupted; finished work is kept, the same command resumes"
            print(f"{Path(sys.argv[0]).stem}: {what}", file=sys.stderr)
        sys.exit(130)  # the status that shells give to Ctrl-C

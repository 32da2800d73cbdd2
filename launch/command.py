"""What the command lines share: flags, and how an error becomes one line."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

from trsr import InputError

Settings = TypeVar("Settings")


def natural(text: str, least: int = 0) -> int:
    """Return text as a whole number, for argparse; `positive` is the same from 1."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, not {text!r}")
    return int(text)


positive = partial(natural, least=1)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is written, and the default of each flag."""


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

    def dtype_on(self, device: str) -> str:
        """Return bf16 or fp32: what was asked for, or what suits the type of device."""
        return {"cuda": "bf16"}.get(device, "fp32") if self.dtype == "auto" else self.dtype


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        # All of torchrun's processes read the same flags, so one of them reports.
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        super().error(message)


def parse_settings(form: type[Settings], description: str) -> Settings:
    """Return the settings that the command line asks for; ends the script on a wrong flag."""
    parser = _Parser(description=description, formatter_class=Help)
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
    return form(**vars(parser.parse_args()))


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

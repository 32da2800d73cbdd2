"""What the command lines share: flags, and how an error becomes one line."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trsr import InputError


def natural(text: str, least: int = 0) -> int:
    """Return text as a whole number, for argparse; `positive` is the same from 1."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, not {text!r}")
    return int(text)


positive = partial(natural, least=1)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is written, and each flag's default."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        if os.environ.get("RANK", "0") != "0":  # all processes of torchrun read the same flags: one tells
            sys.exit(2)
        super().error(message)


def script_parser(description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the flags that summarize, train and evaluate share."""
    parser = _Parser(description=description, formatter_class=Help)
    flag = parser.add_argument_group("files").add_argument
    flag("--data", help="dataset folder, made by prepare (without it: the run's, else data/demo)")
    flag("--model", help="Llama or Pythia folder or hub id (without it: the run's, else models/tiny)")
    flag("--revision", help="commit, tag or branch of a hub id")
    # torchrun takes --run for an abbreviation of its own --run-path, hence the second name.
    flag("--run", "--run-dir", type=Path, default=Path("runs/demo"), help="run folder")
    flag = parser.add_argument_group("machine").add_argument
    flag("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on GPUs, fp32 on CPUs")
    flag("--no-compile", action="store_true", help="on GPUs, run the layers as written: slower, but no wait before it")
    return parser


def run_main(main: Callable[[], None], *errors: type[Exception], tells: Callable[[], bool] = lambda: True) -> None:
    """Run a script's main; what a user can mend, and errors, end it with one line and exit status 2.

    tells: whether this process is the one that says it.
    """
    try:
        main()
    except (InputError, OSError, *errors) as error:
        if tells():
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if tells():
            print(f"{Path(sys.argv[0]).stem}: interrupted; what is done is kept, use the same command", file=sys.stderr)
        sys.exit(130)  # what a shell makes of Ctrl-C

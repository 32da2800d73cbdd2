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


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring as it is written, each flag's default, and long choices once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.choices and action.metavar:  # they stand here instead of behind the flag
            text += ": " + ", ".join(map(str, action.choices))
        return text if (default := shown(action)) is None else f"{text} (default: {default})"


def shown(action: argparse.Action) -> str | None:
    """Return the default of a flag as one would type it; None if there is none to show."""
    default = action.default
    nothing = default is False or default in (None, "", (), argparse.SUPPRESS)
    if nothing or not action.option_strings:
        return None
    if isinstance(default, tuple | list):
        everything = action.choices and tuple(default) == tuple(action.choices)
        return "all" if everything else " ".join(map(shown_value, default))
    return shown_value(default)


def shown_value(value: object) -> str:
    """Return a value as one would type it: 600 instead of 600.0."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def typed() -> str:
    """Return how the program was started: python summarize.py, or python -m runfolder.show."""
    found = sys.modules["__main__"].__spec__
    if found is None or not found.name:
        return f"python {Path(sys.argv[0]).name}"
    return f"python -m {found.name.removesuffix('.__main__')}"


# ---- Settings: a frozen dataclass whose fields are flags


def path(text: str) -> Path:
    """Return a flag's file or folder; an empty text would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a file or folder, not an empty text")
    return Path(text)


def option(default: object, help: str, type: Callable | None = None, group: str = "", **more):
    """Return a dataclass field that is a flag of that default, help and type.

    A False default makes a switch; a field that can be on, off or unset (`bool | None`) has a --no-
    form too. group: the heading in --help, for this field and those after it. more: as for
    argparse's add_argument.
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
    """Reports a wrong flag in one line, from one process; its help begins with the command."""

    def __init__(self, description: str, **options):
        options = {"formatter_class": Help, "usage": argparse.SUPPRESS} | options
        super().__init__(description=description, **options)
        self.register("type", Path, path)  # so that no path is empty

    def format_help(self) -> str:
        """Return the help: how to call the command, what it does, and its flags in groups."""
        needed = [action for action in self._actions if action.required]
        flags = [a.option_strings[0] if a.option_strings else "" for a in needed]
        names = [a.metavar or a.dest.upper() for a in needed]
        more = [" ".join(filter(None, pair)) for pair in zip(flags, names, strict=True)]
        line = " ".join(["usage:", typed(), *more, "[flags]"])
        return f"{line}\n\n{super().format_help()}"

    def error(self, message: str) -> None:
        """End the script with exit status 2."""
        # All of torchrun's processes read the same flags, so one of them reports.
        reports = torchrun_variables().get("LOCAL_RANK", 0) == 0
        name = typed().split()[-1]  # train.py, or prepare.table
        self.exit(2, f"{name}: {message}; --help lists the flags\n" if reports else None)


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
    parser = Parser(description)
    group = parser.add_argument_group("settings")  # unless a field names another
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
        if setting.type == bool | None:
            switch = {"action": argparse.BooleanOptionalAction}
        group.add_argument(*names, default=setting.default, **name_of_value(flag), **flag, **switch)
    asked = vars(parser.parse_args())
    if issubclass(form, Shared):
        asked["given"] = frozenset(flags_given(parser))
    return form(**asked)


def name_of_value(flag: dict) -> dict:
    """Return what stands for a flag's value in --help: a short name instead of many choices."""
    many = len(", ".join(flag.get("choices", ()))) > 60
    return {"metavar": "NAME"} if many and "metavar" not in flag else {}


def flags_given(parser: argparse.ArgumentParser) -> set[str]:
    """Return the destinations of the flags that are on the command line."""
    quiet = copy.deepcopy(parser)
    for action in quiet._actions:
        action.default = argparse.SUPPRESS
    return set(vars(quiet.parse_args()))


# ---- The end of a command


def tell_next(command: str) -> None:
    """Print the command that comes next, unless whoever started this says so (TRSR_STEPS)."""
    if not os.environ.get("TRSR_STEPS"):
        print(f"next    {command}")


def interrupted(error: BaseException | None) -> bool:
    """Return whether error is an interrupt, or what Python or a library has made of one.

    Python 3.11 turns one that comes inside of a descriptor's __set_name__ into a RuntimeError.
    """
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def said(error: Exception) -> str:
    """Return what to say of a user's error; of the system's own, the file and a way out first."""
    if not isinstance(error, OSError) or not error.filename or not error.strerror:
        return str(error)
    way = "; choose another folder, or change its permissions"
    return f"{error.filename}: {error.strerror}{way if isinstance(error, PermissionError) else ''}"


def run_main(
    main: Callable[[], None], *errors: type[Exception], reports: Callable[[], bool] = lambda: True
) -> None:
    """Run a script's main; a fixable user error, or one of errors, ends it with one line.

    The exit status is then 2. reports: whether this process is the one that prints the line.
    """
    path = Path(sys.argv[0])
    name = path.parent.name if path.stem == "__main__" else path.stem  # a package as a command
    try:
        main()
    except (InputError, OSError, *errors) as error:
        if reports():
            print(f"{name}: {said(error)}", file=sys.stderr)
        sys.exit(2)
    except (Exception, KeyboardInterrupt) as error:
        if not interrupted(error):
            raise
        if reports():
            what = "interrupted; finished work is kept, the same command resumes"
            print(f"{name}: {what}", file=sys.stderr)
        sys.exit(130)  # the status that shells give to Ctrl-C

"""A model folder that a command writes: as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from trsr import InputError


@contextmanager
def replacement(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside out, which takes its place on success, and goes otherwise."""
    out = out.resolve()
    fresh, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        fresh.mkdir()
        yield fresh
        for path in fresh.iterdir():
            path.chmod(0o666 & ~mask())  # safetensors makes its file for the owner alone
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{out}: not written ({error}); nothing was changed there") from None
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)


def mask() -> int:
    """Return the permissions that new files do not get."""
    found = os.umask(0)
    os.umask(found)
    return found

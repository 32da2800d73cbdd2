"""The method (being written)."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something a user can mend: one line that names the file, line or field, and the way out."""


def run_main(main):
    """Run a script's main; an InputError or a missing file ends it with one line and exit status 2."""
    try:
        main()
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {error}")


@contextmanager
def atomic_write(path, mode="w"):
    """Open a temporary sibling of path for writing; on success it replaces path, on failure path is untouched."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Replace a file as a whole, so that an interruption leaves either the old one or the new one."""

import os
from contextlib import contextmanager
from pathlib import Path

from trsr import InputError


@contextmanager
def atomic_write(path: Path, mode: str = "w"):
    """Open a temporary sibling of path for writing, which replaces path on success.

    On failure path is untouched. Raises InputError if the disk is full or the folder is not
    writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file

        # Reopened, because a library that writes by name may have replaced the file itself.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{path}: not written ({why}); the previous version is intact") from None
    finally:
        temporary.unlink(missing_ok=True)

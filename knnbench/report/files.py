"""Writing a file as a whole: who opens it never sees half of it, and a full disk leaves what was there."""

import contextlib
import os
import tempfile
from pathlib import Path

from knnbench.errors import InvalidInputError

__all__ = ["write_file"]


def write_file(path: Path, content: bytes) -> None:
    """Write a file, or replace it.

    Raises
    ------
    InvalidInputError
        If it cannot be written.
    """
    temporary = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            if temporary:
                os.unlink(temporary)
        raise InvalidInputError(f"{path} cannot be written: {error.strerror}.") from None

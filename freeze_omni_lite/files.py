"""Files that are either whole or not there: every write goes to a partial file beside the target, then a rename."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import InputError


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Call `write(partial)` and rename the partial file to `path`; if anything fails, `path` is as it was.

    Raises InputError if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error}): choose a folder that you may write, with space left."
        ) from error
    finally:
        if partial.parent.is_dir():
            partial.unlink(missing_ok=True)
    return path


def atomic_write_bytes(path: str | Path, content: bytes) -> Path:
    return atomic_write(path, lambda partial: partial.write_bytes(content))


def atomic_write_text(path: str | Path, text: str) -> Path:
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | Path, value: Any) -> Path:
    """Indented JSON that other programs can read: NaN and infinity raise ValueError."""
    return atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

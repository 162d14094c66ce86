"""Files that are there whole or not at all, and errors that say which file it is and what to do."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} if hasattr(errno, "EDQUOT") else {errno.ENOSPC, errno.EFBIG}


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Atomic, and on the disk when it returns: readers see the old file or the new one. Folders are made. OSError names the file.

    Lines are written as they come, so that they may be more than the memory holds; if they end in an error, nothing changes.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        todo = "make room on the disk" if error.errno in FULL else "may files be written there?"
        raise OSError(f"{path} could not be written ({error.strerror or error}): {todo}") from error
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written, there is nothing to delete
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_lines`."""
    write_lines(path, [text])


def write_json(path: Path, value: Any) -> None:
    """As `write_lines`. TypeError for an object that JSON has no form for."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder's list of names, where the file system can do that for folders."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, todo: str) -> Any:
    """What a JSON file holds; ValueError with its name, and `todo`, for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of UTF-8
        raise ValueError(f"{path} is damaged ({error}): {todo}") from error

"""Files that are there whole or not at all, and errors that say which file it is and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


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
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}): is there room on the disk?") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_lines`."""
    write_lines(path, [text])


def write_json(path: Path, value: Any) -> None:
    """As `write_lines`."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path, todo: str) -> Any:
    """What a JSON file holds; ValueError with its name, and `todo`, for one that is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON, or of UTF-8
        raise ValueError(f"{path} is damaged ({error}): {todo}") from error

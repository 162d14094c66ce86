"""Do the committed outputs still say what the notebooks print? `python -m helpers compare build/tested`

Text must be equal word for word, numbers up to the rounding that another processor or library version brings. Pictures are
compared by their text alternative only. A cell whose output differs from run to run (times, versions, sampled text) has the
tag `varies`, and is left out.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from helpers.profiles import ROOT

TAG = "varies"
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def texts(cell) -> list[str]:
    """What a code cell shows, as text."""
    shown = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            shown.append(output.text)
        elif output.output_type in ("execute_result", "display_data"):
            shown.append("".join(output.data.get("text/plain", "")))
    return shown


def value(number: str) -> float:
    return float(number.replace(",", "").replace("−", "-"))


def same(old: str, new: str, tolerance: float = 0.02) -> bool:
    """Equal words, and numbers that differ by at most `tolerance` of their size, or by one in the last place behind a point."""
    if old == new:
        return True
    old_numbers, new_numbers = NUMBER.findall(old), NUMBER.findall(new)
    if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split():
        return False
    for a, b in zip(old_numbers, new_numbers, strict=True):
        places = len(a.partition(".")[2]) if "e" not in a else 12
        if not math.isclose(value(a), value(b), rel_tol=tolerance, abs_tol=1.01 * 10**-places if "." in a else 0):
            return False
    return True


def differences(committed, executed) -> list[str]:
    """Where two runs of a notebook (nbformat nodes) differ: one line a cell."""
    old, new = ([c for c in nb.cells if c.cell_type == "code"] for nb in (committed, executed))
    if [c.source for c in old] != [c.source for c in new]:
        return ["the notebooks have different cells"]
    found = []
    for number, (a, b) in enumerate(zip(old, new, strict=True), 1):
        if TAG in a.metadata.get("tags", []):
            continue
        before, after = "".join(texts(a)), "".join(texts(b))
        if not same(before, after):
            pairs = zip([*before.splitlines(), ""], [*after.splitlines(), ""], strict=False)
            x, y = next(((x, y) for x, y in pairs if not same(x, y)), (f"{len(before)} characters", f"{len(after)} characters"))
            found.append(f"cell {number} ({a.source.splitlines()[0][:60]!r}): committed {x.strip()!r}, now {y.strip()!r}")
    return found


def compare(folder: str | Path) -> list[str]:
    """Differences between the notebooks in `folder`, which were run, and the committed ones of the same name."""
    import nbformat

    found = []
    paths = sorted(Path(folder).glob("*.ipynb"))
    if not paths:
        raise ValueError(f"{folder} holds no notebooks: run them there first")
    for path in paths:
        pair = (nbformat.read(p, as_version=4) for p in (ROOT / "notebooks" / path.name, path))
        found += [f"{path.name}, {line}" for line in differences(*pair)]
    return found

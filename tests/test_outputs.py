"""The comparison of committed outputs: what it must find, and what it must let pass."""

from __future__ import annotations

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from helpers import outputs
from helpers.course import NOTEBOOKS
from helpers.profiles import ROOT


@pytest.mark.parametrize(
    ("old", "new", "equal"),
    [
        ("loss 1.2345", "loss 1.2346", True),  # one in the last place
        ("loss 0.01", "loss 0.02", True),
        ("loss 0.01", "loss 0.04", False),
        ("12,345 tokens", "12,400 tokens", True),  # half a per cent
        ("12,345 tokens", "13,345 tokens", False),
        ("3 stories", "4 stories", False),  # a count is exact
        ("off by 1.2e-07", "off by 1.21e-07", True),
        ("off by 1.2e-07", "off by 3.0e-02", False),
        ("[OK] is 4-bit", "[OK] is 16-bit", False),
        ("shifts by −0.5", "shifts by 0.5", False),
        ("a\n  b  1.0", "a\nb 1.0", True),  # a column may grow by a digit
        ("one line", "one line\nand another", False),
    ],
)
def test_words_are_exact_and_numbers_nearly(old, new, equal):
    assert outputs.same(old, new) is equal


def notebook(text: str, tags=()):
    cell = new_code_cell("print(x)", outputs=[new_output("stream", text=text)], metadata={"tags": list(tags)})
    return new_notebook(cells=[cell])


def test_a_difference_names_cell_and_lines():
    (line,) = outputs.differences(notebook("same\nloss 1.0\n"), notebook("same\nloss 2.0\n"))
    assert line == "cell 1 ('print(x)'): committed 'loss 1.0', now 'loss 2.0'"
    assert outputs.differences(notebook("same\n"), notebook("same\n")) == []
    assert outputs.differences(notebook("3 s", [outputs.TAG]), notebook("4 s", [outputs.TAG])) == []
    assert len(outputs.differences(notebook("shown"), notebook(""))) == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_most_cells_are_compared(name):
    """The tag is for times and versions, not a way out."""
    committed = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    shown = [c for c in committed.cells if c.cell_type == "code" and outputs.texts(c)]
    varying = [c for c in shown if outputs.TAG in c.metadata.get("tags", [])]
    sampled = name.startswith("05")  # nearly all of it is about replies of a model that was trained on this machine
    assert len(varying) <= len(shown) * (0.7 if sampled else 1 / 3)
    changed = copy.deepcopy(committed)
    for cell in changed.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    assert len(outputs.differences(committed, changed)) == len(shown) - len(varying)


def test_a_folder_without_notebooks_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no notebooks"):
        outputs.compare(tmp_path)

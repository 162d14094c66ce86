"""Static gates over the committed notebooks. Each guards against something that has gone wrong in a published course."""

from __future__ import annotations

import ast
import re
import statistics
from types import SimpleNamespace

import nbformat
import pytest

from helpers import repository
from helpers.course import NOTEBOOKS
from helpers.profiles import ROOT

PATHS = {name: ROOT / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS}


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(PATHS[request.param], as_version=4)


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_there_is_no_other_notebook():
    assert sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NOTEBOOKS)


def test_it_is_valid_and_runs_on_any_machine(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3", "a kernel's private name does not exist elsewhere"
    assert notebook.metadata.accelerator == "GPU" and "colab" in notebook.metadata
    assert "widgets" not in notebook.metadata, "GitHub refuses to show widget state without its data"


def test_it_was_run_top_to_bottom_and_its_outputs_are_committed(notebook):
    cells = [c for c in code_cells(notebook) if c.source.strip()]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run it again from a fresh kernel"
    outputs = [o for c in cells for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs), "no figure is committed"


def test_cells_are_small_and_parse(notebook):
    for number, cell in enumerate(code_cells(notebook)):
        ast.parse(cell.source)
        assert len(cell.source.splitlines()) <= (22 if number else 24), cell.source[:80]


def test_a_reference_solution_is_folded_in_jupyter_and_in_colab(notebook):
    cells = [c for c in code_cells(notebook) if re.search(r"^(def )?reference_", c.source, re.MULTILINE)]
    assert cells or "def judge" not in "".join(c.source for c in code_cells(notebook))
    for cell in cells:
        assert cell.metadata.get("jupyter", {}).get("source_hidden") and cell.metadata.get("cellView") == "form", cell.source[:60]
        assert cell.source.startswith("# @title "), "Colab shows this line alone"


def test_no_dead_code_is_shown(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            assert not (isinstance(node, ast.If) and isinstance(node.test, ast.Constant)), "if False: hides code that never ran"


def test_set_up_comes_first_and_is_the_same_everywhere(notebook):
    first = nbformat.read(PATHS[NOTEBOOKS[0]], as_version=4)
    assert code_cells(notebook)[0].source == code_cells(first)[0].source
    assert "prepare_notebook" in code_cells(notebook)[0].source
    assert notebook.cells[0].cell_type == "markdown" and "colab.research.google.com" in notebook.cells[0].source


def test_the_address_is_the_one_of_the_project(notebook):
    url, ref = repository.address()
    set_up, heading = code_cells(notebook)[0].source, notebook.cells[0].source
    assert f'REPO, REF = "{url}", "{ref}"' in set_up, "run: python -m helpers stamp"
    assert f"/github/{url.removeprefix('https://github.com/')}/blob/{ref}/notebooks/" in heading


def test_outputs_hold_nothing_of_the_machine_they_were_made_on(notebook):
    text = nbformat.writes(notebook)
    assert str(ROOT) not in text and "/home/" not in text and "site-packages" not in text
    assert "widget-view" not in text


def test_it_ends_with_what_was_seen_and_is_not_too_large(notebook):
    headings = [
        line for c in notebook.cells if c.cell_type == "markdown" for line in c.source.splitlines() if line.startswith("#")
    ]
    assert any("What we saw" in h for h in headings)
    assert any("assert " in c.source for c in code_cells(notebook)), "a claim that nothing checks"
    assert len(nbformat.writes(notebook)) < 1_500_000


EXERCISE = re.compile(r"### Exercise: (.+) \((easy|medium|hard), importance (★☆☆|★★☆|★★★), \d+ minutes\)")


def exercises(notebook):
    """Heading → the cells below it, up to the next heading."""
    found, current = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            title = cell.source.splitlines()[0]
            current = found.setdefault(title, []) if title.startswith("### Exercise") else None
        if current is not None:
            current.append(cell)
    return found


def test_exercises_are_whole_and_their_checks_know_the_usual_mistakes(notebook):
    """A stub, a folded hint and solution, and a check that takes the reference and refuses at least three mistakes."""
    found = exercises(notebook)
    assert len(found) >= 3
    for title, cells in found.items():
        assert EXERCISE.fullmatch(title), title
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        assert "<details><summary>Hint</summary>" in text and "<details><summary>Solution</summary>" in text, title
        codes = [c for c in cells if c.cell_type == "code"]
        assert any("return None  # your code here" in c.source for c in codes), f"{title}: no stub"
        said = "".join(o.get("text", "") for c in codes for o in c.outputs)
        _, _, mistakes = said.partition("ypical mistakes" if "ypical mistakes" in said else "usual mistakes")
        assert len([line for line in mistakes.splitlines()[1:] if len(line.split()) >= 5]) >= 3, f"{title}: {said}"


def test_the_folded_solution_can_take_the_place_of_the_stub(notebook):
    """A solution under another name, or with other arguments, would be pasted in vain."""
    for title, cells in exercises(notebook).items():
        (stub,) = (
            node
            for c in cells
            if c.cell_type == "code" and "return None  # your code here" in c.source
            for node in ast.parse(c.source).body
            if isinstance(node, ast.FunctionDef)
        )
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        folded = text.partition("<summary>Solution</summary>")[2].partition("</details>")[0]
        code = re.search(r"```python\n(.+?)```", folded, re.DOTALL)[1]
        functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        (solution,) = (f for f in functions if f.name == stub.name)
        assert [a.arg for a in solution.args.args] == [a.arg for a in stub.args.args], title


def test_it_opens_with_a_picture_of_what_it_builds(notebook):
    """After the set-up, before anything else: nobody should have to scroll to learn what the work is for."""
    first, second = code_cells(notebook)[:2]
    assert "prepare_notebook" in first.source and len(second.source.splitlines()) <= 8
    figure = next(o for o in second.outputs if "image/png" in o.get("data", {}))
    assert len(figure.metadata["image/png"]["alt"].split()) > 8
    text = notebook.cells[notebook.cells.index(second) - 1]
    assert text.cell_type == "markdown" and "Where we are going" in text.source


def test_there_are_eighteen_exercises_in_all():
    assert sum(len(exercises(nbformat.read(path, as_version=4))) for path in PATHS.values()) >= 18


@pytest.mark.parametrize("name", ["03_zloss_moe_patch", "04_qlora_training"])
def test_4_bit_models_of_the_lesson_are_loaded_where_its_tensors_are(name):
    """On a machine with a GPU, bitsandbytes' models go there unless told otherwise; what the cells compute with is on the CPU."""
    cells = [c.source for c in code_cells(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4))]
    loads = [m for source in cells for m in re.findall(r"(?:load_4bit|from_pretrained)\((?:[^()]|\([^()]*\))*\)", source)]
    quantised = [call for call in loads if call.startswith("load_4bit") or "quantization_config" in call]
    assert len(quantised) >= 3
    assert [call for call in quantised if 'device_map="cpu"' not in call] == []


@pytest.mark.parametrize("rows", [1, 2, 3, 18, 161])
def test_the_first_and_last_rows_of_a_log_are_compared_however_short_it_is(rows):
    """A run on a GPU profile makes a dozen steps, not 1,600. Its first row is one step alone, and does not count."""
    (cell,) = [c.source for c in code_cells(nbformat.read(ROOT / "notebooks/04_qlora_training.ipynb", 4)) if "few = " in c.source]
    keys = ("loss", "grad_norm", "router/z", "router/entropy", "router/balance")
    history = [dict.fromkeys(keys, 1000.0 if rows > 1 and n == 0 else 9.0 - n / 100) for n in range(rows)]
    namespace = {"result": SimpleNamespace(history=history), "statistics": statistics}
    exec(cell, namespace)
    assert namespace["first"]["loss"] < 10, "the first row counts"
    assert (namespace["last"]["loss"] < namespace["first"]["loss"]) == (rows > 2), "with fewer there is nothing to compare"


def test_what_is_kept_on_a_drive_is_found_again():
    """Notebook 5 trains anew, for hours, what notebook 4 trained into a folder of another name, or named too late."""
    fourth, fifth = (nbformat.read(PATHS[name], 4) for name in NOTEBOOKS[3:])
    (line,) = set(re.findall(r"%env COURSE_RUNS=[\w/-]+", nbformat.writes(fourth)))
    help_text = (ROOT / "notebooks" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    for text in (nbformat.writes(fifth), help_text):
        assert set(re.findall(r"%env COURSE_RUNS=[\w/-]+", text)) == {line}
    for notebook in (fourth, fifth):
        (knobs,) = [c.source for c in code_cells(notebook) if c.source.startswith("# Knobs")]
        assert 'RUN = RUNS / f"course-{profile.name}"' in knobs
        for text in [c.source for c in notebook.cells if "COURSE_RUNS=/content" in c.source] + [help_text]:
            assert re.search(r"before\*? (the|their) set-up cell", text), "helpers.profiles reads it on import"
    outputs = set(re.findall(r"--output (\S+?)[`\\\s]", "\n".join(c.source for c in fourth.cells) + "\n"))
    assert outputs == {"runs/course-a100-80", "{RUN}"}

"""Runs the five notebooks in order and leaves executed copies and one HTML page under `build/`."""

from __future__ import annotations

import os
import time
from html import escape
from pathlib import Path

from helpers.profiles import ROOT

NOTEBOOKS = (
    "01_dataset_tour",
    "02_prompt_formatting",
    "03_zloss_moe_patch",
    "04_qlora_training",
    "05_length_control_evaluation",
)


NO_ALT = 'alt="No description has been provided for this image"'  # what nbconvert writes


def clean(notebook) -> None:
    """Take out what differs from run to run or cannot be shown on GitHub: widget state, timing and cell ids of widgets."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for output in cell.outputs:
                data = output.get("data", {})
                data.pop("application/vnd.jupyter.widget-view+json", None)


def execute(path: Path, timeout: int = 3600):
    """The notebook, executed in its own folder. Raises nbclient's CellExecutionError at the first failing cell."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": paths}
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)
    clean(notebook)
    return notebook


def one_page(notebooks: list, target: Path) -> Path:
    """All notebooks one after the other as a single HTML page."""
    import nbformat
    from nbconvert import HTMLExporter

    merged = nbformat.v4.new_notebook(metadata=notebooks[0].metadata)
    merged.cells = [cell for notebook in notebooks for cell in notebook.cells]
    for number, cell in enumerate(merged.cells):
        cell["id"] = f"cell-{number}"
    html, _ = HTMLExporter(template_name="lab").from_notebook_node(
        merged, {"metadata": {"name": "Fine-tuning a Mixture of Experts"}}
    )
    outputs = (output for cell in merged.cells for output in cell.get("outputs", []))
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    parts = html.split(NO_ALT)
    if len(parts) == len(pictures) + 1:  # the exporter does not use the text alternatives that the outputs have
        alts = (output.metadata.get("image/png", {}).get("alt", "figure") for output in pictures)
        html = parts[0] + "".join(f'alt="{escape(alt)}"' + part for alt, part in zip(alts, parts[1:], strict=True))
    target.write_text(html, encoding="utf-8")
    return target


def run_course(in_place: bool = False, only: list[str] | None = None) -> Path:
    """Execute the notebooks; returns the page. `in_place` writes the outputs back into `notebooks/` as well."""
    import nbformat

    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    executed, started = [], time.monotonic()
    for name in NOTEBOOKS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        if only and not any(o in name for o in only):
            continue
        print(f"{name} …", end=" ", flush=True)
        begun = time.monotonic()
        notebook = execute(path)
        nbformat.write(notebook, build / path.name)
        if in_place:
            nbformat.write(notebook, path)
        executed.append(notebook)
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
    page = one_page(executed, build / "course.html")
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes: open {page.relative_to(ROOT)}")
    return page

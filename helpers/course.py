"""Runs the five notebooks in order and leaves executed copies and a site to read under `build/`."""

from __future__ import annotations

import os
import time
from pathlib import Path

from helpers.profiles import ROOT

NOTEBOOKS = (
    "01_dataset_tour",
    "02_prompt_formatting",
    "03_zloss_moe_patch",
    "04_qlora_training",
    "05_length_control_evaluation",
)


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


def run_course(in_place: bool = False, only: list[str] | None = None) -> Path:
    """Execute the notebooks; returns the site's first page. `in_place` writes the outputs back into `notebooks/` as well."""
    import nbformat

    from helpers import site

    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    executed, started = {}, time.monotonic()
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
        executed[name] = notebook
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
    page = site.build(executed, build)
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes: open {page.relative_to(ROOT)}")
    return page

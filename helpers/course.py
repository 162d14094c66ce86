"""Runs the five notebooks in order and leaves executed copies and a site to read under `build/`."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from pathlib import Path

from helpers.files import write_json
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
    _run(client, environment)
    clean(notebook)
    return notebook


def _run(client, environment: dict[str, str]) -> None:
    """Execute in a thread of its own: in the main one, nbclient would answer Ctrl-C with the tracebacks of a dead kernel."""
    import psutil

    failures: list[BaseException] = []

    def work() -> None:
        try:
            client.execute(env=environment)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        raise
    if failures:
        raise failures[0]


class PeakMemory:
    """Largest memory of this process's children together, in bytes, looked at twice a second while the block runs."""

    def __enter__(self):
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:  # it ended in this moment
                    continue
            self.bytes = max(self.bytes, total)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


def run_course(in_place: bool = False, only: list[str] | None = None) -> Path:
    """Execute the notebooks; returns the site's first page. `in_place` writes the outputs back into `notebooks/` as well."""
    import nbformat

    from helpers import environment, profiles, site

    for part in only or ():
        if not any(part in name for name in NOTEBOOKS):
            raise ValueError(f"no notebook's name holds {part!r}: they are {', '.join(NOTEBOOKS)}")
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    executed, measured, started = {}, {}, time.monotonic()
    for name in NOTEBOOKS:
        path = ROOT / "notebooks" / f"{name}.ipynb"
        if only and not any(o in name for o in only):
            continue
        print(f"{name} …", end=" ", flush=True)
        begun = time.monotonic()
        with PeakMemory() as peak:
            notebook = execute(path)
        nbformat.write(notebook, build / path.name)
        if in_place:
            nbformat.write(notebook, path)
        executed[name] = notebook
        measured[name] = {"seconds": round(time.monotonic() - begun, 1), "memory_gib": round(peak.bytes / 2**30, 2)}
        print(f"{measured[name]['seconds']:.0f} s, {measured[name]['memory_gib']:.1f} GiB", flush=True)
    if len(executed) == len(NOTEBOOKS):
        facts = {"notebooks": measured, "profile": profiles.choose()[0].name, "date": f"{datetime.date.today()}"}
        facts |= {"hardware": environment.hardware(), "versions": environment.versions()}
        write_json(build / "course.json", facts)
    page = site.build(executed, build)
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes: open {page.relative_to(ROOT)}")
    return page

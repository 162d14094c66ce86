"""The widgets in a real browser: JupyterLab, headless Chromium, a hand on the controls.

    pip install playwright && pytest tests/test_browser.py        (any Chromium or Chrome on the PATH will do)

Callbacks that raise do not fail a notebook: the error hides in the widget. So each control is moved here, the picture below
it must change, and the page must show no error.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from helpers.profiles import ROOT

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: a browser test cannot run without it"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH"),
]
BEGIN = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom helpers import environment, widgets\nenvironment.quiet()"
# Name → the cell that shows the panel, as in the notebooks.
PANELS = {
    "story browser": "from helpers.stories import load_stories\n"
    f"widgets.story_browser(load_stories({str(ROOT / 'data_samples' / 'heldout')!r}))",
    "prompt builder": "widgets.prompt_builder()",
    "router playground": "widgets.router_playground_panel()",
    "nf4 explorer": "widgets.nf4_panel()",
    "reply explorer": "from helpers import eval_widgets, experiment\n"
    "eval_widgets.reply_explorer(experiment.recorded()['variants']['seed 42']['texts to read'])",
}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab over a folder with one notebook for each panel."""
    folder = tmp_path_factory.mktemp("lab")
    for name, source in PANELS.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"{BEGIN}\n{source}")])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, folder / f"{name.replace(' ', '_')}.ipynb")
    home = folder / "home"
    environment = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home), "JUPYTER_RUNTIME_DIR": str(home / "runtime")}
    environment |= {"COURSE_PROFILE": "tiny", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.port=0"]
    command += ["--IdentityProvider.token=", "--ServerApp.open_browser=False", f"--ServerApp.root_dir={folder}"]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield wait_for(server, home / "runtime", folder / "log.txt")
        finally:
            server.terminate()
            server.wait(20)


def wait_for(server: subprocess.Popen, runtime: Path, log: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        for file in runtime.glob("jpserver-*.json"):
            url = json.loads(file.read_text())["url"]
            try:
                urllib.request.urlopen(f"{url}api", timeout=2).read()
                return url
            except OSError:
                break
        time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def panel(lab, browser, request):
    """A page with the panel of that name on it, and its text box."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{lab}lab/tree/{request.param.replace(' ', '_')}.ipynb?reset")  # reset: no tabs of the test before
    page.get_by_text("| Idle").first.wait_for(timeout=90_000)  # before that, a cell that is run is lost
    page.locator(".jp-CodeCell .cm-content").first.click(timeout=60_000)
    page.keyboard.press("Shift+Enter")
    page.locator(".widget-html pre").first.wait_for(timeout=60_000)
    yield page
    if where := os.environ.get("COURSE_SCREENSHOTS"):
        page.screenshot(path=str(Path(where) / f"{request.param.replace(' ', '_')}.png"))
    assert (
        page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-OutputArea-output[data-mime-type*='stderr']").count()
        == 0
    )
    page.close()


def shown(page) -> str:
    return page.locator(".widget-html pre").first.inner_text()


def changed(page, before: str) -> str:
    """What is shown as soon as it differs."""
    page.wait_for_function("old => document.querySelector('.widget-html pre').innerText !== old", arg=before, timeout=20_000)
    return shown(page)


def step(page, number: int, key: str = "ArrowRight") -> None:
    """One step of a slider."""
    handle = page.locator(".widget-slider .noUi-handle").nth(number)
    handle.focus()
    handle.press(key)


@pytest.mark.parametrize("panel", ["story browser"], indirect=True)
def test_story_browser(panel):
    first = shown(panel)
    assert "[1] " in first and "Scenario: " in first
    step(panel, 0)
    second = changed(panel, first)
    assert "[2] " in second and "[1] " not in second
    panel.locator(".widget-dropdown select").first.select_option(index=1)
    assert " (character) and " in changed(panel, second)


@pytest.mark.parametrize("panel", ["prompt builder"], indirect=True)
def test_prompt_builder(panel):
    first = shown(panel)
    assert "### Response: (length = medium)⏎" in first
    panel.locator(".widget-dropdown select").first.select_option(label="humongous")
    second = changed(panel, first)
    assert second == first.replace("(length = medium)", "(length = humongous)")
    name = panel.locator(".widget-text input").first
    name.fill("Odd\tname:")
    name.press("Enter")
    assert changed(panel, second).startswith("cannot be formatted: ")


@pytest.mark.parametrize("panel", ["router playground"], indirect=True)
def test_router_playground(panel):
    first = shown(panel)
    assert "different logits left: 8" in first
    panel.locator(".widget-dropdown select").first.select_option(label="2")
    second = changed(panel, first)
    assert "all experts alike: ln 2" in second
    step(panel, 1)
    assert "+ 0.5, stored in bfloat16" in changed(panel, second)


@pytest.mark.parametrize("panel", ["nf4 explorer"], indirect=True)
def test_nf4_explorer(panel):
    first = shown(panel)
    assert "bits a weight           4.127" in first
    step(panel, 0)
    second = changed(panel, first)
    assert "the first set to 1;" in second
    panel.locator(".widget-checkbox input").first.uncheck()
    assert "bits a weight           4.500" in changed(panel, second)


@pytest.mark.parametrize("panel", ["reply explorer"], indirect=True)
def test_reply_explorer(panel):
    first = shown(panel)
    assert first.count("length = medium, ") == 2
    step(panel, 0)
    second = changed(panel, first)
    assert second.count("length = long, ") == 2
    panel.locator(".widget-dropdown select").first.select_option(index=1)
    assert changed(panel, second).count("length = long, ") == 2

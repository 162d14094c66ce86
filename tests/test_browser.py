"""The widgets and the static site in a real browser: JupyterLab, headless Chromium, a hand on the controls.

    pip install playwright && pytest tests/test_browser.py        (any Chromium or Chrome on the PATH will do)

Callbacks that raise do not fail a notebook: the error hides in the widget. So each control is moved here, the picture below
it must change, and neither the page nor JupyterLab's log may have an error.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urldefrag

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
    "chat": """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from helpers import eval_widgets, evaluation, generation, profiles, tiny
model = AutoModelForCausalLM.from_pretrained(tiny.HOME, dtype=torch.float32).eval()
stories = evaluation.held_out(profiles.PROFILES["tiny"], 2)
short = generation.Sampling(max_new_tokens=12)
eval_widgets.chat_panel(model, AutoTokenizer.from_pretrained(tiny.HOME), stories, short)""",
    "broken": """\
import ipywidgets
button, box = ipywidgets.Button(description="break"), ipywidgets.HTML("<pre>whole</pre>")
button.on_click(lambda _: 1 / 0)
ipywidgets.VBox([button, box])""",
    # A dashboard that draws after each row of the log: in a real run it draws much less often than a step takes.
    "training dashboard": """\
from pathlib import Path
from helpers.run_plots import LiveTraining
from tests import small_runs
live = LiveTraining(share=100, seconds=0)
small_runs.train(small_runs.make_base(Path("base")), Path("run"), progress=live, log_every=1)
print("drawn", live.drawn)""",
}
FIRST_SIGN = {"training dashboard": ".jp-OutputArea-output img"}  # what a panel shows first, if not a text box
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
    page.locator(FIRST_SIGN.get(request.param, ".widget-html pre")).first.wait_for(timeout=60_000)
    cut = """[...document.querySelectorAll('.jp-OutputArea-output .widget-inline-hbox, .jp-OutputArea-output img')].filter(
        e => e.getBoundingClientRect().right > e.closest('.jp-OutputArea-output').getBoundingClientRect().right + 1
    ).map(e => e.innerText || e.alt)"""
    assert page.evaluate(cut) == [], "what the notebook's column cuts off at the right"
    yield page
    if where := os.environ.get("COURSE_SCREENSHOTS"):
        page.screenshot(path=str(Path(where) / f"{request.param.replace(' ', '_')}.png"))
    assert errors(page) == (request.param == "broken")
    page.close()


def errors(page) -> int:
    """Errors in outputs, and those that callbacks leave in JupyterLab's log, which counts them in the status bar."""
    logged = page.locator(".jp-LogConsoleStatusItem")
    count = logged.first.inner_text().strip() if logged.count() else ""
    failed = page.locator(".jp-OutputArea-output[data-mime-type*='error'], .jp-OutputArea-output[data-mime-type*='stderr']")
    return failed.count() + int(count or 0)


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


@pytest.mark.parametrize("panel", ["broken"], indirect=True)
def test_an_error_in_a_callback_is_seen(panel):
    assert errors(panel) == 0
    panel.get_by_role("button", name="break").click()
    panel.wait_for_function("() => +document.querySelector('.jp-LogConsoleStatusItem')?.innerText")
    assert shown(panel) == "whole"


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


CUT_CONTROLS = """[...document.querySelectorAll('.jp-OutputArea-output .widget-inline-hbox')].filter(
    e => e.getBoundingClientRect().right > Math.min(
        innerWidth, e.closest('.jp-OutputArea-output').getBoundingClientRect().right) + 1).map(e => e.innerText)"""


@pytest.mark.parametrize("panel", ["prompt builder", "story browser", "router playground", "nf4 explorer"], indirect=True)
def test_on_a_narrow_page_the_controls_stand_below_one_another(panel):
    panel.keyboard.press("Control+b")  # JupyterLab's file list away: a phone has no room for it
    panel.set_viewport_size({"width": 400, "height": 1000})
    panel.wait_for_function("() => document.querySelector('.jp-OutputArea-output').getBoundingClientRect().right <= innerWidth")
    boxes = [box.bounding_box() for box in panel.locator(".jp-OutputArea-output .widget-inline-hbox").all()]
    assert len(boxes) >= 3 and len({round(box["x"]) for box in boxes}) == 1, "one column"
    assert panel.evaluate(CUT_CONTROLS) == []


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
    assert "bits per weight         4.127" in first
    step(panel, 0)
    second = changed(panel, first)
    assert "the first set to 1;" in second
    panel.locator(".widget-checkbox input").first.uncheck()
    assert "bits per weight         4.500" in changed(panel, second)


@pytest.mark.parametrize("panel", ["reply explorer"], indirect=True)
def test_reply_explorer(panel):
    first = shown(panel)
    assert first.count("length = medium, ") == 2
    step(panel, 0)
    second = changed(panel, first)
    assert second.count("length = long, ") == 2
    panel.locator(".widget-dropdown select").first.select_option(index=1)
    assert changed(panel, second).count("length = long, ") == 2


@pytest.mark.parametrize("panel", ["chat"], indirect=True)
def test_chat(panel):
    first = shown(panel)
    assert "(nothing has been said yet)" in first
    panel.locator(".widget-dropdown select").first.select_option(index=1)
    assert "(nothing has been said yet)" in changed(panel, first)
    box, say = panel.locator(".widget-textarea textarea").first, panel.get_by_role("button", name="say it")

    def ended(replies: int) -> str:
        """What is shown when that many replies are there, whole; a reply that is still being made has no count of words."""
        text = "document.querySelector('.widget-html pre').innerText"
        panel.wait_for_function(f"n => {text}.split(' words)').length === n + 1", arg=replies, timeout=60_000)
        panel.locator(".jupyter-button:disabled").first.wait_for(state="detached")
        return shown(panel)

    def talk(text: str, replies: int) -> str:
        box.fill(text)
        say.click()
        return ended(replies)

    third = talk("Is anyone there?", 1)
    assert "    Is anyone there?" in third and third.count("(length = medium, ") == 1
    assert box.input_value() == ""
    panel.locator(".widget-dropdown select").nth(1).select_option(label="micro")
    fourth = talk("And you?", 2)
    assert fourth.startswith(third) and fourth.count("(length = micro, ") == 1, "a new length is for the next reply"
    panel.get_by_role("button", name="another reply").click()
    changed(panel, fourth)
    fifth = ended(2)
    assert fifth.startswith(third) and "    And you?" in fifth
    say.click()
    refused = changed(panel, fifth)
    assert refused.removeprefix(fifth).startswith("\n["), "an empty text is refused in words"
    panel.locator(".widget-dropdown select").first.select_option(index=0)
    assert changed(panel, refused) == first, "each character has a conversation of its own"


@pytest.mark.parametrize("panel", ["training dashboard"], indirect=True)
def test_training_dashboard(panel):
    def picture() -> str:
        return panel.locator(".jp-OutputArea-output img").get_attribute("src")  # strict: one picture, drawn anew in its place

    seen = [picture()]
    for _ in range(2):
        panel.wait_for_function("old => document.querySelector('.jp-OutputArea-output img').src !== old", arg=seen[-1])
        seen.append(picture())
    assert len(set(seen)) == 3
    panel.get_by_text("drawn 11").wait_for(timeout=60_000)
    assert picture() not in seen


# -------------------------------------------------------------------------------------------------------- the site

# Text whose contrast with its ground is under 4.5, the least that WCAG 2 calls readable. An element without a background stands
# on that of the element around it.
FAINT = """() => {
  const numbers = colour => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n };
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) + 0.05;
  const ground = e => {
    for (; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0.5) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = new Set(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !e.checkVisibility() || e.closest('script, style')) continue;
    const colour = getComputedStyle(e).color, below = ground(e);
    const [low, high] = [light(numbers(colour)), light(below)].sort((x, y) => x - y);
    if (high / low < 4.5) found.add(`${(high / low).toFixed(1)}: ${colour} on ${below}: ${texts.currentNode.data.slice(0, 30)}`);
  }
  return [...found];
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    from helpers import site

    return site.build({}, tmp_path_factory.mktemp("site with spaces"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_site_from_the_file_system(pages, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url[:200]))
    for file in sorted(pages.parent.glob("*.html")):
        page.goto(file.as_uri())
        assert said == [], file.name
        missing = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt)"
        assert page.evaluate(missing) == [], file.name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{file.name} has to be moved sideways"
        assert page.evaluate(FAINT) == [], file.name
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", back)[:3])) < 150 if scheme == "dark" else back == "rgb(255, 255, 255)"
        if where := os.environ.get("COURSE_SCREENSHOTS"):
            page.screenshot(path=str(Path(where) / f"{file.stem}_{width}_{scheme}.png"))
    page.close()


def test_links_of_the_site_lead_to_what_they_name(pages, browser):
    page = browser.new_page()
    links, ids = set(), {}
    for file in pages.parent.glob("*.html"):
        page.goto(file.as_uri())
        links |= set(page.evaluate("[...document.links].map(a => a.href)"))
        ids[file.as_uri()] = set(page.evaluate("[...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name)"))
    inside = [urldefrag(link) for link in links if link.startswith("file:")]
    assert len(inside) > len(ids) and any(fragment for _, fragment in inside)
    assert [(to, at) for to, at in inside if to not in ids or (at and not {at, unquote(at)} & ids[to])] == []
    page.goto(pages.as_uri())
    page.get_by_role("link", name="3 Router losses").click()
    assert page.locator("nav [aria-current]").inner_text() == "3 Router losses"
    to_a_word = next(file for file in sorted(pages.parent.glob("0*.html")) if "glossary.html#" in file.read_text("utf-8"))
    page.goto(to_a_word.as_uri())
    word = page.locator("a[href^='glossary.html#']").first
    place = unquote(word.get_attribute("href").partition("#")[2])
    word.click()
    box = page.locator(f"[id='{place}']").bounding_box()
    assert page.url.startswith(pages.with_name("glossary.html").as_uri())
    assert 0 <= box["y"] < page.viewport_size["height"], "the word is in sight"
    page.close()

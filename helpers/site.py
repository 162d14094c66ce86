"""The executed notebooks as a small static site that needs neither a server nor a network: `build/index.html`.

nbconvert makes the pages. What is added: a navigation bar, links that lead to pages instead of files, formulas as MathML
(nbconvert loads MathJax from the network), the pictures' text alternatives, and room on a phone.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from urllib.parse import urldefrag

from helpers import repository
from helpers.files import write_text
from helpers.profiles import ROOT

NO_ALT = 'alt="No description has been provided for this image"'  # what nbconvert writes
PAGES = {  # source in the repository → (page, name in the navigation bar)
    "README.md": ("index.html", "Start"),
    "notebooks/01_dataset_tour.ipynb": ("01_dataset_tour.html", "1 Data"),
    "notebooks/02_prompt_formatting.ipynb": ("02_prompt_formatting.html", "2 Prompts"),
    "notebooks/03_zloss_moe_patch.ipynb": ("03_zloss_moe_patch.html", "3 Router losses"),
    "notebooks/04_qlora_training.ipynb": ("04_qlora_training.html", "4 QLoRA"),
    "notebooks/05_length_control_evaluation.ipynb": ("05_length_control_evaluation.html", "5 Length control"),
    "benchmarks/results": ("results.html", "Results"),
    "data_samples/README.md": ("data.html", "Sample stories"),
    "notebooks/GLOSSARY.md": ("glossary.html", "Glossary"),
    "notebooks/TROUBLESHOOTING.md": ("trouble.html", "Trouble"),
}
# The syntax colours given here are those of the themes that were too faint on their ground (WCAG asks for a contrast of 4.5).
STYLE = """
:root {color-scheme: light dark; --jp-mirror-editor-comment-color: #2f6868; --jp-mirror-editor-operator-color: #8a1ed1;
  --jp-mirror-editor-number-color: #007000}
[id] {scroll-margin-top: .75em;}
nav.course {display: flex; flex-wrap: wrap; gap: 0 1em; padding: .6em 1em; border-bottom: 1px solid var(--jp-border-color1);
  font: 15px/1.8 system-ui, sans-serif}
nav.course a {color: var(--jp-content-link-color); text-decoration: none}
nav.course a[aria-current] {color: var(--jp-ui-font-color0); font-weight: 600}
body {max-width: 70em; margin: 0 auto !important}
main {overflow-wrap: anywhere}
img, svg {max-width: 100%; height: auto}
table {display: block; overflow-x: auto}
td, th {overflow-wrap: normal}
td code {white-space: nowrap}
pre {overflow-x: auto}
.jp-RenderedMarkdown pre {background: var(--jp-cell-editor-background); margin: .6em 0 !important; padding: .6em .8em !important}
.jp-RenderedMarkdown pre code {background: none !important; white-space: pre !important}
@media (max-width: 45em) {
  body {padding: 0 !important}
  .jp-InputPrompt, .jp-OutputPrompt, .jp-InputCollapser, .jp-OutputCollapser {display: none !important}
  .jp-Cell {padding: 2px .6em !important}
  .jp-OutputArea-output pre, .highlight pre {font-size: 12px}
  .jp-OutputArea-output pre {white-space: pre !important}
}
"""
DARK = """
:root {--jp-mirror-editor-comment-color: #7fbfbf; --jp-mirror-editor-operator-color: #d08bff;
  --jp-mirror-editor-number-color: #7fd083}
"""


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def formulas_to_mathml(markdown: str) -> str:
    """$…$ and $$…$$ outside of code as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def draw(match: re.Match[str]) -> str:
        block = match["block"] is not None
        return convert((match["block"] or match["inline"]).strip(), display="block" if block else "inline")

    formula = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?![\w$])", re.DOTALL)
    return _outside_code(markdown, lambda text: formula.sub(draw, text))


def links_to_pages(markdown: str, source: str) -> str:
    """Relative links of a file in the repository: to the page made of their target, else to the file there; pictures inside."""
    url, ref = repository.address()

    def lead(match: re.Match[str]) -> str:
        target, fragment = urldefrag(match[2])
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.endswith(".png"):
            return f"{match[1]}{inside(path)})"
        there = PAGES[path][0] if path in PAGES else f"{url}/blob/{ref}/{path}"
        return f"{match[1]}{there}{'#' + fragment if fragment else ''})"

    def inside(path: str) -> str:
        return f"data:image/png;base64,{base64.b64encode((ROOT / path).read_bytes()).decode()}"

    def show(match: re.Match[str]) -> str:
        return f'{match[1]}="{inside(posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2])))}"'

    markdown = re.sub(r"\[!\[([^\]]+)\]\(https?:[^)]+\)\]", r"[\1]", markdown)  # a badge's picture is on somebody's server
    markdown = _outside_code(markdown, lambda text: re.sub(r'\b(src|srcset)="([^":]+\.png)"', show, text))
    return _outside_code(markdown, lambda text: re.sub(r"(\]\()([^()\s]+)\)", lead, text))


def results_page(folder: Path) -> str:
    """Every committed result file with what it was measured on, as Markdown."""
    lines = ["# Results", "", "What the numbers of this course were read from. Each file holds all of its run."]
    for file in sorted(folder.glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        machine, versions = facts.get("hardware", {}), facts.get("versions", {})
        where = ", ".join(f"{k} {v}" for k, v in machine.items() if v)
        lines += ["", f"## {file.stem}", "", f"Machine: {where or 'not recorded'}."]
        lines += [f"Versions: {', '.join(f'{k} {v}' for k, v in versions.items()) or 'not recorded'}."]
        text = escape(json.dumps(facts, indent=1, ensure_ascii=False)).replace("$", "&#36;")
        lines += ["", f"<details><summary>{file.name}</summary><pre>{text}</pre></details>"]
    return "\n".join(lines)


def page(notebook, source: str, title: str) -> str:
    """One notebook (nbformat node) as an HTML page that loads nothing from anywhere."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas_to_mathml(links_to_pages(cell.source, source))
    exporter = HTMLExporter(template_name="lab")
    html, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    alts = [o.metadata.get("image/png", {}).get("alt", "figure") for o in outputs if "image/png" in o.get("data", {})]
    parts = html.split(NO_ALT)  # the exporter does not use the text alternatives that the outputs have
    if len(parts) == len(alts) + 1:
        html = parts[0] + "".join(f'alt="{escape(alt)}"' + part for alt, part in zip(alts, parts[1:], strict=True))
    html = re.sub(r"<script[^>]*\ssrc=\"https?://[^>]*></script>", "", html)
    html = re.sub(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", "", html, flags=re.DOTALL)
    here = PAGES[source][0]
    links = (f'<a href="{to}"{" aria-current=page" * (to == here)}>{name}</a>' for to, name in PAGES.values())
    bar = f'<nav class="course" aria-label="Course">{"".join(links)}</nav>'
    dark, *_ = exporter.environment.loader.get_source(exporter.environment, "static/theme-dark.css")
    style = f"{STYLE}@media screen and (prefers-color-scheme: dark) {{{dark}{DARK}}}"
    html = re.sub(r"</head>", lambda _: f"<style>{style}</style></head>", html, count=1)
    return re.sub(r"(<body[^>]*>)", lambda m: m[1] + bar, html, count=1)


def build(notebooks: dict[str, object], target: Path) -> Path:
    """Write all pages into `target`; notebooks: name → executed notebook, the others as they are committed."""
    import nbformat

    target.mkdir(parents=True, exist_ok=True)
    for source, (name, label) in PAGES.items():
        path = ROOT / source
        if path.suffix == ".ipynb":
            node = notebooks.get(path.stem) or nbformat.read(path, as_version=4)
        else:
            text = results_page(path) if path.is_dir() else path.read_text(encoding="utf-8")
            node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
        title = "Fine-tuning a Mixture of Experts" + ("" if name == "index.html" else f" · {label}")
        write_text(target / name, page(node, source, title))
    return target / "index.html"

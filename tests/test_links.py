"""Links in what people read lead somewhere, without a network: files exist, and so do the places in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

from helpers.profiles import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "data_samples").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
LINK = re.compile(r"\]\(([^()\s]+)\)")


@cache
def prose(path: Path) -> str:
    """The page's Markdown without code, in which brackets mean something else."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n\n".join(c.source for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    """The places that a link can name: written ids, and headings as GitHub spells them."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return set(re.findall(r'<a id="([^"]+)">', text)) | {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name if p.suffix == ".ipynb" else str(p.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_place_in_it(path):
    for link in LINK.findall(prose(path)):
        if re.match(r"https?:", link):
            continue
        target, _, place = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name}: {link}"
        assert there.is_relative_to(ROOT), f"{path.name}: {link} leads out of the repository"
        if place:
            assert there.suffix == ".md", f"{path.name}: {link}: places in a notebook have another name on every site"
            assert place in anchors(there), f"{path.name}: {link}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name if p.suffix == ".ipynb" else str(p.relative_to(ROOT)))
def test_papers_are_linked_by_their_own_number(path):
    """The number that is read is the number that opens."""
    for shown, opened in re.findall(r"\[arXiv:? ([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", prose(path)):
        assert shown == opened and re.fullmatch(r"\d{4}\.\d{4,5}", shown), f"{path.name}: {shown} opens {opened}"


def test_every_entry_of_the_glossary_has_a_place_and_is_found_in_the_notebooks_that_it_names():
    rows = [line for line in (ROOT / "notebooks" / "GLOSSARY.md").read_text(encoding="utf-8").splitlines() if line[:3] == "| <"]
    places = [re.match(r'\| <a id="([\w-]+)"></a>', line)[1] for line in rows]
    assert len(set(places)) == len(places) > 40
    texts = {p.name[1]: p.read_text(encoding="utf-8").lower() for p in (ROOT / "notebooks").glob("*.ipynb")}
    terms = []
    for line in rows:
        term, meaning, numbers = (cell.strip() for cell in line.strip("|").split("|"))
        terms.append(re.sub(r"<[^>]+>", "", term))
        assert len(meaning.split()) >= 4, line
        words = [re.sub(r"[^\w-].*", "", word.strip().lower())[:8] for word in re.split(r"[ ,()]+", terms[-1]) if len(word) > 2]
        for number in numbers.split(", "):
            assert any(word and word in texts[number] for word in words), f"{terms[-1]}: not in notebook {number}"
    assert terms == sorted(terms, key=str.lower), "in alphabetical order"


def test_every_trouble_has_a_place_and_the_notebooks_lead_to_the_page():
    page = (ROOT / "notebooks" / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\*\*", page, flags=re.MULTILINE)) == 0, "an entry without an id cannot be linked to"
    linked = {p.name: set(re.findall(r"TROUBLESHOOTING\.md#([\w-]+)", prose(p))) for p in PAGES if p.suffix == ".ipynb"}
    assert all(linked.values()), linked
    wanted = {"memory", "nan", "nan-first-step", "labels", "not-4-bit", "dead-z-loss", "slow", "colab", "interrupted"}
    assert wanted <= set().union(*linked.values()), wanted - set().union(*linked.values())

"""The static site works from the file system: every link leads somewhere, and nothing is loaded from a network."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag

import nbformat
import pytest

from helpers import repository, site


class Page(HTMLParser):
    """What a page loads, links to, and can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads, self.alts, self.tags = set(), [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif found.get("src") or found.get("srcset") or (tag == "link" and found.get("rel") == "stylesheet"):
            self.loads.append(found.get("src") or found.get("srcset") or found["href"])
        if tag == "img":
            self.alts.append(found.get("alt", ""))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    first = site.build({}, tmp_path_factory.mktemp("site"))
    assert first.name == "index.html"
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in first.parent.glob("*.html")}


@pytest.mark.slow
def test_every_page_is_there_and_reached_from_every_other(pages):
    assert sorted(pages) == sorted(name for name, _ in site.PAGES.values())
    for page in pages.values():
        assert set(pages) <= set(page.links)


@pytest.mark.slow
def test_links_lead_somewhere(pages):
    url, ref = repository.address()
    for name, page in pages.items():
        for link in page.links:
            target, fragment = urldefrag(link)
            if target.startswith(("https:", "http:")):
                if target.startswith(f"{url}/blob/"):
                    assert (site.ROOT / target.removeprefix(f"{url}/blob/{ref}/")).exists(), link
                continue
            assert (target or name) in pages, f"{name}: {link}"
            assert not fragment or {fragment, unquote(fragment)} & pages[target or name].ids, f"{name}: {link}"


@pytest.mark.slow
def test_nothing_is_loaded_from_a_network(pages):
    for name, page in pages.items():
        assert [source for source in page.loads if not source.startswith("data:")] == [], name


@pytest.mark.slow
def test_every_picture_has_a_text_alternative(pages):
    alts = [alt for page in pages.values() for alt in page.alts]
    assert len(alts) > 15 and not [alt for alt in alts if not alt or "No description" in alt]


@pytest.mark.slow
def test_a_notebook_that_was_run_is_shown_instead_of_the_committed_one(tmp_path):
    name = "03_zloss_moe_patch"
    cell = nbformat.v4.new_markdown_cell("a line of *this* run")
    site.build({name: nbformat.v4.new_notebook(cells=[cell])}, tmp_path)
    assert "a line of <em>this</em> run" in (tmp_path / f"{name}.html").read_text(encoding="utf-8")


def test_formulas_become_mathml_and_code_does_not():
    text = "of $x_t$ and\n\n$$\\frac{1}{T}$$\n\nbut `$HOME` and 5 $ or US$3\n```\n$y$\n```"
    new = site.formulas_to_mathml(text)
    assert new.count("<math") == 2 and 'display="block"' in new
    assert "`$HOME` and 5 $ or US$3\n```\n$y$\n```" in new
    start = new.index("<math")
    formula = ElementTree.fromstring(new[start : new.index("</math>") + 7])
    assert formula.tag.endswith("math") and "".join(formula.itertext()) == "xt"


@pytest.mark.parametrize(
    ("source", "text", "wanted"),
    [
        ("README.md", "[a](notebooks/03_zloss_moe_patch.ipynb)", "[a](03_zloss_moe_patch.html)"),
        ("notebooks/x.ipynb", "[a](GLOSSARY.md#router)", "[a](glossary.html#router)"),
        ("notebooks/x.ipynb", "[a](https://example.org/b.md)", "[a](https://example.org/b.md)"),
        ("notebooks/x.ipynb", "[a](../data_samples/README.md)", "[a](data.html)"),
        ("notebooks/x.ipynb", "`f[0](README.md)` [a](#there)", "`f[0](README.md)` [a](#there)"),
        ("README.md", "[![Open](https://a.org/b.svg)](https://c.org/)", "[Open](https://c.org/)"),
    ],
)
def test_links(source, text, wanted):
    assert site.links_to_pages(text, source) == wanted


def test_a_link_to_another_file_leads_into_the_repository():
    url, ref = repository.address()
    assert site.links_to_pages("[a](../LICENSE)", "notebooks/x.ipynb") == f"[a]({url}/blob/{ref}/LICENSE)"

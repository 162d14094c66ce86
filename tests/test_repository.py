"""One address, stamped into everything that repeats it."""

from __future__ import annotations

import shutil

import pytest

from helpers import repository
from helpers.profiles import ROOT


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("pyproject.toml", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_fork_is_stamped_everywhere_and_back(copy):
    before, (url, ref) = contents(copy), repository.address(copy)
    changed = repository.stamp("https://github.com/ada-l/own.course", "v1.2", copy)
    assert repository.address(copy) == ("https://github.com/ada-l/own.course", "v1.2")
    assert len(changed) == len(before) - 2, "all but the two Markdown pages"
    old = url.removeprefix("https://github.com/").encode()
    assert not [path for path, text in contents(copy).items() if old in text]
    assert repository.stamp("https://github.com/ada-l/own.course", "v1.2", copy) == [], "a second time changes nothing"
    repository.stamp(url, ref, copy)
    assert contents(copy) == before


@pytest.mark.parametrize(
    "url", ["https://github.com/a/b/", "https://github.com/a/b.git", "git@github.com:a/b.git", " https://github.com/a/b"]
)
def test_spellings_of_an_address(url):
    assert repository.parse(url) == "https://github.com/a/b"


@pytest.mark.parametrize("url", ["https://gitlab.com/a/b", "a/b", "https://github.com/a", "https://github.com/a/b/c", ""])
def test_other_addresses_are_refused(url):
    with pytest.raises(ValueError, match="not a repository on GitHub"):
        repository.parse(url)


def test_a_place_without_an_address_is_named(copy):
    (copy / "CITATION.cff").write_text("title: nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"CITATION\.cff holds no address"):
        repository.stamp("https://github.com/a/b", root=copy)
    with pytest.raises(ValueError, match="no name of a branch"):
        repository.stamp("https://github.com/a/b", "two words", copy)

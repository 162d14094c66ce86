"""Colab, imitated: an empty folder with one notebook in it, and the repository somewhere else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from helpers import repository
from helpers.profiles import ROOT

URL, REF = repository.address()
NOTEBOOK = "03_zloss_moe_patch.ipynb"
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "runs", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")


def set_up_cell() -> str:
    notebook = nbformat.read(ROOT / "notebooks" / NOTEBOOK, as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def git(*arguments: object, cwd=None) -> None:
    who = ("-c", "user.name=course", "-c", "user.email=course@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *map(str, arguments)], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A bare repository with the checkout as it is now, on the branch or tag that the badges name."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and the set-up cell fetches the course with it")
    tree, bare = (tmp_path_factory.mktemp("remote") / name for name in ("a tree", "course.git"))
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    git("init", "--quiet", "-b", REF, tree)
    git("add", "--all", cwd=tree)
    git("commit", "--quiet", "-m", "as it is", cwd=tree)
    git("clone", "--quiet", "--bare", tree, bare)
    return bare


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "my drive"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder)
    return folder


def run(folder, code: str, source: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COURSE_REPO")}
    environment |= {"COURSE_PROFILE": "tiny", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment |= {"COURSE_REPO": source} if source else {}
    # The course that is installed for these tests must not be found.
    hide = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    hide += f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    command = [sys.executable, "-c", hide + code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=240)


@pytest.mark.slow
def test_the_set_up_cell_fetches_the_course_and_runs_twice(remote, empty):
    """Only the notebook is there; what an interrupted download left is in the way; the name of the folder has a space."""
    (empty / "moe-course.partial" / "helpers").mkdir(parents=True)
    cell = set_up_cell()
    after = "import helpers.prompts, helpers; print('from', helpers.__path__[0], 'paths', sys.path.count(str(root)))"
    result = run(empty, f"{cell}\n{cell}\n{after}", remote.as_uri())
    assert result.returncode == 0, result.stderr
    assert f"from {empty / 'moe-course' / 'helpers'} paths 1" in result.stdout
    assert result.stdout.count("profile: tiny") == 2 and "installing" not in result.stdout
    assert sorted(p.name for p in empty.iterdir()) == sorted([NOTEBOOK, "moe-course"])
    depth = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=empty / "moe-course", capture_output=True, text=True)
    assert depth.stdout.strip() == "1"


def test_without_an_address_the_cell_says_what_to_set(empty):
    result = run(empty, set_up_cell().replace(URL, "https://github.com/OWNER/moe-course"), None)
    assert result.returncode and "os.environ['COURSE_REPO'] = " in result.stderr and "Traceback" not in result.stderr


def test_without_a_network_the_cell_says_so_and_leaves_nothing(empty, tmp_path):
    result = run(empty, set_up_cell(), (tmp_path / "nowhere.git").as_uri())
    assert result.returncode and "Could not fetch" in result.stderr and "Is there a network?" in result.stderr
    assert "Traceback" not in result.stderr and [p.name for p in empty.iterdir()] == [NOTEBOOK]


def test_inside_a_checkout_nothing_is_fetched():
    """COURSE_REPO leads nowhere, and nobody asks for it."""
    cell = set_up_cell().replace("environment.prepare_notebook()", "print('found', root)")
    result = run(ROOT / "notebooks", cell, "file:///nowhere")
    assert result.returncode == 0 and f"found {ROOT}" in result.stdout, result.stderr

"""The README says what the files say."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re

import nbformat
import pytest

from helpers.course import NOTEBOOKS
from helpers.profiles import PROFILES, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@functools.cache
def recorder():
    spec = importlib.util.spec_from_file_location("record_course", ROOT / "benchmarks" / "record_course.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recorded() -> dict:
    return json.loads(recorder().RESULTS.read_text(encoding="utf-8"))


def test_the_results_are_rendered_from_the_committed_run():
    assert recorder().with_results(README, recorded()) == README, "run python benchmarks/record_course.py --readme"


def test_another_run_changes_each_measured_block():
    record, results = recorder(), recorded()
    for took in results["notebooks"].values():
        took["seconds"] += 600
    results["picture"] = "another"
    results["evaluation"]["1-adapter"]["rows"][0]["mean"] = 777.7
    new = record.with_results(README, results)
    first = results["notebooks"][NOTEBOOKS[0]]
    cell = f"| {first['seconds'] / 60:.1f} min, {first['memory_gib']:.1f} GiB |"
    assert 'alt="another"' in new and "| 777.7 |" in new and cell in new.replace(record.NBSP, " ") and cell not in README
    for name in NOTEBOOKS:
        assert new.count(f"](notebooks/{name}.ipynb) | ") == README.count(f"](notebooks/{name}.ipynb) | ") == 1


@pytest.mark.parametrize("line", ["<!-- figure: begin -->\n", "<!-- results: end -->\n"])
def test_a_readme_without_its_marks_is_refused(line):
    for broken in (README.replace(line, ""), README + line):
        with pytest.raises(ValueError, match=line.split()[1]):
            recorder().with_results(broken, recorded())


def test_the_first_screen_says_what_it_is_how_to_start_and_what_it_takes():
    order = ["# Fine-tuning", '<img src="benchmarks/results/length-control.png"']
    order += ["make course ", "make test ", "| notebook | you learn |", "## Does it fit your GPU?", "## Results"]
    places = [README.index(text) for text in order]
    assert places == sorted(places) and README.count("\n", 0, places[4]) < 28


def test_the_recorded_run_is_the_shipped_profiles():
    results = recorded()
    provenance = json.loads((ROOT / PROFILES["tiny"].base / "provenance.json").read_text())
    assert results["training"]["steps"] == PROFILES["tiny"].max_steps
    assert results["base"]["parameters"] == provenance["parameters"] and results["base"]["perplexity"] == provenance["perplexity"]
    assert next(r for r in results["audit"] if r["part"] == "experts")["4-bit"] == 1.0


def test_the_recorded_effect_is_there_and_the_control_does_not_show_it():
    tables = recorded()["evaluation"]
    adapter, deep, base = (tables[k]["statistics"] for k in ("1-adapter", "2-adapter-deep", "3-base"))
    assert adapter["spearman"] >= 0.7 and adapter["spearman_p"] < 1e-6 and deep["spearman"] >= 0.5
    assert abs(base["spearman"]) <= 0.15


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_a_notebook_takes_is_what_was_recorded(name):
    results = recorded()
    first = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source
    assert recorder().with_needs(results, name, first) == first, "run benchmarks/record_course.py"


def test_every_module_notebook_and_profile_is_named():
    for path in (ROOT / "helpers").glob("*.py"):
        if path.name != "__init__.py":
            assert f"`{path.name}`" in README, path.name
    for name in NOTEBOOKS:
        assert f"notebooks/{name}.ipynb" in README
    for name in PROFILES:
        assert f"| `{name}` |" in README


def test_a_module_imports_only_what_stands_above_it_or_beside_it():
    table = README[README.index("## Map of `helpers/`") : README.index("## Known limitations")]
    rows = [re.findall(r"`(\w+)\.py`", line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    place = {module: n for n, row in enumerate(rows) for module in row} | {"__main__": len(rows)}
    found = 0
    for module, own in place.items():
        for node in ast.walk(ast.parse((ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
                names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                for name in names:
                    assert place[name] <= own, f"{module} imports {name}, which stands below it"
                    found += 1
    assert found > 100


def test_the_allowance_is_the_budgets():
    from helpers import budget

    assert f"leave {budget.RESERVE:g} GiB more for CUDA" in " ".join(README.split())


def test_relative_links_lead_somewhere():
    for page in (
        "README.md",
        "LICENSE-TEXT.md",
        "data_samples/README.md",
        *(f"notebooks/{n}.md" for n in ("GLOSSARY", "TROUBLESHOOTING")),
    ):
        folder = (ROOT / page).parent
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
            file, _, place = target.partition("#")
            assert (folder / file).exists(), f"{page}: {target}"
            assert not place or f'id="{place}"' in (folder / file).read_text(encoding="utf-8"), f"{page}: {target}"
        for place in re.findall(r"\]\(#([^)]+)\)", text):  # an id of ours: GitHub and the site derive others from a heading
            assert f'id="{place}"' in text, f"{page}: #{place}"


def test_the_share_that_stock_loading_leaves_is_computed():
    """96.6 % in the README: experts of Mixtral-8x7B, counted on its real shapes."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = experts / sum(p.numel() for p in model.parameters())
    assert f"{share:.1%}".replace("%", " %") in README

"""The doctor, and the lists of packages that it reads: they must agree with each other and with what the code imports."""

import ast
import os
import subprocess
import sys
import tomllib
import types
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers import environment, profiles
from helpers.environment import Check, check_package, doctor, report

ROOT = environment.ROOT
# What a hosted notebook has before anything is installed (Colab, August 2026): it must not be replaced.
COLAB = {
    "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
    "numpy": "2.1.0",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "ipython": "7.34.0",
    "nbclient": "0.10.0",
}


def read(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def by_name(requirements: list[Requirement]) -> dict[str, Requirement]:
    return {canonicalize_name(r.name): r for r in requirements}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setenv(profiles.VARIABLE, "tiny")


def test_doctor_passes_here(tiny):
    checks = doctor()
    assert not [c for c in checks if not c.ok], report(checks)
    assert {"Python", "torch", "bitsandbytes", "profile", "device", "memory", "bf16", "disk", "4-bit"} <= {c.name for c in checks}


@pytest.mark.parametrize("text", ["torch>=99", "transformers<1", "no-such-package>=1.0,<2"])
def test_a_range_that_cannot_be_met_fails_and_says_what_to_type(text):
    check = check_package(Requirement(text))
    assert not check.ok
    assert f'pip install "{text}"' in check.todo


def test_local_builds_count_as_their_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.11.0+cu128")
    assert check_package(Requirement("torch>=2.11,<3")).ok
    assert not check_package(Requirement("torch>2.11,<3")).ok


def test_a_broken_check_is_a_failed_check(tiny, monkeypatch):
    def broken():
        raise OSError("libcudart.so.12: cannot open shared object file\nand a long story")

    monkeypatch.setattr(environment, "check_quantisation", broken)
    failed = next(c for c in doctor() if c.name == "4-bit")
    assert not failed.ok and failed.detail == "OSError: libcudart.so.12: cannot open shared object file" and failed.todo


def test_profiles_that_do_not_fit_fail(monkeypatch):
    monkeypatch.setattr(environment, "gpu_memory_gib", lambda: 14.7)
    monkeypatch.setenv(profiles.VARIABLE, "a100-80")
    check = environment.check_profile()
    assert not check.ok and "14.7" in check.detail and f"unset {profiles.VARIABLE}" in check.todo
    monkeypatch.setenv(profiles.VARIABLE, "huge")
    assert "a100-80" in environment.check_profile().detail  # names those that exist
    assert not next(c for c in doctor() if c.name == "profile").ok  # and the doctor goes on to its end


@pytest.mark.parametrize(("capability", "ok"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bf16_goes_by_compute_capability(monkeypatch, capability, ok):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert environment.check_bf16(profiles.PROFILES["l4"]).ok is ok
    assert environment.check_bf16(profiles.PROFILES["t4"]).ok


def test_every_download_has_its_size():
    assert {p.base for p in profiles.PROFILES.values() if p.name != "tiny"} == set(environment.DOWNLOAD_GIB)
    olmoe, mixtral = environment.DOWNLOAD_GIB.values()
    lesson = (ROOT / "notebooks" / "04_qlora_training.ipynb").read_text(encoding="utf-8")
    assert f"the download ({olmoe} GiB for OLMoE, {mixtral} for Mixtral)" in lesson


def test_report():
    text = report([Check("one", True, "fine", "never shown"), Check("two", False, "gone", "type this")])
    assert text == "[OK]   one: fine\n[FAIL] two: gone\n       -> type this\n1 of 2 checks failed: two"
    assert report([Check("one", True, "fine")]).endswith("all 1 checks passed")


def test_facts_for_result_files(tiny, capsys):
    assert set(environment.versions()) == {"python", *environment.PACKAGES}
    assert "missing" not in environment.versions().values()
    facts = environment.hardware()
    assert facts["device"] in ("cpu", "cuda") and facts["name"] and facts["cores"] >= 1 and facts["memory_gib"] > 1
    environment.print_environment()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["versions", "device", "profile"]
    assert lines[2] == "profile: tiny (asked for by $COURSE_PROFILE)"


def test_import_is_light():
    """The doctor must be able to say that torch is broken, so importing it must not import torch."""
    code = "import sys, helpers.environment as e; assert not {'torch', 'transformers', 'packaging'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_lists_of_packages_agree():
    course, constraints = by_name(read("requirements.txt")), by_name(read("constraints.txt"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    installed = by_name([Requirement(r) for r in project])
    for name, wanted in installed.items():
        assert wanted.specifier == course[name].specifier, name
    tools = {"ipykernel", "nbclient", "nbformat", "nbconvert", "latex2mathml", "jupyterlab"}
    assert set(course) - set(installed) == tools, "what serves and runs notebooks; a hosted one brings its own"
    for name, wanted in {**course, **by_name(read("requirements-dev.txt"))}.items():
        (pin,) = constraints[name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), name


def test_the_oldest_versions_are_the_ranges_lower_ends():
    course = by_name(read("requirements.txt"))
    for name, wanted in by_name(read(".github/constraints-oldest.txt")).items():
        (pin,) = wanted.specifier
        (least,) = (s for s in course[name].specifier if s.operator == ">=")
        assert pin.operator == "==" and Version(pin.version) == Version(least.version), name


def test_the_ranges_hold_what_colab_has():
    course = by_name(read("requirements.txt"))
    for name, version in COLAB.items():
        assert course[name].specifier.contains(version), name


def test_everything_that_the_helpers_import_is_required():
    known = {canonicalize_name(name) for name in by_name(read("requirements.txt"))}
    providers = metadata.packages_distributions()
    for file in sorted((ROOT / "helpers").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names = [name for name in names if name != "google.colab"]  # it is part of Colab, and nowhere else
            names = [name.split(".")[0] for name in names]
            came_with = {"helpers", "triton"}  # the latter with torch for CUDA; `helpers.fused` says so where it is missing
            for top in set(names) - sys.stdlib_module_names - came_with:
                if top in providers:
                    assert known & {canonicalize_name(d) for d in providers[top]}, f"{file.name}:{node.lineno} imports {top}"


def test_the_pinned_versions_suit_every_package_that_is_installed():
    """`pip install -c constraints.txt` into an empty environment fails where two pins exclude each other."""

    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())
    pins = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in map(Requirement, filter(None, lines))}
    clashes, seen = [], 0
    for package in metadata.distributions():
        if package.version != pins.get(canonicalize_name(package.name), package.version):
            continue  # another version than the pinned one says nothing about the pins
        for requirement in map(Requirement, package.requires or ()):
            pin = pins.get(canonicalize_name(requirement.name))
            if pin and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                seen += 1
                if not requirement.specifier.contains(pin, prereleases=True):
                    clashes.append(f"{package.name} wants {requirement}, pinned is {pin}")
    assert seen > 50 and not clashes, "\n".join(clashes)


def test_a_colab_secret_reaches_the_hub_and_is_never_printed(monkeypatch, capsys):
    from huggingface_hub import get_token

    asked = []
    userdata = types.SimpleNamespace(get=lambda name: asked.append(name) or "hf_secret")
    colab = types.ModuleType("google.colab")
    colab.userdata = userdata
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setenv("HF_TOKEN", "")
    environment.use_colab_secret()
    assert get_token() == "hf_secret" and asked == ["HF_TOKEN"] and "hf_secret" not in "".join(capsys.readouterr())
    environment.use_colab_secret()
    assert asked == ["HF_TOKEN"], "a token that is set is left alone"

    def refuses(_name):
        raise TimeoutError

    userdata.get = refuses
    monkeypatch.setenv("HF_TOKEN", "")
    environment.use_colab_secret()
    assert not os.environ["HF_TOKEN"]


@pytest.mark.parametrize("linked", [True, False])
def test_the_disk_is_asked_where_the_run_and_the_model_go(monkeypatch, tmp_path, linked):
    """Of Mixtral three checkpoints of 5 GiB exist at once, and the adapter. `linked`: a cache as where links are allowed."""
    disks = {}
    monkeypatch.setattr(
        environment.shutil, "disk_usage", lambda place: disks.setdefault(str(place), types.SimpleNamespace(free=0))
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    large = profiles.PROFILES["a100-80"]
    assert 17 < environment.run_gib(large) < 18 and 9 < environment.run_gib(profiles.PROFILES["t4"]) < 10
    check = environment.check_disk(large, tmp_path / "runs" / "mine")
    assert list(disks) == [str(tmp_path)] and not check.ok
    assert "0.0 GiB free" in check.detail and "wanted 104.3 for the run and the base model" in check.detail
    repo = tmp_path / "cache" / "models--mistralai--Mixtral-8x7B-v0.1"
    for folder in ("blobs", "refs", "snapshots/abc"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc", encoding="utf-8")
    begun = repo / "blobs" / "weights.incomplete"
    with begun.open("wb") as file:
        file.truncate(40 * 2**30)  # sparse
    assert environment.missing_gib(large) == pytest.approx(47, abs=1)
    begun.unlink()
    shard = repo / "snapshots" / "abc" / "model.safetensors"
    with (repo / "blobs" / "weights" if linked else shard).open("wb") as file:
        file.truncate(87 * 2**30)
    if linked:
        shard.symlink_to(repo / "blobs" / "weights")
    assert environment.missing_gib(large) == 0
    disks[str(tmp_path)].free = 17.5 * 2**30
    assert environment.check_disk(large, tmp_path / "runs").ok, "the model is there"
    disks[str(tmp_path)].free = 17 * 2**30
    assert not environment.check_disk(large, tmp_path / "runs").ok


def test_the_hubs_bars_stay_on_a_terminal(monkeypatch):
    from huggingface_hub.utils import are_progress_bars_disabled

    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        environment.quiet()
        assert are_progress_bars_disabled() is not terminal

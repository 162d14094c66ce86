"""Is this machine ready, and what is it? `[OK]`/`[FAIL]` with what to type, and the facts that stand beside each result.

Everything heavy is imported where it is used: the doctor must be able to say that torch is missing or broken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from helpers import profiles
from helpers.profiles import ROOT, Profile

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")  # those that decide about results
DOWNLOAD_GIB = {"allenai/OLMoE-1B-7B-0924": 13, "mistralai/Mixtral-8x7B-v0.1": 87}  # parameters x 2 bytes
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    # Rows of several lengths leave gaps in a GPU's memory. It is read when torch first asks for some.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
INSTALL = "python -m pip install -r requirements.txt -c constraints.txt   (in a checkout: make setup)"


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report."""

    name: str
    ok: bool
    detail: str
    todo: str = ""  # what to type if it is not ok


def requirements() -> list[Requirement]:
    """What must be installed here: requirements.txt beside the package, else what the installed package asks for."""
    from packaging.requirements import Requirement

    file = ROOT / "requirements.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else metadata.requires("moe-course-helpers") or []
    wanted = [Requirement(text) for line in lines if (text := line.split("#")[0].strip()) and not text.startswith("-")]
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    todo = f"install Python {oldest} or newer, then: make setup PYTHON=python{oldest}"
    return Check("Python", sys.version_info >= OLDEST_PYTHON, f"{platform.python_version()}, wanted >={oldest}", todo)


def check_package(wanted: Requirement) -> Check:
    """Is a version within the range installed? (Nightly and +cpu/+cu builds count as their version.)"""
    span = ",".join(sorted(map(str, wanted.specifier), reverse=True))  # >=2.11,<3
    todo = f'python -m pip install "{wanted.name}{span}"   (then restart the notebook\'s kernel)'
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        if wanted.name == "jupyterlab" and "COLAB_RELEASE_TAG" in os.environ:
            return Check(wanted.name, True, "not needed: Colab's own page opens the notebooks")
        return Check(wanted.name, False, f"not installed, wanted {span}", todo)
    fits = wanted.specifier.contains(version, prereleases=True)
    return Check(wanted.name, fits, f"{version}, wanted {span}", todo)


def _shell(variable: str, value: str = "") -> str:
    """What to type to set an environment variable, or to take it away."""
    if os.name == "nt":
        return f"set {variable}={value}"
    return f"export {variable}={value}" if value else f"unset {variable}"


def check_profile() -> Check:
    todo = f"{_shell(profiles.VARIABLE)}   (the one that fits is chosen then)"
    try:
        profile, why = profiles.choose()
    except ValueError as error:
        return Check("profile", False, str(error), todo)
    if short := lacking_memory(profile):
        return Check("profile", False, f"{profile.name} ({why}) {short}", todo)
    return Check("profile", True, f"{profile.name} ({why})")


def lacking_memory(profile: Profile) -> str:
    """ "is meant for …, here are …", or "" if the machine is as large as the profile."""
    here = gpu_memory_gib() or 0.0
    return f"is meant for {profile.memory_gib:.0f} GiB of GPU memory, here are {here:.1f}" if profile.memory_gib > here else ""


def check_device(profile: Profile) -> Check:
    """CPU is fine; a GPU that torch does not see is not, unless the CPU profile was asked for."""
    facts = hardware()
    detail = f"{facts['device']}: {facts['name']}, {facts['cores']} cores"
    if facts["device"] == "cpu" and shutil.which("nvidia-smi") and not os.environ.get(profiles.VARIABLE):
        todo = f"install torch for your driver (pytorch.org/get-started), or stay on the CPU: {_shell(profiles.VARIABLE, 'tiny')}"
        return Check("device", False, f"{detail}; there is an NVIDIA driver, but torch sees no GPU", todo)
    return Check("device", True, detail)


def check_memory(profile: Profile) -> Check:
    host, gpu = host_memory_gib(), gpu_memory_gib()
    needed = 2 if profile.memory_gib == 0 else 8  # weights are streamed to the GPU: the host never holds them all
    detail = f"host {host:.1f} GiB" if host else "host: unknown"
    detail += f", GPU {gpu:.1f} GiB" if gpu else ""
    return Check("memory", host is None or host >= needed, f"{detail}, wanted {needed} on the host", "use a larger machine")


def check_bf16(profile: Profile) -> Check:
    """By compute capability: `torch.cuda.is_bf16_supported()` also says yes where bf16 is only emulated."""
    if profile.dtype != "bfloat16":
        return Check("bf16", True, f"not needed: the profile {profile.name} computes in {profile.dtype}")
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    detail = f"compute capability {major}.{minor}, wanted >=8.0" if major else "no CUDA GPU"
    return Check("bf16", major >= 8, detail, f"{_shell(profiles.VARIABLE)}, or: {_shell(profiles.VARIABLE, 't4')} (fp16)")


SPARE_GIB = 0.5  # logs, optimizer's bookkeeping, the evaluation's replies


def run_gib(profile: Profile, kept: int = profiles.KEPT_CHECKPOINTS) -> float:
    """What a run takes on the disk at most: checkpoints with adapters and Adam's two moments in fp32, and the adapter.

    `kept` checkpoints, and one more: the oldest is deleted when the next is whole.
    """
    quiet()  # bitsandbytes speaks as soon as it is imported
    from helpers import budget

    try:
        adapters = 4 * budget.adapter_numbers(profile) / 2**30
    except (AttributeError, KeyError, ValueError):  # no mixture of experts: loading says so, in its own words
        return SPARE_GIB
    return (kept + 1) * 3 * adapters + adapters + SPARE_GIB


def missing_gib(profile: Profile) -> float | None:
    """How much of the base model is still to be fetched; None if that is not known."""
    if Path(profile.base_path).is_dir():
        return 0.0
    whole = DOWNLOAD_GIB.get(profile.base)
    there = _cached_bytes(profile.base) / 2**30
    missing = None if whole is None else max(0.0, whole - there)
    return 0.0 if missing is not None and missing < 0.05 * whole else missing  # the sizes are rounded


def _cached_bytes(repo_id: str) -> int:
    """What the Hub's cache has of a model, and of files that are still being fetched."""
    from huggingface_hub import CacheNotFound, scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        repos = scan_cache_dir(HF_HUB_CACHE).repos
    except CacheNotFound:  # nothing was ever fetched
        return 0
    whole = sum(repo.size_on_disk for repo in repos if repo.repo_type == "model" and repo.repo_id == repo_id)
    begun = Path(HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "blobs").glob("*.incomplete")
    return whole + sum(file.stat().st_size for file in begun)


def download_note(profile: Profile) -> str:
    """A line for before the base model is fetched: it may take an hour; "" if nothing is to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    missing = missing_gib(profile)
    if missing == 0 or HF_HUB_OFFLINE:
        return ""
    size = f"about {missing:.0f} GiB" if missing else "its weights, if they are not there yet"
    return f"fetching {profile.base} from the Hub: {size}, into {HF_HUB_CACHE} …"


def _disk_of(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def check_disk(profile: Profile, run_dir: Path | None = None, kept: int = profiles.KEPT_CHECKPOINTS) -> Check:
    """Room for the base model where the Hub keeps its cache (what is not there yet), and for a run where runs are kept.

    `run_dir`: of the run that is to be trained; what it has on the disk already it need not find once more. `kept`: checkpoints.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    cache, runs = _disk_of(Path(HF_HUB_CACHE)), _disk_of(run_dir or profiles.RUNS)
    download, room = missing_gib(profile) or 0.0, run_gib(profile, kept)
    if run_dir is not None and run_dir.is_dir():
        room = max(0.0, room - sum(p.stat().st_size for p in run_dir.rglob("*") if p.is_file()) / 2**30)
    one = cache.stat().st_dev == runs.stat().st_dev
    wanted = [(runs, room + download * one, "the run" + " and the base model" * (one and download > 0))]
    wanted += [(cache, download, "the base model")] * (not one and download > 0)
    found = [(place, shutil.disk_usage(place).free / 2**30, gib, what) for place, gib, what in wanted]
    detail = "; ".join(f"{free:.1f} GiB free in {place}, wanted {gib:.1f} for {what}" for place, free, gib, what in found)
    move = f"point the Hub's cache ({_shell('HF_HOME', '/path/to/larger/disk')}) or the runs (COURSE_RUNS, --output) to another"
    return Check("disk", all(free >= gib for _, free, gib, _ in found), detail, f"free some room, or {move}")


def check_quantisation() -> Check:
    """NF4 for real, on the device that the course will use: normal values come back with a mean error of about 0.07."""
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as in `quiet`
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - values).abs().mean().item()
    todo = "python -m bitsandbytes   (it says which library it misses)"
    return Check("4-bit", error < 0.1, f"NF4 round trip on {device}: mean error {error:.3f}, wanted <0.1", todo)


def check_tiny_base() -> Check:
    base = profiles.PROFILES["tiny"].base
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (ROOT / base / name).is_file()]
    detail = f"{', '.join(missing) or 'nothing'} missing in {base}"
    return Check("tiny base", not missing, detail, "python -m helpers.tiny   (builds it again)")


def doctor() -> list[Check]:
    """All checks, in the order in which one would repair things. A check that breaks is a failed check."""
    checks = [check_python()]
    try:
        checks += [check_package(wanted) for wanted in requirements()]
    except ImportError:  # without packaging nothing that we need is there
        return [*checks, Check("packages", False, "nothing of the course is installed in this Python", INSTALL)]

    def attempt(name: str, check: Callable[..., Check], *args) -> Check:
        try:
            return check(*args)
        except Exception as error:
            return Check(name, False, f"{type(error).__name__}: {error}".splitlines()[0], INSTALL)

    checks.append(attempt("profile", check_profile))
    # Without a usable profile, the rest is asked for the smallest one.
    profile = profiles.choose()[0] if checks[-1].ok else profiles.PROFILES["tiny"]
    checks.append(attempt("device", check_device, profile))
    checks.append(attempt("memory", check_memory, profile))
    checks.append(attempt("bf16", check_bf16, profile))
    checks.append(attempt("disk", check_disk, profile))
    checks.append(attempt("4-bit", check_quantisation))
    checks.append(attempt("tiny base", check_tiny_base))
    return checks


def report(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        lines.append(f"{'[OK]  ' if check.ok else '[FAIL]'} {check.name}: {check.detail}")
        if not check.ok:
            lines.append(f"       -> {check.todo}")
    failed = [check.name for check in checks if not check.ok]
    end = f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}" if failed else f"all {len(checks)} checks passed"
    return "\n".join([*lines, end])


def host_memory_gib() -> float | None:
    """The machine's memory, or its container's limit; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        import ctypes

        if not hasattr(ctypes, "windll"):
            return None
        kib = ctypes.c_ulonglong()
        if not ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kib)):
            return None
        total = kib.value * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(text) if text.isdigit() else total) / 2**30


def gpu_memory_gib() -> float | None:
    import torch

    return torch.cuda.mem_get_info()[1] / 2**30 if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """For result files: what the numbers were made with."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def hardware() -> dict[str, str | float | int | None]:
    """For result files: what the numbers were made on. `memory_gib` is the GPU's where there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else _cpu_name()
    memory = gpu_memory_gib() if cuda else host_memory_gib()
    return {"device": "cuda" if cuda else "cpu", "name": name, "memory_gib": memory and round(memory, 1), "cores": cores}


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def print_environment() -> None:
    """The first lines of each notebook: with what, on what, and which profile for what reason."""
    facts, (profile, why) = hardware(), profiles.choose()
    memory = f"{facts['memory_gib']} GiB" if facts["memory_gib"] else "memory unknown"
    print("versions:", ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"device: {facts['device']} ({facts['name']}), {memory}, {facts['cores']} cores")
    print(f"profile: {profile.name} ({why})")


def prepare_notebook() -> None:
    """Second half of every notebook's set-up cell: install what is missing, quieten, print what this runs on.

    Only packages that are not there at all are installed, so that torch, numpy and transformers are never replaced under a
    live kernel; a package that is there in a wrong version is reported with what to type.
    """
    import subprocess

    checks = [(wanted, check_package(wanted)) for wanted in requirements()]
    missing = [str(wanted) for wanted, check in checks if check.detail.startswith("not installed")]
    if missing:
        print("installing", ", ".join(missing))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    wrong = [check for _, check in checks if not check.ok and not check.detail.startswith("not installed")]
    for check in wrong:
        print(f"[FAIL] {check.name}: {check.detail}\n       -> {check.todo}")
    if wrong:
        print("Do this first, restart the kernel, and run this cell again: cells further down may fail otherwise.")

    use_colab_secret()
    quiet()
    print_environment()


def use_colab_secret() -> None:
    """On Colab, the secret HF_TOKEN (key icon at the left) for this process: it is neither printed nor written anywhere.

    Some base models are only given to people who accepted their terms. huggingface_hub reads the variable by itself.
    """
    try:
        from google.colab import userdata
    except ImportError:
        return
    if not os.environ.get("HF_TOKEN"):
        with contextlib.suppress(Exception):  # no such secret, no access to it, no answer: each has a class of its own
            os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")


def quiet() -> None:
    """No progress bars (they leave widget state in notebooks, which GitHub cannot show) and no third-party notices.

    On a terminal the Hub's bars stay: a download of 87 GiB must not look like a program that hangs.
    """
    import warnings

    import transformers
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils import enable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    if sys.stderr.isatty() and HF_HUB_DISABLE_PROGRESS_BARS is None:
        enable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends an optional package with each import
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")

"""What `packtrain doctor` looks at in the environment: Python, the code itself, installed packages."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from trainer.errors import PacktrainError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "slurm", "trainer")
SHOWN_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "submitit")
OPTIONAL = {
    "deepspeed": "strategies zero1 to zero3 and offloading need it",
    "vllm": "serve, and verify --vllm, need it",
    "wandb": "tracking.to: [wandb] needs it",
}
Status = Literal["ok", "warning", "failed", "not here"]


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found there, and what to do where that is not right.

    Attributes:
        status: "not here" is what a host may well lack, such as a GPU on a laptop.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def run_checks(checks: Iterable[Callable[[], list[Check]]]) -> list[Check]:
    """What they find; one that fails itself is told as failed, and the others go on."""
    found: list[Check] = []
    for check in checks:
        try:
            found += check()
        except Exception as error:
            name = getattr(check, "func", check).__name__.removeprefix("check_").replace("_", " ")
            text = str(error) if isinstance(error, PacktrainError) else f"{type(error).__name__}: {error}"
            found.append(Check(name, "failed", f"cannot be looked at: {text}"))
    return found


def check_python() -> list[Check]:
    """Its version and where it is."""
    needed = _metadata().get("python_requires", ">=3.11")
    version = sys.version.split()[0]
    status: Status = "ok" if SpecifierSet(needed).contains(version, prereleases=True) else "failed"
    fix = f"make the environment with a Python {needed}" if status == "failed" else ""
    return [Check("Python", status, f"{version}, {sys.executable}", fix)]


def check_code() -> list[Check]:
    """launch, slurm and trainer are of one checkout, or of one job's snapshot."""
    places = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places[package] = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
    foreign = [f"{package} from {place or 'nowhere'}" for package, place in places.items() if place != ROOT]
    fix = f"take the others off PYTHONPATH and out of this environment, or: pip install -e {ROOT}"
    checks = [Check("code", "failed" if foreign else "ok", "; ".join(foreign) or str(ROOT), fix if foreign else "")]
    here = Path.cwd().resolve()
    if here != ROOT and (hiding := [name for name in PACKAGES if (here / name).is_dir()]):
        found = f"the current folder has its own {', '.join(hiding)}, which torchrun -m trainer would take"
        checks.append(Check("folders here", "warning", found, "start runs from another folder"))
    return checks


def check_git() -> list[Check]:
    """Which commit the code is of."""
    commit = output_of(["git", "-C", str(ROOT), "log", "-1", "--format=%h of %cs"])
    top = output_of(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"])
    if commit is None or top is None or Path(top) != ROOT:  # a job's snapshot may lie inside another checkout
        return [Check("git", "not here", "the code is no git checkout: its version is not recorded")]
    edited = output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--", *PACKAGES]) or ""
    files = [line.split(maxsplit=1)[-1] for line in edited.splitlines()]
    if not files:
        return [Check("git", "ok", f"commit {commit}, nothing edited")]
    found = f"commit {commit}, {len(files)} file{'s' * (len(files) > 1)} edited: {', '.join(files[:3])}"
    more = " ..." if len(files) > 3 else ""
    return [Check("git", "warning", found + more, "commit them, so that a run can be traced to its code")]


def check_versions() -> list[Check]:
    """Installed packages against the ranges of setup.cfg."""
    checks, others = [], 0
    for requirement in _requirements():
        version = package_version(requirement.name)
        is_right = version is not None and requirement.specifier.contains(version, prereleases=True)
        if requirement.name in SHOWN_PACKAGES or not is_right:
            needed = "" if is_right else f", needed {requirement.specifier or 'in any version'}"
            found = f"{version or 'not installed'}{needed}"
            fix = "" if is_right else f"{sys.executable} -m pip install '{requirement}'"
            checks.append(Check(requirement.name, "ok" if is_right else "failed", found, fix))
        else:
            others += 1
    if others:
        checks.append(Check("other packages", "ok", f"{others} as setup.cfg wants them"))
    return checks


def check_optional() -> list[Check]:
    """Packages that only some recipes need."""
    ranges = {requirement.name: requirement for requirement in _requirements(extras=True)}
    checks = []
    for name, purpose in OPTIONAL.items():
        version, needed = package_version(name), ranges.get(name)
        if version is None:
            checks.append(Check(name, "not here", f"not installed: {purpose}"))
        elif needed and not needed.specifier.contains(version, prereleases=True):
            fix = f"{sys.executable} -m pip install '{name}{needed.specifier}'"
            checks.append(Check(name, "warning", f"{version}, needed {needed.specifier}: {purpose}", fix))
        else:
            checks.append(Check(name, "ok", version))
    return checks


def _metadata() -> dict[str, str]:
    """Options of the checkout's setup.cfg; of a snapshot, which has none, what was installed."""
    config = configparser.ConfigParser(inline_comment_prefixes=("#",))
    if config.read(ROOT / "setup.cfg"):
        extras = config["options.extras_require"]
        return {**config["options"], "extras": "\n".join(extras[name] for name in extras)}
    try:
        required = importlib.metadata.requires("packtrain") or []
        python = importlib.metadata.metadata("packtrain")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return {}
    plain = [line for line in required if "extra ==" not in line]
    extras_lines = [line.partition(";")[0] for line in required if "extra ==" in line]
    return {"python_requires": python, "install_requires": "\n".join(plain), "extras": "\n".join(extras_lines)}


def _requirements(extras: bool = False) -> list[Requirement]:
    found = []
    for line in _metadata().get("extras" if extras else "install_requires", "").splitlines():
        try:
            found += [Requirement(line.strip())] if line.strip() else []
        except InvalidRequirement:
            continue
    return found


def package_version(name: str) -> str | None:
    """Of what is installed; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def output_of(command: Sequence[str], with_error: bool = False) -> str | None:
    """What a command prints; None where it is missing, fails or hangs, or with `with_error` what it says then."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if result.returncode:
        return (result.stderr or result.stdout) if with_error else None
    return result.stdout.strip()

"""The layers: imports go one way, and reading a recipe or asking for help loads no torch."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from trainer.data.cache import RowWriter, write_packs
from trainer.data.packing import keep_apart
from trainer.data.types import TokenizedRow
from trainer.importing import importing

ROOT = Path(__file__).parents[2]
PACKAGES = ["launch", "slurm", "trainer"]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ["torch", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "deepspeed", "vllm", "wandb"]
NOT_BEFORE_THE_FIRST_STEP = ["matplotlib", "pandas", "datasets", "deepspeed"]
ROOMS = {"data", "model", "strategies", "checkpoint", "metrics", "watch"}
SHARED_BY_ROOMS = {"trainer.data.types", "trainer.checkpoint.layout"}  # types and paths
ONLY_IN = {
    "bitsandbytes": {"trainer/model/nf4.py", "trainer/optim.py", "trainer/export/as_trained.py"},
    "deepspeed": {"trainer/strategies/zero.py"},
    "flash_attn": {"trainer/model/flash4.py"},
    "vllm": {"trainer/vllm_engine.py"},
    "wandb": {"trainer/metrics/trackers.py"},
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


@cache
def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too; ``from a import b`` is a.b where b is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in submodules}
    return found


def own_imports() -> dict[str, set[str]]:
    return {module_name(path): {name for name in imports(path) if name.split(".")[0] in PACKAGES} for path in FILES}


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "trainer" and parts[1] in ROOMS else None


def test_packages_import_one_way() -> None:
    backward = [
        f"{module} imports {name}"
        for module, names in own_imports().items()
        for name in names
        if PACKAGES.index(name.split(".")[0]) < PACKAGES.index(module.split(".")[0])
    ]
    assert not backward


def test_rooms_share_types_only() -> None:
    below = ("config", "errors", "launchers", "preemption", "recipe", "recipe_schema")
    below += ("optim", "planner", "processes", "readings", "schedule", "storage", "streams", "caches", "units")
    allowed_outside = SHARED_BY_ROOMS | {f"trainer.{name}" for name in below}
    wrong = [
        f"{module} imports {name}"
        for module, names in own_imports().items()
        for name in names
        if room(module) and room(name) != room(module) and name not in allowed_outside
        if not name.startswith("trainer.planning.")  # no torch, and nothing of a room
    ]
    assert not wrong


def test_only_the_assembly_knows_the_loop_and_only_the_entries_know_the_assembly() -> None:
    importers = {
        target: {module for module, names in own_imports().items() if target in names}
        for target in ("trainer.loop", "trainer.run")
    }
    assert importers["trainer.loop"] == {"trainer.run"}
    assert importers["trainer.run"] == {"trainer.__main__", "launch.train"}


def test_config_imports_nothing_of_packtrain_but_its_rules() -> None:
    assert own_imports()["trainer.config"] == {"trainer.config_rules"}
    assert own_imports()["trainer.config_rules"] <= {"trainer.config"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_special_packages_are_imported_in_few_files(package: str) -> None:
    found = {str(path.relative_to(ROOT)) for path in FILES if package in {name.split(".")[0] for name in imports(path)}}
    assert found <= ONLY_IN[package]


def test_light_modules_load_no_torch() -> None:
    light = [module_name(path) for path in FILES if path.name == "__init__.py"]
    light += [
        "trainer.launchers",
        "trainer.launcher_settings",
        "trainer.config",
        "trainer.errors",
        "trainer.recipe",
        "trainer.checkpoint.layout",
        "trainer.data.types",
    ]
    light += [module_name(path) for path in FILES if path.parent.name in ("launch", "planning")]
    light += ["trainer.planner"]
    code = f"import sys, {', '.join(light)}\nprint([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_a_run_waits_for_no_library_that_its_first_step_does_not_need(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    with RowWriter(folder) as writer:
        writer.write([TokenizedRow("chats", 0, [1, 5, 2], [-100, 5, 2], False)], 0)
    write_packs(folder, keep_apart(1))
    code = f"""
import sys
import trainer.run
from pathlib import Path
from trainer.data.cache import ArrowPacks
print(ArrowPacks(Path({str(folder)!r}), ["chats"])[0])
print([name for name in {NOT_BEFORE_THE_FIRST_STEP} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[([1, 5, 2], [-100, 5, 2])]\n[]\n", result.stdout + result.stderr


def test_garbage_is_collected_again_after_imports() -> None:
    try:
        with pytest.raises(ModuleNotFoundError), importing():
            import no_such_library  # noqa: F401
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_wheel_holds_every_module_and_what_they_read(tmp_path: Path) -> None:
    """Built of a copy, as setuptools leaves a build folder behind."""
    files = [
        path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".sh", ".jinja")
    ]
    for path in [*files, *(ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"))]:
        copy = tmp_path / "copy" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    subprocess.run(command, cwd=tmp_path / "copy", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert {str(path.relative_to(ROOT)) for path in files} <= set(held.namelist())

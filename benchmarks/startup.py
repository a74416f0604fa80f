"""Time from `packtrain train` to its first step, by phase, and which packages' imports take it.

    python benchmarks/startup.py
    python benchmarks/startup.py --times 5 --model.path meta-llama/Llama-2-7b-hf --model.tokenizer FOLDER

A tiny model on the CPU unless dotted options, which go to the recipe, say otherwise. A phase ends when the run prints
its line, so each run is watched from outside; imports are timed by Python itself (PYTHONPROFILEIMPORTTIME), in a run of
its own, because that slows it down. Processor time stands beside the clock: where other work shares the cores it
is the figure to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shared import TEMPLATE, TINY, draw_documents, write_inputs

ROOT = Path(__file__).resolve().parent.parent
PACK_LENGTH = 256
# What a run prints at the end of each phase, in order.
PHASES = {
    "imports, data": r"^train: \d+ rows",
    "model built and loaded": r"^base in place after",
    "prepared, isolation checked": r"^packed documents do not see each other",
    "sizes, trackers": r"^micro-batch of ",
    "first step": r"^step 1/",
}
OF_PROCESSOR = "all, processor time"
IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$")
MOST_PACKAGES = 15


def main() -> None:
    """Prints a table of phases and one of imports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="runs, of which medians are shown")
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="packtrain-startup-") as folder:
        write_recipe(Path(folder))
        watch(Path(folder), overrides, {})  # fills the data cache and the page cache
        timed = [watch(Path(folder), overrides, {})[0] for _ in range(options.times)]
        alone = statistics.median(time_imports() for _ in range(options.times))
        _, profiled = watch(Path(folder), overrides, {"PYTHONPROFILEIMPORTTIME": "1"})
    print(f"| phase | seconds (median of {options.times}) |\n|---|---|")
    for phase in (*PHASES, "all", OF_PROCESSOR):
        print(f"| {phase} | {statistics.median(of[phase] for of in timed):.2f} |")
    print(f"| of which importing trainer.run | {alone:.2f} |")
    print("\n| imports of | modules | milliseconds |\n|---|---|---|")
    for package, milliseconds, modules in count_imports(profiled):
        print(f"| {package} | {modules} | {milliseconds:.0f} |")


def write_recipe(folder: Path) -> None:
    """One step of QLoRA on a tiny model."""
    write_inputs(folder, TINY, draw_documents(TINY, 4 * PACK_LENGTH, PACK_LENGTH))
    recipe = {
        "model": {"path": str(folder), "init": "random"},
        "quantization": {"type": "nf4"},
        "adapter": {"r": 4},
        "data": {
            "train": [{"path": str(folder / "documents.jsonl"), "format": "prompt_completion"}],
            "template": TEMPLATE,
            "pack_length": PACK_LENGTH,
        },
        "train": {"max_steps": 1, "global_batch": {"rows": 1}},
        "export": {"merge": False, "verify": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def watch(folder: Path, overrides: list[str], environment: dict[str, str]) -> tuple[dict[str, float], list[str]]:
    """One run, ended at its first step: seconds of each phase, and the lines that it printed.

    Raises:
        SystemExit: it ended before.
    """
    run_dir = tempfile.mkdtemp(dir=folder, prefix="run-")
    command = [
        sys.executable,
        "-P",
        "-m",
        "launch.cli",
        "train",
        str(folder / "recipe.yaml"),
        "--run-dir",
        run_dir,
        *overrides,
    ]
    environment = os.environ | environment | {"PYTHONPATH": str(ROOT), "PACKTRAIN_CACHE": str(folder / "cache")}
    started = last = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    waited, seconds, lines = list(PHASES), {}, []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if re.search(PHASES[waited[0]], line):
            now = time.perf_counter()
            seconds[waited.pop(0)], last = now - last, now
        if not waited:
            break
    used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]  # user, system
    process.kill()
    process.wait()
    process.stderr.close()
    if waited:
        sys.exit("".join(lines[-6:]) + f"no line of the phase {waited[0]!r} came")
    seconds |= {"all": last - started, OF_PROCESSOR: sum(map(int, used)) / os.sysconf("SC_CLK_TCK")}
    return seconds, lines


def time_imports() -> float:
    """Seconds that the libraries take in a process that does nothing else, as a run imports them."""
    code = "from trainer.importing import importing\nwith importing(): import trainer.run"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return time.perf_counter() - started


def count_imports(lines: list[str]) -> list[tuple[str, float, int]]:
    """Packages with the milliseconds that their own modules take and how many those are, the dearest first."""
    found = [match for match in map(IMPORT.match, lines) if match]
    modules, taken = Counter[str](), Counter[str]()
    for match in found:
        package = ".".join(match[2].split(".")[: 2 if match[2].startswith(("torch.", "transformers.", "peft.")) else 1])
        modules[package] += 1
        taken[package] += int(match[1])
    return [(package, taken[package] / 1000, modules[package]) for package, _ in taken.most_common(MOST_PACKAGES)]


if __name__ == "__main__":
    main()

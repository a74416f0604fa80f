"""Tokens a second, scaling, memory, load time and checkpoint stall of `packtrain train` on this host's GPUs.

    python benchmarks/scaling.py recipes/llama2-7b-qlora.yaml --gpus 1,2,4 --kinds ddp,fsdp2 --rows 4 \
        --model.init random --model.tokenizer FOLDER

Each cell is a whole `packtrain train` of a few steps with as many packs for every GPU (weak scaling). Two ratios go
with its rate: to as many times one GPU's of the same run, and to the hardware's peak (MFU). Dotted options go to the
recipe.
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
from pathlib import Path

WARM_UP = 3  # steps not counted


def main() -> None:
    """Prints a line of json for each cell, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--gpus", default="1", help="numbers of GPUs, by commas")
    parser.add_argument("--kinds", default="auto", help="strategy.kind values, by commas; one GPU takes single")
    parser.add_argument("--rows", type=int, default=4, help="packs a GPU and step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--log", type=Path, help="keep what the runs print in this folder")
    parser.add_argument("--limit", type=float, default=600, help="seconds a cell may take")
    parser.add_argument("--kill", action="store_true", help="end a cell after its last step, without saving anything")
    arguments, overrides = parser.parse_known_args()
    cells = []
    for gpus in map(int, arguments.gpus.split(",")):
        for kind in arguments.kinds.split(",") if gpus > 1 else ["single"]:
            cell = measure(arguments, gpus, kind, overrides)
            cells.append(cell)
            print(json.dumps(cell), flush=True)
    print_table(cells)


def measure(arguments: argparse.Namespace, gpus: int, kind: str, overrides: list[str]) -> dict:
    """Runs one cell; its figures, or what went wrong."""
    cell = {"recipe": arguments.recipe.stem, "gpus": gpus, "kind": kind}
    with tempfile.TemporaryDirectory(prefix="packtrain-bench-") as folder:
        command = [sys.executable, "-m", "launch.cli", "train", str(arguments.recipe), "--run-dir", f"{folder}/run"]
        num_steps = arguments.steps + 100 * arguments.kill
        command += ["--gpus", str(gpus), "--strategy.kind", kind, "--train.max_steps", str(num_steps)]
        command += ["--train.global_batch", json.dumps({"rows": arguments.rows * gpus}), "--export.merge", "false"]
        command += ["--eval.every_steps", "null", "--data.split.validation", "0.0", "--tracking.to", "[]"]
        every = "null" if arguments.kill else str(arguments.steps - 2)
        command += ["--checkpoint.every_steps", every, *overrides]
        started, metrics = time.perf_counter(), Path(folder, "run/metrics.jsonl")
        with open(Path(folder, "log"), "w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            while process.poll() is None:
                time.sleep(0.5)
                done = arguments.kill and len(steps_of(metrics)) >= arguments.steps
                if done or time.perf_counter() - started > arguments.limit:
                    process.kill()  # its workers go with it
                    process.wait()
                    time.sleep(5)
            log.seek(0)
            output, status = log.read(), 0 if arguments.kill else process.returncode
        cell["seconds"] = round(time.perf_counter() - started, 1)
        if arguments.log:
            arguments.log.mkdir(parents=True, exist_ok=True)
            name = "-".join([arguments.recipe.stem, kind, str(gpus), str(os.getpid())])
            (arguments.log / f"{name}.log").write_text(output)
        records, steps = read(metrics), steps_of(metrics)
    if len(steps) > WARM_UP:
        cell |= figures(steps[WARM_UP:], records, gpus)
    if loaded := re.search(r"base in place after ([\d.]+) s", output):
        cell["load_s"] = float(loaded[1])
    if status:
        cell |= {"status": status, "error": output.strip().splitlines()[-6:]}
    return cell


def read(metrics: Path) -> list[dict]:
    """Whole lines of a metrics.jsonl that may be growing."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line) for line in lines]


def steps_of(metrics: Path) -> list[dict]:
    """Its optimizer steps."""
    return [record for record in read(metrics) if record["kind"] == "step"]


def figures(steps: list[dict], records: list[dict], gpus: int) -> dict:
    """Medians over the counted steps."""
    rate = statistics.median(step["tokens_per_second"] for step in steps)
    stalls = [r["seconds"] for r in records if r["kind"] == "event" and r["event"] == "checkpoint"]
    sizes = [r["text"] for r in records if r["kind"] == "event" and r["event"] == "micro_batch"]
    mfu = [step["mfu"] for step in steps if step["mfu"]]
    return {
        "tokens_per_second_per_gpu": round(rate / gpus),
        "mfu": round(statistics.median(mfu), 3) if mfu else None,
        "peak_gib": round(max(step["gpu_memory_gib"] or 0 for step in steps), 1),
        "loss": round(steps[-1]["loss"], 4),
        "checkpoint_stall_s": [round(stall, 3) for stall in stalls],
        "sizes": sizes[-1] if sizes else None,
    }


def print_table(cells: list[dict]) -> None:
    """Markdown, with the rate over one GPU's where there is one."""
    rates = {cell["gpus"]: cell.get("tokens_per_second_per_gpu") for cell in cells}
    print("| GPUs | strategy | tok/s/GPU | of one GPU | MFU | peak GiB | load s | stall s |")
    print("|---|---|---|---|---|---|---|---|")
    for cell in cells:
        rate, alone = cell.get("tokens_per_second_per_gpu"), rates.get(1)
        share = f"{rate / alone:.1%}" if rate and alone else "-"
        shown = [cell["gpus"], cell["kind"], rate, share, cell.get("mfu"), cell.get("peak_gib")]
        print("| " + " | ".join(map(str, [*shown, cell.get("load_s"), cell.get("checkpoint_stall_s")])) + " |")


if __name__ == "__main__":
    main()

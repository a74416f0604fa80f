"""packtrain beside TRL and Unsloth: the same shape, documents and tokens a step, each in a process of its own.

    python benchmarks/speed.py --shape Llama-2-7b --setting qlora --results speed.jsonl
    python benchmarks/speed.py --shape tiny --device cpu --setting lora --only packtrain,trl
    python benchmarks/speed.py --table speed.jsonl

Weights are random: speed does not depend on them. Documents are random words of log-normal length (median 200 tokens,
60% of them trained), which each contender packs in its own way; counted are tokens of documents, over the steps after
warm-up. packtrain's side is `packtrain train` with its recipe for Llama-2-7B. Each cell adds a line to the results, of
which the newest counts; so cells can be run one by one. The table and a plot are written beside them.
Dotted options, such as --train.recompute full, go to packtrain's recipe, and become part of what the table says of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from contenders import HARDWARE, PACKTRAIN, PEERS, SETTINGS, Peer, Setting
from shared import TEMPLATE, draw_documents, read_documents, shape_of, write_inputs
from speed_table import write_table

from trainer.data.packing import pack_sequences

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SPARE_STEPS = 4  # of documents: packs of a step may hold a little less than they could
SECONDS_A_LOOK = 0.2
SHOW_VERSIONS = """
import importlib.metadata, json
found = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
names = ["torch", "transformers", "trl", "unsloth", "liger-kernel", "bitsandbytes", "flash-attn-4"]
print(json.dumps({name: found[name] for name in names if name in found}))
"""


def main() -> None:
    """Runs the cells asked for, then writes and prints the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE", help="run nothing: the table of these results")
    parser.add_argument("--shape", default="Llama-2-7b", help="of trainer/model/shapes.py, or tiny")
    parser.add_argument("--setting", default="qlora", help=f"by commas: {', '.join(SETTINGS)}")
    every = [HARDWARE, PACKTRAIN, *PEERS]
    parser.add_argument("--only", default=",".join(every), help=f"contenders by commas: {', '.join(every)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rows", type=int, default=4, help="packs a step")
    parser.add_argument("--pack-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8, help="steps that count")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before that do not")
    parser.add_argument("--limit", type=float, default=180, help="seconds a cell may take")
    parser.add_argument("--results", type=Path, default=Path("speed.jsonl"))
    parser.add_argument(
        "--work", type=Path, help="keep inputs, weights and logs there; default: the system's temporary"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peers, if not this one")
    options, overrides = parser.parse_known_args()
    if options.table is None:
        run_cells(options, overrides)
    print(write_table(options.table or options.results))


def run_cells(options: argparse.Namespace, overrides: list[str]) -> None:
    """Adds a line to the results for each cell."""
    options.work = (options.work or Path(tempfile.gettempdir(), "packtrain-speed")).resolve() / options.shape
    shape, num_steps = shape_of(options.shape), options.warm_up + options.steps + SPARE_STEPS
    documents = draw_documents(shape, num_steps * options.rows * options.pack_length, options.pack_length)
    write_inputs(options.work, shape, documents)
    ours, of_peers = (
        json.loads(subprocess.check_output([python, "-c", SHOW_VERSIONS], text=True))
        for python in (sys.executable, options.peer_python)
    )
    for name, contender in choose_cells(options.setting.split(","), options.only.split(",")):
        cell = {"shape": options.shape, "setting": name, "contender": contender, "device": options.device}
        cell |= {"rows": options.rows, "pack_length": options.pack_length}
        cell["versions"] = of_peers if contender in PEERS else ours
        cell |= run_cell(contender, SETTINGS[name], options, overrides, of_peers)
        with open(options.results, "a", encoding="utf-8") as results:
            results.write(json.dumps(cell) + "\n")
        print(json.dumps(cell), file=sys.stderr, flush=True)


def choose_cells(settings: list[str], contenders: list[str]) -> Iterator[tuple[str, str]]:
    """Settings with their contenders; the hardware once, in small memory none that keeps four packs' activations."""
    for at, (setting, contender) in enumerate(itertools.product(settings, contenders)):
        if contender == HARDWARE and at >= len(contenders):
            continue
        peer = PEERS.get(contender)
        if peer and SETTINGS[setting].budget_gib and not (peer.recompute or peer.accumulate):
            continue
        yield setting, contender


def run_cell(
    contender: str, setting: Setting, options: argparse.Namespace, overrides: list[str], versions: dict[str, str]
) -> dict[str, Any]:
    """The figures of one cell, or why there are none."""
    if contender == HARDWARE:
        return run_script(HERE / "hardware.py", hardware_job(options), options, sys.executable)
    if contender == PACKTRAIN:
        return summarise(run_packtrain(setting, options, overrides), options)
    peer = PEERS[contender]
    needed = [*peer.packages, *(["bitsandbytes"] if setting.method == "qlora" or options.device == "cuda" else [])]
    if missing := [package for package in needed if package not in versions]:
        return {"missing": missing}
    return summarise(run_script(HERE / "peers" / peer.script, peer_job(peer, setting, options), options), options)


def summarise(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the counted steps, and what the documents are like, on which the work of a token depends."""
    seconds, tokens = (cell.pop(name, [])[options.warm_up :] for name in ("step_seconds", "step_tokens"))
    if not seconds:
        return {"error": "no step after the warm-up", **cell}
    documents = read_documents(options.work)
    total = sum(len(document.ids) for document in documents)
    return {
        **cell,
        "tokens_per_second": statistics.median(t / s for t, s in zip(tokens, seconds, strict=True)),
        "step_seconds": statistics.median(seconds),
        "step_tokens": statistics.mean(tokens),
        "num_steps": len(seconds),
        "mean_attended": sum(len(one.ids) * (len(one.ids) + 1) / 2 for one in documents) / total,
        "trained_share": sum(len(one.ids) - one.num_prompt for one in documents) / total,
    }


# ------------------------------------------------------------------------------------------------------------ packtrain


def run_packtrain(setting: Setting, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """`packtrain train`, ended after the last step that counts, before it saves anything."""
    recipe, run_dir = options.work / "recipe.yaml", Path(tempfile.mkdtemp(dir=options.work, prefix="run-"))
    recipe.write_text(json.dumps(make_recipe(setting, options)))
    given = [f"--{name}={value}" for name, value in setting.overrides.items()]
    command = [sys.executable, "-m", "launch.cli", "train", str(recipe), "--run-dir", str(run_dir), "--gpus", "1"]
    metrics, wanted, first = run_dir / "metrics.jsonl", options.warm_up + options.steps, [0.0]

    def is_done(seconds: float) -> bool:
        steps = read_records(metrics, "step")
        first[0] = first[0] or (seconds if steps else 0.0)
        return len(steps) >= wanted

    cell, _ = run_process([*command, *given, *overrides], options, is_done)
    steps = read_records(metrics, "step")[:wanted]
    notes = [record["text"] for record in read_records(metrics, "event") if record["event"] == "micro_batch"]
    if steps:
        cell |= {"loss": steps[-1]["loss"], "peak_gib": steps[-1]["gpu_memory_gib"], "first_step_s": first[0]}
    shown = [f"recipes/llama2-7b-{setting.method}.yaml", *notes, *given, *overrides]
    seconds, tokens = ([step[name] for step in steps] for name in ("seconds", "tokens"))
    return {**cell, "step_seconds": seconds, "step_tokens": tokens, "settings": ", ".join(shown)}


def make_recipe(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """Llama-2-7B's recipe of the method, on the shape and the documents of all contenders, without evaluation."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"llama2-7b-{setting.method}.yaml").read_text())
    rows = {"path": str(options.work / "documents.jsonl"), "format": "prompt_completion"}
    data = {"train": [rows], "template": TEMPLATE, "pack_length": options.pack_length}
    recipe |= {"model": {"path": str(options.work), "init": "random"}, "data": data}
    recipe |= {"train": {"max_steps": 10**4, "global_batch": {"rows": options.rows}}}
    recipe |= {"eval": {}, "checkpoint": {}, "tracking": {"to": []}, "export": {"merge": False, "verify": False}}
    if options.device == "cpu":
        recipe["train"]["device"], recipe["optim"]["name"] = "cpu", "adamw"
    return recipe


def read_records(metrics: Path, kind: str) -> list[dict[str, Any]]:
    """Whole lines of a kind in a metrics.jsonl that may be growing."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


# --------------------------------------------------------------------------------------------------- peers and hardware


def peer_job(peer: Peer, setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What ``peers/common.py`` reads."""
    return {
        "work": str(options.work),
        "device": options.device,
        "method": setting.method,
        "weights": setting.weights,
        "liger": peer.liger,
        "recompute": peer.recompute,
        "rows": options.rows,
        "micro_batch": 1 if peer.accumulate else options.rows,
        "pack_length": options.pack_length,
        "steps": options.warm_up + options.steps,
    }


def hardware_job(options: argparse.Namespace) -> dict[str, Any]:
    """What ``hardware.py`` reads: the documents of a step, each pack filled up by one more."""
    lengths = [len(document.ids) for document in read_documents(options.work)]
    packs = pack_sequences(np.array(lengths), options.pack_length)
    drawn = random.Random(0).sample(range(len(packs)), options.rows)  # the first ones hold the longest documents
    step = [[lengths[row] for row in packs.rows[slice(*packs.offsets[at : at + 2])]] for at in drawn]
    filled = [length for pack in step for length in [*pack, options.pack_length - sum(pack)] if length]
    rows = [[1, options.rows * options.pack_length], [options.rows, options.pack_length], [1, options.pack_length]]
    return {"device": options.device, "shape": shape_of(options.shape), "lengths": filled, "rows": rows}


def run_script(script: Path, job: dict[str, Any], options: argparse.Namespace, python: str = "") -> dict[str, Any]:
    """Runs a script that prints a line RESULT and figures."""
    command = [python or options.peer_python, "-P", str(script), json.dumps(job)]
    cell, output = run_process(command, options)
    results = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    if not results:
        return cell
    return {"seconds": cell["seconds"], "recompute": job.get("recompute"), **json.loads(results[-1])}


# ------------------------------------------------------------------------------------------------------------ processes


def run_process(
    command: list[str], options: argparse.Namespace, is_done: Callable[[float], bool] = lambda seconds: False
) -> tuple[dict[str, Any], str]:
    """Runs a cell until it ends, has done enough or has used up its time; its log is kept in the work folder.

    Returns:
        seconds, and error where it ended by itself in failure or took too long; what it printed.
    """
    paths = [str(ROOT), str(HERE), str(HERE / "peers"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    environment["CUDA_VISIBLE_DEVICES"] = gpu if options.device == "cuda" else ""
    log, started, why = options.work / "log.txt", time.perf_counter(), ""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=options.work, start_new_session=True
        )
        try:
            while process.poll() is None and not (why or is_done(time.perf_counter() - started)):
                time.sleep(SECONDS_A_LOOK)
                why = f"not done after {options.limit:.0f} s" if time.perf_counter() - started > options.limit else ""
            if process.returncode:
                why = f"exit status {process.returncode}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    cell: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1)}
    return (cell | {"error": why, "output": text.strip().splitlines()[-12:]} if why else cell), text


if __name__ == "__main__":
    main()

"""Time and memory of `packtrain merge` beside plain copies of the same bytes and PEFT's `merge_and_unload`.

    python benchmarks/merge.py --shape meta-llama/Llama-2-7b-hf --tokenizer FOLDER --folder /disk/with/room
    python benchmarks/merge.py --shape meta-llama/Llama-2-70b-hf --layers 40 --tokenizer FOLDER --folder /disk \
        --out-folder /dev/shm --skip peft --nf4

Writes a model of a published shape with random weights and an adapter on all its linear modules, then has each tool
make its folder, in a process of its own, one after the other. Before each the base's files are taken out of the page
cache. A time ends when the bytes are on the disk. `copies` are several `cp` at once, a file each: the ceiling where one
`cp` is slower than the disk. Memory is what the process came to hold beyond its imports (and CUDA's context), in pages
of its own and in all, with the pinned part of it as torch counts it; `cp` holds none. Processor seconds tell what the
time would be on a machine that does nothing else. Needs room for the model twice, or once on each of the two folders.

`benchmarks/merge_stages.py` tells which stage of a merge limits it on a host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 16.0, "target_modules": "all-linear"}
TOOLS = ("copy", "copies", "packtrain", "peft")
MOST_COPIES = 8  # at once


def main() -> None:
    """Prints what is measured, a line of json for each tool, then a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="meta-llama/Llama-2-7b-hf", help="a shape of trainer/model/shapes.py")
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer that has a chat template")
    parser.add_argument("--layers", type=int, help="cut the shape to so many")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--nf4", action="store_true", help="packtrain merges onto the dequantised base, as after QLoRA")
    parser.add_argument("--folder", type=Path, help="for the base; on the disk to measure")
    parser.add_argument("--out-folder", type=Path, help="for what the tools write, if elsewhere, such as /dev/shm")
    parser.add_argument("--skip", default="", help=f"of {', '.join(TOOLS)}, by commas")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=TOOLS, help=argparse.SUPPRESS)  # the child's own
    arguments = parser.parse_args()
    if arguments.only:
        measure_here(arguments.only, arguments.folder, arguments.out_folder)
        return
    with (
        tempfile.TemporaryDirectory(prefix="packtrain-bench-", dir=arguments.folder) as source,
        tempfile.TemporaryDirectory(prefix="packtrain-bench-", dir=arguments.out_folder or arguments.folder) as place,
    ):
        largest = write_model(Path(source), arguments)
        name = describe(Path(source), Path(place), arguments)
        print(name, flush=True)
        tools = [tool for tool in TOOLS if tool not in arguments.skip.split(",")]
        records = [measure(tool, Path(source), Path(place)) for _ in range(arguments.repeat) for tool in tools]
    print_table(name, records, largest)


def write_model(folder: Path, arguments: argparse.Namespace) -> int:
    """``base/`` and ``run/``, with the adapter; size of the base's largest file, in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from trainer.checkpoint.layout import RunDir
    from trainer.config import RunConfig
    from trainer.export.consolidate import write_model as write_tensors
    from trainer.model.shapes import published_shape
    from trainer.recipe import dump_recipe

    shape = published_shape(arguments.shape)
    if shape is None:
        sys.exit(f"no shape {arguments.shape}")
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    base, run = folder / "base", RunDir(folder / "run")
    base.mkdir()
    run.adapter.mkdir(parents=True)
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in sorted(model.named_parameters())}
    block, largest = torch.randn(2**20).mul_(0.02).bfloat16(), max(shape.numel() for shape in shapes.values())
    numbers = block.repeat(-(-largest // block.numel()))  # the same ones in every tensor: the disk is what takes time
    write_tensors(base, shapes, torch.bfloat16, lambda name: numbers[: shapes[name].numel()].view(shapes[name]))
    pairs: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
            pairs[prefix + "A.weight"] = 0.02 * torch.randn(arguments.rank, shape[1])
            pairs[prefix + "B.weight"] = 0.02 * torch.randn(shape[0], arguments.rank)
    save_file(pairs, run.adapter / "adapter_model.safetensors")
    own = ADAPTER | {"r": arguments.rank, "base_model_name_or_path": str(base)}
    (run.adapter / "adapter_config.json").write_text(json.dumps(own))
    recipe = {
        "model": {"path": str(base)},
        "adapter": {"r": arguments.rank, "alpha": ADAPTER["lora_alpha"]},
        "data": {"train": [{"path": "none.jsonl", "format": "messages"}]},
        **({"quantization": {"type": "nf4"}} if arguments.nf4 else {}),
    }
    run.recipe.write_text(dump_recipe(RunConfig.model_validate(recipe)))
    run.write_state("done", 1)
    return max(file.stat().st_size for file in base.glob("*.safetensors"))


def describe(source: Path, place: Path, arguments: argparse.Namespace) -> str:
    """What is measured, in words."""
    config = json.loads((source / "base" / "config.json").read_text())
    sizes = [file.stat().st_size for file in (source / "base").glob("*.safetensors")]
    from trainer.model.shapes import published_shape

    layers, whole = config["num_hidden_layers"], (published_shape(arguments.shape) or {})["num_hidden_layers"]
    cut = f"{layers} of {whole} layers" if layers != whole else f"{layers} layers"
    return (
        f"{arguments.shape}, {cut}: {sum(sizes) / 2**30:.1f} GiB in {len(sizes)} files, "
        f"{'onto the NF4 base, dequantised' if arguments.nf4 else '16-bit base'}, r {arguments.rank}; "
        f"from {source.parent} to {place.parent}, {len(os.sched_getaffinity(0))} cores"
    )


def measure(tool: str, source: Path, place: Path) -> dict[str, Any]:
    """Has a process of its own make ``out/``, which is removed again."""
    _forget(source / "base")
    child = [sys.executable, __file__, "--tokenizer", "-", "--folder", str(source), "--out-folder", str(place)]
    printed = subprocess.run([*child, "--only", tool], check=True, stdout=subprocess.PIPE, text=True).stdout
    record = json.loads(printed.splitlines()[-1]) | {"tool": tool}
    record["gib"] = sum(file.stat().st_size for file in (place / "out").glob("*.safetensors")) / 2**30
    shutil.rmtree(place / "out")
    print(json.dumps(record), flush=True)
    return record


def measure_here(tool: str, source: Path, place: Path) -> None:
    """Runs one tool and prints seconds and GiB; imports and CUDA's start count for neither."""
    # For the copies too: a virtual machine hands freed memory back to its host within seconds and then is slow to touch
    # it again, so that whoever began at once would win.
    import peft
    import torch
    import transformers

    from trainer.export.merge import merge_adapter

    if torch.cuda.is_available() and not tool.startswith("cop"):
        torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda")).cpu()
    base, out = source / "base", place / "out"
    peak = Peak()
    started, cpu_before = time.perf_counter(), _cpu_seconds()
    if tool == "copy":
        subprocess.run(["cp", "--reflink=never", "-r", str(base), str(out)], check=True)
    elif tool == "copies":
        out.mkdir()
        with ThreadPoolExecutor(MOST_COPIES) as pool:
            copy = ["cp", "--reflink=never", "-t", str(out)]
            list(pool.map(lambda file: subprocess.run([*copy, str(file)], check=True), sorted(base.iterdir())))
    elif tool == "packtrain":
        merge_adapter(source / "run", out)
    else:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        model = peft.PeftModel.from_pretrained(model, str(source / "run" / "adapter")).merge_and_unload()
        model.save_pretrained(out)
    for file in out.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - started
    cpu_seconds = _cpu_seconds() - cpu_before
    own, whole = peak.stop()
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "own_gib": own, "rss_gib": whole}
    print(json.dumps({name: round(value, 3) for name, value in (figures | {"pinned_gib": _pinned(tool)}).items()}))


def _cpu_seconds() -> float:
    """Of this process and those it waited for, on all processors."""
    return sum(os.times()[:4])


def _pinned(tool: str) -> float:
    """GiB of host memory that torch pinned for a GPU's copies, at most; whether RSS holds it is up to the driver."""
    import torch

    if torch.cuda.is_available() and not tool.startswith("cop"):
        return torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30
    return 0.0


class Peak:
    """The most memory this process holds from now on: pages of its own, and all with those of mapped files."""

    def __init__(self) -> None:
        self._before, self._peak, self._done = _memory(), _memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> tuple[float, float]:
        """GiB above what it held when this began."""
        self._done.set()
        self._thread.join()
        own, whole = (peak - before for peak, before in zip(self._peak, self._before, strict=True))
        return own, whole

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = tuple(max(pair) for pair in zip(self._peak, _memory(), strict=True))


def _memory() -> tuple[float, ...]:
    status = Path("/proc/self/status").read_text()
    return tuple(int(status.split(f"{field}:")[1].split()[0]) / 2**20 for field in ("RssAnon", "VmRSS"))


def _forget(folder: Path) -> None:
    """Takes the files of `folder` out of the page cache."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(name: str, records: list[dict[str, Any]], largest: int) -> None:
    """A line a tool, its best time; bandwidth as a share of the copies', memory in largest files."""
    best = {r["tool"]: r for r in sorted(records, key=lambda r: -r["seconds"])}
    file_gib = largest / 2**30
    heads = (
        "",
        "seconds",
        "cpu s",
        "GiB/s",
        "of copy",
        "of copies",
        "own GiB",
        "of file",
        "all GiB",
        "of file",
        "pinned",
    )
    print(f"\n{name}\nlargest file {file_gib:.2f} GiB")
    print(" ".join(f"{head:>9}" for head in heads))
    rates = {tool: record["gib"] / record["seconds"] for tool, record in best.items()}
    for tool in TOOLS:
        if (r := best.get(tool)) is None:
            continue
        shares = [rates[tool] / rates[copy] if copy in rates else float("nan") for copy in ("copy", "copies")]
        figures = (r["seconds"], r["cpu_seconds"], rates[tool], *shares)
        figures += (r["own_gib"], r["own_gib"] / file_gib, r["rss_gib"], r["rss_gib"] / file_gib, r["pinned_gib"])
        print(f"{tool:>9} " + " ".join(f"{figure:9.2f}" for figure in figures))


if __name__ == "__main__":
    main()

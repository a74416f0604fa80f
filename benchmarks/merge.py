"""Time and memory of `packtrain merge` beside a plain copy of the same bytes and PEFT's `merge_and_unload`.

    python benchmarks/merge.py --shape meta-llama/Llama-2-7b-hf --tokenizer FOLDER --layers 8 --folder /disk/with/room
    python benchmarks/merge.py --shape meta-llama/Llama-2-70b-hf --tokenizer FOLDER --folder /disk --skip peft

Writes a model of a published shape with random weights and an adapter on all its linear modules, then has each tool
make its folder, in a process of its own and on the same disk, one after the other. Before each the base's files are
taken out of the page cache. A time ends when the bytes are on the disk. Memory is what the process came to hold
beyond its imports, in pages of its own and in all; `cp` holds none. Processor seconds tell what the time would be on a
machine that does nothing else. Needs room for the model twice.
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
from pathlib import Path
from typing import Any

ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_alpha": 16.0, "target_modules": "all-linear"}
TOOLS = ("copy", "packtrain", "peft")


def main() -> None:
    """Prints a line of json for each tool, then a table with ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="meta-llama/Llama-2-7b-hf", help="a shape of trainer/model/shapes.py")
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer that has a chat template")
    parser.add_argument("--layers", type=int, help="cut the shape to so many")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--skip", default="", help=f"of {', '.join(TOOLS)}, by commas")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--only", choices=TOOLS, help=argparse.SUPPRESS)  # the child's own
    arguments = parser.parse_args()
    if arguments.only:
        measure_here(arguments.only, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="packtrain-bench-", dir=arguments.folder) as place:
        folder = Path(place)
        largest = write_model(folder, arguments)
        tools = [tool for tool in TOOLS if tool not in arguments.skip.split(",")]
        records = [measure(tool, folder) for _ in range(arguments.repeat) for tool in tools]
    print_table(records, largest)


def write_model(folder: Path, arguments: argparse.Namespace) -> int:
    """``base/`` and ``adapter/``; size of the base's largest file, in bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from trainer.export.consolidate import write_model as write_tensors
    from trainer.model.shapes import published_shape

    shape = published_shape(arguments.shape)
    if shape is None:
        sys.exit(f"no shape {arguments.shape}")
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config.save_pretrained(base)
    AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in sorted(model.named_parameters())}
    block = torch.randn(2**20).mul_(0.02).bfloat16()
    write_tensors(base, shapes, torch.bfloat16, lambda name: _repeat(block, shapes[name]))
    pairs: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            prefix = f"base_model.model.{name.removesuffix('weight')}lora_"
            pairs[prefix + "A.weight"] = 0.02 * torch.randn(arguments.rank, shape[1])
            pairs[prefix + "B.weight"] = 0.02 * torch.randn(shape[0], arguments.rank)
    from safetensors.torch import save_file

    save_file(pairs, adapter / "adapter_model.safetensors")
    own = ADAPTER | {"r": arguments.rank, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(own))
    return max(file.stat().st_size for file in base.glob("*.safetensors"))


def _repeat(block: Any, shape: Any) -> Any:
    """A tensor of `shape` whose numbers come again and again."""
    num = shape.numel()
    return block.repeat(-(-num // block.numel()))[:num].view(shape)


def measure(tool: str, folder: Path) -> dict[str, Any]:
    """Has a process of its own make ``out/``, which is removed again."""
    _forget(folder / "base")
    child = [sys.executable, __file__, "--tokenizer", "-", "--folder", str(folder), "--only", tool]
    printed = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
    record = json.loads(printed.splitlines()[-1]) | {"tool": tool}
    record["gib"] = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors")) / 2**30
    shutil.rmtree(folder / "out")
    print(json.dumps(record), flush=True)
    return record


def measure_here(tool: str, folder: Path) -> None:
    """Runs one tool and prints seconds and GiB; imports count for neither."""
    if tool != "copy":
        import peft
        import transformers

        from trainer.export.merge import merge_adapter
    peak = Peak()
    started, cpu_before = time.perf_counter(), _cpu_seconds()
    if tool == "copy":
        subprocess.run(["cp", "--reflink=never", "-r", str(folder / "base"), str(folder / "out")], check=True)
    elif tool == "packtrain":
        merge_adapter(folder / "adapter", folder / "out")
    else:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        model = peft.PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload()
        model.save_pretrained(folder / "out")
    for file in (folder / "out").iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.perf_counter() - started
    cpu_seconds = _cpu_seconds() - cpu_before
    own, whole = peak.stop()
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "own_gib": own, "rss_gib": whole}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def _cpu_seconds() -> float:
    """Of this process and those it waited for, on all processors."""
    return sum(os.times()[:4])


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
        while not self._done.wait(0.005):
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


def print_table(records: list[dict[str, Any]], largest: int) -> None:
    """A line a tool, its best time; bandwidth as a share of the copy's, memory in largest files."""
    best = {r["tool"]: r for r in sorted(records, key=lambda r: -r["seconds"])}
    file_gib = largest / 2**30
    heads = ("", "seconds", "cpu s", "GiB/s", "of cp's", "own GiB", "of file", "all GiB", "of file")
    print(f"\nlargest file {file_gib:.2f} GiB")
    print(" ".join(f"{head:>9}" for head in heads))
    rates = {tool: record["gib"] / record["seconds"] for tool, record in best.items()}
    for tool in TOOLS:
        if (r := best.get(tool)) is None:
            continue
        share = rates[tool] / rates["copy"] if "copy" in rates else float("nan")
        figures = (r["seconds"], r["cpu_seconds"], rates[tool], share)
        figures += (r["own_gib"], r["own_gib"] / file_gib, r["rss_gib"], r["rss_gib"] / file_gib)
        print(f"{tool:>9} " + " ".join(f"{figure:9.2f}" for figure in figures))


if __name__ == "__main__":
    main()

"""Loading by several processes: the same bytes as by one, every file read once, and one error for all."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from distributed.pool import Pools
from trainer.config import RunConfig
from trainer.errors import PacktrainError, UserError
from trainer.launchers import World
from trainer.model.build import build_model
from trainer.model.host import Host
from trainer.model.load import load_weights
from trainer.model.nf4 import FourBit
from trainer.model.quantized import QuantizedLinear, fingerprint
from trainer.model.weights import build_on_meta
from trainer.processes import Processes

CPU = torch.device("cpu")
QLORA: dict[str, Any] = {"adapter": {"r": 4}, "quantization": {"type": "nf4", "double_quant": True}}
CASES: dict[str, dict[str, Any]] = {
    "full, float32 masters": {"model": {"dtype": "bfloat16"}},
    "tied": {"model": {"dtype": "bfloat16"}},
    "LoRA": {"model": {"dtype": "bfloat16"}, "adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}},
    "QLoRA": {"model": {"dtype": "bfloat16"}, **QLORA},
    "QDoRA": {**QLORA, "adapter": {"r": 4, "dora": True, "modules_to_save": ["lm_head"]}},
    "QLoRA on a random base": {"model": {"init": "random"}, **QLORA},
}
Recipe = Callable[..., RunConfig]


def digest(tensor: torch.Tensor) -> str:
    return blake3(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def load_digests(processes: Processes, config: RunConfig) -> dict[str, Any]:
    """Hashes of all that is placed, in that order, with what else loading says."""
    built = build_model(config, processes.device)
    names = {module: name for name, module in built.model.named_modules()}
    placed: list[tuple[str, str]] = []

    def place(owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        placed.append((f"{names[owner]}.{leaf}", digest(whole)))

    identity = load_weights(built, config, place, processes, mark=lambda activity: None)
    first = {name: digest(tensor) for name, tensor in built.adapter_init.items()}
    return {"placed": placed, "identity": identity, "adapter_init": first}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_same_bytes_on_any_number_of_processes(
    pool: Pools, world_size: int, case: str, toy_recipe: Recipe, toy_model_dir: Path, toy_tied_model_dir: Path
) -> None:
    folder = toy_tied_model_dir if case == "tied" else toy_model_dir
    sections = CASES[case]
    config = toy_recipe(**{**sections, "model": {"path": str(folder), **sections.get("model", {})}})
    alone = load_digests(Processes(World(), CPU), config)

    found = pool(world_size).run(load_digests, config)

    assert found == [alone] * world_size
    assert len(alone["placed"]) > 10


# ----------------------------------------------------------------------------------------------------- reads and memory


def write_base(folder: Path) -> int:
    """A base of bfloat16 zeros in three sparse files; bytes of the files."""
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 30, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=4096, architectures=["LlamaForCausalLM"], **shape)
    config.save_pretrained(folder)
    parameters = list(build_on_meta(config, torch.bfloat16, "eager").named_parameters())
    weight_map: dict[str, str] = {}
    for part in range(3):
        file, header, end = f"model-{part}.safetensors", {}, 0
        for name, parameter in parameters[part::3]:
            begin, end = end, end + 2 * parameter.numel()
            header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def anonymous_bytes() -> int:
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar:")[2].split()[0])


def load_and_measure(processes: Processes, warm_up: RunConfig, config: RunConfig) -> tuple[int, int]:
    """Bytes this process read while loading, and by how many its own memory grew; nothing that is placed is kept."""

    def load(config: RunConfig) -> None:
        built = build_model(config, processes.device)
        load_weights(built, config, lambda owner, leaf, whole: None, processes, mark=lambda activity: None)

    load(warm_up)  # imports, and what a first load allocates for good
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher, already_read = threading.Thread(target=watch), read_bytes()
    load(config)
    num_read = read_bytes() - already_read
    watcher.start()
    load(config)
    done.set()
    watcher.join()
    return num_read, peak - before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_byte_is_read_once_and_little_is_held(
    pool: Pools, world_size: int, toy_recipe: Recipe, tmp_path: Path
) -> None:
    size = write_base(tmp_path)
    config = toy_recipe(model={"path": str(tmp_path), "dtype": "bfloat16"}, adapter={"r": 1})

    measured = pool(world_size).run(load_and_measure, toy_recipe(), config)

    assert size <= sum(num_read for num_read, _ in measured) < 1.05 * size
    assert min(num_read for num_read, _ in measured) > 0.9 * size / world_size
    assert max(grown for _, grown in measured) < 0.4 * size  # most of it is what malloc keeps of freed small tensors


# ------------------------------------------------------------------------------------------------------------- failures


def load_error(processes: Processes, config: RunConfig) -> tuple[str, str]:
    try:
        load_digests(processes, config)
    except PacktrainError as error:
        return type(error).__name__, str(error)
    return "", ""


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


LATE, EARLY = "model.norm.weight", "model.layers.0.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated"),
    "NaN early": (lambda folder: edit(folder, lambda t: t[EARLY].fill_(torch.nan)), f"{EARLY} holds NaN"),
    "NaN late": (lambda folder: edit(folder, lambda t: t[LATE].fill_(torch.nan)), f"{LATE} holds NaN"),
    "missing": (lambda folder: edit(folder, lambda t: t.pop(LATE)), f"no tensor {LATE}"),
    "shape": (lambda folder: edit(folder, lambda t: t.update({LATE: torch.ones(7)})), r"shape \[7\]"),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_all_raise_the_error_of_the_one_who_reads(
    pool: Pools, world_size: int, damage: str, toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_model_dir, tmp_path / "model"))
    spoil, message = DAMAGES[damage]
    spoil(folder)
    config = toy_recipe(model={"path": str(folder)}, **QLORA)
    with pytest.raises(UserError, match=message) as alone:
        load_digests(Processes(World(), CPU), config)

    found = pool(world_size).run(load_error, config, timeout=60.0)

    assert found == [("UserError", str(alone.value))] * world_size


def error_of_truncation_while_loading(processes: Processes, config: RunConfig, file: Path) -> tuple[str, str]:
    built = build_model(config, processes.device)

    def place(owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        if processes.rank == 0:
            with file.open("r+b") as stream:
                stream.truncate(5000)

    try:
        load_weights(built, config, place, processes, mark=lambda activity: None)
    except UserError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("world_size", [2])
def test_a_file_that_shrinks_while_it_is_read(
    pool: Pools, world_size: int, toy_recipe: Recipe, toy_model_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_model_dir, tmp_path / "model"))
    config, file = toy_recipe(model={"path": str(folder)}), folder / "model.safetensors"

    found = pool(world_size).run(error_of_truncation_while_loading, config, file, timeout=60.0)

    assert len(set(found)) == 1
    assert found[0][0] == "UserError"
    assert "it ends within tensor" in found[0][1]


def share_a_failure(processes: Processes, source: int) -> tuple[str, str, int]:
    host = Host(processes)

    def fail() -> int:
        raise ValueError("spoilt")

    try:
        host.share(source, fail)
    except Exception as error:
        return type(error).__name__, str(error), host.share(source, lambda: processes.rank)
    return "", "", -1


@pytest.mark.parametrize("world_size", [3])
def test_an_unforeseen_failure_is_told_with_its_rank(pool: Pools, world_size: int) -> None:
    found = pool(world_size).run(share_a_failure, 1)

    assert found[1] == ("ValueError", "spoilt", 1)  # the error itself, and the processes still agree after it
    assert found[0] == found[2] == ("PacktrainError", "rank 1: ValueError: spoilt", 1)


# ---------------------------------------------------------------------------------------------------------- fingerprint


def build_layers() -> nn.ModuleList:
    layers = nn.ModuleList(QuantizedLinear(64, out, False, FourBit("nf4", True), torch.float32) for out in (2, 32))
    for layer in layers:
        assert isinstance(layer, QuantizedLinear)
        layer.set_weight(torch.randn(layer.out_features, 64, generator=torch.Generator().manual_seed(0)))
    return layers


def fingerprint_of_parts(processes: Processes) -> str:
    """Of 4-bit layers of whose bytes each process has a part, some perhaps none."""

    def own(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().view(-1)[processes.rank :: processes.world_size].contiguous()

    return fingerprint(build_layers(), dist.group.WORLD, own)


@pytest.mark.parametrize("world_size", [2, 3])
def test_fingerprint_of_parts_is_that_of_the_whole(pool: Pools, world_size: int) -> None:
    assert set(pool(world_size).run(fingerprint_of_parts)) == {fingerprint(build_layers())}

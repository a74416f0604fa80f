"""The bytes that a matmul sees are the ones that were placed, whatever a strategy did with them in between."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from distributed.pool import Pools
from distributed.runs import build, make_packs
from trainer.checkpoint.layout import RunDir
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import collate
from trainer.model.format import Format
from trainer.model.int8 import Int8
from trainer.model.nf4 import FourBit
from trainer.model.quantized import Fingerprint, QuantizedLinear
from trainer.processes import Processes
from trainer.strategies.base import Strategy

PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)  # every two bytes there are


class Dequantized(TorchDispatchMode):
    """Notes what dequantising is given and returns while this is on: bytes, scales of blocks or rows, and weight."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_int8 = func is torch.ops.aten.mul.out and args[0].dtype == torch.int8
        if is_int8 or func is torch.ops.bitsandbytes.dequantize_4bit.default:
            self.calls.append(digest(args[0], args[1], result))
        return result


def digest(*tensors: torch.Tensor) -> str:
    """Of the tensors' bytes as they lie in memory."""
    hasher = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        # A copy: storage that numpy has seen cannot be freed, as FSDP2 does with what it gathered.
        hasher.update(tensor.detach().clone().cpu().view(-1).view(torch.uint8).numpy())
    return hasher.hexdigest()


class Placed:
    """Gives every quantised layer bytes out of an endless row of all patterns, and knows what they have to look like.

    Args:
        scales: with ``"patterns"`` their bytes run through all patterns too, NaN and Inf among them.

    Attributes:
        calls: what dequantising exactly these bytes gives, by layer.
        pairs: patterns that were placed, in bytes and in scales.
    """

    def __init__(self, scales: str) -> None:
        self.scales, self.pristine, self.fingerprint = scales, Dequantized(), Fingerprint()
        self.placed: dict[int, dict[str, torch.Tensor]] = {}
        self.pairs: dict[str, set[int]] = {"packed": set(), "scales": set()}
        self._next = {"packed": 0, "scales": 0}

    def __call__(self, strategy: Strategy, owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        if isinstance(owner, QuantizedLinear) and leaf in self._next:
            if leaf == "packed" or self.scales == "patterns":
                whole = self._cut(leaf, whole)
            self._note(owner, leaf, whole, strategy.processes.device)
        strategy.place(owner, leaf, whole)

    def _cut(self, leaf: str, whole: torch.Tensor) -> torch.Tensor:
        indices = torch.arange(self._next[leaf], self._next[leaf] + whole.numel()) % len(PATTERNS)
        self._next[leaf] += whole.numel()
        return PATTERNS[indices].view(whole.shape)

    def _note(self, owner: QuantizedLinear, leaf: str, whole: torch.Tensor, device: torch.device) -> None:
        self.fingerprint.add(whole)
        self.pairs[leaf] |= set(whole.reshape(-1).view(torch.uint16).to(torch.int32).tolist())
        both = self.placed.setdefault(id(owner), {})
        both[leaf] = whole.to(device)
        if len(both) == 2:
            with self.pristine:
                owner.format.dequantize(both["packed"], both["scales"], owner.compute_dtype)


def train_on_patterns(processes: Processes, config: RunConfig, scales: str, folder: Path) -> dict[str, Any]:
    """Where bytes differed from what was placed, after every stage of a run and of its resumption."""
    placed = Placed(scales)
    strategy = build(processes, config, placed)
    wanted, fingerprint, wrong = set(placed.pristine.calls), placed.fingerprint.text(), []
    batch = collate(make_packs(1, seed=processes.rank))

    def look(stage: str) -> None:
        strategy.module.train()
        with Dequantized() as seen:
            strategy.forward_backward([batch], 10)
        strategy.discard_gradients()
        if set(seen.calls) != wanted or len(seen.calls) <= len(wanted):  # forward, and backward once more
            wrong.append(f"{stage}: {len(set(seen.calls) - wanted)} of {len(wanted)} layers differ")
        if strategy.fingerprint() != fingerprint:
            wrong.append(f"{stage}: the fingerprint differs")

    look("prepare")
    strategy.forward_backward([batch, batch], 10)
    strategy.step(1e-3, 1.0)
    look("step")
    checkpoints = CheckpointManager(RunDir(folder), config.checkpoint, {}, processes, lambda step, saved: None)
    checkpoints.save(1, strategy.state_dict(), {}, False)
    checkpoints.wait()
    look("save")
    strategy = build(processes, config, Placed(scales))
    strategy.allocate_optimizer()
    strategy.restore(checkpoints.open(1))
    checkpoints.close()
    look("resume")
    with strategy.whole_weights():
        pass
    look("gathering it all")
    return {"wrong": wrong, "layers": len(wanted), "pairs": {leaf: len(found) for leaf, found in placed.pairs.items()}}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configs of Llamas whose 4-bit bytes (narrow), and whose scales too (wide), are more than all patterns take."""
    folders = {}
    for name, width in {"narrow": 192, "wide": 2816}.items():
        config = LlamaConfig(
            vocab_size=300, hidden_size=128, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4
        )
        config.architectures = ["LlamaForCausalLM"]
        folders[name] = str(tmp_path_factory.mktemp(name))
        config.save_pretrained(folders[name])
    return folders


STRATEGIES = {
    "single": (1, "single"),
    "ddp": (2, "ddp"),
    "fsdp2": (2, "fsdp2"),
    "fsdp2 of three": (3, "fsdp2"),
    "zero1": (2, "zero1"),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
    "zero3 of three": (3, "zero3"),
}
# What the scales are, and the dtype that the engines gather and compute in.
CASES = [
    ("double quantised", "float32"),
    ("valid", "bfloat16"),
    ("patterns", "bfloat16"),
    ("patterns", "float16"),
    ("of rows", "bfloat16"),
]
CELLS = [
    pytest.param(*strategy, *case, id="-".join((name, *case)))
    for name, strategy in STRATEGIES.items()
    for case in CASES
    if ("zero" not in name or "float16" not in case) and ("three" not in name or case == CASES[2])
    if "of rows" not in case or name in ("single", "fsdp2", "zero3")
]


@pytest.mark.parametrize(("world_size", "kind", "scales", "dtype"), CELLS)
def test_bytes_stay_as_they_were_placed(
    world_size: int,
    kind: str,
    scales: str,
    dtype: str,
    pool: Pools,
    toy_recipe: Any,
    model_dirs: dict[str, str],
    tmp_path: Path,
) -> None:
    config = toy_recipe(
        model={"path": model_dirs["wide" if scales == "patterns" else "narrow"], "init": "random", "dtype": dtype},
        adapter={"r": 2},
        quantization={"type": "int8" if scales == "of rows" else "nf4", "double_quant": scales == "double quantised"},
        strategy={"kind": kind},
    )
    for found in pool(world_size).run(train_on_patterns, config, scales, tmp_path):
        assert found["wrong"] == []
        assert found["layers"] == 14
        assert found["pairs"]["packed"] == 2**16
        assert scales != "patterns" or found["pairs"]["scales"] == 2**16


def train_compiled(processes: Processes, config: RunConfig) -> tuple[float, float, bool, bool]:
    """The loss before and after compiling, and whether matmuls and fingerprint saw the same bytes after it."""
    placed = Placed("valid")
    strategy = build(processes, config, placed)
    strategy.module.train()
    batch = collate(make_packs(3, seed=processes.rank))
    plain = strategy.forward_backward([batch], 10).item()
    strategy.discard_gradients()
    for name, module in strategy.module.named_modules():
        if name.endswith("layers.0.mlp"):
            module.compile(backend="aot_eager")
    compiled = strategy.forward_backward([batch], 10).item()
    strategy.discard_gradients()
    with Dequantized() as seen:  # dynamo stands aside for it
        strategy.forward_backward([batch], 10)
    same = set(seen.calls) == set(placed.pristine.calls)
    return plain, compiled, same, strategy.fingerprint() == placed.fingerprint.text()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("world_size", [2])
def test_bytes_stay_when_modules_are_compiled(
    world_size: int, kind: str, pool: Pools, toy_recipe: Any, model_dirs: dict[str, str]
) -> None:
    config = toy_recipe(
        model={"path": model_dirs["narrow"], "init": "random"},
        adapter={"r": 2},
        quantization={"double_quant": False},
        strategy={"kind": kind},
    )
    for plain, compiled, same_bytes, same_fingerprint in pool(world_size).run(train_compiled, config):
        assert plain == pytest.approx(compiled, rel=1e-6)
        assert same_bytes and same_fingerprint


@pytest.mark.parametrize("format", [FourBit("nf4", True), FourBit("nf4", False), Int8()], ids=str)
def test_a_compiled_dequantisation_gives_the_same_bits(format: Format) -> None:
    _, scales = format.quantize(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    packed = PATTERNS.view(512, 256).clone()
    before = digest(packed, scales)
    compiled = torch.compile(format.dequantize)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(compiled(packed, scales, dtype), format.dequantize(packed, scales, dtype))
    assert digest(packed, scales) == before

"""Loads a model tensor by tensor, its base quantised on the way: onto one device, or laid out by a strategy.

Each process of a host reads, casts and quantises its share of the tensors, whole and ahead of need, so that the disk is
read in parallel and every byte once; in turn a tensor then goes to all of them, and each keeps its part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.launchers import World
from trainer.model.build import BuiltModel, Destination, build_model
from trainer.model.folder import resolve_folder
from trainer.model.host import Host
from trainer.model.prepare import Preparation, TrailingHash
from trainer.model.source import FLOATS, StoredTensor, deal, list_tensors
from trainer.model.weights import computing_config
from trainer.processes import Processes
from trainer.storage import allocate, put

Place = Callable[[nn.Module, str, torch.Tensor], None]


@dataclass(frozen=True)
class BaseIdentity:
    """Which base was trained on; a checkpoint carries it, and resuming or merging on another is refused.

    Attributes:
        path: ``model.path`` of the recipe; of a local folder or file in full, as the recipe's may be relative.
        revision: commit of the hub's snapshot, where there is one.
        content_hash: `trainer.model.weights.base_content_hash`. config: `trainer.model.weights.computing_config`.
        quantization: type, double_quant and compute_dtype of a quantised base.
        nf4_fingerprint: `trainer.model.quantized.fingerprint` of a quantised base, of whatever type.
    """

    path: str
    revision: str | None
    content_hash: str
    config: dict[str, Any] | None
    quantization: dict[str, Any] | None
    nf4_fingerprint: str | None


@dataclass
class LoadedModel:
    """A model whole on one device: the causal LM, or the PeftModel around it."""

    model: nn.Module
    base: BaseIdentity


def load_model(config: RunConfig, device: torch.device) -> LoadedModel:
    """The base of `config` on `device`, with its adapter where the recipe has one; by this process alone.

    Raises:
        UserError: files missing, truncated or of another shape; a model outside the Llama family; an adapter that
            does not fit.
    """
    built = build_model(config, device)
    allocate(built.model, device)

    def place(owner: nn.Module, leaf: str, whole: torch.Tensor) -> None:
        put(owner.get_parameter(leaf), whole)

    identity = load_weights(built, config, place, Processes(World(), device), mark=lambda activity: None)
    return LoadedModel(built.model, identity)


@torch.no_grad()
def load_weights(
    built: BuiltModel,
    config: RunConfig,
    place: Place,
    processes: Processes,
    mark: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> BaseIdentity:
    """Gives every parameter of `built` its value, whole, through `place`; on all processes together.

    Args:
        place: called once for each parameter, in one order on all processes, with its owner, its name there and the
            whole tensor, on this process's device or (of the adapter) on the CPU.
        mark: told what comes next.
        check: called before each tensor by all processes; what it raises, on all of them, ends the loading.

    Returns:
        Identity of the base, equal on all processes.

    Raises:
        UserError: files missing, truncated or of another shape, or numbers that are not finite; on every process of
            the host alike.
    """
    host, num_placed = Host(processes), 0
    mark("loading the base's file headers")
    tensors = host.share(0, lambda: _list_checked(built, config))
    sources = deal(tensors, processes.local_world_size)
    own = [tensor for tensor, source in zip(tensors, sources, strict=True) if source == processes.local_rank]
    with (
        Preparation(built.destinations, tensors, own, config, processes.device) as preparation,
        TrailingHash(config) as trailing,
    ):
        for stored, source in zip(tensors, sources, strict=True):
            mark(f"loading {stored.name}")
            check()
            values = built.destinations[stored.name].values
            layout = [(value.shape, value.dtype) for value in values]
            wholes = host.share_tensors(source, preparation.next, layout, processes.device)
            for value, whole in zip(values, wholes, strict=True):
                for owner, leaf in value.homes:
                    place(owner, leaf, whole)
                    num_placed += 1
            if processes.local_rank == 0:
                trailing.read_up_to(stored.file)
        _fill_rotary_buffers(_causal_lm(built.model), processes.device)
        for name, whole in built.adapter_init.items():
            mark(f"loading {name}")
            owner_name, _, leaf = name.rpartition(".")
            place(built.model.get_submodule(owner_name), leaf, whole)
            num_placed += 1
        assert num_placed == len(list(built.model.parameters())), "every parameter is placed once"
        mark("hashing the base")
        while host.share(0, trailing.is_behind):
            mark("hashing the base")
        told = host.share(0, lambda: (trailing.text(), _revision(config), computing_config(config.model)))
        content_hash, revision, base_config = told
    if processes.host is not None:
        preparation.fingerprint.all_reduce(processes.host)
    return BaseIdentity(
        path=_full_path(config.model.path),
        revision=revision,
        content_hash=content_hash,
        config=base_config,
        quantization=_quantization(config),
        nf4_fingerprint=preparation.fingerprint.text() if config.quantization else None,
    )


def _list_checked(built: BuiltModel, config: RunConfig) -> list[StoredTensor]:
    """The base's tensors, of which names, shapes and dtypes fit the model."""
    tensors, path = list_tensors(config.model), config.model.path
    for tensor in tensors:
        _check_tensor(tensor, built.destinations.get(tensor.name), path)
    wanted = {name for name, destination in built.destinations.items() if destination.values}
    if missing := sorted(wanted - {tensor.name for tensor in tensors}):
        raise UserError(path, f"no tensor {missing[0]} ({len(missing)} missing)", "all of config.json")
    return tensors


def _check_tensor(tensor: StoredTensor, destination: Destination | None, path: str) -> None:
    if destination is None:
        raise UserError(
            path, f"tensor {tensor.name}, which config.json has no place for", fix="use the model's own config.json"
        )
    if tensor.shape != tuple(destination.shape):
        raise UserError(
            path, f"tensor {tensor.name} of shape {list(tensor.shape)}", f"{list(destination.shape)}, by config.json"
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            path, f"tensor {tensor.name} of {tensor.dtype}", ", ".join(FLOATS), "name the unquantised model"
        )


def _quantization(config: RunConfig) -> dict[str, Any] | None:
    if config.quantization is None:
        return None
    return {**config.quantization.model_dump(), "compute_dtype": config.compute_dtype}


def _full_path(path: str) -> str:
    local = Path(path).expanduser()
    return str(local.resolve()) if local.exists() else path


def _revision(config: RunConfig) -> str | None:
    if config.model.init == "pretrained" and not Path(config.model.path).expanduser().is_dir():
        return resolve_folder(config.model).name  # the hub's cache names a snapshot by its commit
    return config.model.revision


def _causal_lm(model: nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _fill_rotary_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Rebuilds modules whose buffers no file holds (rotary frequencies), which have no storage yet."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            rebuild: Any = type(module)
            model.set_submodule(name, rebuild(model.config).to(device))
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"no storage for {left}"

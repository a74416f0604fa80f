"""What happens in the background while a model is loaded: tensors are read, checked, converted; files are hashed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.model.build import Destination
from trainer.model.quantized import Fingerprint
from trainer.model.source import StoredTensor, TensorReader, start_threads
from trainer.model.weights import FileHash, base_content_hash, weight_files

TENSORS_AHEAD = 2  # of this process's own, ready or in the making while those of others are placed
SECONDS_A_WAIT = 5.0  # for the hash, between signs of life
EMBEDDINGS = "model.embed_tokens.weight"


class Preparation:
    """Reads, checks and converts this process's tensors ahead of need; a context manager.

    Two threads, so that the next tensor is read while one is quantised.

    Args:
        tensors: all of the base.
        own: those to prepare, in the order they are asked for.
        device: where they come to lie.

    Attributes:
        fingerprint: of the quantised bytes made so far.
    """

    def __init__(
        self,
        destinations: dict[str, Destination],
        tensors: list[StoredTensor],
        own: Iterable[StoredTensor],
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self.destinations, self.path = destinations, config.model.path
        self.fingerprint = Fingerprint()
        self._embeddings = next((tensor for tensor in tensors if tensor.name == EMBEDDINGS), None)
        self._reader = TensorReader(config.model, config.train.seed, device)
        self._reading, self._converting = (start_threads(1, device) for _ in range(2))
        self._own, self._started = iter(own), deque[Future[list[torch.Tensor]]]()
        for _ in range(TENSORS_AHEAD):
            self._start()

    def next(self) -> list[torch.Tensor]:
        """What the next of `own` becomes at its destination, on the device.

        Raises:
            UserError: it is not all there, not finite, or not equal to the embeddings it is tied to.
        """
        self._start()
        return self._started.popleft().result()

    def _start(self) -> None:
        stored = next(self._own, None)
        if stored is not None:
            read = self._reading.submit(self._reader.read, stored)
            self._started.append(self._converting.submit(self._convert, stored, read))

    @torch.no_grad()
    def _convert(self, stored: StoredTensor, read: Future[torch.Tensor]) -> list[torch.Tensor]:
        destination = self.destinations[stored.name]
        weight = read.result().to(destination.dtype)
        _check_finite(stored.name, weight, self.path)
        if not destination.values:
            self._check_tied(stored, weight)
            return []
        tensors = destination.convert(weight)
        if destination.quantized:
            self.fingerprint.add(*tensors[:2])
        return tensors

    def _check_tied(self, head: StoredTensor, weight: torch.Tensor) -> None:
        assert self._embeddings is not None
        if not torch.equal(weight, self._reader.read(self._embeddings).to(weight)):
            raise UserError(self.path, f"{head.name} differs from the embeddings that config.json ties it to")

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._reading, self._converting):
            pool.shutdown(cancel_futures=True)
        self._reader.__exit__(*error)


def _check_finite(name: str, weight: torch.Tensor, path: str) -> None:
    """By the sum, which no NaN or Inf leaves finite and which needs no memory."""
    if not math.isfinite(weight.sum(dtype=torch.float32).item()):
        raise UserError(
            path,
            f"tensor {name} holds NaN or Inf as {str(weight.dtype).removeprefix('torch.')}",
            "finite numbers",
            "download the model again; where float16 is too narrow for it, set model.dtype: bfloat16",
        )


class TrailingHash:
    """Hashes the base's files behind those who read them, out of the page cache; a context manager."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._hash, self._thread = FileHash(), ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._started: list[Future[None]] = []
        self._waiting: list[Path] | None = None

    def read_up_to(self, file: Path | None) -> None:
        """Tells that the files before `file` have been read (None: of a random base)."""
        if file is None:
            return
        if self._waiting is None:
            self._waiting = list(weight_files(file.parent))
        while self._waiting[0] != file:
            self._hash_next(self._waiting)

    def is_behind(self) -> bool:
        """Whether files are still to be hashed, after some seconds of waiting; all have been read."""
        while self._waiting:
            self._hash_next(self._waiting)
        return bool(wait(self._started, timeout=SECONDS_A_WAIT).not_done)

    def text(self) -> str:
        """`base_content_hash` of the base, when nothing is left to be hashed."""
        if self._waiting is None:
            return base_content_hash(self.config.model, self.config.train.seed)
        for hashed in self._started:
            hashed.result()  # raises where it failed
        return self._hash.text()

    def _hash_next(self, waiting: list[Path]) -> None:
        self._started.append(self._thread.submit(self._hash.add, waiting.pop(0)))

    def __enter__(self) -> TrailingHash:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

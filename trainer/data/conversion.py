"""Rows of sources to tokenised rows, some at a time: in this process, or in a pool that takes every core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

from trainer.config import DataConfig, Source
from trainer.data.formats import BadRow, read_example
from trainer.data.masking import Dropped, build_labels
from trainer.data.rows import Row
from trainer.data.templated import TemplateReader
from trainer.data.templates import Template
from trainer.data.types import Example, TokenizedRow
from trainer.preemption import STOP_SIGNALS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARALLEL_ROWS = 20_000  # below this a pool of processes takes longer to start than it saves
# A source with its columns, and some of its rows with their indices.
Task = tuple[Source, dict[str, tuple[str, ...]], list[int], list[Row]]
# Rows, and the reasons of those that are none or are dropped.
Result = tuple[list[TokenizedRow], list[str]]


class Reader:
    """Rows of a source to examples."""

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
        self._unfolds = data.train_on != "all"
        self._templated = TemplateReader(template, tokenizer)

    def __call__(self, task: Task) -> tuple[list[Example], list[str]]:
        """Examples, and the reasons of rows that are none."""
        source, columns, indices, rows = task
        examples, reasons = [], []
        for index, row in zip(indices, rows, strict=True):
            try:
                example = read_example(row, index, source, columns)
                examples.append(self._templated.read(example) if self._has_messages(source) else example)
            except BadRow as error:
                reasons.append(str(error))
        return examples, reasons

    def _has_messages(self, source: Source) -> bool:
        """Whether the source's texts hold messages that are to be told apart."""
        return source.format == "templated" and self._unfolds


@dataclass(frozen=True)
class Converter:
    """Rows of a source to tokenised rows, and the reasons of those that are dropped."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    data: DataConfig

    @cached_property
    def _read(self) -> Reader:
        return Reader(self.template, self.tokenizer, self.data)

    def __call__(self, task: Task) -> Result:
        examples, reasons = self._read(task)
        made = build_labels(examples, self.template, self.tokenizer, self.data)
        rows = [row for row in made if isinstance(row, TokenizedRow)]
        return rows, reasons + [row.reason for row in made if isinstance(row, Dropped)]


Convert = Callable[[Iterable[tuple[int, Task]]], Iterator[tuple[int, Result]]]
_converter: Converter  # of a worker process


@contextmanager
def converting(
    template: Template, tokenizer: PreTrainedTokenizerBase, data: DataConfig, num_rows: int
) -> Iterator[Convert]:
    """Yields what converts numbered tasks, in order: in this process for few rows, in a pool of them for many."""
    converter = Converter(template, tokenizer, data)
    num_workers = min(len(os.sched_getaffinity(0)), num_rows // PARALLEL_ROWS + 1)
    if num_workers == 1:
        yield lambda tasks: ((index, converter(task)) for index, task in tasks)
        return
    # Else the first worker's start does this, and leaves SIGTERM unblocked, here and in the workers
    # (https://github.com/python/cpython/blob/v3.11.7/Lib/multiprocessing/resource_tracker.py, ensure_running).
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    # Spawned, not forked: a process that has started threads (torch's, tokenizers') cannot be forked safely.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(converter,)
    )
    try:
        yield lambda tasks: _map_in_order(pool, tasks, ahead=4 * num_workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _start(converter: Converter) -> None:
    global _converter
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for watch in (_end_with_parent, _end_when_told):
        threading.Thread(target=watch, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already take every core
    _converter = converter


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_when_told() -> None:
    """SLURM sends its signals to every process of a job step, and this one has to outlive them: they ask the run to
    save. One of the parent's own ends it, as when another worker has died."""
    parent = os.getppid()
    while True:
        found = signal.sigwaitinfo(STOP_SIGNALS)
        if (found.si_signo, found.si_pid) == (signal.SIGTERM, parent):
            os._exit(1)


def _convert_in_worker(task: Task) -> Result:
    return _converter(task)


def _map_in_order(
    pool: ProcessPoolExecutor, tasks: Iterable[tuple[int, Task]], ahead: int
) -> Iterator[tuple[int, Result]]:
    """Results in the tasks' order, with few tasks in memory at a time."""
    running: deque[tuple[int, Future[Result]]] = deque()
    for index, task in tasks:
        running.append((index, pool.submit(_convert_in_worker, task)))
        if len(running) >= ahead:
            first, future = running.popleft()
            yield first, future.result()
    yield from ((index, future.result()) for index, future in running)

"""TrainLoop: steps, evaluations, checkpoints and the reasons to stop, in the order they happen."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler, collate, deal
from trainer.data.types import PackedBatch, PackedRows
from trainer.errors import MemoryRanOut, Preempted, TrainingDiverged
from trainer.metrics.meters import ThroughputMeter
from trainer.metrics.recorder import Recorder
from trainer.preemption import StopRequest
from trainer.readings import Figure, Moment
from trainer.schedule import Schedule
from trainer.sizes import Sizes
from trainer.strategies.base import StepResult, Strategy
from trainer.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)

# So many steps in a row with a gradient that is not finite end the run.
MAX_FAILURES_IN_A_ROW = 3
AnswerSamples = Callable[[], list[tuple[str, str]]]


@dataclass
class LoopState:
    """What the loop itself remembers; saved in every checkpoint's manifest.

    Attributes:
        step: optimizer steps done.
        best_loss: lowest validation loss so far; None before the first evaluation.
        bad_evaluations: evaluations since `best_loss` without the improvement early stopping asks for.
        failures_in_a_row: latest steps skipped for a gradient that is not finite.
        skipped_steps: all such steps.
        evaluated_step: step of the latest evaluation.
    """

    step: int = 0
    best_loss: float | None = None
    bad_evaluations: int = 0
    failures_in_a_row: int = 0
    skipped_steps: int = 0
    evaluated_step: int = 0


@dataclass(frozen=True)
class UnreadStep:
    """A step whose figures may still be on their way.

    Attributes:
        loss_sum: over the global batch.
        ended: when the device was done with it.
        num_tokens, num_trained: of the global batch.
    """

    step: int
    loss_sum: Figure
    ended: Moment
    result: StepResult
    lr: float
    num_tokens: int
    num_trained: int


class TrainLoop:
    """Runs a prepared strategy over packed data until the steps are done or there is a reason to stop.

    Every process runs the same loop over its own share of each global batch; what they have to agree on (tokens, a
    stop) is added up once a step.

    Args:
        sizes: micro-batch and recompute levels; saved, so that a resumed run computes the same.
        answer_samples: generates the answers to the recipe's sample prompts, as ``(prompt, answer)``.
        stop: asked at every step boundary.
        watchdog: told where this process is.
    """

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        train_packs: PackedRows,
        validation_packs: PackedRows | None,
        sampler: GlobalBatchSampler,
        num_steps: int,
        sizes: Sizes,
        schedule: Schedule,
        checkpoints: CheckpointManager,
        recorder: Recorder,
        meter: ThroughputMeter,
        answer_samples: AnswerSamples,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.strategy, self.schedule = config, strategy, schedule
        self.train_packs, self.validation_packs, self.sampler = train_packs, validation_packs, sampler
        self.num_steps, self.sizes = num_steps, sizes
        self.checkpoints, self.recorder, self.meter = checkpoints, recorder, meter
        self.answer_samples, self.stop, self.watchdog = answer_samples, stop, watchdog
        self.processes = strategy.processes
        self._costs = train_packs.costs()
        self.state = LoopState()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[list[PackedBatch]] | None = None
        self._unread: UnreadStep | None = None

    def fit(self) -> None:
        """Trains from `state.step` to the end and commits a checkpoint there.

        Raises:
            Preempted: a signal asked to stop; a checkpoint of this step is committed.
            TrainingDiverged: the gradient was not finite several steps in a row.
            MemoryRanOut: for the first time, and not where this process could go on by itself.
        """
        try:
            if self._is_due(self.config.eval.every_steps) and self.state.evaluated_step < self.state.step:
                with self.meter.paused():
                    self.evaluate()  # a stop came before its end
            while self.state.step < self.num_steps and not self._stops_early():
                self.train_step()
                evaluates, saves = map(self._is_due, (self.config.eval.every_steps, self.config.checkpoint.every_steps))
                if evaluates or saves:
                    self._read_step()
                    with self.meter.paused():
                        if evaluates:
                            self.evaluate()
                        if saves:
                            self.save()
                if self._is_asked_to_stop() and self.state.step < self.num_steps:
                    self._stop()
            self._read_step()
            if self.state.evaluated_step != self.state.step:
                self.evaluate()
            self.save()
            self._mark("waiting for the last checkpoint")
            self.checkpoints.wait()
        except torch.OutOfMemoryError as error:
            found, run = self.meter.peak_memory, self.checkpoints.run_dir
            if text := self.sizes.note_failure(run, self.processes.world_size, found):
                raise MemoryRanOut(text) from error
            raise
        finally:
            self._loader.shutdown(cancel_futures=True)

    def train_step(self) -> None:
        """One optimizer step over one global batch. What came of it is read when the device has more to do."""
        step = self.state.step + 1
        self._mark("loading a batch")
        micro_batches = self._batches_of(step)
        num_tokens = sum(batch.num_tokens for batch in micro_batches if batch.num_trained_tokens)
        num_trained = sum(batch.num_trained_tokens for batch in micro_batches)
        num_tokens, num_trained = self.processes.sum(num_tokens, num_trained)
        lr = self.schedule.lr(step)
        self.strategy.module.train()
        loss_sum = self._forward_backward(step, micro_batches, num_trained)
        self._read_step()  # told before an optimizer that may wait for the device
        self._mark("optimizer step")
        result = self.strategy.step(lr, self.config.optim.max_grad_norm)
        ended = Moment(self.strategy.device)
        self._unread = UnreadStep(step, Figure(loss_sum), ended, result, lr, num_tokens, num_trained)
        self.state.step = step
        if self._unread.loss_sum.is_here:
            self._read_step()

    def _read_step(self) -> None:
        """Waits for the latest step that was not read yet, records it, and counts it if it was skipped.

        Raises:
            TrainingDiverged: too many were, in a row.
        """
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        self.watchdog.observe(unread.step, unread.result.grad_norm)
        record = {
            "step": unread.step,
            "loss": float(unread.loss_sum) / max(1, unread.num_trained),
            "lr": unread.lr,
            "grad_norm": unread.result.grad_norm,
            "tokens": unread.num_tokens,
            "trained_tokens": unread.num_trained,
            **self.meter.record(unread.num_tokens, unread.num_trained, unread.ended),
        }
        self.recorder.step(record)
        if unread.result.skipped:
            self._count_skip(unread.step, unread.result.is_failure)
        else:
            self.state.failures_in_a_row = 0

    def _forward_backward(self, step: int, micro_batches: list[PackedBatch], num_trained: int) -> torch.Tensor:
        """As the strategy's; where memory runs out, once more with leaner sizes, which leave the gradient as it is."""
        failure: torch.OutOfMemoryError | None = None
        try:
            return self.strategy.forward_backward(micro_batches, num_trained, self._begin_micro_batch)
        except torch.OutOfMemoryError as error:
            failure = error.with_traceback(None)  # its frames hold the activations
        self._read_step()  # told before what became of this one
        text = self.sizes.back_off(self.meter.peak_memory) if self.strategy.can_begin_anew else None
        if text is None:
            raise failure
        self.strategy.discard_gradients()
        self.recorder.event(self.state.step, "out_of_memory", text)
        if self._next is not None:
            self._next = self._loader.submit(self._load, step + 1)  # cut anew
        return self.strategy.forward_backward(self._load(step), num_trained, self._begin_micro_batch)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Token-weighted loss over the validation packs, and the sample prompts' answers.

        Raises:
            Preempted: a signal asked to stop; this step is saved as not yet evaluated.
        """
        self.strategy.module.eval()
        record = self._evaluate_loss(self.validation_packs) if self.validation_packs is not None else None
        self.state.evaluated_step = self.state.step
        if record is not None:
            self.recorder.evaluation(record)
            self.schedule.observe(record["loss"])
            self._compare_with_best(record["loss"])
        self._mark("answering the sample prompts")
        with self.strategy.whole_weights():
            answers = self.answer_samples()
        for prompt, answer in answers:
            self.recorder.sample(self.state.step, prompt, answer)

    def save(self, is_best: bool = False) -> None:
        """Starts a checkpoint of this step; training waits only while it is copied to host memory."""
        if self.checkpoints.has_begun(self.state.step) and not is_best:
            return  # by the evaluation before, a moment ago: waiting for it would stop the training
        self._mark("saving a checkpoint")
        started = time.perf_counter()
        progress = {
            "loop": asdict(self.state),
            "schedule": self.schedule.state_dict(),
            **self.sizes.setting.saved,
        }
        if not self.checkpoints.save(self.state.step, self.strategy.state_dict(), progress, is_best):
            return
        stall = time.perf_counter() - started
        if self.processes.is_first:
            self.checkpoints.run_dir.write_state("running", self.state.step)
        text = f"checkpoint of step {self.state.step}: training waited {stall:.2f} s"
        self.recorder.event(self.state.step, "checkpoint", text, seconds=stall)

    def resume(self, step: int) -> None:
        """Puts everything back to where the checkpoint of `step` was taken, by however many processes."""
        self._mark("restoring a checkpoint")
        saved = self.checkpoints.open(step)
        self.strategy.restore(saved)
        self.state = LoopState(**saved.progress["loop"])
        if self.config.checkpoint.keep_best and self.checkpoints.best_step() is None:
            self.state.best_loss = None  # its checkpoint is damaged or was not kept: the best of what comes counts
        self.schedule.load_state_dict(saved.progress["schedule"])

    def _batches_of(self, step: int) -> list[PackedBatch]:
        """The step's micro-batches, and the next step's on their way while this one computes."""
        current = self._next.result() if self._next else self._load(step)
        self._next = self._loader.submit(self._load, step + 1) if step < self.num_steps else None
        return current

    def _load(self, step: int) -> list[PackedBatch]:
        samples, sampler = self.sampler.samples(step - 1), self.sampler
        costs = self._costs[sampler.batch(step - 1)]
        return [
            collate(
                [self.train_packs[sampler.pack(sample)] for sample in own], sampler.noise_seed(own[0] if own else 0)
            )
            for own in self._deal(samples, costs)
        ]

    def _deal(self, samples: Sequence[int], costs: np.ndarray) -> list[list[int]]:
        return deal(samples, costs, self.processes.rank, self.processes.world_size, self.sizes.setting.micro_batch)

    def _evaluate_loss(self, packs: PackedRows) -> dict[str, Any]:
        """The evaluation's line of ``metrics.jsonl``."""
        started = time.perf_counter()
        loss_sum, num_trained = torch.zeros((), dtype=torch.float64, device=self.strategy.device), 0
        for number, own in enumerate(self._deal(range(len(packs)), packs.costs())):
            self._mark(f"evaluating micro-batch {number + 1}")
            if self._is_asked_to_stop():
                self._stop()
            batch = collate([packs[index] for index in own])
            loss_sum += self.strategy.module(batch.to(self.strategy.device))
            num_trained += batch.num_trained_tokens
        (num_trained,) = self.processes.sum(num_trained)
        loss = self.processes.sum_float(loss_sum.item()) / num_trained
        return {
            "step": self.state.step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "trained_tokens": num_trained,
            "seconds": time.perf_counter() - started,
        }

    def _compare_with_best(self, loss: float) -> None:
        best = math.inf if self.state.best_loss is None else self.state.best_loss
        stopping = self.config.eval.early_stopping
        improved_enough = loss < best - (stopping.min_delta if stopping else 0.0)
        self.state.bad_evaluations = 0 if improved_enough else self.state.bad_evaluations + 1
        if loss < best:
            self.state.best_loss = loss
            if self.config.checkpoint.keep_best:
                self.save(is_best=True)

    def _stops_early(self) -> bool:
        stopping = self.config.eval.early_stopping
        if stopping is None or self.state.bad_evaluations < stopping.patience:
            return False
        text = f"stopped early: {self.state.bad_evaluations} evaluations without improvement"
        self.recorder.event(self.state.step, "early_stop", text)
        return True

    def _count_skip(self, step: int, is_failure: bool) -> None:
        if not is_failure:
            self.recorder.event(step, "loss_scale", f"step {step}: float16 overflow, loss scale lowered")
            return
        self.state.skipped_steps += 1
        self.state.failures_in_a_row += 1
        self.recorder.event(step, "skipped_step", f"step {step}: gradient is not finite, step skipped")
        if self.state.failures_in_a_row < MAX_FAILURES_IN_A_ROW:
            return
        self.checkpoints.wait()
        steps = self.checkpoints.run_dir.steps()
        kept = f"the last good checkpoint is step {steps[-1]}" if steps else "no checkpoint had been saved yet"
        raise TrainingDiverged(
            f"step {step}: loss or gradient was NaN or Inf {MAX_FAILURES_IN_A_ROW} steps in a row; {kept}\n"
            "  fix: lower optim.lr, lengthen schedule.warmup, or set optim.max_grad_norm"
        )

    def _is_asked_to_stop(self) -> bool:
        """A signal may reach some processes only, or all at different moments: all learn of it at the same place."""
        (num_asked,) = self.processes.sum(int(self.stop.reason is not None))
        return num_asked > 0

    def _stop(self) -> None:
        reason = self.stop.reason or "a signal to another process"
        self._read_step()
        self.save()
        self._mark("waiting for the checkpoint before stopping")
        self.checkpoints.wait()
        self.recorder.event(self.state.step, "preempted", f"{reason}: checkpoint of step {self.state.step} saved")
        raise Preempted(f"stopped at step {self.state.step} by {reason}; the same command goes on from there")

    def _begin_micro_batch(self, index: int) -> None:
        if index == 1:
            self._read_step()  # the device has the first to do
        self._mark(f"forward and backward of micro-batch {index + 1}")

    def _mark(self, activity: str) -> None:
        self.watchdog.mark(self.state.step, activity)

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0

"""TrainLoop: steps, evaluations, checkpoints and the reasons to stop, in the order they happen."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch

from trainer.checkpoint.layout import find_damage
from trainer.checkpoint.manager import CheckpointManager
from trainer.config import RunConfig
from trainer.data.sampler import GlobalBatchSampler, collate
from trainer.data.types import PackedBatch, PackedRows
from trainer.errors import PacktrainError, Preempted, TrainingDiverged
from trainer.metrics.meters import ThroughputMeter
from trainer.metrics.recorder import Recorder
from trainer.preemption import StopRequest
from trainer.schedule import Schedule
from trainer.strategies.base import StateDict, Strategy

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


class TrainLoop:
    """Runs a prepared strategy over packed data until the steps are done or there is a reason to stop.

    Args:
        micro_batch: packs in one forward.
        recompute: as set in the module; saved, so that a resumed run computes the same.
        answer_samples: generates the answers to the recipe's sample prompts, as ``(prompt, answer)``.
        stop: asked at every step boundary.
    """

    def __init__(
        self,
        config: RunConfig,
        strategy: Strategy,
        train_packs: PackedRows,
        validation_packs: PackedRows | None,
        sampler: GlobalBatchSampler,
        num_steps: int,
        micro_batch: int,
        recompute: bool,
        schedule: Schedule,
        checkpoints: CheckpointManager,
        recorder: Recorder,
        meter: ThroughputMeter,
        answer_samples: AnswerSamples,
        stop: StopRequest,
    ) -> None:
        self.config, self.strategy, self.schedule = config, strategy, schedule
        self.train_packs, self.validation_packs, self.sampler = train_packs, validation_packs, sampler
        self.num_steps, self.micro_batch, self.recompute = num_steps, micro_batch, recompute
        self.checkpoints, self.recorder, self.meter = checkpoints, recorder, meter
        self.answer_samples, self.stop = answer_samples, stop
        self.state = LoopState()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[list[PackedBatch]] | None = None

    def fit(self) -> None:
        """Trains from `state.step` to the end, leaving the best (or last) weights in the strategy's module.

        Raises:
            Preempted: a signal asked to stop; a checkpoint of this step is committed.
            TrainingDiverged: the gradient was not finite several steps in a row.
        """
        try:
            while self.state.step < self.num_steps and not self._stops_early():
                self.train_step()
                with self.meter.paused():
                    if self._is_due(self.config.eval.every_steps):
                        self.evaluate()
                    if self._is_due(self.config.checkpoint.every_steps):
                        self.save()
                if self.stop.reason and self.state.step < self.num_steps:
                    self._preempt(self.stop.reason)
            if self.state.evaluated_step != self.state.step:
                self.evaluate()
            self.save()
            self.checkpoints.wait()
            self._load_best()
        finally:
            self._loader.shutdown(cancel_futures=True)

    def train_step(self) -> None:
        """One optimizer step over one global batch."""
        step = self.state.step + 1
        micro_batches = self._batches_of(step)
        num_trained = sum(batch.num_trained_tokens for batch in micro_batches)
        lr = self.schedule.lr(step)
        self.strategy.module.train()
        loss_sum = self.strategy.forward_backward(micro_batches, num_trained)
        result = self.strategy.step(lr, self.config.optim.max_grad_norm)
        self.state.step = step
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        record = {
            "step": step,
            "loss": loss_sum.item() / max(1, num_trained),
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": num_tokens,
            "trained_tokens": num_trained,
            **self.meter.record(num_tokens, num_trained),
        }
        self.recorder.step(record)
        if result.skipped:
            self._count_skip(result.is_failure)
        else:
            self.state.failures_in_a_row = 0

    @torch.no_grad()
    def evaluate(self) -> None:
        """Token-weighted loss over the validation packs, and the sample prompts' answers."""
        self.state.evaluated_step = self.state.step
        self.strategy.module.eval()
        if self.validation_packs is not None:
            self._evaluate_loss(self.validation_packs)
        for prompt, answer in self.answer_samples():
            self.recorder.sample(self.state.step, prompt, answer)

    def save(self, is_best: bool = False) -> None:
        """Starts a checkpoint of this step."""
        progress = {
            "loop": asdict(self.state),
            "schedule": self.schedule.state_dict(),
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
        }
        self.checkpoints.save(self.state.step, self._tensors(), progress, is_best)

    def resume(self, step: int) -> None:
        """Puts everything back to where the checkpoint of `step` was taken."""
        progress = self._restore(step)
        self.state = LoopState(**progress["loop"])
        if self.config.checkpoint.keep_best and self.checkpoints.best_step() is None:
            self.state.best_loss = None  # its checkpoint is damaged or was not kept: the best of what comes counts
        self.schedule.load_state_dict(progress["schedule"])

    def _batches_of(self, step: int) -> list[PackedBatch]:
        """The step's micro-batches, and the next step's on their way while this one computes."""
        current = self._next.result() if self._next else self._load(step)
        self._next = self._loader.submit(self._load, step + 1) if step < self.num_steps else None
        return current

    def _load(self, step: int) -> list[PackedBatch]:
        packs = [self.train_packs[index] for index in self.sampler.batch(step - 1)]
        return [collate(packs[i : i + self.micro_batch]) for i in range(0, len(packs), self.micro_batch)]

    def _evaluate_loss(self, packs: PackedRows) -> None:
        started = time.perf_counter()
        loss_sum, num_trained = torch.zeros((), device=self.strategy.device), 0
        for start in range(0, len(packs), self.micro_batch):
            stop = min(start + self.micro_batch, len(packs))
            batch = collate([packs[index] for index in range(start, stop)])
            loss_sum += self.strategy.module(batch.to(self.strategy.device))
            num_trained += batch.num_trained_tokens
        loss = loss_sum.item() / num_trained
        record = {
            "step": self.state.step,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "trained_tokens": num_trained,
            "seconds": time.perf_counter() - started,
        }
        self.recorder.evaluation(record)
        self.schedule.observe(loss)
        self._compare_with_best(loss)

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

    def _count_skip(self, is_failure: bool) -> None:
        step = self.state.step
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

    def _preempt(self, reason: str) -> None:
        self.save()
        self.checkpoints.wait()
        self.recorder.event(self.state.step, "preempted", f"{reason}: checkpoint of step {self.state.step} saved")
        raise Preempted(f"stopped at step {self.state.step} by {reason}; the same command goes on from there")

    def _load_best(self) -> None:
        best = self.checkpoints.best_step() if self.config.checkpoint.keep_best else None
        if best is None or best == self.state.step:
            return
        if damage := find_damage(self.checkpoints.run_dir.step_dir(best)):
            raise PacktrainError(
                f"the best checkpoint is damaged: {damage}\n"
                f"  fix: put it back, or delete {self.checkpoints.run_dir.best} to keep the last weights instead"
            )
        self._restore(best)
        text = f"best weights loaded: step {best}, validation loss {self.state.best_loss:.4f}"
        self.recorder.event(self.state.step, "best_loaded", text)

    def _restore(self, step: int) -> dict:
        self.strategy.allocate_optimizer()
        tensors = self._tensors()
        progress = self.checkpoints.load(step, tensors)
        self.strategy.load_state_dict(tensors)
        set_rng_state(tensors, self.strategy.rank, self.strategy.device)
        return progress

    def _tensors(self) -> StateDict:
        return self.strategy.state_dict() | rng_state(self.strategy.rank, self.strategy.device)

    def _is_due(self, every_steps: int | None) -> bool:
        return every_steps is not None and self.state.step % every_steps == 0


def rng_state(rank: int, device: torch.device) -> StateDict:
    """This process's random state as tensors: dropout draws from it."""
    state = {f"rng.rank_{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"rng.rank_{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: StateDict, rank: int, device: torch.device) -> None:
    """Puts back what `rng_state` gave."""
    torch.set_rng_state(state[f"rng.rank_{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[f"rng.rank_{rank}.cuda"], device)

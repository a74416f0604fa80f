"""From the beats of all processes to the one that ends the run: who, where, since when and why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from trainer.errors import EXIT_FAILURE, only
from trainer.watch.heartbeat import Beat, Failure


@dataclass(frozen=True)
class Limits:
    """Times in seconds. Every way to end but `all_wait` takes less than a minute: probe + stall + 2 beats + grace
    + courtesy.

    Attributes:
        beat: between two beats: a small message a rank, nothing to the network.
        silence: without a beat. A thread of its own beats, so only a stopped process, a lost host or a call that holds
            Python's lock is silent; the last can take seconds, hence not less.
        suspect: silence that is enough once another process has lost a peer: three beats.
        settle: a first failure is named after this time, in which the same failure of all may be told.
        secondary: so long do errors of lost connections wait for their cause.
        stall: one process does not come to where all others wait.
        probe: without progress, after which a GPU is asked whether it is busy. A query may spoil a CUDA graph being
            captured, so the GPU is left alone while all goes well.
        all_wait: all wait in one place: a GPU's queue may hold minutes of work, so nobody can tell sooner.
        fail: the main thread waits for the cause of its own failure; longer than `secondary`.
        connect: for all to reach rank 0, and for a process that never does.
        leave: rank 0 stays for the others at the end.
        drain: for a message to be read before its connection closes.
        grace: for the main thread to end by itself after the verdict.
        courtesy: so much later end those that do not tell the user: a launcher asks the first to end for the cause.
    """

    beat: float = 2.0
    silence: float = 30.0
    suspect: float = 6.0
    settle: float = 1.0
    secondary: float = 20.0
    stall: float = 35.0
    probe: float = 4.0
    all_wait: float = 900.0
    fail: float = 30.0
    connect: float = 30.0
    leave: float = 5.0
    drain: float = 2.0
    grace: float = 10.0
    courtesy: float = 2.0


# All processes compute the norm of the same gradient; reductions in another order differ by far less.
NORM_TOLERANCE = 1e-3
WHY_DEAD = "killed, crashed or out of host memory"
WHY_SILENT = "stopped, stuck in one call, or its host or the network to it is down"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
        culprits: ranks at fault; empty where nobody can tell.
        message: for users.
        exit_status: of all processes.
        speaker: rank that tells the user; None where rank 0 failed by an error, which its own main thread tells.
        host: the one whose machine is at fault; empty where none is, or nobody can tell which.
        is_loss: processes died or went silent, as they also do when a whole job is being ended.
    """

    culprits: list[int]
    message: str
    exit_status: int
    speaker: int | None
    host: str = ""
    is_loss: bool = False


@dataclass(frozen=True)
class Member:
    """A process of the run as known from its start."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host} (pid {self.pid})"


class Judge:
    """Collects beats; one process judges for all, so that all tell the same."""

    def __init__(self, members: list[Member], limits: Limits, now: float) -> None:
        self.members, self.limits = members, limits
        self.beats = [Beat(0, "starting") for _ in members]
        self._heard = [now + limits.connect - limits.silence] * len(members)
        self._lost: dict[int, float] = {}
        self._left: dict[int, float] = {}
        self._failed: dict[int, float] = {}
        self._norms: dict[int, dict[int, float]] = {}
        self._diverged: Verdict | None = None

    def take(self, rank: int, beat: Beat, now: float) -> None:
        """A beat of `rank` has come."""
        self.beats[rank], self._heard[rank] = beat, now
        if beat.failure:
            self._failed.setdefault(rank, now)
        if beat.left:
            self._left.setdefault(rank, now)
        for step, norm in beat.norms:
            norms = self._norms.setdefault(step, {})
            norms[rank] = norm
            if len(norms) == len(self.members):
                self._compare(step, self._norms.pop(step))

    def lose(self, rank: int, now: float) -> None:
        """The connection to `rank` is gone. No matter after it said that it leaves."""
        if rank not in self._left:
            self._lost[rank] = now

    def excuse(self, seconds: float) -> None:
        """The judging process itself slept so long: nobody's silence counts for that time."""
        self._heard = [heard + seconds for heard in self._heard]

    def gone(self) -> set[int]:
        """Ranks that are done or lost."""
        return self._left.keys() | self._lost.keys()

    def verdict(self, now: float) -> Verdict | None:
        """The most telling of what is wrong, or None."""
        primary = [rank for rank in self._failed if not self._failure(rank).is_secondary]
        if primary:
            return self._failed_first(primary, now)
        return self._ended_or_silent(now) or self._lost_peers(now) or self._diverged or self._stalled(now)

    def _failed_first(self, primary: list[int], now: float) -> Verdict | None:
        """The earliest failure; where rank 0 fails alike it is the one, for its main thread speaks by itself."""
        first = min(primary, key=lambda rank: self._failed[rank])
        everybody = len(self._failed.keys() | self.gone()) == len(self.members)
        if now - self._failed[first] < self.limits.settle and not everybody:
            return None
        if 0 in primary and self._failure(0).text == self._failure(first).text:
            first = 0
        failure = self._failure(first)
        culprits = failure.blames or [first]
        what = f"failed {self._place(culprits[0])}: {failure.text}"
        # What one process ran into, others may report too.
        host = only(self._failure(rank).host for rank in primary)
        return self._speak(culprits, what, failure.exit_status, rank_0_speaks=0 in culprits, host=host)

    def _ended_or_silent(self, now: float) -> Verdict | None:
        """Processes whose connection closed at once, and those of which nothing is heard any more.

        A lost connection may itself be a consequence (NCCL aborts a process that lost a peer): a silent one was first.
        """
        ended = [rank for rank in self._lost if rank not in self._failed]
        limit = self.limits.suspect if self._lost or self._failed else self.limits.silence
        gone = self.gone()
        silent = [rank for rank, heard in enumerate(self._heard) if rank not in gone and now - heard > limit]
        if silent:
            since = now - min(self._heard[rank] for rank in silent)
            where = self._place(silent[0], gone=True)
            what = f"is silent for {since:.0f} s {where}: {WHY_SILENT}"
            return self._speak(silent, what, host=self._silent_host(silent), is_loss=True)
        if ended:
            first = min(ended, key=lambda rank: self._lost[rank])
            what = f"died {self._place(ended[0], gone=True)}: {WHY_DEAD}"
            return self._speak(ended, what, host=self.members[first].host, is_loss=True)
        return None

    def _silent_host(self, silent: list[int]) -> str:
        """Where all other hosts fell silent at once, the one that judges has lost its network."""
        here = self.members[0].host
        others = {member.host for member in self.members} - {here}
        heard = {member.host for member in self.members if member.rank not in silent} - {here}
        if len(others) > 1 and not heard:
            return here
        return self.members[min(silent, key=lambda rank: self._heard[rank])].host

    def _lost_peers(self, now: float) -> Verdict | None:
        """Errors of lost connections whose cause has not shown."""
        if not self._failed:
            return None
        first = min(self._failed, key=lambda rank: self._failed[rank])
        if now - self._failed[first] < self.limits.secondary:
            return None
        what = f"failed {self._place(first)}: {self._failure(first).text}"
        host = only(self._failure(rank).host for rank in self._failed)
        return self._speak([first], what, rank_0_speaks=first == 0, host=host)

    def _compare(self, step: int, norms: dict[int, float]) -> None:
        """Gradient norms of one step, of all ranks: the majority is right."""
        finite = [norm for norm in norms.values() if math.isfinite(norm)]
        right = statistics.median_low(finite) if 2 * len(finite) >= len(norms) else math.nan
        odd = [rank for rank, norm in sorted(norms.items()) if not _agree(norm, right)]
        if not odd or self._diverged:
            return
        values = ", ".join(f"rank {rank}: {norm:.6g}" for rank, norm in sorted(norms.items()))
        what = f"diverged at step {step}: gradient norms differ ({_shortened(values)})"
        if len(norms) == 2:
            what += "; of two, either may be the wrong one"
        is_clear = 2 * len(odd) < len(norms)
        self._diverged = self._speak(odd, what, host=self._host_of(odd) if is_clear else "")

    def _stalled(self, now: float) -> Verdict | None:
        """All others have waited long, and some do not come."""
        limit, left = self.limits.stall, self._left
        here = [rank for rank in range(len(self.members)) if rank not in left]
        beats = [self.beats[rank] for rank in here]
        if any(beat.alone for beat in beats) or not any(beat.waiting > limit for beat in beats):
            return None
        absent = [rank for rank, beat in zip(here, beats, strict=True) if beat.working > limit]
        waiting = [rank for rank, beat in zip(here, beats, strict=True) if beat.waiting > limit]
        if len(absent) + len(waiting) < len(here):
            return None
        if absent:
            return self._hangs(absent)
        last = min(beat.step for beat in beats)
        behind = [rank for rank in waiting if self.beats[rank].step == last]
        if len(behind) < len(waiting):
            return self._hangs(behind)
        if left and now - max(left.values()) > limit and all(beat.on_host for beat in beats):
            return self._speak(sorted(left), f"left the run {self._place(min(left))} while all others wait for it")
        shortest = min(beat.waiting for beat in beats)
        if shortest < self.limits.all_wait:
            return None
        return self._speak([], f"all ranks wait for one another for {shortest:.0f} s {self._place(here[0])}")

    def _hangs(self, ranks: list[int]) -> Verdict:
        quiet = min(self.beats[rank].quiet for rank in ranks)
        what = f"hangs {self._place(ranks[0])}: no progress for {quiet:.0f} s while all others wait for it"
        return self._speak(ranks, what, host=self._host_of(ranks))

    def _host_of(self, ranks: list[int]) -> str:
        return only(self.members[rank].host for rank in ranks)

    def _speak(
        self,
        ranks: list[int],
        what: str,
        status: int = EXIT_FAILURE,
        rank_0_speaks: bool = False,
        host: str = "",
        is_loss: bool = False,
    ) -> Verdict:
        """The message, and the lowest rank that lives and is not at fault to tell it."""
        silent = self.gone() | set(ranks)
        speaker = next((rank for rank in range(len(self.members)) if rank not in silent), None)
        message = f"{_named(self.members[rank] for rank in ranks)} {what}" if ranks else what
        return Verdict(ranks, message, status, None if rank_0_speaks else speaker, host, is_loss)

    def _failure(self, rank: int) -> Failure:
        failure = self.beats[rank].failure
        assert failure is not None
        return failure

    def _place(self, rank: int, gone: bool = False) -> str:
        beat = self.beats[rank]
        return place(beat.step, beat.alone or beat.activity, self.beats[0].step if gone else 0)


def place(step: int, activity: str, others: int = 0) -> str:
    """Where a process was last heard of.

    Args:
        others: step of the others. They cannot be ahead of it: who lost it at step 7 did step 6 together with it.
    """
    return f"at step {step}, in '{activity}'" if others <= step else f"at step {others} (last heard of in '{activity}')"


def _agree(norm: float, right: float) -> bool:
    if math.isfinite(norm) and math.isfinite(right):
        return abs(norm - right) <= NORM_TOLERANCE * max(abs(norm), abs(right))
    return math.isfinite(norm) == math.isfinite(right)


def _named(members: Iterable[Member]) -> str:
    return _shortened(", ".join(map(str, members)))


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."

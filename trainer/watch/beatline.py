"""The connections that carry beats to rank 0 and verdicts back: JSON lines over TCP.

Plain sockets and no `torch.distributed.TCPStore`, whose calls hang for ever where rank 0 is stopped, and which does not
show that a process has ended: here the kernel closes its connection at once.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from trainer.errors import EXIT_FAILURE, PacktrainError
from trainer.watch.heartbeat import Beat, Failure
from trainer.watch.verdict import WHY_DEAD, WHY_SILENT, Judge, Limits, Member, Verdict, place

_MAX_LINE = 1 << 20  # bytes; a stranger's endless line is cut off here


class Line(ABC):
    """This process's end of the connections. One thread uses it; `wake` may be called by any."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._looked = time.monotonic()

    def wake(self) -> None:
        """Lets `exchange` return early."""
        with contextlib.suppress(OSError):
            self._waker.send(b"x")

    @abstractmethod
    def exchange(self, beat: Beat, seconds: float) -> Verdict | None:
        """Sends the beat, then listens for `seconds` or until woken; returns early with a verdict."""

    @abstractmethod
    def leave(self, beat: Callable[[], Beat]) -> Verdict | None:
        """Says that this process is done, and goes; a verdict may still come first."""

    @abstractmethod
    def announce(self, verdict: Verdict) -> None:
        """Tells the others where this process judges for them."""

    @abstractmethod
    def close(self, verdict: Verdict | None = None) -> None:
        """Closes; waits a little so that what was sent is read first."""

    def _ready(self, sockets: list[socket.socket], seconds: float) -> tuple[list[socket.socket], bool]:
        """Sockets that have something to read, and whether `wake` was called."""
        readable = _readable([*sockets, self._woken], seconds)
        woken = self._woken in readable
        if woken:
            self._woken.recv(4096)
            readable.remove(self._woken)
        return readable, woken

    def _slept(self) -> float:
        """Seconds that this thread got no turn since the last call, beyond what is usual: the silence was its own."""
        now = time.monotonic()
        slept, self._looked = now - self._looked, now
        return slept if slept > 2 * self.limits.beat else 0.0


class _Peer:
    """One connection, read and written by lines without blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank: int | None = None  # known after its first line
        self._unread = b""

    def send(self, message: dict[str, Any]) -> None:
        """Or not: a peer that is gone or does not read shows in other ways."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Whole lines that have come, and whether the other side is still there."""
        try:
            data = self.connection.recv(1 << 16)
        except BlockingIOError:
            return [], True
        except OSError:
            return [], False
        *lines, self._unread = (self._unread + data).split(b"\n")
        alive = bool(data) and len(self._unread) < _MAX_LINE
        try:
            return [json.loads(line) for line in lines], alive
        except ValueError:
            return [], False


class Hub(Line):
    """Rank 0's end: hears all and judges."""

    def __init__(self, listener: socket.socket, token: str, members: list[Member], limits: Limits) -> None:
        super().__init__(limits)
        self._listener, self._token = listener, token
        self._judge = Judge(members, limits, time.monotonic())
        self._peers: dict[socket.socket, _Peer] = {}

    def exchange(self, beat: Beat, seconds: float) -> Verdict | None:
        deadline = time.monotonic() + seconds
        self._judge.take(0, beat, time.monotonic())
        for peer in self._peers.values():
            peer.send({"step": beat.step, "activity": beat.alone or beat.activity})
        while True:
            # Looks now and then: a failure is judged some time after it was told.
            rest = min(deadline - time.monotonic(), self.limits.settle / 2)
            readable, woken = self._ready([self._listener, *self._peers], rest)
            self._judge.excuse(self._slept())
            stayed = [self._read(ready) for ready in readable]
            if not all(stayed):
                return None  # to be judged with a fresh beat of rank 0: the lost rank's last may be old
            verdict = self._judge.verdict(time.monotonic())
            if verdict or woken or time.monotonic() >= deadline:
                return verdict

    def leave(self, beat: Callable[[], Beat]) -> Verdict | None:
        deadline = time.monotonic() + self.limits.leave
        verdict = self.exchange(beat(), 0.0)
        while verdict is None and self._peers and time.monotonic() < deadline:
            verdict = self.exchange(beat(), self.limits.settle / 10)
        if verdict is None:
            for peer in self._peers.values():
                peer.send({"closing": True})
            self.close()
        return verdict

    def announce(self, verdict: Verdict) -> None:
        for peer in self._peers.values():
            peer.send({"verdict": asdict(verdict)})

    def close(self, verdict: Verdict | None = None) -> None:
        self._listener.close()
        _drain(list(self._peers), self.limits.drain)

    def _read(self, ready: socket.socket) -> bool:
        """False where a process was lost."""
        now = time.monotonic()
        if ready is self._listener:
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                self._peers[connection] = _Peer(connection)
            return True
        peer = self._peers[ready]
        messages, alive = peer.receive()
        for message in messages:
            if peer.rank is None and isinstance(message, dict) and message.get("token") == self._token:
                peer.rank = message["rank"]
            elif peer.rank is None:
                alive = False
            else:
                self._judge.take(peer.rank, _beat(message), now)
        if not alive:
            del self._peers[ready]
            ready.close()
            if peer.rank is not None:
                self._judge.lose(peer.rank, now)
        return alive


class Spoke(Line):
    """The end of every other rank: beats to rank 0, and hears its verdict or its silence.

    Raises:
        PacktrainError: rank 0 cannot be reached.
    """

    def __init__(self, address: tuple[str, int], token: str, rank: int, members: list[Member], limits: Limits) -> None:
        super().__init__(limits)
        self._members, self._rank = members, rank
        try:
            connection = socket.create_connection(address, timeout=limits.connect)
        except OSError as error:
            raise PacktrainError(
                f"rank {rank} on host {members[rank].host} cannot reach rank 0 at {address[0]}:{address[1]}: {error}\n"
                "  fix: let the hosts of a run connect to one another on all ports"
            ) from error
        self._peer = _Peer(connection)
        self._peer.send({"token": token, "rank": rank})
        self._rank_0_left, self._rank_0_ended, self._step = False, False, 0
        self._heard, self._first = time.monotonic(), (0, "starting")

    def exchange(self, beat: Beat, seconds: float) -> Verdict | None:
        deadline = time.monotonic() + seconds
        self._peer.send(asdict(beat))
        self._step = beat.step
        if self._rank_0_ended:
            return self._rank_0(f"died {place(*self._first, self._step)}: {WHY_DEAD}")
        limit = self.limits.suspect if beat.failure and beat.failure.is_secondary else self.limits.silence
        limit += self.limits.suspect  # where the link to rank 0 is cut it judges first, and of the two alone
        while True:
            watched = [] if self._rank_0_left else [self._peer.connection]
            readable, woken = self._ready(watched, deadline - time.monotonic())
            self._heard += self._slept()
            if readable and (verdict := self._read()):
                return verdict
            if self._rank_0_ended:
                return None  # to be judged with a fresh beat: rank 0's last may be old
            now = time.monotonic()
            if now - self._heard > limit and not self._rank_0_left:
                return self._rank_0(
                    f"is silent for {now - self._heard:.0f} s {place(*self._first, self._step)}: {WHY_SILENT}"
                )
            if woken or now >= deadline:
                return None

    def leave(self, beat: Callable[[], Beat]) -> Verdict | None:
        self._peer.send(asdict(beat()))
        self.close()
        return None

    def announce(self, verdict: Verdict) -> None:
        """Rank 0 has announced it."""

    def close(self, verdict: Verdict | None = None) -> None:
        _drain([self._peer.connection], self.limits.drain)

    def _read(self) -> Verdict | None:
        """Rank 0's verdict, or that on its end."""
        messages, alive = self._peer.receive()
        for message in messages:
            self._heard = time.monotonic()
            if "verdict" in message:
                return Verdict(**message["verdict"])
            if "closing" in message:
                self._rank_0_left = True
                return None
            self._first = message["step"], message["activity"]
        self._rank_0_ended = not alive
        return None

    def _rank_0(self, what: str) -> Verdict:
        """Nobody else knows who lives. So the lowest other rank speaks, and one of another host if there is one."""
        first = self._members[0]
        others = [member.rank for member in self._members[1:]]
        elsewhere = [member.rank for member in self._members if member.host != first.host]
        speaks = self._rank in (others[0], *elsewhere[:1])
        speaker = self._rank if speaks else None
        return Verdict([0], f"{first} {what}", EXIT_FAILURE, speaker, host=first.host, is_loss=True)


def open_listener() -> socket.socket:
    """On a free port of all addresses of this host."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    else:
        listener = socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)
    return listener


def _beat(message: dict[str, Any]) -> Beat:
    failure = message.pop("failure")
    return Beat(**message, failure=Failure(**failure) if failure else None)


def _readable(sockets: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Those with something to read; waits at most `seconds` for one."""
    with selectors.DefaultSelector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, seconds)) if isinstance(key.fileobj, socket.socket)]


def _drain(connections: list[socket.socket], seconds: float) -> None:
    """Closes: bytes left unread at a close would make the kernel drop what was sent last."""
    deadline = time.monotonic() + seconds
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
    waiting = set(connections)
    while waiting and time.monotonic() < deadline:
        for ready in _readable(waiting, deadline - time.monotonic()):
            try:
                if ready.recv(1 << 16):
                    continue
            except OSError:
                pass
            waiting.discard(ready)
    for connection in connections:
        connection.close()

"""Several processes on one host: real children, real signals, a real terminal; none is ever left behind."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).parents[2]
WAIT = 30.0  # seconds until a test gives up
# Runs CHILD on argv[1] processes in the current folder, as `packtrain train` does; less patient. It goes on where there
# is a file `again`.
DRIVER = """
import os, sys
from pathlib import Path
from launch import local
from trainer.errors import PacktrainError
local.SECONDS_TO_END = float(os.environ.get("SECONDS_TO_END", 3))
local.SECONDS_AFTER_RANK_0 = local.SECONDS_AFTER_SECOND_CTRL_C = 1.0
try:
    command = [sys.executable, "-c", Path("child.py").read_text()]
    sys.exit(local.run_processes(command, int(sys.argv[1]), os.environ, Path("logs"), Path("again").exists))
except PacktrainError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
except KeyboardInterrupt:
    sys.exit(130)
"""
# Every child says that it is there, and can note what happens to it.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
def note(text):
    with open(f"notes_{rank}", "a") as file:
        file.write(text + "\\n")
def ready():
    Path(f"pid_{rank}.new").write_text(str(os.getpid()))
    os.rename(f"pid_{rank}.new", f"pid_{rank}")
def wait():
    ready()
    while True:
        time.sleep(0.01)
"""
NOTES_SIGNALS = """
def stop(number, frame):
    note(signal.Signals(number).name)
    signal.alarm(1)  # leaves time for a second delivery
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, stop)
signal.signal(signal.SIGALRM, lambda *_: os._exit(75))
wait()
"""


class Launch:
    """A launcher at work in a folder."""

    def __init__(self, folder: Path, child: str, num_processes: int, terminal: int | None = None, **env: str) -> None:
        self.folder, self.num_processes = folder, num_processes
        (folder / "child.py").write_text(PRELUDE + child)
        own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal} if terminal else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(num_processes)],
            cwd=folder,
            env={**own, "PYTHONPATH": str(ROOT), **env},
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams),  # type: ignore[call-overload]
            text=True,
            start_new_session=True,
            preexec_fn=lambda: self._begin(terminal),
        )

    @staticmethod
    def _begin(terminal: int | None) -> None:
        """In the launcher's process: Ctrl-C counts there even if these tests run under nohup."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if terminal:
            take_terminal(terminal)

    def pids(self) -> list[int]:
        """Of the children, when all have come up."""
        files = [self.folder / f"pid_{rank}" for rank in range(self.num_processes)]
        until(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def ended(self) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        out, err = self.process.communicate(timeout=WAIT)
        return self.process.returncode, out, err

    def notes(self, rank: int) -> list[str]:
        return (self.folder / f"notes_{rank}").read_text().splitlines()

    def clean_up(self) -> None:
        """After a test that failed half-way."""
        self.process.kill()
        self.process.wait()
        for file in self.folder.glob("pid_*"):
            if is_alive(pid := int(file.read_text())):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(child: str, num_processes: int = 2, **more: str) -> Launch:
        started.append(Launch(tmp_path, child, num_processes, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for each in started:
        each.clean_up()


def take_terminal(terminal: int) -> None:
    """Makes it the controlling terminal, with this process in its foreground."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = WAIT) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ((0, 0, 0), 0),
        ((75, 75, 75), 75),
        ((75, 0, 0), 75),  # stopped before rank 0 merged alone
        ((2, 2, 2), 2),
        ((0, 2, 0), 2),
        ((1, 1, 1), 1),
        ((0, 0, 1), 1),
        ((1, 75, 75), 1),
        ((0, 0, 3), 1),
    ],
)
def test_exit_status(statuses: tuple[int, ...], status: int, launch: Callable[..., Launch]) -> None:
    first_knows = statuses[0] not in (0, 75)  # and is to end first, on a busy machine too
    wait = f"__import__('time').sleep({first_knows} * 2 * bool(rank))"
    found, _, err = launch(f"print('said by', rank); {wait}; sys.exit({statuses}[rank])", 3).ended()
    assert found == status, err
    wrong = [rank for rank, own in enumerate(statuses) if own not in (0, 75)]
    if wrong and not first_knows:
        assert f"rank {wrong[0]} ended with status {statuses[wrong[0]]}" in err
        assert f"logs/rank_{wrong[0]}.out:\n  said by {wrong[0]}" in err
    else:
        assert err == ""


def test_children_know_who_they_are(launch: Callable[..., Launch], tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    run = launch(f"note(' '.join(os.environ[name] for name in {names}))", 3, OMP_NUM_THREADS="5")
    assert run.ended() == (0, "", "")
    notes = [run.notes(rank)[0].split() for rank in range(3)]
    ports = {note.pop(5) for note in notes}
    assert notes == [[rank, rank, "3", "3", "127.0.0.1", "5"] for rank in "012"]
    assert len(ports) == 1 and 0 < int(ports.pop()) < 65536


def test_threads_share_the_cores(launch: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    run = launch("note(os.environ['OMP_NUM_THREADS'])", 2)
    run.ended()
    assert int(run.notes(1)[0]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_rank_0_has_the_streams_and_the_others_a_file_each(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.out").write_text("of an earlier start\n")
    code = "print('out', rank); print('err', rank, file=sys.stderr); assert sys.stdin.read() == ''"
    assert launch(code, 3).ended() == (0, "out 0\n", "err 0\n")
    written = {file.name: sorted(file.read_text().splitlines()) for file in (tmp_path / "logs").iterdir()}
    assert written == {"rank_1.out": ["err 1", "of an earlier start", "out 1"], "rank_2.out": ["err 2", "out 2"]}


def test_rank_0_alone_sees_the_terminal(launch: Callable[..., Launch]) -> None:
    master, terminal = pty.openpty()
    run = launch("note(f'{sys.stdout.isatty()} {sys.stderr.isatty()}')", 2, terminal=terminal)  # type: ignore[arg-type]
    assert run.ended()[0] == 0
    assert (run.notes(0), run.notes(1)) == (["True True"], ["False False"])
    os.close(master)
    os.close(terminal)


def test_a_file_s_last_lines_are_of_this_start(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.out").write_text("of an earlier start\n")
    (tmp_path / "logs" / "rank_1.log").write_text("of an earlier log\n")
    code = "rank and open('logs/rank_1.log', 'a').write('the cause\\n'); sys.exit(rank)"
    status, _, err = launch(code).ended()
    assert (status, err) == (1, "rank 1 ended with status 1\nthe end of logs/rank_1.log:\n  the cause\n")


def test_what_stopped_to_be_resumed_is_started_again_for_as_long_as_it_goes_on(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    (tmp_path / "again").touch()
    stops_twice = """
note(os.environ["MASTER_PORT"])
starts = len(Path(f"notes_{rank}").read_text().splitlines())
starts == 3 and Path("again").unlink(missing_ok=True)
sys.exit(75)
"""
    run = launch(stops_twice)
    assert run.ended() == (75, "", "")
    ports = run.notes(0)
    assert len(ports) == 3 and run.notes(1) == ports


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_reaches_every_child_once(
    number: signal.Signals, launch: Callable[..., Launch], tmp_path: Path
) -> None:
    (tmp_path / "again").touch()  # who was asked to stop does not go on
    run = launch(NOTES_SIGNALS, 3)
    run.pids()
    run.process.send_signal(number)
    assert run.ended() == (75, "", "")
    assert [run.notes(rank) for rank in range(3)] == [[number.name]] * 3


def test_ctrl_c_on_a_terminal_reaches_every_child_once(launch: Callable[..., Launch]) -> None:
    master, terminal = pty.openpty()
    run = launch(NOTES_SIGNALS, terminal=terminal)  # type: ignore[arg-type]
    run.pids()
    os.write(master, b"\x03")
    assert run.ended()[0] == 75
    assert [run.notes(rank) for rank in range(2)] == [["SIGINT"]] * 2
    os.close(master)
    os.close(terminal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)])
def test_a_signal_before_children_can_handle_it_is_no_failure(
    number: signal.Signals, status: int, launch: Callable[..., Launch]
) -> None:
    run = launch("signal.signal(signal.SIGINT, signal.SIG_DFL); wait()")
    run.pids()
    run.process.send_signal(number)
    assert run.ended() == (status, "", "")


def test_a_second_ctrl_c_ends_children_that_do_not_stop(launch: Callable[..., Launch]) -> None:
    run = launch("signal.signal(signal.SIGINT, lambda *_: note('heard')); wait()")
    pids = run.pids()
    run.process.send_signal(signal.SIGINT)
    until(lambda: all((run.folder / f"notes_{rank}").exists() for rank in range(2)))
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == (130, "", "")
    assert run.notes(1) == ["heard", "heard"]
    assert not any(map(is_alive, pids))


def test_a_killed_child_is_named_and_the_others_get_time_to_end(launch: Callable[..., Launch]) -> None:
    # Rank 0 ends by itself, as a watchdog would; rank 2 hangs.
    code = """
ready()
print('here I am', flush=True)
while rank != 0 or Path('pid_killed').exists() is False:
    time.sleep(0.01)
time.sleep(0.5)
note('by myself')
sys.exit(1)
"""
    run = launch(code, 3)
    pids = run.pids()
    started = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    (run.folder / "pid_killed").write_text(str(pids[1]))
    status, _, err = run.ended()
    assert status == 1
    assert err.startswith("rank 1 was killed by SIGKILL (out of host memory?)\n")
    assert "rank_1.out:\n  here I am" in err
    assert run.notes(0) == ["by myself"]
    assert 1.5 < time.monotonic() - started < 15  # as patient as DRIVER says
    assert not any(map(is_alive, pids))


def test_a_stopped_child_does_not_stay(launch: Callable[..., Launch]) -> None:
    run = launch("wait() if rank != 1 else (ready(), time.sleep(1), sys.exit(1))", 3)
    pids = run.pids()
    os.kill(pids[2], signal.SIGSTOP)
    status, _, err = run.ended()
    assert status == 1 and err.startswith("rank 1 ended with status 1")
    assert not any(map(is_alive, pids))


def test_a_stopped_rank_0_does_not_stay(launch: Callable[..., Launch]) -> None:
    run = launch("wait() if rank == 0 else (ready(), time.sleep(1), sys.exit(1))", 3, SECONDS_TO_END="60")
    pids = run.pids()
    os.kill(pids[0], signal.SIGSTOP)
    started = time.monotonic()
    status, _, err = run.ended()
    assert status == 1 and "ended with status 1" in err
    assert time.monotonic() - started < 15
    assert not any(map(is_alive, pids))


def test_a_rank_that_meets_nobody_after_a_signal_does_not_stay(launch: Callable[..., Launch]) -> None:
    # Rank 0 dies of the signal as one would that is still importing; rank 1 catches it, and waits for rank 0.
    run = launch("if rank == 1:\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwait()", 2)
    run.pids()
    run.process.send_signal(signal.SIGTERM)
    status, _, err = run.ended()
    assert status == 75 and err == ""


def test_what_a_killed_rank_had_started_does_not_stay(launch: Callable[..., Launch], tmp_path: Path) -> None:
    code = """
import subprocess
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
Path(f"helper_{rank}").write_text(str(helper.pid))
ready()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1)
"""
    run = launch(code, 2)
    assert run.ended()[0] == 1
    helpers = [int((tmp_path / f"helper_{rank}").read_text()) for rank in range(2)]
    until(lambda: not any(map(is_alive, helpers)), 10)


def test_rank_0_may_take_the_time_to_say_why(launch: Callable[..., Launch]) -> None:
    code = """
ready()
if rank == 1:
    sys.exit(1)
time.sleep(2.0 if rank == 0 else 1e6)
sys.exit(1)
"""
    started = time.monotonic()
    status, _, err = launch(code, 3).ended()
    assert status == 1 and err.startswith("rank 1 ended with status 1")
    assert 2.5 < time.monotonic() - started < 15


def test_children_die_with_a_launcher_that_is_killed(launch: Callable[..., Launch]) -> None:
    run = launch("signal.signal(signal.SIGTERM, signal.SIG_IGN); wait()", 3)
    pids = run.pids()
    os.kill(pids[2], signal.SIGSTOP)
    run.process.kill()
    until(lambda: not any(map(is_alive, pids)), 10)


def test_a_command_that_is_not_there_leaves_nothing(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    status, _, err = launch("wait()").ended()
    assert status == 1 and "FileExistsError" in err  # the command line explains it
    assert not list(tmp_path.glob("pid_*"))


# packtrain train


@pytest.mark.parametrize(
    ("options", "environ", "says"),
    [
        (["--gpus", "2", "--optim.lr", "-1"], {}, "optim.lr"),
        (["--gpus", "0"], {}, "--gpus: 0"),
        (["--gpus", "2", "--strategy.kind", "single"], {}, "strategy.kind is single"),
        (
            [],
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "started 2 times by a launcher",
        ),
        (
            ["--strategy.kind", "ddp"],
            {"ACCELERATE_USE_FSDP": "true"},
            "strategy.kind: ddp, and the launcher says fsdp2",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    options: list[str],
    environ: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "r.yaml").write_text("model: {path: m}\ndata: {train: [{path: a.jsonl, format: messages}]}\n")
    monkeypatch.chdir(tmp_path)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "r.yaml", *options]) == 2
    assert says in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["r.yaml"]

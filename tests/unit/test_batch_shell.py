"""What the batch shell decides when srun has ended, with a stand-in for scontrol; tests/slurm has a real one."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from slurm.history import read_followed

BATCH = Path(__file__).parents[2] / "slurm" / "batch.sh"
SCONTROL = """#!/bin/bash
echo "$*" >> {calls}
case $1 in
  show) echo "JobId=12 JobName=x JobState={state} Reason=None Requeue=1 Restarts={restarts} BatchFlag=1" ;;
  requeue) {requeue} ;;
esac
"""


class Job:
    """A job's shell around a run dir, with a scontrol that answers as it is told."""

    def __init__(self, folder: Path) -> None:
        self.run, self.calls = folder / "a 'run'", folder / "calls"
        self.submission, self.bin = folder / "0001", folder / "bin"
        for path in (self.run / "checkpoints", self.submission, self.bin):
            path.mkdir(parents=True)
        (self.submission / "runs").write_text(f"{folder / 'other'}\n{self.run}\n")
        self.note("0001")
        self.sleeps("")

    def note(self, submission: str) -> None:
        """What submit does when sbatch has answered."""
        path = self.submission.parent / submission
        (self.run / "job.json").write_text(json.dumps({"job_id": "99", "submission": str(path)}, indent=1))

    def sleeps(self, shell: str) -> None:
        """Seconds go by at once; `shell` is what happens meanwhile."""
        (self.bin / "sleep").write_text(f"#!/bin/bash\n{shell}\n")
        (self.bin / "sleep").chmod(0o755)

    def save(self, step: int) -> None:
        """A committed checkpoint."""
        folder = self.run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")

    def __call__(
        self,
        status: int,
        wrote: dict[str, Any] | None = None,
        *,
        saves: int | None = None,
        state: str = "RUNNING",
        restarts: int = 0,
        requeue: str = "true",
        limit: int = 10**6,
        setup: str = ":",
        **variables: str,
    ) -> int:
        """One start: `begin`, the run writes its state and saves, srun ends, `end`; the shell's status."""
        text = SCONTROL.format(calls=self.calls, state=state, restarts=restarts, requeue=requeue)
        (self.bin / "scontrol").write_text(text)
        (self.bin / "scontrol").chmod(0o755)
        self.calls.write_text("")
        work = []
        if wrote:
            (self.submission / "state").write_text(json.dumps(wrote, indent=1) + "\n")
            work.append('cp "$SUBMISSION/state" "$RUN/new"; mv "$RUN/new" "$RUN/state.json"')
        if saves:
            folder = f"$RUN/checkpoints/step_{saves:08d}"
            work.append(f'mkdir "{folder}"; touch "{folder}/manifest.json"')
        script = [
            f"MAX_RESTARTS=5 LIMIT_SECONDS={limit} EXCLUDE=n9 SUBMISSION={shlex.quote(str(self.submission))}",
            *(f"source {BATCH}", "begin", setup, *work, f"end {status}"),
        ]
        environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "14",
            "SLURM_ARRAY_JOB_ID": "12",
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_JOB_NODELIST": "n[1-2]",
            **variables,
        }
        return subprocess.run(["bash", "-c", "\n".join(script)], env=environ, timeout=60).returncode

    @property
    def asked(self) -> list[str]:
        """What scontrol was asked to do."""
        return [line for line in self.calls.read_text().splitlines() if not line.startswith("show")]

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.run / "state.json").read_text())

    @property
    def ends(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run / "attempts.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] == "end"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def state_of(name: str, **further: Any) -> dict[str, Any]:
    return {"state": name, "step": 7, "reason": 'a "reason"', **further}


def test_done(job: Job) -> None:
    assert job(0, state_of("done"), saves=7) == 0
    assert job.asked == []
    assert job.ends[0] | {"time": 0} == {
        **{"event": "end", "time": 0, "job_id": "12_1", "restart": 0, "status": 0, "state": "done", "step": 7},
        **{"idle": False, "action": "finish", "why": ""},
    }


def test_a_job_that_stopped_in_order_to_be_resumed_is_queued_again(job: Job) -> None:
    assert job(75, state_of("preempted"), saves=7) == 1
    assert job.asked == ["requeue 12_1"]
    assert job.state == state_of("preempted")
    assert job.ends[0]["action"] == "requeue"


def test_a_job_by_itself_has_its_own_id(job: Job) -> None:
    (job.submission / "runs").write_text(f"{job.run}\n")
    job(75, state_of("preempted"), SLURM_ARRAY_JOB_ID="", SLURM_ARRAY_TASK_ID="")
    assert job.asked == ["requeue 14"]


@pytest.mark.parametrize(("status", "wrote"), [(137, state_of("running")), (1, None), (75, None)])
def test_a_job_that_died_without_a_word_is_queued_again(job: Job, status: int, wrote: dict[str, Any] | None) -> None:
    assert job(status, wrote) == 1
    assert job.asked == ["requeue 12_1"]


def test_a_failure_of_the_run_is_not_tried_again(job: Job) -> None:
    assert job(1, state_of("failed")) == 1
    assert job.asked == []
    assert job.state == state_of("failed")


def test_wrong_input_before_the_run_could_say_so(job: Job) -> None:
    (job.run / "state.json").write_text(json.dumps(state_of("preempted"), indent=1))  # an earlier start's
    assert job(2) == 1
    assert job.asked == []
    assert job.state["state"] == "failed"


def test_a_machines_failure_is_tried_again_and_twice_blamed_it_is_left_out(job: Job) -> None:
    job(1, state_of("failed", blamed="n2"), saves=7)
    assert job.asked == ["requeue 12_1"]
    assert job(1, state_of("failed", blamed="n2"), saves=8) == 1
    assert job.asked == ["requeuehold 12_1", "update JobId=12_1 ExcNodeList=n9,n2", "release 12_1"]
    assert job.ends[-1]["why"] == "without n2"


def test_a_cancelled_run_is_not_queued_again(job: Job) -> None:
    (job.run / "cancelled").touch()
    assert job(75, state_of("preempted")) == 1
    assert job.asked == []
    assert job.state["state"] == "cancelled"


def test_a_run_cancelled_meanwhile(job: Job) -> None:
    job(75, state_of("preempted"))
    (job.run / "cancelled").touch()
    assert job(75, state_of("preempted")) == 1
    assert (job.asked, job.state["state"]) == ([], "cancelled")


def test_scancel_is_a_cancellation(job: Job) -> None:
    assert job(75, state_of("preempted"), state="COMPLETING") == 1
    assert (job.asked, job.state["state"], job.state["reason"]) == ([], "cancelled", "scancel")


def test_what_slurm_queues_again_is_left_to_it(job: Job) -> None:
    assert job(75, state_of("preempted"), state="COMPLETING", restarts=1) == 1
    assert (job.asked, job.state["state"]) == ([], "preempted")
    assert job.ends[0]["why"] == "by SLURM"


def test_a_job_at_its_limit_that_saved_too_late_is_queued_again(job: Job) -> None:
    assert job(137, state_of("running"), saves=7, state="COMPLETING", limit=1) == 1
    assert job.asked == ["requeue 12_1"]


def test_restarts_are_bounded(job: Job) -> None:
    assert job(75, state_of("preempted"), saves=7, SLURM_RESTART_COUNT="5") == 1
    assert job.asked == []
    assert "5 restarts" in job.state["reason"]


def test_three_crashes_at_one_step_are_enough(job: Job) -> None:
    job.save(5)
    asked = [bool(job(137, state_of("running", time=time)) and job.asked) for time in range(3)]
    assert asked == [True, True, False]
    assert (job.state["state"], job.state["step"]) == ("failed", 5)
    with open(job.run / "attempts.jsonl", "a") as file:
        file.write('{"event":"submit","time":1}\n')
    job(137, state_of("running"))
    assert job.asked == ["requeue 12_1"]  # submitted again, it has three more


def test_a_checkpoint_between_crashes_counts_anew(job: Job) -> None:
    for step in range(1, 5):
        job(137, state_of("running", time=step), saves=step)
        assert job.asked == ["requeue 12_1"]


def test_preemptions_are_no_crashes(job: Job) -> None:
    for time in range(5):
        job(75, state_of("preempted", time=time))
        assert job.asked == ["requeue 12_1"]


def test_a_time_limit_too_short_for_a_step_is_noticed(job: Job) -> None:
    asked = [bool(job(75, state_of("preempted", time=time), limit=0) and job.asked) for time in range(3)]
    assert asked == [True, True, False]


def test_a_setup_that_lets_the_shell_end_early_changes_nothing(job: Job) -> None:
    assert job(75, state_of("preempted"), saves=7, setup="set -euo pipefail\nset +eu") == 1
    assert job.asked == ["requeue 12_1"]


def test_a_setup_that_ends_the_shell_is_told(job: Job) -> None:
    assert job(0, setup="exit 0") == 1
    assert (job.asked, job.state["state"]) == ([], "failed")
    assert "slurm.setup" in job.state["reason"]


def test_a_job_whose_run_was_submitted_again_leaves_it_alone(job: Job) -> None:
    job.note("0002")
    assert job(75, state_of("preempted")) == 1
    assert job.asked == []
    assert not (job.run / "attempts.jsonl").exists()
    job.note("0001")
    job(75, state_of("preempted"))
    assert job.asked == ["requeue 12_1"]


@pytest.mark.parametrize("earlier", [None, "0000"])
def test_a_job_that_submit_could_not_note_leaves_the_run_alone(
    job: Job, earlier: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    job.note(earlier) if earlier else (job.run / "job.json").unlink()
    before = sorted(path.name for path in job.run.iterdir())
    assert job(75, state_of("preempted")) == 1
    assert job.asked == [] and sorted(path.name for path in job.run.iterdir()) == before
    assert "packtrain submit was ended before it had noted job 12_1" in capfd.readouterr().err


def test_a_job_that_starts_before_it_is_noted_waits_for_that(job: Job) -> None:
    noted = job.run / "job.json"
    noted.rename(job.run / "soon")
    job.sleeps(f"mv {shlex.quote(str(job.run / 'soon'))} {shlex.quote(str(noted))}")
    assert job(0, state_of("done"), saves=7) == 0
    assert job.ends[0]["state"] == "done"


def test_a_cluster_that_does_not_requeue(job: Job) -> None:
    assert job(75, state_of("preempted"), requeue='echo "Job \\"12\\" can not be requeued" >&2; exit 1') == 1
    assert job.state["state"] == "failed"
    assert "can not be requeued" in job.state["reason"]
    assert job.ends[-1]["action"] == "give up"


@pytest.mark.parametrize("status", [0, 3])
def test_what_follows_notes_how_it_ended(job: Job, status: int) -> None:
    lines = [f"SUBMISSION={shlex.quote(str(job.submission))}", f"source {BATCH}", "check_not_cancelled"]
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    script = "\n".join([*lines, f"(exit {status})", "followed merge $?"])
    assert subprocess.run(["bash", "-c", script], env=environ, timeout=60).returncode == status
    assert read_followed(job.run) == ({"merge"} if status == 0 else set())
    with open(job.run / "attempts.jsonl", "a") as file:
        file.write('{"event":"start","time":1}\n')
    assert read_followed(job.run) == set()  # trained again, it is to be merged again

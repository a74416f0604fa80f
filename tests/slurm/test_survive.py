"""Runs that are stopped, preempted, requeued, cancelled or lose a node: they go on, or end and say why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from runs import SAVE_EVERY, Submitter, assert_uninterrupted

# One task of a job has a GPU whose memory runs out.
RUNS_OUT = """
import os
if "SLURM_STEP_ID" in os.environ and os.environ["SLURM_PROCID"] == "{rank}":
    import torch
    from trainer.loss import PackedCausalLM
    forward = PackedCausalLM.forward
    def limited(self, batch):
        if self.training and batch.num_tokens > {limit}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return forward(self, batch)
    PackedCausalLM.forward = limited
"""


def test_two_nodes_with_two_tasks_each_and_what_follows(
    cluster: Cluster, submit: Submitter, reference: dict[int, float]
) -> None:
    run = submit(cluster, "--gpus-per-node", "2", "--then", "merge,verify,evaluate")
    run.wait_for_end()
    assert_uninterrupted(run, reference)
    assert [event["nodes"] for event in run.events("start")] == ["n[1-2]"]
    assert {file.name for file in run.run.logs.glob("*.log")} == {f"rank_{rank}.log" for rank in range(4)}
    last = run.job["then"][-1]["job_id"]
    cluster.wait_until(lambda: cluster.job(last)["JobState"] == "COMPLETED", 120, "merged, verified and evaluated")
    states = {one["command"]: cluster.job(one["job_id"]) for one in run.job["then"]}
    assert [job["Partition"] for job in states.values()] == ["cpu", "cpu", "gpu"]
    assert (run.run.merged / "model.safetensors").exists()
    assert json.loads((run.path / "evaluation.json").read_text())[0]["loss"] > 0


def test_time_limit(cluster: Cluster, submit: Submitter, reference: dict[int, float]) -> None:
    # Answers make the run longer than a job, however fast the machine is.
    slow = {"every_steps": 1, "samples": [f"Repeat {letter} b c d." for letter in "abcd"], "max_new_tokens": 64}
    run = submit(cluster, slurm={"time": "1"}, eval=slow)
    run.wait_for_end(400)
    assert_uninterrupted(run, reference)
    ends = run.events("end")
    assert len(ends) >= 2
    assert [end["action"] for end in ends] == ["requeue"] * (len(ends) - 1) + ["finish"]
    assert {end["state"] for end in ends[:-1]} == {"preempted"}
    assert "SIGUSR2" in run.output()


@pytest.mark.parametrize("which", ["cluster", "plain_cluster"])
def test_preemption(which: str, submit: Submitter, reference: dict[int, float], request: pytest.FixtureRequest) -> None:
    """By a job of a higher partition; with SLURM's user signal and accounting, and with neither."""
    cluster = request.getfixturevalue(which)
    run = submit(cluster)
    run.wait_for_step(SAVE_EVERY + 5)
    urgent = cluster.submit("sleep 8", "--partition=urgent", "--nodes=4", "--exclusive")
    cluster.wait_for(urgent, "COMPLETED", 90)
    run.wait_for_end()
    assert_uninterrupted(run, reference)
    first, *_ = run.events("end")
    assert (first["state"], first["action"]) == ("preempted", "requeue")
    assert first["step"] == run.events("start")[1]["step"]  # the step it stopped at was saved
    assert ("SIGUSR2" if which == "cluster" else "SIGTERM") in run.output()


def test_requeued_by_an_administrator(cluster: Cluster, submit: Submitter, reference: dict[int, float]) -> None:
    run = submit(cluster)
    run.wait_for_step(SAVE_EVERY + 5)
    before = run.last_step()
    cluster.run("scontrol", "requeue", run.job_id)
    run.wait_for_end()
    assert_uninterrupted(run, reference)
    assert run.events("start")[1]["restart"] == 1
    assert run.events("start")[1]["step"] >= before  # TERM came before KILL


def test_a_killed_rank_is_tried_again_and_its_node_excluded(
    cluster: Cluster, submit: Submitter, reference: dict[int, float]
) -> None:
    run = submit(cluster)
    for _ in range(2):
        seen = len(run.events("end"))
        run.wait_for_step(run.last_step() + SAVE_EVERY + 5, 120)
        run.kill_rank(1)
        run.wait_for(lambda seen=seen: len(run.events("end")) > seen, 90, "the end of the start")
    run.wait_for_end()
    assert_uninterrupted(run, reference)
    assert (run.path / "blamed").read_text().split() == ["n2", "n2"]
    assert "n2" not in run.events("start")[-1]["nodes"]
    assert [end["why"] for end in run.events("end")] == ["", "without n2", ""]


def test_memory_that_runs_out_is_tried_again_with_less(
    cluster: Cluster, submit: Submitter, slurm_toy: dict[str, Any]
) -> None:
    limit = 2 * slurm_toy["data"]["pack_length"]
    (submit.folder / "sitecustomize.py").write_text(RUNS_OUT.format(rank=1, limit=limit))
    setup = [f"export PYTHONPATH=$PYTHONPATH:{submit.folder}"]
    sizes = {"micro_batch": "auto", "recompute": "none", "global_batch": {"rows": 8}, "max_steps": 10}
    run = submit(cluster, slurm={"setup": setup}, train=sizes)
    run.wait_for_end()
    assert [(end["state"], end["action"]) for end in run.events("end")] == [
        ("preempted", "requeue"),
        ("done", "finish"),
    ]
    assert not (run.path / "blamed").exists() and len(run.steps()) == 10
    assert re.search(
        "rank 1 on host n2 .* out of memory with .*(.|\n)*memory ran out with .*: takes less", run.output()
    )


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_lost_node(node: str, cluster: Cluster, submit: Submitter, reference: dict[int, float]) -> None:
    """What runs on it runs on for a while, rank 0 on n1 too, which holds the run dir's lock."""
    run = submit(cluster)
    run.wait_for_step(SAVE_EVERY + 5)
    cluster.cut_link(node)
    run.wait_for(lambda: len(run.events("start")) > 1, 150, "another start")
    cluster.mend_link(node)
    run.wait_for_end()
    assert_uninterrupted(run, reference)


def test_a_killed_slurmd(cluster: Cluster, submit: Submitter, reference: dict[int, float]) -> None:
    """Tasks run on without it; the run ends as if nothing had been, or begins again where it was."""
    run = submit(cluster)
    run.wait_for_step(SAVE_EVERY + 5)
    cluster.kill_slurmd("n1")
    cluster.start_slurmd("n1")
    run.wait_for_end()
    assert_uninterrupted(run, reference)


def test_scancel_is_no_preemption(cluster: Cluster, submit: Submitter) -> None:
    run = submit(cluster, "--then", "merge")
    run.wait_for_step(SAVE_EVERY + 5)
    cluster.run("scancel", run.job_id)
    run.wait_for_end(state="cancelled")
    assert run.run.read_state()["reason"] == "scancel"
    assert run.saved_steps()[-1] > SAVE_EVERY  # it saved on its way out
    merge = run.job["then"][0]["job_id"]
    cluster.wait_until(lambda: cluster.job(merge)["JobState"] == "CANCELLED", 30, "what follows is cancelled")


def test_a_chain_whose_middle_fails_goes_on_from_there(cluster: Cluster, submit: Submitter) -> None:
    asked: dict[str, Any] = {"train": {"max_steps": 100}}
    run = submit(cluster, "--nodes", "1", "--then", "merge,verify,report", **asked)
    run.wait_for_step(1)
    (run.path / "merged").write_text("in the way")
    run.wait_for_end()
    merge, verify, report = (one["job_id"] for one in run.job["then"])
    cluster.wait_until(lambda: cluster.job(report)["JobState"] == "CANCELLED", 90, "the chain's end")
    assert cluster.job(merge)["JobState"] == "FAILED"
    assert cluster.job(verify)["JobState"] == "CANCELLED"
    assert run.state == "done"

    (run.path / "merged").unlink()
    submit(cluster, "--nodes", "1", "--then", "merge,verify,report", **asked)
    last = run.job["then"][-1]["job_id"]
    assert last != report
    cluster.wait_until(lambda: cluster.job(last)["JobState"] == "COMPLETED", 180, "the chain's end")
    assert (run.run.merged / "model.safetensors").exists() and run.run.report.exists()
    assert [(end["command"], end["status"] == 0) for end in run.events("followed")] == [
        ("merge", False),
        *((command, True) for command in ("merge", "verify", "report")),
    ]
    assert len(run.events("start")) == 1  # no GPU was asked for again


def test_wrong_data_found_by_the_job_are_not_tried_again(
    cluster: Cluster, submit: Submitter, slurm_toy: dict[str, Any]
) -> None:
    run = submit(
        cluster, "--nodes", "1", slurm={"setup": [f"rm -r {submit.folder}/copy"]}, **_own_rows(submit, slurm_toy)
    )
    run.wait_for_end(state="failed")
    assert [(end["action"], end["state"]) for end in run.events("end")] in (
        [("give up", "failed")],
        [("finish", "failed")],
    )
    assert "rows.jsonl" in run.output()


def _own_rows(submit: Submitter, slurm_toy: dict[str, Any]) -> dict[str, Any]:
    source = dict(slurm_toy["data"]["train"][0])
    copy = submit.folder / "copy" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(source["path"]).read_bytes())
    return {"data": {"train": [source | {"path": str(copy)}]}}


def test_a_run_that_always_crashes_is_given_up(cluster: Cluster, submit: Submitter) -> None:
    run = submit(cluster, "--nodes", "1", slurm={"python": "false"})
    run.wait_for_end(state="failed")
    assert [end["action"] for end in run.events("end")] == ["requeue", "requeue", "give up"]
    assert "3 starts in a row" in run.run.read_state()["reason"]

"""The jobs of runs: which they are, by ``job.json``, and what SLURM says of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cluster import cluster_name
from slurm.history import read_job
from slurm.queue import JobState, job_states


@dataclass(frozen=True)
class Answer:
    """What SLURM said a moment ago.

    Attributes:
        states: of the jobs it was asked for, by their ids.
        cluster: whose jobs these are; empty where nobody tells.
    """

    states: Mapping[str, JobState]
    cluster: str

    def of(self, job: Mapping[str, Any], job_id: str) -> JobState:
        """The state of a job of the submission `job`. A job of another cluster, which may have a number that a job
        here has too, cannot be asked, nor one that was submitted since then."""
        if is_elsewhere(job, self.cluster):
            reason = f"submitted on cluster {job['cluster']}, and this host's is {self.cluster}"
            return JobState(job_id, reason=reason, answered=False)
        return self.states.get(job_id) or JobState(job_id, reason="it was submitted this moment", answered=False)


def ask(run_dirs: Iterable[Path]) -> Answer:
    """Asks SLURM, once, for the jobs of these runs and those that follow them."""
    jobs = [job for run_dir in run_dirs if (job := read_job(run_dir))]
    states = job_states(job_id for job in jobs for job_id in (job["job_id"], *follower_ids(job)))
    answered = any(state.answered for state in states.values())
    return Answer(states, cluster_name() if answered and any(job.get("cluster") for job in jobs) else "")


def follower_ids(job: Mapping[str, Any]) -> list[str]:
    """Of the jobs that follow a run's."""
    return [str(follower["job_id"]) for follower in job.get("then", [])]


def is_elsewhere(job: Mapping[str, Any], cluster: str) -> bool:
    """Whether a submission is another cluster's; not, where one of both names is unknown."""
    return bool(cluster and job.get("cluster")) and job["cluster"] != cluster

"""The cluster that these tests share. Where it cannot be, they say why and skip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, find_missing
from runs import Submitter, toy

_started: list[Cluster] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interruptions", type=int, default=20, help="of test_soak.py")
    parser.addoption("--seed", type=int, default=0, help="of test_soak.py")


@pytest.fixture(scope="session")
def _slurm() -> None:
    missing = find_missing()
    if missing:
        pytest.skip(f"no SLURM for the tests here: {missing}")


@pytest.fixture(scope="session")
def shared_cluster(_slurm: None) -> Iterator[Cluster]:
    """One cluster for all tests, with accounting and `preempt_send_user_signal`; a test asks for `cluster`."""
    yield from _keep(Cluster())


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster; after the test its jobs are cancelled and all nodes are idle again."""
    yield shared_cluster
    shared_cluster.reset()


@pytest.fixture(scope="session")
def shared_plain_cluster(_slurm: None) -> Iterator[Cluster]:
    yield from _keep(Cluster(preempt_send_user_signal=False, accounting=False))


@pytest.fixture
def plain_cluster(shared_plain_cluster: Cluster) -> Iterator[Cluster]:
    """As `cluster`, as SLURM is by default: no accounting, and no user signal before a preemption."""
    yield shared_plain_cluster
    shared_plain_cluster.reset()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Adds the end of the daemons' and jobs' logs to the report of a failed test."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.failed:
        report.sections += [(f"logs of {cluster.folder.name}", cluster.tail_logs()) for cluster in _started]


@pytest.fixture(scope="session")
def slurm_toy(toy_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe that these tests submit, as plain data."""
    from launch.demo import chat_rows, write_jsonl

    return toy(toy_model_dir, write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", chat_rows(400, seed=2)))


@pytest.fixture
def submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slurm_toy: dict[str, Any]) -> Submitter:
    """`packtrain submit` of the toy recipe: ``submit(cluster, "--nodes", "1", train={"max_steps": 20})``."""
    return Submitter(tmp_path, monkeypatch, slurm_toy)


@pytest.fixture(scope="session")
def reference(slurm_toy: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Loss by step of the toy recipe, trained by one process that nothing interrupts."""
    from trainer.config import RunConfig
    from trainer.metrics.trackers import read_metrics
    from trainer.run import train

    folder = tmp_path_factory.mktemp("reference") / "run"
    train(RunConfig.model_validate(slurm_toy), folder)
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "step"}


def _keep(cluster: Cluster) -> Iterator[Cluster]:
    with cluster:
        _started.append(cluster)
        yield cluster
        _started.remove(cluster)

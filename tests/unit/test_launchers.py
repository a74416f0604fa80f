"""Which process this is, from environments that real launchers made, and what accelerate's settings do to a recipe."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.train import choose_num_processes
from trainer import launcher_settings
from trainer.config import RunConfig
from trainer.errors import UserError
from trainer.launcher_settings import adopt_launcher
from trainer.launchers import World, expand_tasks_per_node, first_host, host_name, read_world, visible_gpus

# As printed by processes that torchrun 2.13, accelerate 1.15 and SLURM 22.05 started.
TORCHRUN = {
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "39853",
    "RANK": "1",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "2",
}
ACCELERATE = {
    **TORCHRUN,
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
ACCELERATE_FSDP = {
    **ACCELERATE,
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_VERSION": "2",
}
ACCELERATE_DEEPSPEED = {
    **TORCHRUN,
    "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,offload_optimizer_device,offload_param_device,zero3_init_flag",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_DEEPSPEED": "true",
}
ACCELERATE_ALONE = {  # `accelerate launch --cpu --num_processes 2` starts this one process
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_CPU": "True",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1",
}
SBATCH = {  # the batch script's own shell: one process, whatever SLURM_NTASKS says
    "SLURM_JOBID": "2",
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "node[0-1]",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASK_PID": "18226",
}
SALLOC = {
    "SLURM_JOBID": "3",
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SRUN = {  # task 3 of `srun -N2 --ntasks-per-node=2`
    "SLURM_GTIDS": "2,3",
    "SLURM_JOBID": "1",
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "node[0-1]",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3",
    "SLURM_SRUN_COMM_HOST": "127.0.0.1",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# Rank 1 of `srun --ntasks=2` inside that batch job: SLURM spread it over the nodes, SLURM_NTASKS_PER_NODE is stale.
SRUN_IN_SBATCH = {
    **SBATCH,
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_SRUN_COMM_HOST": "127.0.0.1",
    "SLURM_STEP_ID": "7",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_TASKS_PER_NODE": "1(x2)",
}


@pytest.mark.parametrize(
    ("environ", "world"),
    [
        ({}, World()),
        ({"WORLD_SIZE": "1"}, World()),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, World()),
        (TORCHRUN, World(1, 2, 1, 2, "localhost", 39853)),
        (ACCELERATE, World(1, 2, 1, 2, "127.0.0.1", 29500)),
        (
            # deepspeed's launcher, by which accelerate starts several hosts
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1"}
            | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
            World(5, 8, 1, 4, "10.0.0.1", 29500),
        ),
        ({**ACCELERATE_ALONE, "MASTER_ADDR": ""}, World()),
        (SBATCH, World()),
        (SALLOC, World()),
        ({**SALLOC, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World()),
        (SRUN, World(3, 4, 1, 2, "node0", 20007)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, World(3, 4, 1, 2, "10.0.0.1", 1234)),
        (SRUN_IN_SBATCH, World(1, 2, 0, 1, "node0", 20021)),
        ({**SRUN, **TORCHRUN}, World(1, 2, 1, 2, "localhost", 39853)),  # torchrun started by srun
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "node0"},
            World(3, 4, 3, 4, "127.0.0.1", 20007),
        ),
    ],
)
def test_the_world_as_launchers_say_it(environ: dict[str, str], world: World) -> None:
    assert read_world(environ) == world


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"WORLD_SIZE": "4"}, ["RANK: is not set, although WORLD_SIZE=4", "torchrun"]),
        ({"RANK": "0"}, ["WORLD_SIZE: is not set, although RANK=0"]),
        ({**TORCHRUN, "RANK": "2"}, ["rank 2 of 2"]),
        ({**TORCHRUN, "RANK": "-1"}, ["RANK: '-1'", "a number from 0"]),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, ["rank 1 of 2, on its host 0 of 2", "count up host by host"]),
        ({**TORCHRUN, "MASTER_ADDR": ""}, ["MASTER_ADDR: is not set", "RANK=1"]),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ["MASTER_PORT: 'http'"]),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"}, ["LOCAL_WORLD_SIZE: is not set"]),
        ({**TORCHRUN, "WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"}, ["3 processes on 2 hosts", "--nproc-per-node"]),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, ["3 processes on 1 host, 2 of them"]),
        (ACCELERATE_ALONE, ["RANK, WORLD_SIZE: not set", "num_processes", "packtrain train RECIPE --gpus N"]),
        (
            {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3,1"},
            ["SLURM_STEP_TASKS_PER_NODE: nodes run 3, 1 tasks", "srun --ntasks-per-node=N"],
        ),
        ({**SRUN, "SLURM_GTIDS": "1,3"}, ["SLURM_GTIDS: this node runs tasks 1,3", "srun --distribution=block"]),
        ({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_GTIDS": ""}, ["--distribution=block"]),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": "", "SLURM_NODELIST": ""}, ["SLURM_STEP_NODELIST"]),
    ],
)
def test_half_set_and_contradictory_environments_are_refused(environ: dict[str, str], says: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read_world(environ)
    assert all(text in str(error.value) for text in says), error.value


def test_all_tasks_of_a_step_find_the_same_door() -> None:
    tasks = [
        {**SRUN, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2)}
        for rank in range(4)
    ]
    worlds = [read_world(task) for task in tasks]
    assert {(world.master_addr, world.master_port) for world in worlds} == {("node0", 20007)}
    assert [world.rank for world in worlds] == [0, 1, 2, 3]
    assert read_world({**SRUN, "SLURM_STEP_ID": "1"}).master_port != 20007
    assert 1024 < read_world({**SRUN, "SLURM_JOB_ID": "98765432"}).master_port < 32768


def test_a_job_that_is_queued_again_meets_at_another_door() -> None:
    """A node that was lost may still run the processes of the start before."""
    starts = [read_world({**SRUN, "SLURM_RESTART_COUNT": str(restart)}).master_port for restart in range(100)]
    neighbours = {
        read_world({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(1, 20)
        for step in range(3)
    }
    assert len(set(starts)) == 100 and starts[0] == 20007
    assert not neighbours & set(starts[1:10])
    assert all(20000 <= port < 32000 for port in starts)


def test_a_host_has_the_name_that_its_cluster_calls_it() -> None:
    assert host_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert host_name({}) == socket.gethostname()


@pytest.mark.parametrize("environ", [SBATCH, SALLOC])
def test_a_job_of_many_tasks_that_starts_one_process_is_told_so(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    read_world(environ)
    assert "SLURM gave 4 tasks" in caplog.text and "srun python -m trainer" in caplog.text


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node0", "node0"),
        ("n[1-3,7],gpu05", "n1"),
        ("n[01-03]", "n01"),
        ("gpu05,n[1-3]", "gpu05"),
        ("rack[1-2]n[04,07-09],x", "rack1n04"),
        ("a-b-[7]", "a-b-7"),
        ("n[3-4]-ib,login", "n3-ib"),
    ],
)
def test_rank_0_runs_on_the_list_s_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_per_node() -> None:
    assert expand_tasks_per_node("4(x2),2") == [4, 4, 2]
    assert expand_tasks_per_node("8") == [8]
    with pytest.raises(UserError, match="numbers such as"):
        expand_tasks_per_node("4x2")


@pytest.mark.parametrize(
    ("chosen", "count"),
    [
        (None, 4),
        ("", 0),
        ("0,1", 2),
        (" 3, 2 ", 2),
        ("-1", 0),
        ("0,7,1", 1),
        ("0,0", 1),
        ("NoDevFiles", 0),
        ("GPU-1c2f,GPU-9b1e,GPU-3a44", 3),
    ],
)
def test_cuda_visible_devices_is_counted_as_cuda_does(chosen: str | None, count: int) -> None:
    assert visible_gpus(4, chosen) == count


# packtrain train --gpus


@pytest.mark.parametrize(
    ("asked", "num_gpus", "kind", "started"),
    [
        (None, 0, "auto", 1),
        (None, 8, "auto", 8),
        (None, 8, "single", 1),
        (2, 8, "fsdp2", 2),
        (1, 8, "single", 1),
        (3, 0, "ddp", 3),
    ],
)
def test_one_process_a_gpu(
    asked: int | None, num_gpus: int, kind: str, started: int, toy_recipe: Callable[..., RunConfig]
) -> None:
    assert choose_num_processes(toy_recipe(strategy={"kind": kind}), asked, num_gpus) == started


@pytest.mark.parametrize(
    ("asked", "num_gpus", "kind", "says"),
    [
        (9, 8, "auto", "--gpus: 9; this host has 8.*\n  allowed: 1 to 8"),
        (0, 8, "auto", "--gpus: 0"),
        (2, 8, "single", "strategy.kind is single"),
    ],
)
def test_more_processes_than_gpus_or_than_the_strategy_takes_are_refused(
    asked: int, num_gpus: int, kind: str, says: str, toy_recipe: Callable[..., RunConfig]
) -> None:
    with pytest.raises(UserError, match=says):
        choose_num_processes(toy_recipe(strategy={"kind": kind}), asked, num_gpus)


def test_a_rehearsal_on_the_cpu_counts_no_gpus(
    toy_recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch import train
    from trainer import run

    started = list[RunConfig]()
    monkeypatch.setattr(train, "count_gpus", lambda environ: 8)
    monkeypatch.setattr(train, "_run_several", pytest.fail)
    monkeypatch.setattr(run, "train", lambda config, run_dir: started.append(config))
    train.train(toy_recipe_file(train={"device": "cpu"}), run_dir=tmp_path / "run")
    assert started[0].train.device == "cpu"


# accelerate's settings

WORLD = World(1, 2, 1, 2, "127.0.0.1", 29500)
TWO_HOSTS = World(3, 4, 1, 2, "10.0.0.1", 29500)
FULL = {"adapter": None, "quantization": None}


def settings(config: RunConfig) -> dict[str, Any]:
    kinds = {name: getattr(config.strategy, name) for name in ("kind", "offload", "reshard", "shard_size")}
    return {**kinds, "recompute": config.train.recompute, "clip": config.optim.max_grad_norm}


@pytest.mark.parametrize(
    ("environ", "world", "adopted"),
    [
        ({}, WORLD, {}),
        (TORCHRUN, WORLD, {}),
        (ACCELERATE, WORLD, {}),
        ({**ACCELERATE_FSDP, "ACCELERATE_USE_FSDP": "false"}, WORLD, {}),
        (ACCELERATE_FSDP, WORLD, {"kind": "fsdp2"}),
        ({**ACCELERATE_FSDP, "FSDP_VERSION": "1"}, WORLD, {"kind": "fsdp2"}),
        ({**ACCELERATE_FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, WORLD, {"kind": "fsdp2", "offload": "all"}),
        ({**ACCELERATE_FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, WORLD, {"kind": "fsdp2", "reshard": False}),
        ({**ACCELERATE_FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, WORLD, {"kind": "fsdp2", "recompute": "full"}),
        (
            {**ACCELERATE_FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
            WORLD,
            {"kind": "fsdp2", "reshard": False},
        ),
        (
            {**ACCELERATE_FSDP, "FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"},
            WORLD,
            {"kind": "fsdp2", "reshard": False},
        ),
        ({**ACCELERATE_FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "3"}, WORLD, {"kind": "ddp"}),
        (
            {**ACCELERATE_FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
            TWO_HOSTS,
            {"kind": "fsdp2", "shard_size": 2},
        ),
        (
            {**ACCELERATE_FSDP, "FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"},
            WORLD,
            {"kind": "fsdp2"},
        ),
        (
            {**ACCELERATE_FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1"}
            | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"},
            TWO_HOSTS,
            {"kind": "fsdp2", "shard_size": 2},
        ),
        (ACCELERATE_DEEPSPEED, WORLD, {"kind": "zero3"}),
        ({**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, WORLD, {"kind": "zero1"}),
        ({**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, WORLD, {"kind": "ddp"}),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, WORLD, {"kind": "zero2"}),  # accelerate's default stage
        (
            {**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            WORLD,
            {"kind": "zero3", "offload": "optimizer"},
        ),
        (
            {**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
            | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            WORLD,
            {"kind": "zero3", "offload": "all"},
        ),
        ({**ACCELERATE_DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.3"}, WORLD, {"kind": "zero3", "clip": 0.3}),
        ({**ACCELERATE_DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.0"}, WORLD, {"kind": "zero3", "clip": None}),
        ({**ACCELERATE_DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"}, WORLD, {"kind": "zero3"}),
    ],
)
def test_a_silent_recipe_takes_what_accelerate_says(
    environ: dict[str, str], world: World, adopted: dict[str, Any], toy_recipe: Callable[..., RunConfig]
) -> None:
    config = toy_recipe(**FULL, train={"recompute": "auto"})
    taken = adopt_launcher(config, environ, world)
    assert settings(taken) == settings(config) | adopted
    rest = {"strategy", "train", "optim"}
    assert taken.model_dump(exclude=rest) == config.model_dump(exclude=rest)


@pytest.mark.parametrize(
    ("recipe", "environ", "says"),
    [
        (
            {"strategy": {"kind": "zero3"}},
            ACCELERATE_FSDP,
            [
                "strategy.kind: zero3",
                "fsdp2",
                "ACCELERATE_USE_FSDP=true",
                "distributed_type: FSDP",
                "fix: set strategy.kind",
            ],
        ),
        ({"strategy": {"kind": "single"}}, ACCELERATE_FSDP, ["strategy.kind: single", "ACCELERATE_USE_FSDP"]),
        (
            {"strategy": {"kind": "zero2"}},
            ACCELERATE_DEEPSPEED,
            ["strategy.kind: zero2", "zero3", "ACCELERATE_DEEPSPEED_ZERO_STAGE=3", "deepspeed_config.zero_stage"],
        ),
        (
            {"strategy": {"kind": "fsdp2", "offload": "none"}},
            {**ACCELERATE_FSDP, "FSDP_OFFLOAD_PARAMS": "true"},
            ["strategy.offload: none", "FSDP_OFFLOAD_PARAMS=true"],
        ),
        (
            {"train": {"recompute": "none"}},
            {**ACCELERATE_FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["train.recompute: none", "FSDP_ACTIVATION_CHECKPOINTING=true"],
        ),
        (
            {"optim": {"max_grad_norm": 1.0}},
            {**ACCELERATE_DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "0.3"},
            ["optim.max_grad_norm: 1.0", "ACCELERATE_GRADIENT_CLIPPING=0.3"],
        ),
        (
            {"optim": {"name": "adamw_8bit"}},
            ACCELERATE_DEEPSPEED,
            ["ACCELERATE_DEEPSPEED_ZERO_STAGE=3", "does not go with this recipe", "adamw_8bit"],
        ),
        (
            {},
            {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"},
            ["model.dtype: float32", "bf16", "ACCELERATE_MIXED_PRECISION=bf16", "model.dtype: bfloat16"],
        ),
        (
            {"model": {"dtype": "bfloat16"}},
            {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp8"},
            ["ACCELERATE_MIXED_PRECISION=fp8", "fp8 is not done here"],
        ),
        (
            {"quantization": {"compute_dtype": "bfloat16"}, "adapter": {}},
            {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "fp16"},
            ["quantization.compute_dtype: bfloat16", "fp16"],
        ),
        (
            {},
            {**ACCELERATE_DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "train.global_batch"],
        ),
        (
            {},
            {**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            ["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE=nvme", "cpu or none"],
        ),
        ({}, {**ACCELERATE_DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, ["ZERO_STAGE=4", "0, 1, 2 or 3"]),
        ({}, {**ACCELERATE, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, ["ACCELERATE_DYNAMO_BACKEND=INDUCTOR"]),
        ({}, {**ACCELERATE, "ACCELERATE_USE_MEGATRON_LM": "true"}, ["Megatron-LM is not used here"]),
        (
            {},
            {**ACCELERATE_FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            ["PARALLELISM_CONFIG_TP_SIZE=2", "parallelism_config_tp_size: 1"],
        ),
        (
            {},
            {**ACCELERATE_FSDP, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            ["FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=true"],
        ),
    ],
)
def test_a_contradiction_names_both(
    recipe: dict[str, Any], environ: dict[str, str], says: list[str], toy_recipe: Callable[..., RunConfig]
) -> None:
    with pytest.raises(UserError) as error:
        adopt_launcher(toy_recipe(**{**FULL, **recipe}), environ, WORLD)
    assert all(text in str(error.value) for text in says), error.value


@pytest.mark.parametrize(
    ("recipe", "environ"),
    [
        ({"strategy": {"kind": "zero3"}}, ACCELERATE_DEEPSPEED),
        ({"strategy": {"kind": "fsdp2", "offload": "optimizer"}}, ACCELERATE_FSDP),  # off is no word against it
        ({"strategy": {"kind": "fsdp2"}}, ACCELERATE),  # plain processes: the recipe says what they do
        ({"model": {"dtype": "bfloat16"}}, {**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"}),
    ],
)
def test_agreement_leaves_the_recipe_as_it_is(
    recipe: dict[str, Any], environ: dict[str, str], toy_recipe: Callable[..., RunConfig]
) -> None:
    config = toy_recipe(**{**FULL, **recipe})
    assert adopt_launcher(config, environ, WORLD) == config


@pytest.fixture
def deepspeed_file(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """Writes a DeepSpeed config and gives accelerate's environment for it."""

    def write(config: Any) -> dict[str, str]:
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        names = {"ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}
        return {**TORCHRUN, **names, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}

    yield write


@pytest.mark.parametrize(
    ("file", "kind", "offload"),
    [
        ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": "auto"}, "zero2", "none"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "zero3", "all"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "zero1", "optimizer"),
        ({"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}, "ddp", "none"),
    ],
)
def test_a_deepspeed_config_file_is_read(
    file: dict[str, Any], kind: str, offload: str, deepspeed_file: Any, toy_recipe: Callable[..., RunConfig]
) -> None:
    strategy = adopt_launcher(toy_recipe(**FULL), deepspeed_file(file), WORLD).strategy
    assert (strategy.kind, strategy.offload) == (kind, offload)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
            ["model.dtype: float32", "bf16.enabled: true in"],
        ),
        ({"gradient_accumulation_steps": 8}, ["gradient_accumulation_steps: 8 in", "train.global_batch"]),
        ("{stage: 3", ["ACCELERATE_DEEPSPEED_CONFIG_FILE=", "cannot be read"]),
    ],
)
def test_a_deepspeed_config_file_that_contradicts_is_named(
    file: Any, says: list[str], deepspeed_file: Any, toy_recipe: Callable[..., RunConfig]
) -> None:
    with pytest.raises(UserError) as error:
        adopt_launcher(toy_recipe(**FULL), deepspeed_file(file), WORLD)
    assert all(text in str(error.value) for text in says), error.value


def test_a_cpu_that_accelerate_asks_for_is_not_a_gpu(
    monkeypatch: pytest.MonkeyPatch, toy_recipe: Callable[..., RunConfig]
) -> None:
    environ = {**ACCELERATE_ALONE, "MASTER_ADDR": ""}
    monkeypatch.setattr(launcher_settings, "count_gpus", lambda environ: 0)
    assert adopt_launcher(toy_recipe(), environ, World()) == toy_recipe()
    monkeypatch.setattr(launcher_settings, "count_gpus", lambda environ: 1)
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=true"):
        adopt_launcher(toy_recipe(), environ, World())

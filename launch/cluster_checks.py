"""What `packtrain doctor` looks at of the SLURM cluster that this host belongs to, and what it means for a run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from launch.checks import Check, Status
from slurm.cluster import ClusterFacts, Partition, SlurmError, read_cluster, read_config, run_slurm
from slurm.status import duration
from trainer.config import SlurmConfig
from trainer.errors import PacktrainError

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "sinfo", "scontrol")
NO_CLUSTER = "Could not establish a configuration source"  # neither slurm.conf nor a server that gives it
LEAST_GRACE = 30  # seconds; a checkpoint of an adapter takes some, one of a full fine-tune more
SECONDS_TO_PLACE = 30.0


class ClusterChecks:
    """Asks the cluster once and keeps what it says.

    Attributes:
        facts: partitions and nodes; None where there is no SLURM, or none that answers.
    """

    def __init__(self, profile: Path | None) -> None:
        self.profile = profile
        self.facts: ClusterFacts | None = None
        self._config: dict[str, str] = {}
        self._slurm: SlurmConfig | None = None

    def check_commands(self) -> list[Check]:
        """SLURM's commands are there and slurmctld answers."""
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if len(missing) == len(COMMANDS):
            return [Check("SLURM", "not here", "no sbatch on PATH: runs are local (packtrain train)")]
        if missing:
            fix = "module load slurm, or add SLURM's bin folder to PATH"
            return [Check("SLURM", "failed", f"not on PATH: {', '.join(missing)}", fix)]
        try:
            self._config = read_config()
            self.facts = read_cluster()
        except SlurmError as error:
            if self.profile is None and NO_CLUSTER in error.stderr:
                found = "its commands are installed, and know of no cluster: runs are local (packtrain train)"
                return [Check("SLURM", "not here", found)]
            fix = "wait, or ask the cluster's administrators; scontrol ping tells which daemon is down"
            return [Check("SLURM", "failed", str(error), fix)]
        version, name = self._config.get("SLURM_VERSION", "?"), self._config.get("ClusterName", "?")
        nodes = f"{len(self.facts.nodes)} node{'s' * (len(self.facts.nodes) != 1)}"
        return [Check("SLURM", "ok", f"{version}, cluster {name}, {nodes}")]

    def check_profile(self) -> list[Check]:
        """The cluster's profile is valid and names what there is."""
        if self.profile is None:
            return []
        from trainer.recipe import load_profile

        name = "cluster profile"
        try:
            self._slurm = slurm = load_profile(self.profile)
        except PacktrainError as error:
            return [Check(name, "failed", str(error), f"correct {self.profile}")]
        wrong = []
        if self.facts:
            known = self.facts.partitions
            asked = {"partition": slurm.partition, "cpu_partition": slurm.cpu_partition}
            for field, names in asked.items():
                wrong += [
                    f"{field}: {one} is no partition here"
                    for one in (names or "").split(",")
                    if one not in known and one
                ]
            partition = known.get(slurm.partition or "") or (None if slurm.partition else self.facts.default)
            wrong += _compare(slurm, partition) if partition else []
        if wrong:
            return [Check(name, "failed", "; ".join(wrong), f"correct {self.profile}; partitions are listed below")]
        return [Check(name, "ok", f"{self.profile}: partition {slurm.partition or 'of the cluster'}")]

    def check_partition(self) -> list[Check]:
        """Where a job goes that names no partition, and for how long it may run."""
        if not self.facts:
            return []
        default = self.facts.default
        if default is None:
            given = self._slurm is not None and self._slurm.partition is not None
            fix = "set slurm.partition in the recipe or the cluster's profile"
            return [Check("default partition", "ok" if given else "warning", "there is none", "" if given else fix)]
        limit = (
            "no time limit" if default.max_minutes is None else f"at most {duration(60 * default.max_minutes)} a job"
        )
        found = f"{default.name}, {limit}, {default.gpus_per_node} GPU{'s' * (default.gpus_per_node != 1)} a node"
        if not default.is_up:
            return [Check("default partition", "warning", f"{found}; it is down at present", "name another one")]
        if not default.gpus_per_node:
            return [Check("default partition", "warning", found, "set slurm.partition to one with GPUs")]
        return [Check("default partition", "ok", f"{found}; longer runs go on in the next job")]

    def check_submit(self) -> list[Check]:
        """sbatch takes jobs from this host and this user."""
        if not self.facts:
            return []
        slurm = self._slurm
        asked = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos} if slurm else {}
        options = [f"--{name}={value}" for name, value in asked.items() if value]
        command = ["sbatch", "--test-only", "--nodes=1", "--time=1", "--output=/dev/null", *options, "--wrap=true"]
        try:
            run_slurm(*command, timeout=SECONDS_TO_PLACE)
        except SlurmError as error:
            said = " ".join(error.stderr.split()) or "it does not say why"
            fix = "name your partition and account in a cluster profile and give it by --cluster FILE"
            fix = f"correct {self.profile}" if slurm else fix
            return [Check("sbatch --test-only", "failed" if slurm else "warning", said, fix)]
        return [Check("sbatch --test-only", "ok", "a job of one minute would be taken")]

    def check_accounting(self) -> list[Check]:
        """sacct, which remembers jobs that slurmctld has forgotten."""
        if not self.facts:
            return []
        kept = duration(_seconds(self._config.get("MinJobAge", "300")))
        without = f"the end of a job is forgotten after {kept}; nothing packtrain does needs it"
        try:
            run_slurm("sacct", "--noheader", "--allocations", "--starttime=now")
        except PacktrainError as error:
            return [Check("accounting", "not here", f"{str(error).splitlines()[0]}: {without}")]
        return [Check("accounting", "ok", "sacct answers")]

    def check_requeue(self) -> list[Check]:
        """Whether a job may be queued again."""
        if not self.facts:
            return []
        by_default = self._config.get("JobRequeue", "1") == "1"
        found = (
            "by the cluster's default" if by_default else "JobRequeue=0 is the default; packtrain asks with --requeue"
        )
        wait = re.search(r"cred_expire=(\d+)", self._config.get("AuthInfo", ""))
        again = duration(int(wait[1]) if wait else 120)
        return [Check("requeue", "ok", f"{found}; a requeued job starts after some {again} at the earliest")]

    def check_preemption(self) -> list[Check]:
        """What a run gets to hear before it is preempted, and how long it then has."""
        if not self.facts:
            return []
        kind, mode = self._config.get("PreemptType", "preempt/none"), self._config.get("PreemptMode", "OFF")
        kill_wait = _seconds(self._config.get("KillWait", "30"))
        if kind.lower() in ("preempt/none", "(null)"):
            return [
                Check("preemption", "ok", f"jobs are not preempted; scancel leaves {kill_wait} s to save (KillWait)")
            ]
        rules = self._preemption_rules()
        modes = {name: (rule.get("PreemptMode") or mode) for name, rule in rules.items()}
        graces = {
            name: _seconds(rule.get("GraceTime", "0")) for name, rule in rules.items() if "OFF" not in modes[name]
        }
        sends = "preempt_send_user_signal" in self._config.get("SlurmctldParameters", "")
        signal = "USR2 and TERM" if sends else "TERM (no preempt_send_user_signal)"
        times = ", ".join(f"{name} {grace} s" for name, grace in graces.items()) or "no partition's jobs are preempted"
        found = (
            f"{kind.removeprefix('preempt/')}, {mode}: {signal}, then {kill_wait} s (KillWait) after GraceTime: {times}"
        )
        status: Status = "ok"
        fix = ""
        short = [name for name, grace in graces.items() if grace + kill_wait < LEAST_GRACE]
        if short:
            status = "warning"
            fix = f"a checkpoint that takes longer is lost in {', '.join(short)}: set checkpoint.every_steps low"
        if cancelled := [name for name in graces if "CANCEL" in modes[name]]:
            status = "warning"
            fix = (
                f"jobs preempted in {', '.join(cancelled)} are not queued again: packtrain submit goes on with the run"
            )
        return [Check("preemption", status, found, fix)]

    def _preemption_rules(self) -> dict[str, dict[str, str]]:
        """PreemptMode and GraceTime by partition."""
        text = run_slurm("scontrol", "show", "partition", "--oneliner")
        found = (dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines())
        return {fields["PartitionName"]: fields for fields in found if "PartitionName" in fields}


def _compare(slurm: SlurmConfig, partition: Partition) -> list[str]:
    """What a profile asks for and its partition does not have."""
    wrong = []
    # A profile that leaves gpus_per_node open has the field's default, which recipes are likely to change.
    if "gpus_per_node" in slurm.model_fields_set and slurm.gpus_per_node > partition.gpus_per_node:
        wrong.append(f"gpus_per_node: {slurm.gpus_per_node}; {partition.name} has {partition.gpus_per_node} a node")
    if slurm.gpu_type and slurm.gpu_type not in partition.gpu_types:
        known = ", ".join(sorted(partition.gpu_types)) or "GPUs without a type"
        wrong.append(f"gpu_type: {slurm.gpu_type}; {partition.name} has {known}")
    limit = partition.max_minutes
    if "time" in slurm.model_fields_set and limit is not None and slurm.minutes > limit:
        wrong.append(f"time: {slurm.time}; {partition.name} has at most {duration(60 * limit)}")
    return wrong


def _seconds(text: str) -> int:
    """30 of ``30 sec``."""
    found = re.match(r"\d+", text)
    return int(found[0]) if found else 0

"""A real SLURM on this machine, for as long as a test run: nodes in network namespaces, fake GPUs, accounting.

    python tests/slurm/cluster.py [COMMAND ...]     # runs a command (else a shell) beside a cluster, then stops it

How it leaves nothing behind: daemons, nodes and jobs are processes of one PID namespace. Its first process, the
guardian, waits for the end of a pipe that the starter holds. Once that is closed, however the starter died, the
guardian ends, the kernel kills all others of the namespace, and with them go network namespaces, bridge and mounts.
This machine has only one end of a veth pair, which the kernel removes together with the other end.

Daemons listen in namespaces of their own, so ports never collide; the name of that veth claims a subnet.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

COMMANDS = (
    *("slurmctld", "slurmd", "slurmdbd", "sbatch", "srun", "sacct", "munged", "mariadbd", "mariadb-install-db"),
    *("ip", "nsenter", "unshare", "mknod"),
)
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GPUS_PER_NODE = 4
CPUS_PER_NODE = 16

# Arguments: folder. First output: its process id as this machine sees it, for /proc is still this machine's.
GUARDIAN = """
set -e
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
echo head > /proc/sys/kernel/hostname
ip link set lo up
ip link add br0 type bridge
ip link set br0 up
echo $pid
cat > /dev/null || true
kill -KILL -1 || true
for try in 1 2 3 4 5; do rm -rf -- "$1" && break; sleep 0.1; done  # what is being killed may still write
"""

# Runs in the guardian's namespaces. Arguments: folder, subnet, then the nodes' names. Output: a process id a node.
# A node is a sleeping process with network, mount, UTS and IPC namespaces of its own; jobs reach it by its name.
MACHINES = """
set -e
folder=$1; subnet=$2; shift 2
ip link set host master br0 up
ip addr add $subnet.1/24 dev br0
mount --bind $folder/hosts /etc/hosts
last=10
for node; do
    last=$((last + 1))
    unshare --net --mount --uts --ipc sleep infinity < /dev/null > /dev/null 2>&1 &
    until grep -q sleep /proc/$!/comm; do sleep 0.01; done
    ip link add $node type veth peer name eth0 netns $!
    ip link set $node master br0 up
    nsenter -t $! --net --mount --uts --ipc sh -c "
        echo $node > /proc/sys/kernel/hostname
        mount -t tmpfs tmpfs /dev/shm
        ip link set lo up
        ip addr add $subnet.$last/24 dev eth0
        ip link set eth0 up"
    echo $!
done
"""

# `cred_expire`: a requeued job waits until its credentials expired, by default 2 minutes.
SLURM_CONF = """
ClusterName=lab
SlurmctldHost=head({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=200000
SlurmdParameters=config_overrides
{slurmctld_parameters}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MailProg=/bin/true
SlurmdTimeout=15
SlurmctldTimeout=60
InactiveLimit=0
PropagateResourceLimits=NONE
{accounting}
GresTypes=gpu
NodeName=n[1-4] NodeAddr={subnet}.[11-14] CPUs={cpus} RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=c1 NodeAddr={subnet}.15 CPUs={cpus} RealMemory=16000 State=UNKNOWN
PartitionName=gpu Nodes=n[1-4] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=cpu Nodes=c1 MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF
"""

ACCOUNTING = """
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={subnet}.1
AccountingStoragePass={folder}/munge/socket
AccountingStorageTRES=gres/gpu
"""

SLURMDBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=head
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""

MARIADB_OPTIONS = (
    *("--no-defaults", "--user=root", "--datadir=/dev/shm/db", "--innodb-buffer-pool-size=16M"),
    *("--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0", "--innodb-lock-wait-timeout=900"),
)


def find_missing() -> str | None:
    """What this machine lacks for a cluster, in words; None when it has all."""
    missing = [name for name in COMMANDS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() != 0:
        return "needs root"
    trial = "mount -t tmpfs tmpfs /mnt && mknod /mnt/gpu0 c 1 3 && ip link add type bridge"
    namespaces = ("--net", "--pid", "--fork", "--mount", "--uts", "--ipc")
    tried = subprocess.run(["unshare", *namespaces, "sh", "-c", trial], capture_output=True, text=True)
    return f"namespaces, devices or bridges are not allowed: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Nodes n1 to n4 with four fake GPUs each, c1 with none; partitions gpu (the default), urgent and cpu.

    A job of `urgent` preempts one of `gpu`, which then has `grace` seconds. With `preempt_send_user_signal` the signal
    of `sbatch --signal` comes at their start, else the job's steps get SIGTERM. Without `accounting` sacct fails, as on
    clusters that have none.
    """

    nodes = ("n1", "n2", "n3", "n4")
    cpu_node = "c1"

    def __init__(self, preempt_send_user_signal: bool = True, accounting: bool = True, grace: int = 30) -> None:
        self.preempt_send_user_signal = preempt_send_user_signal
        self.accounting = accounting
        self.grace = grace
        self.folder = Path(tempfile.mkdtemp(prefix="packtrain-slurm-"))
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self.link = ""
        self._link_number: str | None = None
        self._own_processes: set[int] = set()  # the nodes themselves
        self._guardian: subprocess.Popen[str] | None = None
        self._guardian_pid = ""
        self._machines: dict[str, str] = {}

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # Start and stop

    def start(self) -> None:
        """Returns when all nodes are idle; stops again when that fails.

        Raises:
            RuntimeError, TimeoutError: A daemon did not start; with the end of the logs.
        """
        try:
            self._start_guardian()
            self._write_files(self._start_machines())
            self._start_daemons()
        except BaseException as error:
            error.add_note(self.tail_logs())
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all processes of the cluster, those of jobs too, and removes its folder."""
        if self._guardian is not None:
            self._guardian.communicate()  # closes the pipe; then waits
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._link_number is not None:
            # by number: another cluster may take the name at once
            self.wait_until(lambda: _read_link_number(self.link) != self._link_number, 10, f"{self.link} is gone")

    def _start_guardian(self) -> None:
        namespaces = ["--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc", "--mount", "--propagation", "slave"]
        self._guardian = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", GUARDIAN, "guardian", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C is for the tests, which then stop the cluster
        )
        assert self._guardian.stdout
        self._guardian_pid = self._guardian.stdout.readline().strip()
        if not self._guardian_pid:
            raise RuntimeError("the cluster's namespaces could not be set up; what failed is on stderr")
        self.pid_namespace = os.readlink(f"/proc/{self._guardian_pid}/ns/pid")

    def _start_machines(self) -> str:
        """Joins this machine to the guardian's bridge and makes the nodes.

        Returns:
            The first three bytes of the subnet.
        """
        for number in range(256):  # 198.18.0.0/15 is set apart for tests of networks, RFC 2544
            self.link, subnet = f"packtrain{number}", f"198.18.{number}"
            link = ["ip", "link", "add", self.link, "type", "veth", "peer", "name", "host", "netns", self._guardian_pid]
            made = subprocess.run(link, capture_output=True, text=True)
            if "exists" not in made.stderr:
                break
        if made.returncode:
            raise RuntimeError(f"{link}: {made.stderr}")
        self._link_number = _read_link_number(self.link)
        subprocess.run(["ip", "addr", "add", f"{subnet}.254/24", "dev", self.link], check=True)
        subprocess.run(["ip", "link", "set", self.link, "up"], check=True)
        names = (*self.nodes, self.cpu_node)
        addresses = {"head": f"{subnet}.1", **{name: f"{subnet}.{11 + index}" for index, name in enumerate(names)}}
        hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        machines = self._inside("sh", "-c", MACHINES, "machines", str(self.folder), subnet, *names).stdout
        self._machines = dict(zip(names, machines.split(), strict=True))
        self._own_processes = {pid for name in names for pid in self.processes(name)}
        return subnet

    def _write_files(self, subnet: str) -> None:
        for name in ("munge", "run", "log", "state", *(f"spool/{node}" for node in self._machines)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        values = {
            **{"folder": self.folder, "subnet": subnet, "grace": self.grace},
            **{"cpus": CPUS_PER_NODE, "gpus": GPUS_PER_NODE},
        }
        parameters = "SlurmctldParameters=preempt_send_user_signal" if self.preempt_send_user_signal else ""
        accounting = ACCOUNTING.format(**values) if self.accounting else ""
        conf = SLURM_CONF.format(**values, slurmctld_parameters=parameters, accounting=accounting)
        (self.folder / "slurm.conf").write_text(conf)
        for gpu in range(GPUS_PER_NODE):  # null devices: SLURM hands them out, nobody opens them
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-4] Name=gpu File={self.folder}/gpu[0-{GPUS_PER_NODE - 1}]\n"
        )
        _write_private(self.folder / "slurmdbd.conf", SLURMDBD_CONF.format(folder=self.folder).encode())
        _write_private(self.folder / "munge" / "key", os.urandom(128))

    def _start_daemons(self) -> None:
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._inside("munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
        if self.accounting:
            self._start_accounting()
        self._inside("slurmctld", "-c")
        for node in self._machines:
            self.start_slurmd(node)
        self.wait_until(self.is_idle, 20, "all nodes are idle")

    def _start_accounting(self) -> None:
        # In memory: an fsync a transaction takes longer than all else.
        log = self.folder / "mariadb.log"
        self._inside(
            *("sh", "-c", f'"$@" > {log} 2>&1', "sh", "mariadb-install-db", *MARIADB_OPTIONS),
            *("--auth-root-authentication-method=normal", "--skip-test-db"),
        )
        # slurmdbd asks for the socket by mariadb's default; both see it there in the guardian's /dev/shm
        quiet = ("--skip-networking", "--performance-schema=off", "--skip-log-bin", "--socket=/dev/shm/mariadb")
        server = " ".join(("mariadbd", *MARIADB_OPTIONS, *quiet))
        self._inside("sh", "-c", f"{server} < /dev/null >> {log} 2>&1 &")
        self._inside("sh", "-c", "for i in $(seq 200); do [ -S /dev/shm/mariadb ] && break; sleep 0.05; done")
        self._inside("env", "MYSQL_UNIX_PORT=/dev/shm/mariadb", "slurmdbd")
        asked = ("sacctmgr", "-n", "show", "cluster")
        self.wait_until(lambda: self.run(*asked, check=False).returncode == 0, 15, "slurmdbd answers")

    def _inside(self, *argv: str, node: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command on the machine of the daemons, or on a node, with an environment of its own."""
        namespaces = ("--mount", "--net", "--uts", "--ipc")
        enter = ["nsenter", "-t", self._guardian_pid, "--pid", *namespaces]
        if node is not None:
            enter += ["nsenter", "-t", self._machines[node], *namespaces]
        environ = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "SLURM_CONF": self.environ["SLURM_CONF"]}
        done = subprocess.run(
            [*enter, *argv], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd="/", timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{argv} failed with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    # What a test does

    def run(
        self, *argv: str, check: bool = True, cwd: Path | None = None, environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the submitting host (this machine), with `environ` laid over the cluster's.

        Raises:
            RuntimeError: It failed, and `check` is set.
        """
        env = {**self.environ, **(environ or {})}
        done = subprocess.run(list(argv), env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
        if check and done.returncode:
            raise RuntimeError(f"{argv} failed with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def submit(self, script: str, *options: str) -> str:
        """Submits a shell script with sbatch's options; returns the job's id. Its output is in `tail_logs`."""
        path = self.folder / "script.sh"  # sbatch sends a copy
        path.write_text(f"#!/bin/bash\n{script}\n")
        output = f"--output={self.folder}/log/job-%j.out"
        return self.run("sbatch", "--parsable", output, *options, str(path)).stdout.strip()

    def kill_slurmd(self, node: str) -> None:
        """Kills a node's slurmd with SIGKILL. What runs there runs on, until a slurmd is back and tidies up."""
        self._inside("sh", "-c", f"kill -KILL $(cat {self.folder}/run/slurmd.{node}.pid)")

    def start_slurmd(self, node: str) -> None:
        """Starts a node's slurmd; it registers itself at once."""
        self._inside("slurmd", node=node)

    def cut_link(self, node: str) -> None:
        """Pulls a node's network cable; what runs there runs on."""
        self._inside("ip", "link", "set", node, "down")

    def mend_link(self, node: str) -> None:
        """Plugs the cable in again; the node registers itself at once."""
        self._inside("ip", "link", "set", node, "up")
        # slurmctld asks a node that is down again after a minute or later; a slurmd that rereads its files registers
        self._inside("sh", "-c", f"kill -HUP $(cat {self.folder}/run/slurmd.{node}.pid)", check=False)

    def jobs(self, job_id: str = "") -> list[dict[str, str]]:
        """`scontrol show job` as dicts, an array's tasks one by one; what slurmctld forgot is asked of sacct."""
        shown = self.run("scontrol", "show", "job", "-o", *([job_id] if job_id else []), check=False)
        found = [_parse_fields(line) for line in shown.stdout.splitlines() if line.startswith("JobId=")]
        if found or not self.accounting or not job_id:
            return found
        names = ("JobId", "JobName", "JobState", "NodeList", "ExitCode")
        columns = "JobID,JobName,State,NodeList,ExitCode"
        table = self.run("sacct", "-X", "-n", "-P", "-j", job_id, "-o", columns).stdout
        found = [dict(zip(names, line.split("|"), strict=True)) for line in table.splitlines()]
        return [{**job, "JobState": job["JobState"].split()[0]} for job in found]  # "CANCELLED by 0"

    def job(self, job_id: str) -> dict[str, str]:
        """The one job (or task `12_3` of an array) of this id."""
        found = self.jobs(job_id)
        if len(found) != 1:
            raise RuntimeError(f"job {job_id}: {len(found)} found")
        return found[0]

    def wait_for(self, job_id: str, states: str | Collection[str], timeout: float) -> dict[str, str]:
        """Waits until the job's state is (one of) `states`; returns the job.

        Raises:
            TimeoutError: With the job as it is then.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} not {wanted} in {timeout} s: {job}")
            time.sleep(0.2)
        return job

    def wait_until(self, predicate: Callable[[], object], timeout: float, what: str) -> None:
        """Waits until `predicate()` is true.

        Raises:
            TimeoutError: Saying `what` did not come.
        """
        deadline = time.monotonic() + timeout
        while not predicate():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not in {timeout} s: {what}")
            time.sleep(0.1)

    def is_idle(self) -> bool:
        """Whether every node is up and without a job."""
        states = self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.splitlines()
        return {line.split()[0] for line in states if line.endswith(" idle")} == set(self._machines)

    def reset(self) -> None:
        """Cancels all jobs, mends what was cut or killed, waits until all nodes are idle, kills what jobs left."""
        self.run("scancel", "--user=root")
        for node in self._machines:
            if self._inside("ip", "link", "show", "up", "dev", node).stdout == "":
                self.mend_link(node)
            if not any(command == "slurmd" for command in self.processes(node).values()):
                self.start_slurmd(node)
        self.wait_until(self.is_idle, 60, "all nodes are idle again")
        for node in self._machines:
            for pid, command in self.processes(node).items():
                if pid not in self._own_processes and not command.startswith(("slurmd", "slurmstepd")):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def hide_sacct(self) -> Iterator[dict[str, str]]:
        """While it lasts, `environ` (yielded too) has a PATH with all commands but sacct."""
        path = self.environ["PATH"]
        folders = []
        for index, folder in enumerate(path.split(":")):
            if (Path(folder) / "sacct").exists():
                without = Path(tempfile.mkdtemp(prefix=f"bin-{index}-", dir=self.folder))
                for command in Path(folder).iterdir():
                    if command.name != "sacct":
                        (without / command.name).symlink_to(command)
                folder = str(without)
            folders.append(folder)
        self.environ["PATH"] = ":".join(folders)
        try:
            yield self.environ
        finally:
            self.environ["PATH"] = path

    def processes(self, node: str | None = None) -> dict[int, str]:
        """Command lines of the cluster's processes (a node's alone) by their id on this machine, for `os.kill`."""
        kind, wanted = "pid", self.pid_namespace
        if node is not None:
            kind, wanted = "uts", self._inside("readlink", "/proc/self/ns/uts", node=node).stdout.strip()
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if os.readlink(folder / "ns" / kind) == wanted:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def tail_logs(self, num_lines: int = 40) -> str:
        """The last lines of what slurmctld, each slurmd and the jobs of `submit` wrote."""
        parts = []
        for log in sorted((self.folder / "log").glob("*")):
            lines = log.read_text(errors="replace").splitlines()[-num_lines:]
            parts.append("\n".join([f"--- {log.name}", *lines]))
        return "\n".join(parts)


def _read_link_number(link: str) -> str | None:
    path = Path("/sys/class/net", link, "ifindex")
    try:
        return path.read_text()
    except OSError:
        return None


def _write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def _parse_fields(line: str) -> dict[str, str]:
    """`JobId=1 JobName=a b UserId=root(0)` as a dict; a name starts with a capital."""
    parts = re.split(r"(?:^|\s)([A-Z][\w:/]*)=", line.strip())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def main() -> int:
    """Runs the command given, or a shell, with the environment of a new cluster."""
    missing = find_missing()
    if missing:
        sys.exit(f"no cluster here: {missing}")
    with Cluster() as cluster:
        print(f"export SLURM_CONF={cluster.environ['SLURM_CONF']}", file=sys.stderr)
        return subprocess.run(sys.argv[1:] or [os.environ.get("SHELL", "bash")], env=cluster.environ).returncode


if __name__ == "__main__":
    sys.exit(main())

"""A real SLURM of two nodes with four GPUs each, on this one machine and in one folder.

The GPUs are device files that nothing reads: SLURM counts and assigns them as it does real ones.
Needs root, and Debian's packages slurm-wlm, slurm-client and munge. It does not touch SLURM's usual
places: commands find this cluster through wrappers that come first on PATH, because the executor
plugin removes SLURM_CONF from the environment of its jobs.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NODES = ("node1", "node2")
GPUS_PER_NODE = 4
GPU_MODEL = "a100"
COMMANDS = ("srun", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct", "sacctmgr")
NVIDIA_MAJOR = 195
START_SECONDS = 60
CONFIGURATION = """\
ClusterName=toy
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=30
CredType=cred/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=12
MinJobAge=3600
KillWait=2
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=toy Nodes=ALL Default=YES MaxTime=24:00:00 State=UP
"""
NODE = (
    "CPUs=8 Boards=1 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 "
    f"Gres=gpu:{GPU_MODEL}:{GPUS_PER_NODE} State=UNKNOWN"
)
GRES = """\
AutoDetect=off
NodeName=node[1-2] Name=gpu Type={model} File={folder}/dev/nvidia[0-{last}]
"""


@dataclass(frozen=True)
class Job:
    """SLURM's record of a job from `scontrol --details show job`, by its names."""

    fields: dict[str, str]

    @property
    def rule(self) -> str:
        """Rule of the job, from the comment that the executor plugin sets."""
        return re.sub(r"^rule_|_wildcards_.*$", "", self.fields["Comment"])

    @property
    def wildcards(self) -> str:
        return self.fields["Comment"].partition("_wildcards_")[2]

    @property
    def gpus_asked_for(self) -> str:
        """`gres:gpu:2` or `gres:gpu:a100:2`; of one node with `--gres`. Empty for none."""
        names = ("TresPerJob", "TresPerNode")
        return next((self.fields[name] for name in names if name in self.fields), "")

    @property
    def gpus_given(self) -> str:
        """`gpu:a100:2`, on all nodes. Empty for none."""
        return self.fields.get("JOB_GRES", "").replace("(null)", "")


@dataclass(frozen=True)
class ToyCluster:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        return {"PATH": path, "SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    def call(self, *command: str) -> str:
        result = subprocess.run(
            command,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def jobs(self) -> list[Job]:
        """All jobs since the start, in the order of submission."""
        records = self.call("scontrol", "--details", "--oneliner", "show", "job").splitlines()
        return [Job(_fields(record)) for record in records if record.startswith("JobId=")]

    def node_states(self) -> dict[str, str]:
        lines = self.call("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(map(str.split, lines))

    def start_node(self, name: str) -> None:
        self.call("slurmd", "-N", name, "-f", str(self.folder / "etc/slurm.conf"))

    def lose_node(self, name: str, job_ids: list[str]) -> None:
        """Kills a node's daemon and what the jobs run on it, as when its power fails."""
        os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGKILL)
        for job_id in job_ids:
            for process in _processes_of(job_id):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def toy_cluster() -> Iterator[ToyCluster]:
    """Starts the cluster; in any case stops all that it started, and removes the folder."""
    # Not below pytest's folder: munged wants all parents open to others.
    folder = Path(tempfile.mkdtemp(prefix="toy-slurm-"))
    folder.chmod(0o755)
    cluster = ToyCluster(folder)
    try:
        _start(cluster)
        yield cluster
    finally:
        _stop(cluster)
        shutil.rmtree(folder, ignore_errors=True)


def _start(cluster: ToyCluster) -> None:
    folder = cluster.folder
    names = ["munge", "state", "log", "dev", "etc", "bin"]
    names += [f"{kind}/{node}" for kind in ("spool", "tmp") for node in NODES]
    for name in names:
        (folder / name).mkdir(parents=True)
    for index in range(GPUS_PER_NODE):
        # Regular files would not do: SLURM wants devices.
        device = os.makedev(NVIDIA_MAJOR, index)
        os.mknod(folder / f"dev/nvidia{index}", 0o20666, device)
    host, ports = socket.gethostname().partition(".")[0], _free_ports(3)
    configuration = CONFIGURATION.format(host=host, folder=folder, ports=ports, node=NODE)
    (folder / "etc/slurm.conf").write_text(configuration)
    gres = GRES.format(model=GPU_MODEL, folder=folder, last=GPUS_PER_NODE - 1)
    (folder / "etc/gres.conf").write_text(gres)
    for command in filter(shutil.which, COMMANDS):
        wrapper = folder / "bin" / command
        conf = folder / "etc/slurm.conf"
        wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which(command)} "$@"\n')
        wrapper.chmod(0o755)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster.call(
        "munged",
        f"--key-file={key}",
        f"--socket={folder}/munge/socket",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/log/munged.log",
        f"--seed-file={folder}/munge/seed",
    )
    cluster.call("slurmctld", "-f", str(folder / "etc/slurm.conf"))
    for node in NODES:
        cluster.start_node(node)
    wait_until(lambda: set(cluster.node_states().values()) == {"idle"}, START_SECONDS, cluster)


def _stop(cluster: ToyCluster) -> None:
    with contextlib.suppress(Exception):
        cluster.call("scancel", "--signal=KILL", "--user=root")
        cluster.call("scancel", "--user=root")
        wait_until(lambda: not cluster.call("squeue", "--noheader").strip(), 20)
    # munged last: the others authenticate their farewells.
    for names in ((*NODES, "slurmctld"), ("munged",)):
        processes = []
        for name in names:
            with contextlib.suppress(OSError, ValueError):
                processes.append(int((cluster.folder / f"{name}.pid").read_text()))
        _end(processes)


def _end(processes: list[int]) -> None:
    for number, pauses in ((signal.SIGTERM, 50), (signal.SIGKILL, 1)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        for _ in range(pauses):
            if not any(Path("/proc", str(process)).exists() for process in processes):
                return
            time.sleep(0.1)


def wait_until(condition, seconds: float, cluster: ToyCluster | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            log = "" if cluster is None else (cluster.folder / "log/slurmctld.log").read_text()
            raise TimeoutError(f"not within {seconds:.0f} s\n{log[-3000:]}")
        time.sleep(0.2)


def _fields(record: str) -> dict[str, str]:
    """Parses `JobId=1 JobName=x Comment=...`; the first of repeated names counts."""
    pairs = re.findall(r"(?:^| )([A-Za-z_/:]+)=(.*?)(?= [A-Za-z_/:]+=|$)", record)
    found: dict[str, str] = {}
    for name, value in pairs:
        found.setdefault(name, value.strip())
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _processes_of(job_id: str) -> list[int]:
    """The processes of a job, those of SLURM that watch over them first."""
    watchers, others = [], []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"slurmstepd: [{job_id}." in (folder / "cmdline").read_bytes().decode("latin-1"):
                watchers.append(int(folder.name))
            elif f"SLURM_JOB_ID={job_id}".encode() in (
                (folder / "environ").read_bytes().split(b"\0")
            ):
                others.append(int(folder.name))
    return watchers + others

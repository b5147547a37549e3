"""A real Slurm on this machine: one slurmctld, two slurmd that pose as nodes n1 and n2, munge.

The scheduler's own delays are shortened: a lost node is noticed after 5 s, and `restarted` skips the
two minutes for which Slurm holds a requeued job.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "setpriv")
NODES = ("n1", "n2", "n3")
HOLD_S = 121
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmdTimeout=5
TCPTimeout=2
MessageTimeout=5
SlurmctldParameters=node_reg_mem_percent=1
MailProg=/bin/true
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Why no Slurm can be started here."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{absent[0]} is not installed (Debian: slurm-wlm slurmd slurmctld munge)"
    return None if os.geteuid() == 0 else "slurmd and munged are started as root only"


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Cluster:
    """A running Slurm below a folder."""

    base: Path
    nodes: tuple[str, ...] = NODES
    daemons: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """Environment in which sbatch and the rest find this cluster."""
        return {"SLURM_CONF": str(self.base / "slurm.conf"), "PATH": _path()}

    def start(self) -> None:
        """Bring everything up; a failure shows the controller's log."""
        for name in ("munge", "state", *(f"spool.{node}" for node in self.nodes)):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        self._write_conf()
        self._start_munge()
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", self.env["SLURM_CONF"]])
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.idle() == len(self.nodes), 20)

    def _write_conf(self) -> None:
        lines = [
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={_free_port()} "
            f"CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN"
            for node in self.nodes
        ]
        text = CONF.format(
            host=socket.gethostname(),
            ctld=_free_port(),
            base=self.base,
            nodes="\n".join(lines),
            names=",".join(self.nodes),
        )
        (self.base / "slurm.conf").write_text(text)

    def _start_munge(self) -> None:
        folder = self.base / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        for path in (folder, folder / "key"):
            shutil.chown(path, "munge", "munge")
        (folder / "key").chmod(0o400)
        files = [f"--{name}={folder / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        user = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
        command = [*user, "munged", "-F", "--force", f"--key-file={folder / 'key'}", *files]
        self._daemon("munged", command)
        self.wait((folder / "socket").exists, 10)

    def start_node(self, node: str) -> None:
        """Bring one node up."""
        self._daemon(node, ["slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"]])

    def kill_node(self, node: str) -> None:
        """Lose a node: its slurmd, and whatever its jobs run there."""
        self.daemons.pop(node).kill()

    def _daemon(self, name: str, command: list[str]) -> None:
        log = (self.base / f"{name}.out").open("ab")
        env = {**os.environ, **self.env}
        self.daemons[name] = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def stop(self) -> None:
        """End all jobs, then every daemon."""
        with suppress(Exception):
            for job in self.run("squeue", "-h", "-o", "%A").split():
                self.run("scancel", job)
            self.wait(lambda: not self.run("squeue", "-h").strip(), 15)
        for daemon in reversed(list(self.daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(timeout=8)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def idle(self) -> int:
        """Nodes that wait for work."""
        with suppress(AssertionError):
            return sum(
                line.endswith("idle") for line in self.run("sinfo", "-h", "-N", "-o", "%N %t").split("\n")
            )
        return 0

    def job(self, job_id: str) -> dict[str, str]:
        """What scontrol says about a job."""
        words = self.run("scontrol", "show", "job", job_id, "--oneliner").splitlines()[0].split()
        return dict(word.partition("=")[::2] for word in words)

    def restarted(self, job_id: str) -> bool:
        """Whether a job has been requeued; one that Slurm holds back for two minutes starts after 3 s.

        Earlier it would be killed: Slurm revokes the credentials of the attempt before by the second.
        """
        state = self.job(job_id)
        if state["JobState"] == "PENDING" and state["Reason"] == "BeginTime":
            begins = datetime.fromisoformat(state["StartTime"])
            if (begins - datetime.now()).total_seconds() > HOLD_S - 3:
                return False
            self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
        return state["JobState"] == "RUNNING" and int(state["Restarts"]) > 0

    def wait(self, condition, seconds: float) -> None:
        """Poll until something is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                log = self.base / "slurmctld.log"
                raise TimeoutError(log.read_text()[-3000:] if log.exists() else "no controller")
            time.sleep(0.1)

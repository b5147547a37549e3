"""Start a program on this machine under torchrun, pass signals to it, return its exit code.

torchrun hides the exit codes of its workers and kills them 30 s after a signal of its own.
So the program says in a status file how it ended, and signals go to the workers, which finish
their step, save and leave; torchrun then ends by itself.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from . import command, processes
from .control import in_use
from .failure import Failure, first_failure, killed_worker
from .protocol import BAD_INPUT, DONE, FAILED, PREFLIGHT_FAILED, REQUEUE, Status, read_status

POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A program to start on this machine."""

    argv: tuple[str, ...]
    """`script.py ...` or `-m module ...`."""
    processes: int
    """Workers."""
    port: int = 0
    """Port of the rendezvous; 0: any free one."""
    status: Path | None = None
    """Where the program writes how it ended."""
    log: Path | None = None
    """Where torchrun's own messages go; None: a temporary file."""
    python: str = sys.executable
    """Interpreter of torchrun and the workers."""
    setup: tuple[str, ...] = ()
    """Shell lines before the start."""
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    """Environment of torchrun and the workers."""
    workdir: Path | None = None
    """Working folder; None: this one."""
    restarts: int = 0
    """Times that torchrun restarts all workers."""
    time_limit_s: float = 0
    """Seconds after which the run is killed; 0: never."""
    before_s: float = 0
    """Seconds before that, at which the workers are asked to stop."""


class Stop:
    """Signals that asked us to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.interrupts = 0
        self.late = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handler of every stop signal."""
        self.interrupts += number == signal.SIGINT
        if self.interrupts == 1 and number == signal.SIGINT:
            say("stopping after this step, with a checkpoint; Ctrl-C again kills the run")
        self.asked = True


class Clock:
    """What a scheduler does elsewhere: asks before the time limit, kills at it."""

    def __init__(self, *, limit_s: float, before_s: float) -> None:
        self._limit_s, self._before_s = limit_s, before_s
        self._started = time.monotonic()

    def look(self, stop: Stop) -> None:
        """Stop the run where it is time to."""
        seconds = time.monotonic() - self._started
        if self._limit_s and seconds > self._limit_s - self._before_s and not stop.asked:
            say(
                f"stopping after this step: {self._before_s:.0f} s are left of time_limit={self._limit_s:.0f}"
            )
            stop.asked = True
        stop.late = stop.late or bool(self._limit_s and seconds > self._limit_s)


def run(job: Job) -> int:
    """Start the program, wait for its end, return its exit code.

    Returns:
        The program's own code from the status file; without one, torchrun's; 3 if the port is taken, 2 if
        another run is at work in the folder.
    """
    problem = port_problem(job.port)
    if problem:
        say(f"error: {problem}")
        return PREFLIGHT_FAILED
    problem = in_use(job.status.parent) if job.status else ""
    if problem:
        say(f"error: {problem}")
        return BAD_INPUT
    if job.status:
        job.status.parent.mkdir(parents=True, exist_ok=True)
        job.status.unlink(missing_ok=True)
    with _log_file(job.log) as log, _handlers() as stop:
        code = _supervise(job, log, stop)
        return _verdict(job, code, stop, log.read_text(encoding="utf-8", errors="replace"))


def port_problem(port: int) -> str | None:
    """Why the rendezvous cannot listen on a port, or None."""
    if port == 0:
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return (
                f"port {port} of this machine cannot be used ({error.strerror}); "
                "choose another with --port (run.port), or 0 for any free one"
            )
    return None


def say(text: str) -> None:
    """A line to the user, beside what the workers print."""
    print(text, file=sys.stderr, flush=True)


def _supervise(job: Job, log: Path, stop: Stop) -> int:
    """Torchrun's exit code, negative for a signal."""
    cores = len(os.sched_getaffinity(0))
    agent = command.agent(_arguments(job, run_id=f"local-{os.getpid()}"), log=log, python=job.python)
    torchrun = subprocess.Popen(
        command.after(job.setup, agent),
        env=command.environment(job.env, processes=job.processes, cores=cores),
        cwd=job.workdir,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # the terminal's Ctrl-C reaches this process alone
    )
    told: set[int] = set()
    clock = Clock(limit_s=job.time_limit_s, before_s=job.before_s)
    while True:
        try:
            return torchrun.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            clock.look(stop)
            workers = processes.children(torchrun.pid) if stop.asked else []
        if stop.interrupts > 1 or stop.late:
            processes.send([*workers, torchrun.pid], signal.SIGKILL)
        processes.send([pid for pid in workers if pid not in told], signal.SIGTERM)
        told.update(workers)


def _verdict(job: Job, code: int, stop: Stop, report: str) -> int:
    """The job's exit code, and a word about the cause where the program said none."""
    if stop.interrupts > 1 or stop.late:
        say("killed")
        return 128 + (signal.SIGKILL if stop.late else signal.SIGINT)
    status = read_status(job.status) if job.status else None
    if status and (status.exit_code != DONE or code == 0):
        if status.exit_code == FAILED:
            _say_cause(status, killed_worker(report))
        return status.exit_code
    if code == 0:
        return DONE
    failure = first_failure(report)
    if stop.asked and failure and failure.exit_code == -signal.SIGTERM:
        say("stopped before the program could handle the signal; nothing was saved")
        return REQUEUE
    if failure is None:  # torchrun itself failed: its words are all there is
        say(report.rstrip())
    say(f"error: {failure or f'torchrun ended with exit code {code}'}" + _see(job.log))
    if failure and failure.exit_code == BAD_INPUT:  # of a program that may not write into the folder
        return BAD_INPUT
    return code if code > 0 else 128 - code


def _say_cause(status: Status, killed: Failure | None) -> None:
    """The cause once more, after whatever the other ranks printed."""
    if killed:
        say(f"error: {killed}")
    elif status.error:
        say(f"error: rank {status.rank} failed first: {status.error}")


def _see(log: Path | None) -> str:
    return f"; its own words are above, torchrun's report is {log}" if log else ""


@contextmanager
def _log_file(log: Path | None) -> Iterator[Path]:
    """An empty file for torchrun's messages."""
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("", encoding="utf-8")
        yield log
        return
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        path = Path(folder, "torchrun.log")
        path.touch()
        yield path


@contextmanager
def _handlers() -> Iterator[Stop]:
    """Take the stop signals for the time of the run."""
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def dry_run(job: Job) -> Sequence[str]:
    """The equivalent command, to read or to paste."""
    return command.after(
        job.setup, [job.python, "-m", "torch.distributed.run", *_arguments(job, run_id="local")]
    )


def _arguments(job: Job, *, run_id: str) -> list[str]:
    return command.torchrun(
        job.argv, processes=job.processes, port=job.port, run_id=run_id, restarts=job.restarts
    )

"""What cannot work is refused before anything is submitted."""

from dataclasses import replace
from pathlib import Path

from .errors import SpecError
from .load import Loaded
from .sites import Site
from .spec import MINUTE_S, Job


def check(loaded: Loaded) -> Loaded:
    """The job with its defaults filled in.

    Raises:
        SpecError: naming keys, values and what to change.
    """
    job, site = _filled(loaded.job, loaded.site), loaded.site
    _check_counts(job, site)
    _check_restart(job)
    _check_time(job, site)
    _check_container(job, site)
    for path in ("folder", "workdir"):
        value = getattr(job, path)
        if any(ord(letter) < 32 for letter in value):
            raise SpecError(f"{path}={value!r} holds a control character; choose another folder")
    return replace(loaded, job=job)


def devices(job: Job, site: Site) -> int:
    """Accelerators of one node."""
    return site.devices if job.devices is None else job.devices


def _filled(job: Job, site: Site) -> Job:
    nodes = sum(group.nodes for group in job.groups) or job.nodes
    processes = job.processes or max(1, devices(job, site))
    folder = str(Path(job.folder or "runs/launch").absolute())
    workdir = job.workdir or str(Path().absolute())
    before = job.signal.before or max(3 * MINUTE_S, int(2 * job.stop_s) + MINUTE_S)
    signal = replace(job.signal, before=before)
    return replace(job, nodes=nodes, processes=processes, folder=folder, workdir=workdir, signal=signal)


def _check_counts(job: Job, site: Site) -> None:
    for name, lowest in {"nodes": 1, "processes": 1, "spare_nodes": 0, "log_limit": 1}.items():
        if getattr(job, name) < lowest:
            raise SpecError(f"{name}={getattr(job, name)}; choose at least {lowest}")
    own = devices(job, site)
    if own > site.devices > 0 or (own and not site.devices):
        raise SpecError(f"devices={own} exceeds site.devices={site.devices}; choose at most {site.devices}")
    if 0 < own < job.processes:
        raise SpecError(
            f"processes={job.processes} of one node exceed its {own} devices; set processes to at most {own}"
        )
    if job.world and job.world != job.nodes * job.processes:
        raise SpecError(f"the program was checked for {job.world} ranks, nodes x processes is another number")
    if job.groups and job.spare_nodes:
        raise SpecError(
            "spare_nodes with groups: a spare of one kind cannot replace another; set spare_nodes=0"
        )
    if any(group.nodes < 1 for group in job.groups):
        raise SpecError("groups: every group needs nodes of at least 1")


def _check_restart(job: Job) -> None:
    restart = job.restart
    if restart.mode in ("chain", "array") and restart.links < 2:
        raise SpecError(f"restart.mode={restart.mode} with restart.links={restart.links}; choose at least 2")
    if job.groups and restart.mode == "array":
        raise SpecError("Slurm knows no arrays of heterogeneous jobs; set restart.mode=requeue or chain")
    if not 0 <= restart.min_nodes <= job.nodes:
        raise SpecError(f"restart.min_nodes={restart.min_nodes}; choose 0 to nodes={job.nodes}")
    if restart.min_nodes and not restart.workers:
        raise SpecError("restart.min_nodes needs restart.workers >= 1: torchrun goes on only by a restart")
    if restart.no_progress < 1:
        raise SpecError(f"restart.no_progress={restart.no_progress}; choose at least 1")


def _check_time(job: Job, site: Site) -> None:
    before, limit = job.signal.before, job.time_limit
    if limit and limit <= job.stop_s:
        raise SpecError(
            f"time_limit={limit} s is shorter than a step and a checkpoint save of {job.stop_s:.0f} s; "
            f"set time_limit to {before + int(job.stop_s) + MINUTE_S} or more"
        )
    if limit and limit <= before:
        raise SpecError(
            f"time_limit={limit} s is not above signal.before={before} s: the job would stop as it starts; "
            "raise time_limit or lower signal.before"
        )
    network = site.network
    if network.port_count < 1 or network.port_first < 1024 or network.port_first + network.port_count > 65536:
        raise SpecError("site.network: ports must lie between 1024 and 65535; set port_first and port_count")


def _check_container(job: Job, site: Site) -> None:
    if job.environment.image and site.container.runtime == "none":
        raise SpecError(
            f"environment.image={job.environment.image}, but the site has no container runtime; "
            "set site.container.runtime to pyxis or apptainer, or remove the image"
        )
    for mount in job.mounts:
        if "," in mount:
            raise SpecError(
                f"mounts: {mount!r} holds a comma, which separates mounts; give each its own entry"
            )


def grace(loaded: Loaded, *, here: bool) -> int:
    """Seconds from the first word about a stop to the kill, whichever stop leaves least; 0: unknown.

    Args:
        loaded: a job and a site that have been checked.
        here: on this machine, where nobody ends a job without a time limit.
    """
    limited = loaded.job.time_limit or (loaded.site.scheduler == "slurm" and not here)
    known = (loaded.site.grace, loaded.job.signal.before if limited else 0)
    return min((each for each in known if each), default=0)


def warnings(job: Job, site: Site) -> list[str]:
    """What may go wrong at a stop; nothing here stops a launch."""
    notes, stop = [], f"a step and a save take {job.stop_s:.0f} s"
    if job.signal.before < 1.5 * job.stop_s:
        notes.append(
            f"signal.before={job.signal.before} s, and {stop}; "
            f"set signal.before={int(2 * job.stop_s) + MINUTE_S}"
        )
    if site.grace and site.grace < 1.5 * job.stop_s:
        notes.append(
            f"a preempted job has {site.grace} s (site.grace), and {stop}: only saves from before the signal "
            "count. longctx then saves in the background all the time; another program has to do so itself"
        )
    return notes

"""A job and a site on this machine: what of them applies here; what only a cluster can give is refused."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from . import local, preflight
from .check import devices
from .errors import PreflightError, SpecError
from .load import Loaded
from .quote import check_name, exports, words
from .sites import Site
from .spec import Job

STATUS, LOG = "status.json", "logs/torchrun.log"


def job_here(loaded: Loaded, environ: Mapping[str, str] = os.environ) -> local.Job:
    """What runs on this machine.

    Args:
        loaded: a job and a site that have been checked.
        environ: of the person who starts it.

    Raises:
        SpecError: keys that one machine without a scheduler cannot honour, or a secret that cannot be read.
    """
    job, site = loaded.job, loaded.site
    _refuse(job, site)
    return local.Job(
        argv=job.argv,
        processes=job.processes,
        python=job.environment.python or sys.executable,
        setup=tuple([*_modules(site), *site.setup, *job.environment.setup, *_stage(site)]),
        env=_environment(job, site, environ),
        workdir=Path(job.workdir),
        status=Path(job.folder, STATUS),
        log=Path(job.folder, LOG),
        restarts=job.restart.workers,
        time_limit_s=job.time_limit,
        before_s=job.signal.before,
    )


def _refuse(job: Job, site: Site) -> None:
    """Name the first key that has no meaning here."""
    kept = "set it to {} here, or use launch slurm"
    reasons = [
        (
            job.nodes > 1,
            f"nodes={job.nodes}",
            "this machine is one node; set nodes=1, or use launch torchrun or slurm",
        ),
        (job.spare_nodes > 0, f"spare_nodes={job.spare_nodes}", kept.format(0)),
        (job.restart.mode in ("chain", "array"), f"restart.mode={job.restart.mode}", kept.format("never")),
        (
            job.restart.failures > 0,
            f"restart.failures={job.restart.failures}",
            "set it to 0 here; restart.workers has torchrun try again",
        ),
        (
            bool(job.environment.image),
            f"environment.image={job.environment.image}",
            "start this command inside the container instead",
        ),
    ]
    for bad, key, why in reasons:
        if bad:
            raise SpecError(f"{key}: {why}")


def _modules(site: Site) -> list[str]:
    return [f"module load {words(site.modules)}"] if site.modules else []


def _stage(site: Site) -> list[str]:
    return [f"cp -r -- {words([each.source, each.target])} || exit 3" for each in site.stage]


def _environment(job: Job, site: Site, environ: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment with the site's and the job's changes, and the secrets from their files."""
    changes: dict[str, str | None] = {**site.env, **job.env}
    exports(changes)  # what no script may hold is refused here too: the job is the same
    if site.network.interface:
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        changes = {**dict.fromkeys(names, site.network.interface), **changes}
    merged = {**environ, **changes, **{name: _secret(name, path) for name, path in job.secrets.items()}}
    return {name: value for name, value in merged.items() if value is not None}


def _secret(name: str, path: str) -> str:
    check_name(name)
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"secrets.{name}={path} cannot be read: {error}") from error


def examine(loaded: Loaded) -> None:
    """What preflight asks of every node, asked of this machine.

    Raises:
        PreflightError: with everything that is wrong.
    """
    job, site = loaded.job, loaded.site
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    checks = site.checks
    demands = preflight.Demands(
        folder=folder, disk=checks.disk, shm=checks.shm, clock=checks.clock, devices=devices(job, site)
    )
    problems = preflight.examine(demands, "here").problems if checks.enabled else ()
    if problems:
        raise PreflightError("\n".join(f"preflight: {each}" for each in problems))

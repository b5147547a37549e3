"""The #SBATCH lines: ours, then the site's, then the command line's; later ones win, null removes."""

import re
from collections.abc import Iterable, Mapping

from .errors import SpecError
from .sites import Directives, Site
from .spec import Group, Job
from .units import clock

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./:,=@%+*\[\]-]+")


def batch_directives(job: Job, site: Site, changes: Directives) -> list[list[str]]:
    """Option lines of each part of the job; one part unless the job is heterogeneous."""
    if not job.groups:
        return [_lines(_common(job, site) | _nodes(job.nodes + job.spare_nodes, job, site), site, changes)]
    parts = []
    for index, group in enumerate(job.groups):
        ours = (_common(job, site) if index == 0 else {}) | _nodes(group.nodes, job, site)
        parts.append(_lines(ours, site, {**group.directives, **changes} if index == 0 else group.directives))
    return parts


def job_options(job: Job, site: Site, group: Group | None = None) -> dict[str, str | int | bool | None]:
    """What one part asks for, before the site's own directives."""
    return _nodes(group.nodes if group else job.nodes, job, site)


def _common(job: Job, site: Site) -> dict[str, str | int | bool | None]:
    ours: dict[str, str | int | bool | None] = {
        "job-name": job.name,
        "output": job.folder.replace("%", "%%") + "/launch/%j.log",
        "open-mode": "append",
        "signal": f"B:{job.signal.name}@{job.signal.before}",
    }
    if job.restart.mode == "requeue":
        ours["requeue"] = True
    if job.restart.mode == "array":
        ours["array"] = f"0-{job.restart.links - 1}%1"
        ours["output"] = job.folder.replace("%", "%%") + "/launch/%A_%a.log"
    if job.restart.mode == "chain":
        ours["dependency"] = "singleton"
    if job.time_limit:
        ours["time"] = clock(job.time_limit)
    return ours


def _nodes(count: int, job: Job, site: Site) -> dict[str, str | int | bool | None]:
    ours: dict[str, str | int | bool | None] = {"nodes": count, "ntasks-per-node": 1}
    devices = site.devices if job.devices is None else job.devices
    if devices and site.device_directive:
        name, _, value = site.device_directive.partition("=")
        ours[name.lstrip("-")] = value.replace("{devices}", str(devices))
    return ours


def _lines(ours: Directives, site: Site, changes: Directives) -> list[str]:
    return options({**ours, **site.directives, **changes})


def options(values: Mapping[str, str | int | bool | None]) -> list[str]:
    """`--name=value` for everything that is set, in the quotes that sbatch understands."""
    return [_option(name, value) for name, value in values.items() if value not in (None, False)]


def _option(name: str, value: str | int | bool | None) -> str:
    if not _OPTION.fullmatch(name):
        raise SpecError(f"directive {name!r} is no long option; write it without dashes, such as partition")
    return f"--{name}" if value is True else f"--{name}={_word(name, str(value))}"


def _word(name: str, value: str) -> str:
    """A value inside an #SBATCH line, which no shell reads: sbatch knows quotes and backslashes."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise SpecError(f"directive {name}={value!r} holds a control character; a directive is one line")
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def parse(texts: Iterable[str], removed: Iterable[str]) -> dict[str, str | int | bool | None]:
    """Directives from a command line: `name=value`, `name` for a flag, and names to remove."""
    changes: dict[str, str | int | bool | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        changes[name.lstrip("-")] = value if equals else True
    return changes | {name.lstrip("-"): None for name in removed}

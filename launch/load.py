"""Job and site files, with changes from the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import SpecError
from .fields import build
from .sites import Site
from .spec import Job

CLUSTERS = Path(__file__).parents[1] / "configs" / "cluster"
SITE = "site."


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a launch starts from."""

    job: Job
    """The job."""
    site: Site
    """The cluster."""
    base: Path
    """Folder of the site file: its relative paths start there."""


def load(job: str, site: str, changes: Sequence[str] = (), *, values: dict[str, Any] | None = None) -> Loaded:
    """Read both files and apply changes.

    Args:
        job: path of the job's file; empty: defaults.
        site: path of the site's file or its name in configs/cluster; empty: defaults.
        changes: `key=value` for the job, `site.key=value` for the site; null takes an entry out.
        values: keys of the job that the caller sets.

    Raises:
        SpecError: a file or a change is wrong.
    """
    where = _site_path(site)
    job_raw, site_raw = _read(Path(job)) if job else {}, _read(where) if where else {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise SpecError(f"--set {change}: write key=value, such as nodes=4 or site.network.interface=ib0")
        target, path = (site_raw, key[len(SITE) :]) if key.startswith(SITE) else (job_raw, key)
        _put(target, path.split("."), _yaml(text, f"--set {change}"), change)
    job_raw |= values or {}
    return Loaded(
        job=build(Job, job_raw, where=job or "job"),
        site=build(Site, site_raw, where=str(where or "site")),
        base=where.parent if where else Path(),
    )


def _site_path(site: str) -> Path | None:
    if not site:
        return None
    known = CLUSTERS / f"{site}.yaml"
    return known if not Path(site).exists() and known.exists() else Path(site)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        names = ", ".join(sorted(each.stem for each in CLUSTERS.glob("*.yaml")))
        raise SpecError(f"{path} cannot be read: {error.strerror}; known sites: {names}") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is no text file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SpecError(f"{path} must hold a mapping of keys")
    return content


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: no valid YAML: {' '.join(str(error).split())}") from error


def _put(target: dict[str, Any], path: list[str], value: Any, change: str) -> None:
    """Set one dotted key; what is unknown is found when the dataclass is built."""
    *sections, last = path
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise SpecError(f"--set {change}: {section} is no section")
    target[last] = value

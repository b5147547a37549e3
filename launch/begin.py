"""The start of an attempt: which nodes take part, in which order, and whether to start at all."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import attempts, exclusion, preflight
from .errors import LaunchError, PreflightError
from .preflight import Answer
from .protocol import NO_PROGRESS
from .submit import RECORD
from .topology import order, picture, rank_map


class StuckError(LaunchError):
    """Starting again does not get further."""

    exit_code = NO_PROGRESS


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """What an attempt knows when it begins."""

    folder: Path
    """Run folder."""
    attempt: str
    """Job id and restart count."""
    later: int
    """0 for the first attempt of a submission."""
    nodes: int
    """Nodes that the job needs."""
    candidates: Sequence[str]
    """Nodes that it was given, spares among them."""
    processes: int
    """Workers of a node."""
    preflight: bool
    """Whether the nodes have been asked."""
    no_progress: int
    """Starts with the same progress that are too many."""
    progress: str
    """Pattern of the files that show progress."""
    topology: str
    """`slurm` or a file."""
    choice: exclusion.Choice | None = None
    """What Slurm could give to a later start; None: nothing is excluded then."""

    @property
    def scratch(self) -> Path:
        """Folder of this attempt."""
        return self.folder / "launch" / self.attempt


def begin(start: Start) -> list[str]:
    """Choose and order the nodes, write them to `hosts`, record the start.

    Returns:
        What to print: who was left out, and the rank map.

    Raises:
        PreflightError: too few good nodes; each bad one is named with its reason.
        StuckError: the starts before this one got no further.
    """
    now = attempts.progress(start.folder, start.progress)
    if start.later and attempts.stuck(attempts.read(start.folder), now, start.no_progress):
        raise StuckError(
            f"{start.no_progress} starts in a row found {now or 'no checkpoint'} and got no further; "
            "not starting again. Look at the last attempt (longctx launch logs), then submit anew"
        )
    answers = preflight.read(start.scratch, list(start.candidates)) if start.preflight else {}
    bad = judge(start.candidates, answers) if start.preflight else {}
    good = [node for node in start.candidates if node not in bad]
    start.scratch.mkdir(parents=True, exist_ok=True)
    lines = [f"preflight: {node} is left out: {why}" for node, why in bad.items()]
    lines += _exclude(start, list(bad))
    if len(good) < start.nodes:
        raise PreflightError("\n".join([*lines, _too_few(start, good, bad)]))
    addresses = {node: str(answer.facts.get("topology", "")) for node, answer in answers.items()}
    chosen = _proven(start, order(good, source=start.topology, addresses=addresses))
    if chosen[0] in answers and not answers[chosen[0]].facts.get("port_free", True):
        raise PreflightError(
            f"preflight: the port of the rendezvous is taken on {chosen[0]}, the first node; submit again, "
            "or set site.network.port_first to a range that nobody else uses"
        )
    lines += _strange_versions(start, answers)
    (start.scratch / "hosts").write_text("".join(f"{node}\n" for node in chosen), encoding="utf-8")
    (start.folder / "launch" / "ranks.svg").write_text(picture(chosen, start.processes), encoding="utf-8")
    record = attempts.Attempt(attempt=start.attempt, time=time.time(), later=start.later, progress=now)
    attempts.append(start.folder, record)
    return [*lines, *rank_map(chosen, start.processes)]


def _exclude(start: Start, bad: list[str]) -> list[str]:
    """Remember who failed, and write down what later starts are to exclude."""
    unfit = exclusion.remember(start.folder, bad)
    away = exclusion.exclusion(unfit, start.candidates, start.choice) if unfit and start.choice else []
    if not away:
        return []
    (start.scratch / exclusion.EXCLUDE).write_text(",".join(away), encoding="utf-8")
    return [f"preflight: later starts exclude {', '.join(unfit)}"]


def _proven(start: Start, ordered: list[str]) -> list[str]:
    """As many nodes as the job needs; one that has failed before only where no other is left."""
    unfit = exclusion.failed(start.folder)
    kept = sorted(ordered, key=lambda node: node in unfit)[: start.nodes]
    return [node for node in ordered if node in kept]


def _strange_versions(start: Start, answers: Mapping[str, Answer]) -> list[str]:
    """How the nodes, or the image on them, differ from where the job was submitted."""
    path = start.folder / RECORD
    submitted = json.loads(path.read_text(encoding="utf-8")).get("versions", {}) if path.exists() else {}
    usual = common_versions(list(answers.values()))
    return [
        f"preflight: {name} is {value} on the nodes and {submitted[name]} where the job was submitted"
        for name, value in usual.items()
        if submitted.get(name, value) != value
    ]


def _too_few(start: Start, good: list[str], bad: Mapping[str, str]) -> str:
    return (
        f"preflight: {len(good)} of {len(start.candidates)} nodes are fit, the job needs {start.nodes}; "
        f"submit with --directive exclude={','.join(bad)} or with spare_nodes={len(bad)}"
    )


def judge(nodes: Sequence[str], answers: Mapping[str, Answer]) -> dict[str, str]:
    """Bad nodes with the reason: silent, unfit, or different from the others."""
    bad = {}
    usual = common_versions(list(answers.values()))
    for node in nodes:
        if node not in answers:
            bad[node] = "it did not answer"
            continue
        answer = answers[node]
        different = [
            f"{name} is {answer.facts['versions'].get(name, 'absent')}, elsewhere {value}"
            for name, value in usual.items()
            if answer.facts["versions"].get(name, "absent") != value
        ]
        reasons = [*answer.problems, *different]
        if reasons:
            bad[node] = "; ".join(reasons)
    return bad


def common_versions(answers: Sequence[Answer]) -> dict[str, str]:
    """What most nodes have, name by name."""
    names = sorted({name for each in answers for name in each.facts["versions"]})
    return {
        name: Counter(each.facts["versions"].get(name, "absent") for each in answers).most_common(1)[0][0]
        for name in names
    }

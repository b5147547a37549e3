"""Which node holds which ranks: neighbours in the network become neighbours among the ranks.

Ranks of one node are consecutive, so tp and ulysses, the innermost axes, stay inside it; a ring then
crosses from a node to the next, which the order makes a near one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import SpecError

_PART = re.compile(r"(\d+)")
WIDTH, HEIGHT, MARGIN = 34, 26, 120


def order(nodes: Sequence[str], *, source: str, addresses: Mapping[str, str]) -> list[str]:
    """Nodes in the order of their ranks.

    Args:
        nodes: to order.
        source: `slurm`, or a file with one node a line.
        addresses: node -> its path of switches, as Slurm's topology plugin gives it.

    Raises:
        SpecError: the file does not name every node.
    """
    if source == "slurm":
        return sorted(nodes, key=lambda node: (natural(addresses.get(node, "")), natural(node)))
    try:
        listed = [
            line.split("#")[0].strip() for line in Path(source).read_text(encoding="utf-8").splitlines()
        ]
    except OSError as error:
        raise SpecError(f"topology={source} cannot be read: {error.strerror}; or write slurm") from error
    missing = [node for node in nodes if node not in listed]
    if missing:
        raise SpecError(f"topology={source} does not name {missing[0]}; add a line for every node")
    return sorted(nodes, key=listed.index)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that puts node9 before node10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in _PART.split(name)]


def rank_map(nodes: Sequence[str], processes: int) -> list[str]:
    """One line a node with its ranks."""
    width = max(map(len, nodes), default=0)
    lines = []
    for index, node in enumerate(nodes):
        first = index * processes
        last = first + processes - 1
        lines.append(
            f"node {index}  {node:<{width}}  rank{f's {first} to {last}' if last > first else f' {first}'}"
        )
    return lines


def picture(nodes: Sequence[str], processes: int) -> str:
    """The rank map as SVG: a row for each node, a box for each rank, an arrow to the next node."""
    rows = []
    for index, node in enumerate(nodes):
        y = index * HEIGHT + 4
        rows.append(f'<text x="4" y="{y + 16}">{_text(node)}</text>')
        for local in range(processes):
            x = MARGIN + local * WIDTH
            rows.append(f'<rect x="{x}" y="{y}" width="{WIDTH - 4}" height="{HEIGHT - 6}"/>')
            rows.append(f'<text x="{x + 5}" y="{y + 15}">{index * processes + local}</text>')
    size = f'width="{MARGIN + processes * WIDTH + 8}" height="{len(nodes) * HEIGHT + 8}"'
    style = "<style>rect{fill:#dce9f7;stroke:#33658a}text{font:12px sans-serif}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(rows)}</svg>\n'


def _text(name: str) -> str:
    return name.replace("&", "&amp;").replace("<", "&lt;")

"""Cutting the connections of a broken membership, so that nobody waits for a rank that is gone.

gloo has no way to wake a rank that waits for a lost peer: `abort` and `shutdown` of its groups wake
nobody, and the wait ends at its timeout. Shutting down the connected sockets ends it at once. NCCL
groups are aborted, which is their own way.
"""

import os
import socket
from contextlib import suppress

import torch.distributed as dist


class Fence:
    """Knows which sockets belong to one membership, which is being formed or has formed."""

    def __init__(self) -> None:
        """Process groups are made from now on."""
        self._before = set(_connections())
        self._formed: set[str] | None = None

    def opened(self) -> None:
        """They are complete: sockets that appear later belong to somebody else."""
        self._formed = set(_connections()) - self._before

    def cut(self) -> None:
        """Shut them all down; may be called from another thread, and again."""
        for name, descriptor in _connections().items():
            if name in self._before or (self._formed is not None and name not in self._formed):
                continue
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
                sock.shutdown(socket.SHUT_RDWR)
        _abort_nccl()


def cut_everything() -> None:
    """Shut down every connection of this process, for a rehearsal."""
    for descriptor in _connections().values():
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
            sock.shutdown(socket.SHUT_RDWR)


def _connections() -> dict[str, int]:
    """Connected TCP sockets of this process: inode -> descriptor. Never listeners: gloo would terminate."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:") and _is_connection(int(name)):
                found[target] = int(name)
    return found


def _is_connection(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            return False
        return not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)


def _abort_nccl() -> None:
    if not dist.is_initialized() or not dist.is_nccl_available():
        return
    import torch

    if torch.cuda.is_initialized():
        with suppress(RuntimeError, AttributeError):
            dist.distributed_c10d._abort_process_group()

"""How the supervisor of a node tells torchrun's other processes there how the job ended."""

import os
import signal
import socket
import time
from collections.abc import Sequence

from .protocol import FAILED

FIND_S = 60.0


def _name() -> str:
    """An address that the processes of one torchrun share, and that is gone with them."""
    return f"\0longctx-verdict-{os.getppid()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


class VerdictServer:
    """Takes connections and answers all of them once."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(_name())
        self._listener.listen(1024)
        self._listener.setblocking(False)

    def tell(self, exit_code: int) -> None:
        """Tell everybody who has connected; whoever has not sees the end of this process."""
        while True:
            try:
                peer, _ = self._listener.accept()
            except BlockingIOError:
                return
            with peer:
                peer.send(f"{exit_code}\n".encode())


def wait_for_verdict(signals: Sequence[signal.Signals] = ()) -> int:
    """Exit code of the job, from the supervisor of this node; `FAILED` if that one dies.

    Args:
        signals: left to the supervisor as soon as there is one; until then they end this process.
    """
    for number in signals:
        signal.signal(number, signal.SIG_DFL)
    deadline = time.monotonic() + FIND_S
    with socket.socket(socket.AF_UNIX) as sock:
        while True:
            try:
                sock.connect(_name())
                break
            except OSError:
                if time.monotonic() > deadline:
                    return FAILED
                time.sleep(0.05)
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        try:
            answer = sock.recv(64)
        except ConnectionError:
            answer = b""
        return int(answer) if answer.strip() else FAILED  # empty: the supervisor has died

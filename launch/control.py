"""The control server: it knows the job's membership, and every node's supervisor is connected to it.

It runs in a thread of the first node's supervisor and binds to one address. Supervisors find it
through a file in the run folder that only the user can read; the file holds the job's secret.
"""

import json
import os
import queue
import secrets
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .lines import ClosedError, Lines, Message, admit, connect
from .membership import Membership

ADDRESS_FILE = "control.json"
POLL_S = 0.1
BEAT_S = 5.0
"""How often supervisors hear from the server, so that one that is stopped is missed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where the server listens, and what proves that a peer belongs to the job."""

    host: str
    """Name or address."""
    port: int
    """TCP port."""
    secret: str
    """Known to this job's processes alone."""
    job: str
    """Whose server it is."""


class ControlServer:
    """Serves one job; `close` ends the thread."""

    def __init__(self, membership: Membership, *, host: str, job: str, folder: Path) -> None:
        self._membership = membership
        self._secret = secrets.token_hex(32)
        self._listener = socket.create_server((host, 0), family=_family(host), backlog=1024)
        self._nodes: dict[int, Lines] = {}
        self._selector = selectors.DefaultSelector()
        self._admitted: queue.SimpleQueue[tuple[Lines, Message]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._closing = False
        port = self._listener.getsockname()[1]
        _write(folder / ADDRESS_FILE, Address(host=host, port=port, secret=self._secret, job=job))
        self._threads = [
            threading.Thread(target=work, name=f"control-{work.__name__}", daemon=True)
            for work in (self._serve, self._accept)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop; connections are closed."""
        self._closing = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._wake.send(b"x")
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(sock,), daemon=True).start()

    def _admit(self, sock: socket.socket) -> None:
        try:
            lines = admit(sock, self._secret)
            self._admitted.put((lines, lines.one()))
            self._wake.send(b"x")
        except OSError:  # a stranger, or a peer that gave up
            sock.close()

    def _serve(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        beat = time.monotonic()
        while not self._closing:
            wait_s = self._membership.wait_s(time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._woken.recv(4096)
                    self._take_admitted()
                else:
                    self._take(key.data)
            self._tell(self._membership.tick(time.monotonic()))
            if time.monotonic() - beat > BEAT_S:
                beat = time.monotonic()
                self._tell([{"kind": "beat"}])
        for lines in self._nodes.values():
            lines.close()

    def _take_admitted(self) -> None:
        while not self._admitted.empty():
            lines, hello = self._admitted.get()
            if hello["node"] in self._nodes:  # of two, the one that came first is the job's
                lines.close()
                continue
            self._nodes[hello["node"]] = lines
            self._selector.register(lines, selectors.EVENT_READ, hello)

    def _take(self, hello: Message) -> None:
        lines, now = self._nodes[hello["node"]], time.monotonic()
        try:
            for message in lines.receive():
                self._tell(self._membership.handle(message, now))
        except ClosedError:
            self._selector.unregister(lines)
            del self._nodes[hello["node"]]
            self._tell(self._membership.handle(hello | {"kind": "node_lost"}, now))

    def _tell(self, messages: list[Message]) -> None:
        for message in messages:
            for lines in list(self._nodes.values()):
                lines.send(message)


def find(folder: Path, *, job: str, node: int, first_rank: int, timeout_s: float) -> Lines:
    """Connect to the job's server once the address file names it and it answers.

    Raises:
        ClosedError: not within the time.
    """
    deadline = time.monotonic() + timeout_s
    problem: Exception = FileNotFoundError(folder / ADDRESS_FILE)
    while time.monotonic() < deadline:
        try:
            address = Address(**json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8")))
            if address.job != job:
                raise ValueError(f"it is of job {address.job}, not {job}")
            lines = connect(address.host, address.port, address.secret)
            lines.send({"kind": "hello", "node": node, "first_rank": first_rank})
            return lines
        except (OSError, ValueError, TypeError) as error:  # of an earlier start, or not there yet
            problem = error
            time.sleep(POLL_S)
    raise ClosedError(
        f"no control server found through {folder / ADDRESS_FILE} within {timeout_s:g} s ({problem}); "
        "run.dir must be a folder that all nodes share"
    )


def in_use(folder: Path) -> str:
    """Why a job cannot begin in a run folder: another one is at work there; empty: none is."""
    try:
        address = Address(**json.loads((folder / ADDRESS_FILE).read_text(encoding="utf-8")))
        connect(address.host, address.port, address.secret, timeout_s=3.0).close()
    except (OSError, ValueError, TypeError):
        return ""
    return (
        f"run.dir={folder} belongs to a run that is at work on {address.host}; set run.dir to another folder"
    )


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def _write(path: Path, address: Address) -> None:
    """The file appears whole, and readable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(address), file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)

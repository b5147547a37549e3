"""JSON objects, one a line, over a socket; and how two ends prove that they know a job's secret."""

import hmac
import json
import secrets
import socket
from typing import Any

Message = dict[str, Any]

LONGEST_BYTES = 64 * 2**20
"""Of a line; a peer that sends more is cut off."""

KEEPALIVE = {
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 5,
    socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 30_000,
}
"""A machine that loses power or its network says nothing; after half a minute its connections end (s, s,
count, ms)."""


class ClosedError(ConnectionError):
    """The other end is gone, or never knew the secret."""


class Lines:
    """Messages over one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._buffer = sock, b""

    def fileno(self) -> int:
        """Descriptor, for selectors."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send one message; one that nobody can receive any more is dropped: the reader will notice."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[Message]:
        """Messages that have arrived whole, after waiting for at least some bytes.

        Raises:
            ClosedError: the other end is gone, or sends what is no message.
        """
        try:
            data = self._socket.recv(65536)
            *whole, self._buffer = (self._buffer + data).split(b"\n")
            messages = [json.loads(line) for line in whole]
        except (OSError, ValueError) as error:
            raise ClosedError(str(error)) from error
        if not data or len(self._buffer) > LONGEST_BYTES or not all(isinstance(m, dict) for m in messages):
            raise ClosedError("the other end has gone")
        return messages

    def one(self) -> Message:
        """The next message of a conversation in which each waits for the other."""
        while True:
            messages = self.receive()
            if messages:
                return messages[0]

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def admit(sock: socket.socket, secret: str, *, timeout_s: float = 10.0) -> Lines:
    """The server's side of the handshake: both ends prove the secret, nobody sends it.

    Raises:
        ClosedError: the peer does not know the secret, or is silent.
    """
    lines, ours = _talk(sock, timeout_s), secrets.token_hex(16)
    lines.send({"nonce": ours})
    answer = lines.one()
    theirs, proof = str(answer.get("nonce")), str(answer.get("proof"))
    if not hmac.compare_digest(proof, _proof(secret, "client", ours, theirs)):
        raise ClosedError("a peer does not know the job's secret")
    lines.send({"proof": _proof(secret, "server", ours, theirs)})
    sock.settimeout(None)
    return lines


def connect(host: str, port: int, secret: str, *, timeout_s: float = 10.0) -> Lines:
    """The client's side of the handshake.

    Raises:
        ClosedError: nobody listens there who knows the secret.
    """
    try:
        sock = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        raise ClosedError(f"{host}:{port}: {error}") from error
    lines, ours = _talk(sock, timeout_s), secrets.token_hex(16)
    theirs = str(lines.one().get("nonce"))
    lines.send({"nonce": ours, "proof": _proof(secret, "client", theirs, ours)})
    if not hmac.compare_digest(str(lines.one().get("proof")), _proof(secret, "server", theirs, ours)):
        raise ClosedError(f"{host}:{port} does not know the job's secret")
    sock.settimeout(None)
    return lines


def _talk(sock: socket.socket, timeout_s: float) -> Lines:
    sock.settimeout(timeout_s)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return Lines(sock)


def _proof(secret: str, role: str, server: str, client: str) -> str:
    return hmac.new(secret.encode(), f"{role} {server} {client}".encode(), "sha256").hexdigest()

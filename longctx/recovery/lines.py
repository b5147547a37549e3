"""This process's end of the channel to its supervisor: JSON objects, one a line."""

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]


class SupervisorGoneError(ConnectionError):
    """The supervisor's end is closed."""


class Lines:
    """Messages over a socket that several threads may send on."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._buffer = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Send one message; if the supervisor is gone, reading will tell."""
        with self._sending:
            try:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return

    def receive(self) -> list[Message]:
        """Wait for messages.

        Raises:
            SupervisorGoneError: no more will come.
        """
        try:
            data = self._socket.recv(65536)
        except OSError as error:
            raise SupervisorGoneError(str(error)) from error
        if not data:
            raise SupervisorGoneError("end of the channel")
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in whole]

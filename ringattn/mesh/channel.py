"""TCP connections between processes that carry JSON messages and notice the end of the other side."""

import json
import socket
from contextlib import suppress
from typing import Any

LONGEST = 1 << 20
"""Maximum number of bytes of a message."""
OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
"""TCP options by name. A host that loses power or network does not close connections: it is noticed after 30 s."""


class Channel:
    """A TCP connection that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.problem = ""
        """Why the connection ended, if it was not closed by the other side."""
        self._received = b""
        connection.settimeout(30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in OPTIONS.items():
            if name in vars(socket):  # macOS lacks some
                connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)

    def send(self, **message: Any) -> None:
        """Sends a message. Ignores a closed connection, which `receive` reports."""
        with suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Waits for data. Returns the messages that are complete; None at the end of the connection."""
        try:
            data = self.connection.recv(65536)
        except ConnectionResetError:
            return None
        except OSError as error:
            self.problem = error.strerror or str(error)
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):  # of another program
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.connection.close()


def split(address: str) -> tuple[str, int]:
    """Returns the host and the port of HOST:PORT, where an IPv6 host is in brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)

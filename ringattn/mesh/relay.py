"""A relay between JAX's client in a process and JAX's coordinator, which runs in process 0.

JAX's client aborts its process, with a stack trace of C++, at the moment when its connection to the coordinator ends,
before Python could report which process has ended. The relay keeps the client's connection open. See `peers.py`.
"""

import socket
import threading
import time
from contextlib import suppress

from ringattn.mesh.channel import split


def start_relay(address: str) -> str:
    """Relays connections to `address` in threads, until this process ends. Returns the address to connect to."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, address), name="relay", daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, address: str) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_serve, args=(client, address), name="relay", daemon=True).start()


def _serve(client: socket.socket, address: str) -> None:
    coordinator = _connect(address)
    for each in (client, coordinator):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_copy, args=(coordinator, client), name="relay", daemon=True).start()
    _copy(client, coordinator)
    for each in (coordinator, client):
        each.close()


def _connect(address: str) -> socket.socket:
    while True:
        with suppress(OSError):
            connection = socket.create_connection(split(address), timeout=10)
            connection.settimeout(None)
            return connection
        time.sleep(0.05)


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copies bytes until one of the connections ends. Closes neither."""
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)

"""The relay between JAX's client and the coordinator."""

import socket
from contextlib import closing

import pytest

from ringattn.mesh.relay import start_relay


def test_the_relay_keeps_a_connection_open_after_the_coordinator_has_gone():
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        host, port = start_relay(f"127.0.0.1:{coordinator.getsockname()[1]}").split(":")
        with closing(socket.create_connection((host, int(port)), timeout=10)) as client:
            client.sendall(b"question")
            connection, _ = coordinator.accept()
            assert connection.recv(100) == b"question"
            connection.sendall(b"answer")
            assert client.recv(100) == b"answer"
            connection.close()
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(100)
            client.sendall(b"more")

"""The processes of a run meet at the address of the coordinator, before JAX listens there.

JAX itself waits for 300 s and aborts if a process is missing, without its name. Here, messages name the missing
processes, and each process keeps a connection to process 0, which `peers.py` watches.
"""

import os
import selectors
import socket
import sys
import time
from contextlib import suppress
from typing import NamedTuple

from ringattn.mesh.channel import Channel, split
from ringattn.mesh.launchers import FIX, Place

PATIENCE = 300.0
"""Seconds until a process gives up: the starts of hosts can differ by minutes."""
FIRST_NOTICE, NOTICES = 10.0, 60.0
"""Seconds until a process reports that it waits, and between later reports."""
BACKLOG = 1024
"""Number of processes that may connect at the same moment."""
RESTART_PATIENCE = 20.0
"""Seconds during which the address may be in use by an earlier start of the run, which is ending."""

EARLY = "ended before all processes had joined; start the same command in every process"


class AbsentError(Exception):
    """Raised if a process does not join in time, or ends before the others have joined."""


class Meeting(NamedTuple):
    members: list[str]
    """Description of each process: 'process 1 on host a (pid 7)'."""
    hosts: list[str]
    """Name of the host of each process."""
    channels: dict[int, Channel]
    """Connections: in process 0 to each other process, in the others to process 0."""


def meet(place: Place) -> Meeting:
    """Waits until all processes have joined.

    Raises ValueError if process 0 cannot listen or refuses this process, and AbsentError if a process does not join.
    """
    return _receive(place) if place.index == 0 else _join(place)


def _receive(place: Place) -> Meeting:
    """Waits in process 0 for the others."""
    notice, joined, connected = _Notice(), dict[int, tuple[Channel, str, str]](), list[Channel]()
    try:
        with _listen(place.address) as listener, selectors.DefaultSelector() as selector:
            listener.settimeout(0)
            selector.register(listener, selectors.EVENT_READ, None)
            while missing := [index for index in range(1, place.count) if index not in joined]:
                notice.check(f"{_in_words(missing)} of {place.count} to join at {place.address}")
                for key, _ in selector.select(timeout=0.5):
                    if key.data is None:
                        with suppress(OSError):  # the connection may have been closed already
                            connected.append(Channel(listener.accept()[0]))
                            selector.register(connected[-1].connection, selectors.EVENT_READ, connected[-1])
                    elif not _welcome(key.data, place, joined):
                        selector.unregister(key.data.connection)
                        key.data.close()
    except BaseException as error:
        for channel, *_ in joined.values() if isinstance(error, AbsentError) else ():
            channel.send(lost=str(error))
        joined.clear()
        raise
    finally:
        kept = [channel for channel, *_ in joined.values()]
        for channel in connected:
            if channel not in kept:
                channel.close()
    members = [_own_description(0), *(joined[index][1] for index in sorted(joined))]
    hosts = [socket.gethostname(), *(joined[index][2] for index in sorted(joined))]
    channels = {index: channel for index, (channel, *_) in joined.items()}
    for channel in channels.values():
        channel.send(members=members, hosts=hosts)
    return Meeting(members, hosts, channels)


def _welcome(channel: Channel, place: Place, joined: dict[int, tuple[Channel, str, str]]) -> bool:
    """Adds the process that sends its first message over `channel`. Returns False if it cannot join.

    Raises AbsentError if it has joined and ends.
    """
    messages = channel.receive()
    if messages is None:
        lost = next((f"{member} {EARLY}" for other, member, _ in joined.values() if other is channel), None)
        if lost is None:  # the connection of another program
            return False
        raise AbsentError(lost)
    for message in messages:
        index, count = message.get("process"), message.get("count")
        if count != place.count:
            channel.send(refusal=f"process {index} expects {count} processes, and process 0 expects {place.count}")
            return False
        if not isinstance(index, int) or not 0 < index < place.count or index in joined:
            channel.send(refusal=f"two processes have the index {index}")
            return False
        joined[index] = channel, str(message.get("member")), str(message.get("host"))
        channel.send(joined=_own_description(0))
    return True


def _join(place: Place) -> Meeting:
    """Connects to process 0, and waits until it has started the run."""
    notice, interval = _Notice(), 0.05
    while True:
        try:
            channel = Channel(socket.create_connection(split(place.address), timeout=5))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            own = {"member": _own_description(place.index), "host": socket.gethostname()}
            channel.send(process=place.index, count=place.count, **own)
            meeting = None
            try:
                meeting = _wait(channel, place, notice)
            finally:
                if meeting is None:
                    channel.close()
            if meeting is not None:
                return meeting
            reason = "the connection was closed"
        notice.check(f"process 0 to listen at {place.address} ({reason})")
        time.sleep(interval)
        interval = min(1.0, 1.5 * interval)


def _wait(channel: Channel, place: Place, notice: "_Notice") -> Meeting | None:
    """Returns the meeting; None if another program listens, such as an earlier start of the run.

    Raises ValueError if process 0 refuses this process, and AbsentError if a process ends.
    """
    channel.connection.settimeout(0.5)
    first = ""
    while True:
        messages = channel.receive()
        if messages is None and channel.problem != "timed out":
            if first:
                raise AbsentError(f"{first} {EARLY}")
            return None
        for message in messages or ():
            first = message.get("joined", first)
            if "lost" in message:
                raise AbsentError(message["lost"])
            if "refusal" in message:
                raise ValueError(f"cannot join the other processes: {message['refusal']}; {FIX}")
            if "members" in message:
                channel.connection.settimeout(30)
                return Meeting(message["members"], message["hosts"], {0: channel})
        channel.problem = ""
        # Without an answer of process 0, another program may listen.
        (notice.show if first else notice.check)(f"other processes to join process 0 at {place.address}")


def _listen(address: str) -> socket.socket:
    """Returns a socket that listens where JAX's coordinator will. Raises ValueError if the address stays in use."""
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{split(address)[1]}")
    host, port = split(bind)
    end = time.monotonic() + RESTART_PATIENCE
    while True:
        try:
            if host in ("", "::") and socket.has_dualstack_ipv6():
                options = {"backlog": BACKLOG, "family": socket.AF_INET6, "dualstack_ipv6": True}
                return socket.create_server(("::", port), **options)
            family = socket.AF_INET6 if ":" in host.removesuffix("::") else socket.AF_INET
            return socket.create_server(("" if host == "::" else host, port), backlog=BACKLOG, family=family)
        except OSError as error:
            if time.monotonic() > end:
                problem = (
                    f"process 0 cannot listen at {bind} ({os.strerror(error.errno or 0)}): another run may use the port"
                )
                raise ValueError(f"{problem}; use another port") from None
        time.sleep(0.5)


class _Notice:
    """Reports on stderr that this process waits."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._next = self._start + FIRST_NOTICE

    def check(self, waits_for: str) -> None:
        """Calls `show`. Raises AbsentError after `PATIENCE`."""
        if time.monotonic() > self._start + PATIENCE:
            raise AbsentError(f"waited {PATIENCE:.0f} s for {waits_for}; start the same command in every process")
        self.show(waits_for)

    def show(self, waits_for: str) -> None:
        """Prints what this process waits for, at most once a minute."""
        now = time.monotonic()
        if now > self._next:
            print(f"waiting for {waits_for}", file=sys.stderr)
            self._next = now + NOTICES


def _own_description(index: int) -> str:
    return f"process {index} on host {socket.gethostname()} (pid {os.getpid()})"


def _in_words(indices: list[int]) -> str:
    names = ", ".join(map(str, indices[:5])) + f" and {len(indices) - 5} more" * (len(indices) > 5)
    return f"process{'es' * (len(indices) > 1)} {names}"

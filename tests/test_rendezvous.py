"""Processes meet, and name those that are missing."""

import re
import socket
import threading
import time
from contextlib import closing, suppress

import pytest

from ringattn.mesh import rendezvous
from ringattn.mesh.channel import Channel, split
from ringattn.mesh.launchers import Place


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def in_threads(*places: Place) -> list[object]:
    """Returns what `meet` returns or raises for each place. Closes the connections."""
    results = dict[int, object]()

    def run(number: int, place: Place) -> None:
        try:
            results[number] = meeting = rendezvous.meet(place)
            for channel in meeting.channels.values():
                channel.close()
        except (ValueError, rendezvous.AbsentError) as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [results[number] for number in range(len(places))]


def test_processes_meet_despite_other_connections():
    address = free_address()

    def disturb() -> None:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process": 1}\n', b"") * 5:
            with suppress(OSError), socket.create_connection(split(address), timeout=5) as connection:
                connection.sendall(content)
            time.sleep(0.01)

    other = threading.Thread(target=disturb, daemon=True)
    other.start()
    results = in_threads(*(Place(address, 3, index) for index in range(3)))
    other.join(30)
    meetings = [each for each in results if isinstance(each, rendezvous.Meeting)]
    assert len(meetings) == 3, results
    assert all(each.members == meetings[0].members for each in meetings)
    assert [re.sub(r" on .*", "", member) for member in meetings[0].members] == ["process 0", "process 1", "process 2"]
    assert all(each.hosts == [socket.gethostname()] * 3 for each in meetings)
    assert sorted(tuple(sorted(each.channels)) for each in meetings) == [(0,), (0,), (1, 2)]


def test_a_process_that_does_not_join_is_named(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "PATIENCE", 1.5)
    monkeypatch.setattr(rendezvous, "FIRST_NOTICE", 0.5)
    address = free_address()
    first, second = in_threads(Place(address, 4, 0), Place(address, 4, 2))
    missing = f"processes 1, 3 of 4 to join at {address}"
    assert f"waiting for {missing}\n" in capsys.readouterr().err
    assert (type(first), type(second)) == (rendezvous.AbsentError, rendezvous.AbsentError)
    assert str(first) == str(second)
    assert f"{missing}; start the same command in every process" in str(first)
    (alone,) = in_threads(Place(address, 2, 1))
    assert f"process 0 to listen at {address} (Connection refused)" in str(alone)


def test_two_processes_with_one_index_or_different_counts_are_refused(monkeypatch):
    monkeypatch.setattr(rendezvous, "PATIENCE", 1.5)
    address = free_address()
    results = in_threads(Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1), Place(address, 4, 2))
    refusals = sorted(str(each) for each in results if isinstance(each, ValueError))
    assert "cannot join the other processes: process 2 expects 4 processes, and process 0 expects 3" in refusals[0]
    assert "cannot join the other processes: two processes have the index 1" in refusals[1]


def test_a_port_in_use_is_an_error(monkeypatch):
    monkeypatch.setattr(rendezvous, "RESTART_PATIENCE", 0.2)
    message = r"cannot listen at \[::\]:\d+ \(Address already in use\)"
    with socket.create_server(("127.0.0.1", 0)) as used, pytest.raises(ValueError, match=message):
        rendezvous.meet(Place(f"localhost:{used.getsockname()[1]}", 2, 0))


def test_a_process_that_ends_before_all_have_joined_ends_the_others(monkeypatch):
    address, both_joined, original = free_address(), threading.Event(), rendezvous._welcome

    def welcome(channel, place, joined):
        result = original(channel, place, joined)
        if len(joined) == 2:
            both_joined.set()
        return result

    def join_and_end() -> None:
        while True:
            try:
                connection = socket.create_connection(split(address), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with closing(Channel(connection)) as channel:
            channel.send(process=1, count=4, member="process 1 on host h (pid 7)")
            both_joined.wait(30)

    monkeypatch.setattr(rendezvous, "_welcome", welcome)
    ending = threading.Thread(target=join_and_end, daemon=True)
    ending.start()
    first, second = in_threads(Place(address, 4, 0), Place(address, 4, 2))
    ending.join(30)
    expected = "process 1 on host h (pid 7) ended before all processes had joined; start the same command in every"
    assert expected in str(first)
    assert expected in str(second)

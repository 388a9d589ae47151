"""Byte counts, durations and errors as short text."""

import pytest

from ringattn.units import bytes_in_words, duration_in_words, first_line


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1536, "1.5 KiB"),
        (2**34, "16 GiB"),
        (3 * 2**40, "3 TiB"),
        (2**53, "8 PiB"),
    ],
)
def test_bytes_in_words(count, words):
    assert bytes_in_words(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (75.0, "1 min 15 s"),
        (3600.0, "1 h 0 min"),
        (9000.0, "2 h 30 min"),
        (18e4, "2 d 2 h"),
    ],
)
def test_duration_in_words(seconds, words):
    assert duration_in_words(seconds) == words


def test_first_line_of_an_error():
    assert first_line(ValueError("\n first\nsecond")) == "first"
    assert first_line(ValueError("x" * 300)) == "x" * 200
    assert first_line(ValueError()) == "ValueError"

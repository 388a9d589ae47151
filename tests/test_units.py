"""Numbers in words."""

import pytest

from ringattn.units import bytes_in_words


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

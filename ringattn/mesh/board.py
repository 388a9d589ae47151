"""Short texts by key that all processes of a run see, kept by JAX's coordination service in process 0."""

from typing import Any

from jax._src import distributed  # private: JAX has no public access to its key-value store


def post(key: str, text: str) -> None:
    """Stores `text` at `key`, a path such as 'checkpoints/3/failed/0'. Replaces an earlier text."""
    _client().key_value_set(key, text, allow_overwrite=True)


def read(directory: str) -> dict[str, str]:
    """Returns the texts whose keys start with `directory`, which ends with a slash, by the rest of their keys."""
    return {key.removeprefix(directory): text for key, text in _client().key_value_dir_get(directory)}


def remove(directory: str) -> None:
    """Removes the texts whose keys start with `directory`. Without several processes there are none."""
    if distributed.global_state.client is not None:
        _client().key_value_delete(directory)


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "called in a single process"
    return client

"""Reads the chat template of a checkpoint: chat_template.jinja, or the field of tokenizer_config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringattn.data.chat import ChatTemplate
from ringattn.units import first_line
from ringattn.weights.untrusted import parse_object

TEMPLATE, SETTINGS, TOKENIZER = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"
VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Fields of tokenizer_config.json that are variables of the template."""


def read_chat_template(files: Mapping[str, bytes], path: Path) -> ChatTemplate | None:
    """Returns the chat template in `files`, contents by name; None if there is none, or no tokenizer.json.

    Of several templates, returns the one named 'default'. `path` is the directory or GGUF file of `files`. Raises
    ValueError if a file is damaged.
    """
    settings = named_object(files, SETTINGS, path)
    template, source = _template(settings, path), str(path / SETTINGS if path.is_dir() else path)
    if TEMPLATE in files:
        source = str(path / TEMPLATE)
        try:
            template = files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not UTF-8 ({error.reason}); download it again") from None
    if template is None or TOKENIZER not in files:
        return None
    special, plain = added_tokens(named_object(files, TOKENIZER, path), path)
    return ChatTemplate(template, source, special, plain, _variables(settings))


def read_token_ids(files: Mapping[str, bytes], path: Path) -> dict[str, int]:
    """Returns the ids of config.json, such as eos_token_id, that tokenizer_config.json names. Raises ValueError."""
    special, _ = added_tokens(named_object(files, TOKENIZER, path), path)
    names = _variables(named_object(files, SETTINGS, path))
    fields = ("bos_token", "eos_token", "pad_token")
    return {f"{field}_id": special[names[field]] for field in fields if names.get(field) in special}


def named_object(files: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file `name`; empty without the file. Raises ValueError that names it."""
    try:
        return parse_object(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{path / name} is not a valid JSON object ({first_line(error)}); download it again") from None


def _template(settings: Mapping[str, Any], path: Path) -> str | None:
    found = settings.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError, IndexError):
        named = {}
    template = named.get("default")
    if not isinstance(template, str):
        rule = "must be a string, or a list of {name, template} with the name 'default'"
        raise ValueError(f"{path / SETTINGS}: chat_template {rule}; download the file again")
    return template


def added_tokens(content: Mapping[str, Any], path: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Returns the ids of special tokens by name, and the names of other added tokens. Raises ValueError."""
    special, plain = {}, set()
    try:
        for token in content.get("added_tokens") or []:
            name, number = token["content"], token["id"]
            if type(name) is not str or not name or type(number) is not int:
                raise TypeError
            if token["special"]:
                special[name] = number
            else:
                plain.add(name)
    except (TypeError, KeyError):
        rule = "must be a list of objects with content, id and special"
        raise ValueError(f"{path / TOKENIZER}: added_tokens {rule}; download the file again") from None
    return special, frozenset(plain)


def _variables(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of the special tokens that templates use. An entry is a name, or an object with one."""
    entries = {name: settings.get(name) for name in VARIABLES}
    names = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: value for name, value in names.items() if isinstance(value, str)}

"""Rebuilds tokenizer.json from the metadata of a GGUF file, with the package `tokenizers`.

Byte-level BPE (`gpt2`) with the pre-tokenizers of llama.cpp (src/llama-vocab.cpp), and SentencePiece BPE (`llama`).
"""

import json
from collections.abc import Mapping
from typing import Any

from ringattn.weights.tokenizers import tokenizer_config
from ringattn.weights.untrusted import shortened
from ringattn.weights.values import Values

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": (GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST,),
    "qwen2": (_WORDS + r"\p{N}" + _REST,),
}
"""Regular expressions that split text one after the other, by tokenizer.ggml.pre."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values of tokenizer.ggml.token_type."""
_SPACE = "\u2581"
_MAX_PIECE = 1000
"""Maximum number of characters of a SentencePiece token: the time to find its parts is quadratic in it."""
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id"}
SPECIAL |= {"pad_token": "padding_token_id"}
"""Fields of tokenizer_config.json and the fields of GGUF that hold their ids."""


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """Returns tokenizer.json and tokenizer_config.json. Raises ValueError if `metadata` has no tokenizer to rebuild."""
    own = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()}
    values = Values(own, f"{source}: tokenizer.ggml")
    kind = values.take("model", str, "none")
    if kind not in ("gpt2", "llama"):
        raise values.error(
            f"model={shortened(kind)}", "is not supported", "supported are gpt2 and llama; use another file"
        )
    tokens = _list(values, "tokens", str)
    if len(set(tokens)) < len(tokens):
        raise values.error("tokens", "has duplicates", "download the file again")
    tokenizer = _byte_level(values, tokens) if kind == "gpt2" else _sentence_piece(values, tokens)
    names = {field: _token(values, name, tokens) for field, name in SPECIAL.items() if name in values}
    _add_special(values, tokenizer, tokens)
    content = json.loads(tokenizer.to_str())
    adds_bos = kind == "llama" or values.take("pre", str, "default") == "llama-bpe"  # llama.cpp's defaults
    if values.take("add_bos_token", bool, adds_bos) and "bos_token" in names:
        content["post_processor"] = _with_bos(names["bos_token"], values.take("bos_token_id", int))
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer.json": json.dumps(content, indent=2, ensure_ascii=False).encode(),
        "tokenizer_config.json": tokenizer_config(names, template if isinstance(template, str) else None),
    }


def _with_bos(name: str, number: int) -> dict[str, Any]:
    """Returns the post-processor of tokenizer.json that puts the special token `name` before each sequence.

    The constructor of the package parses a template, in which a name such as '$A' or 'a b' has another meaning.
    """

    def sequence(which: str, kind: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": kind}},
            {"Sequence": {"id": which, "type_id": kind}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def token_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """Returns the ids of config.json, such as eos_token_id, that `metadata` has."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    values = Values(metadata, source)
    found = {field: f"tokenizer.ggml.{name}" for field, name in names.items() if f"tokenizer.ggml.{name}" in values}
    return {field: values.take(name, int) for field, name in found.items()}


def generation_files(metadata: Mapping[str, Any], source: str) -> dict[str, bytes]:
    """Returns a generation_config.json by name, if a turn ends with another token than a text, as in Gemma."""
    values = Values(metadata, source)
    text, turn = (values.take(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot"))
    if turn is None or turn == text:
        return {}
    ids = [turn] if text is None else [text, turn]
    return {"generation_config.json": json.dumps({"eos_token_id": ids}).encode()}


def _list(values: Values, name: str, kind: type) -> list[Any]:
    """Returns a list whose items are of type `kind`."""
    items = values.take(name, list)
    if not all(type(item) is kind for item in items):
        raise values.error(name, f"must be a list of {kind.__name__}", "download the file again")
    return items


def _token(values: Values, name: str, tokens: list[str]) -> str:
    number = values.take(name, int)
    if not 0 <= number < len(tokens):
        raise values.error(f"{name}={number}", f"must be less than {len(tokens)}", "download the file again")
    return tokens[number]


def _byte_level(values: Values, tokens: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = values.take("pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise values.error(f"pre={shortened(pre)}", "is not supported", f"supported are {known}; use another file")
    merges = [tuple(merge.split(" ")) for merge in _list(values, "merges", str)]
    known = set(tokens)
    if any(len(merge) != 2 or not known.issuperset((*merge, "".join(merge))) for merge in merges):
        raise values.error("merges", "must be pairs of tokens whose union is a token", "download the file again")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(values: Values, tokens: list[str]) -> Any:
    """Returns a BPE tokenizer whose merges follow from the scores of the tokens, as in transformers' converter."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list(values, "scores", float)
    if len(scores) != len(tokens) or max(map(len, tokens), default=0) > _MAX_PIECE:
        rule = f"must be one per token, and tokens must have at most {_MAX_PIECE} characters"
        raise values.error("scores", rule, "download the file again")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found = [pair for pair in parts if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [
            (score, *pair) for pair in sorted(found, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    unknown = _token(values, "unknown_token_id", tokens) if "unknown_token_id" in values else None
    pairs = [merge[1:] for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    normalizing: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if values.take("add_space_prefix", bool, True):
        normalizing.insert(0, normalizers.Prepend(_SPACE))
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(normalizing), decoders.Sequence(steps)
    return tokenizer


def _add_special(values: Values, tokenizer: Any, tokens: list[str]) -> None:
    """Marks control tokens as special, and adds user-defined tokens."""
    from tokenizers import AddedToken

    types = _list(values, "token_type", int) if "token_type" in values else [1] * len(tokens)
    if len(types) != len(tokens):
        raise values.error("token_type", "must be one per token", "download the file again")
    pairs = list(zip(tokens, types, strict=True))
    special = [token for token, kind in pairs if kind in (_UNKNOWN, _CONTROL) and token]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    user = [token for token, kind in pairs if kind == _USER_DEFINED and token]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user])

"""The tokenizer of a checkpoint, for text, and its files in a Hugging Face directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from ringattn.data import Tokenizer


@dataclass(frozen=True)
class TextTokenizer:
    """Encodes text to ids and decodes ids to text, without special tokens.

    `documents` is the same tokenizer for the data pipeline.
    """

    documents: Tokenizer
    """Encodes documents, which are bytes."""

    def encode(self, text: str | bytes) -> Int[np.ndarray, " tokens"]:
        """Returns the ids [tokens] int32 of `text`. Names of special tokens in the text are plain text.

        Raises ValueError if the tokenizer would lose a part of the text.
        """
        document = text.encode() if isinstance(text, str) else text
        return self.documents.encode(document).astype(np.int32)

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of `ids` (any shape, flattened). Raises ValueError for an id outside the vocabulary."""
        return self.documents.decode(ids)


def run_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns tokenizer.json and a tokenizer_config.json for the tokenizer of a run; {} if it has no tokenizer.json.

    The boundary, which separates documents, becomes the end-of-text token.
    """
    content = tokenizer.files.get("tokenizer.json")
    if content is None:
        return {}
    names = {token["id"]: token["content"] for token in json.loads(content)["added_tokens"]}
    start = {} if tokenizer.start == tokenizer.boundary else {"bos_token": names[tokenizer.start]}
    settings = tokenizer_config({"eos_token": names[tokenizer.boundary]} | start)
    return {"tokenizer.json": content, "tokenizer_config.json": settings}


def tokenizer_config(names: Mapping[str, str], template: str | None = None) -> bytes:
    """Returns tokenizer_config.json.

    `names` are the special tokens by field, such as eos_token; `template` is the chat template.
    """
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    if template is not None:
        settings["chat_template"] = template
    return json.dumps(settings, indent=2).encode()

"""Data to batches: read documents, tokenise, pack into rows, deal out by (seed, step)."""

from ringattn.data.loader import Loader, deal, load, prefetch
from ringattn.data.packing import Batch
from ringattn.data.prepare import prepare
from ringattn.data.reading import Sides, load_tokenizer, read
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import VideoTokenizer

__all__ = [
    "Batch",
    "Loader",
    "Sides",
    "Tokenizer",
    "VideoTokenizer",
    "deal",
    "load",
    "load_tokenizer",
    "prefetch",
    "prepare",
    "read",
]

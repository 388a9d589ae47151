"""Data to batches: read documents, tokenise, pack into rows, deal out by (seed, step)."""

from ringattn.data.loader import Loader, load, prefetch
from ringattn.data.packing import Batch
from ringattn.data.prepare import prepare
from ringattn.data.reading import load_tokenizer
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import VideoTokenizer

__all__ = ["Batch", "Loader", "Tokenizer", "VideoTokenizer", "load", "load_tokenizer", "prefetch", "prepare"]

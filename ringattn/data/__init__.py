"""Text to batches: read documents, tokenise, pack into rows, deal out by (seed, step)."""

from ringattn.data.loader import Loader, load, prefetch
from ringattn.data.packing import Batch
from ringattn.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Batch", "Loader", "Tokenizer", "load", "load_tokenizer", "prefetch"]

"""Data to batches: read documents, tokenise, pack into rows, deal out by (seed, step)."""

from ringattn.data.corpus import Corpus
from ringattn.data.loader import Loader, deal, fingerprint, load, prefetch
from ringattn.data.packing import Batch, PackedRows
from ringattn.data.prepare import prepare
from ringattn.data.reading import Sides, find_tokenizer, load_tokenizer, read, read_all
from ringattn.data.tasks import DEEP, Question, check_room, check_tokenizer, question
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import VideoTokenizer

__all__ = [
    "DEEP",
    "Batch",
    "Corpus",
    "Loader",
    "PackedRows",
    "Question",
    "Sides",
    "Tokenizer",
    "VideoTokenizer",
    "check_room",
    "check_tokenizer",
    "deal",
    "find_tokenizer",
    "fingerprint",
    "load",
    "load_tokenizer",
    "prefetch",
    "prepare",
    "question",
    "read",
    "read_all",
]

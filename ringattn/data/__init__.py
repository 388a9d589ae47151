"""Data pipeline: reads documents, tokenizes them, packs them into rows and makes batches.

.. include:: README.md
"""

from ringattn.data.chat import ChatTemplate
from ringattn.data.corpus import Corpus
from ringattn.data.dataset import Splits, find_tokenizer, load_tokenizer, read, read_all
from ringattn.data.loader import Loader, fingerprint, load, make_loaders, prefetch
from ringattn.data.packing import Batch, PackedRows
from ringattn.data.prepare import prepare
from ringattn.data.questions import Question, check_fits, check_tokenizer, question
from ringattn.data.tasks import DEPTH_TASKS
from ringattn.data.tokenizer import Tokenizer
from ringattn.data.video import VideoTokenizer

__all__ = [
    "DEPTH_TASKS",
    "Batch",
    "ChatTemplate",
    "Corpus",
    "Loader",
    "PackedRows",
    "Question",
    "Splits",
    "Tokenizer",
    "VideoTokenizer",
    "check_fits",
    "check_tokenizer",
    "find_tokenizer",
    "fingerprint",
    "load",
    "load_tokenizer",
    "make_loaders",
    "prefetch",
    "prepare",
    "question",
    "read",
    "read_all",
]

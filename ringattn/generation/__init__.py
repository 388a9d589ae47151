"""Generates text with a K/V cache that is sharded over the ring.

.. include:: README.md
"""

from ringattn.generation.conversation import Conversation
from ringattn.generation.generator import Generator, Result
from ringattn.generation.saved import PromptCache

__all__ = ["Conversation", "Generator", "PromptCache", "Result"]

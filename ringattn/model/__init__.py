"""The transformer."""

from ringattn.model.transformer import Transformer, count_parameters

__all__ = ["Transformer", "count_parameters"]

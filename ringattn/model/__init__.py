"""The transformer."""

from ringattn.model.transformer import Params, Transformer, count_parameters

__all__ = ["Params", "Transformer", "count_parameters"]

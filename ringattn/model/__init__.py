"""The transformer."""

from ringattn.model.transformer import Params, Transformer, count_parameters, whole

__all__ = ["Params", "Transformer", "count_parameters", "whole"]

"""Drafters: cheap proposals. One file per method."""

from specjax.drafters.draft_model import draft_model

__all__ = ["draft_model"]

"""Drafters: cheap proposals. One file per method; `draw` is what those with logits share."""

from specjax.drafters.draft_model import draft_model
from specjax.drafters.draw import draw

__all__ = ["draft_model", "draw"]

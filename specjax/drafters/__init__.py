"""Drafters: cheap proposals. One file per method; drafters with logits share `draw`."""

from specjax.drafters.draft_model import draft_model
from specjax.drafters.draw import draw
from specjax.drafters.prompt_lookup import prompt_lookup

__all__ = ["draft_model", "draw", "prompt_lookup"]

"""Drafters: cheap proposals. One file per method; drafters with logits share `draw`."""

from specjax.drafters.draft_model import draft_model
from specjax.drafters.draw import draw
from specjax.drafters.first_of import first_of
from specjax.drafters.prompt_lookup import prompt_lookup
from specjax.drafters.save_store import load_store, save_store
from specjax.drafters.store import Store
from specjax.drafters.suffix_store import suffix_store

__all__ = ["Store", "draft_model", "draw", "first_of", "load_store", "prompt_lookup", "save_store", "suffix_store"]

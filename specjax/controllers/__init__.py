"""Controllers: how many tokens to draft. One file per policy."""

from specjax.controllers.fixed import fixed

__all__ = ["fixed"]

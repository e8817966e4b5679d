"""Verifiers: which draft tokens stay. One file per rule."""

from specjax.verify.greedy import greedy
from specjax.verify.rejection import rejection

__all__ = ["greedy", "rejection"]

"""Controllers: how many tokens to draft. One file per policy."""

from specjax.controllers.additive import additive
from specjax.controllers.confidence import confidence
from specjax.controllers.fixed import fixed
from specjax.controllers.throughput import ThroughputState, throughput

__all__ = ["ThroughputState", "additive", "confidence", "fixed", "throughput"]

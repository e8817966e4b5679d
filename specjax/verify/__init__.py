"""Verifiers: one file per rule."""

from specjax.verify.block import block
from specjax.verify.coupled import coupled
from specjax.verify.greedy import greedy
from specjax.verify.rejection import rejection
from specjax.verify.top_k_lossy import top_k_lossy
from specjax.verify.typical_lossy import typical_lossy

__all__ = ["block", "coupled", "greedy", "rejection", "top_k_lossy", "typical_lossy"]

"""Your Flax module as a Model: nothing rewritten, nothing copied, parameters stay arguments."""

from specjax.adapters.choose import Adapted, Strategy
from specjax.adapters.linen import from_linen
from specjax.adapters.nnx import from_nnx
from specjax.adapters.wrapped import Takes, as_given, per_head

__all__ = ["Adapted", "Strategy", "Takes", "as_given", "from_linen", "from_nnx", "per_head"]

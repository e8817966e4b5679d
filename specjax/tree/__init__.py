"""Token trees: how a draft with branches lies in one forward pass."""

from specjax.tree.layout import Layout as Layout
from specjax.tree.layout import chain as chain
from specjax.tree.layout import layout as layout

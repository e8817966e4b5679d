"""A trace as one HTML page that needs nothing else: no network, no font, no server."""

from specjax.viewer.page import page
from specjax.viewer.save import save, writer

__all__ = ["page", "save", "writer"]

"""The loop: generation with speculation, the autoregressive baseline, tokens as they come."""

from specjax.decode.api import autoregressive as autoregressive
from specjax.decode.api import generate as generate
from specjax.decode.stream import Chunk as Chunk
from specjax.decode.stream import LogProb as LogProb
from specjax.decode.stream import Origin as Origin
from specjax.decode.stream import stream as stream

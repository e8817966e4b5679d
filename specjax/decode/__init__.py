"""Decoding: generation with speculation, the autoregressive baseline, streams, and rounds by hand."""

from specjax.decode.admit import admit as admit
from specjax.decode.admit import open_slots as open_slots
from specjax.decode.api import autoregressive as autoregressive
from specjax.decode.api import generate as generate
from specjax.decode.by_hand import finish as finish
from specjax.decode.by_hand import init as init
from specjax.decode.by_hand import step as step
from specjax.decode.state import State as State
from specjax.decode.stream import Chunk as Chunk
from specjax.decode.stream import LogProb as LogProb
from specjax.decode.stream import Origin as Origin
from specjax.decode.stream import stream as stream

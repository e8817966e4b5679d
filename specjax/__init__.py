"""specjax: exact speculative decoding for JAX models, one XLA program on TPU, GPU and CPU."""

from specjax import controllers, costs, drafters, stats, trace, verify, viewer
from specjax.calibration import calibrate
from specjax.decode import autoregressive, generate
from specjax.profiling import profile
from specjax.stream import Chunk, LogProb, Origin, stream
from specjax.types import (
    Context,
    Controller,
    Draft,
    Drafter,
    DraftPlan,
    Drawn,
    Generation,
    LogProbs,
    Model,
    Output,
    Processor,
    Round,
    Sampling,
    Stats,
    Status,
    Target,
    Verdict,
    Verifier,
)

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "Context",
    "Controller",
    "Draft",
    "DraftPlan",
    "Drafter",
    "Drawn",
    "Generation",
    "LogProb",
    "LogProbs",
    "Model",
    "Origin",
    "Output",
    "Processor",
    "Round",
    "Sampling",
    "Stats",
    "Status",
    "Target",
    "Verdict",
    "Verifier",
    "autoregressive",
    "calibrate",
    "controllers",
    "costs",
    "drafters",
    "generate",
    "profile",
    "stats",
    "stream",
    "trace",
    "verify",
    "viewer",
]

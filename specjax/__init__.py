"""specjax: exact speculative decoding for JAX models, one XLA program on TPU, GPU and CPU."""

import importlib
from types import ModuleType

from specjax import controllers, costs, drafters, stats, verify, viewer
from specjax.decode import (
    Chunk,
    LogProb,
    Origin,
    State,
    admit,
    autoregressive,
    finish,
    generate,
    init,
    open_slots,
    step,
    stream,
)
from specjax.profiling import calibrate, profile
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
from specjax.viewer import trace

__version__ = "0.1.0"

_ON_DEMAND = ("adapters", "aot", "models", "sharding", "testing", "text")

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
    "State",
    "Stats",
    "Status",
    "Target",
    "Verdict",
    "Verifier",
    "admit",
    "autoregressive",
    "calibrate",
    "controllers",
    "costs",
    "drafters",
    "finish",
    "generate",
    "init",
    "open_slots",
    "profile",
    "stats",
    "step",
    "stream",
    "trace",
    "verify",
    "viewer",
]


def __getattr__(name: str) -> ModuleType:
    """The parts that not every program needs, imported when first named."""
    if name in _ON_DEMAND:
        return importlib.import_module(f"specjax.{name}")
    raise AttributeError(f"module 'specjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})

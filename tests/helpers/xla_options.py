"""Compile options for programs that run once or twice: compiling is most of the suite's time, so they compile badly."""

from __future__ import annotations

import importlib.metadata

OPTIONS = {"xla_backend_optimization_level": 0}
if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):  # later ones end the process on it
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
FLAGS = " ".join(f"--{name}={value:d}" for name, value in OPTIONS.items())

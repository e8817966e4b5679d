"""Ahead-of-time compilation for TPUs, without a TPU: plan the pod before you rent it."""

from specjax.aot.planning import Collective, Cost, Report, plan
from specjax.aot.topology import ENVIRONMENT, HBM_GIB

__all__ = ["ENVIRONMENT", "HBM_GIB", "Collective", "Cost", "Report", "plan"]

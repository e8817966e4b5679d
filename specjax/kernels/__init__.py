"""Pallas kernels for TPU, where what XLA makes of a step costs more than the step's bytes; cache.py chooses."""

"""A finished training run, measured after the fact from the checkpoints that it left."""

from curvdiag.checkpoints.outcome import Failure, Scan
from curvdiag.checkpoints.scanning import scan
from curvdiag.checkpoints.weights import load_checkpoint

__all__ = ["Failure", "Scan", "load_checkpoint", "scan"]

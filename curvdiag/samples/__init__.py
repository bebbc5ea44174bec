"""Per-sample gradients: what each sample alone adds to the gradient of an objective."""

from curvdiag.samples.streaming import per_sample_gradients

__all__ = ["per_sample_gradients"]

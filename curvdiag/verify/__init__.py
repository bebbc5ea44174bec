"""A second opinion: curvdiag beside dense LAPACK and PyHessian on small problems."""

from curvdiag.verify.checks import verify
from curvdiag.verify.problems import Problem, problems
from curvdiag.verify.rows import Check, Verification

__all__ = ["Check", "Problem", "Verification", "problems", "verify"]

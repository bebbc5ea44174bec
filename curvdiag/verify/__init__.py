"""A second opinion: curvdiag beside dense LAPACK and PyHessian on small problems."""

from curvdiag.verify.checks import Check, Verification, verify
from curvdiag.verify.problems import Problem, problems

__all__ = ["Check", "Problem", "Verification", "problems", "verify"]

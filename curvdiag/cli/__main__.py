"""``python -m curvdiag.cli``, the same as the command ``curvdiag``."""

from curvdiag.cli import run

run()

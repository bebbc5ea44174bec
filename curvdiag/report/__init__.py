"""One self-contained page about the runs of a file: written once, or served while a run goes on.

:func:`write_report` writes it, :func:`serve` serves it on the loopback address, :func:`bundle` is the data in it.
"""

from curvdiag.report.contents import bundle
from curvdiag.report.page import write_report
from curvdiag.report.server import serve

__all__ = ["bundle", "serve", "write_report"]

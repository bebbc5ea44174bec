"""Pictures of results: every function is ``f(data, ax=None, ...) -> Axes``.

Without ``ax`` a function makes a figure of its own through :mod:`matplotlib.pyplot`, so that notebooks show
it and ``plt.show()`` finds it; with ``ax`` it draws there and leaves pyplot alone. No function changes a
global setting. Colours are distinct to colour-blind readers, and every difference of colour is also one of
lightness, line style or marker, so that a black-and-white print keeps it.
"""

from curvdiag.plotting.anisotropy import anisotropy
from curvdiag.plotting.coupling import coupling, coupling_pair
from curvdiag.plotting.density import density
from curvdiag.plotting.duality import duality
from curvdiag.plotting.eigenpairs import eigenpairs
from curvdiag.plotting.estimate import estimate
from curvdiag.plotting.exponent import exponent
from curvdiag.plotting.exponents_by_layer import exponents_by_layer
from curvdiag.plotting.exponents_of_runs import exponents_of_runs
from curvdiag.plotting.heatmap import heatmap
from curvdiag.plotting.layers import layers
from curvdiag.plotting.scalars import scalars
from curvdiag.plotting.scaling import scaling
from curvdiag.plotting.scaling_page import scaling_page
from curvdiag.plotting.spectra import spectra

__all__ = [
    "anisotropy",
    "coupling",
    "coupling_pair",
    "density",
    "duality",
    "eigenpairs",
    "estimate",
    "exponent",
    "exponents_by_layer",
    "exponents_of_runs",
    "heatmap",
    "layers",
    "scalars",
    "scaling",
    "scaling_page",
    "spectra",
]

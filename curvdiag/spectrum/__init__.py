"""Algorithms over any symmetric operator: density, eigenpairs, traces, anisotropy."""

from curvdiag.spectrum.anisotropy import MEASURES, Anisotropy, Measure, anisotropy
from curvdiag.spectrum.budget import SpectrumMeasurement, measure_spectrum
from curvdiag.spectrum.density import SpectralDensity, spectral_density
from curvdiag.spectrum.eigen import Eigenpairs, power_iteration, top_eigenpairs
from curvdiag.spectrum.lanczos import Tridiagonal
from curvdiag.spectrum.layers import LayerSpectra, LayerSpectrum, layer_spectra
from curvdiag.spectrum.trace import diagonal, frobenius_norm, trace

__all__ = [
    "MEASURES",
    "Anisotropy",
    "Eigenpairs",
    "LayerSpectra",
    "LayerSpectrum",
    "Measure",
    "SpectralDensity",
    "SpectrumMeasurement",
    "Tridiagonal",
    "anisotropy",
    "diagonal",
    "frobenius_norm",
    "layer_spectra",
    "measure_spectrum",
    "power_iteration",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]

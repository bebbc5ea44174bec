"""Callbacks for training frameworks, each imported from its own module, so that no framework is imported unasked.

::

    from curvdiag.integrations.lightning import CurvatureCallback
    from curvdiag.integrations.transformers import CurvatureCallback
"""

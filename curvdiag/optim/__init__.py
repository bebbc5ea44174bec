"""Optimizers in the l_p geometry, and the baselines they are compared with that PyTorch lacks."""

from curvdiag.optim.direction import dual_norm, lp_direction
from curvdiag.optim.gsgd import GSGD
from curvdiag.optim.lion import Lion
from curvdiag.optim.lpsgd import LPSGD
from curvdiag.optim.lpsgdm import LPSGDM
from curvdiag.optim.sign_sgd import SignSGD
from curvdiag.optim.stacey import Stacey

__all__ = ["GSGD", "LPSGD", "LPSGDM", "Lion", "SignSGD", "Stacey", "dual_norm", "lp_direction"]

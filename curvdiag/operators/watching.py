"""Watching the operations that PyTorch runs, without its compiler."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A mode in which ``__torch_dispatch__`` looks at operations and changes none of them.

    PyTorch would import its compiler, which takes a second or two, only to keep it out of ``__torch_dispatch__``. What
    is measured runs eagerly anyway (:mod:`curvdiag.sandbox`), never within compiled code.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

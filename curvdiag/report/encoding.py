"""Arrays as text that a page can carry, and names that no page takes for markup."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np


def packed(array: np.ndarray, dtype: str = "<f8") -> str:
    """An array as base64 of its bytes, little-endian float64 if not said otherwise."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def plain(value: Any) -> Any:
    """A configuration as strict JSON has it: what is not finite becomes its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def script_json(data: Any) -> str:
    """JSON, in ASCII, that stays data wherever it stands in a page: no character of it can end a script element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")

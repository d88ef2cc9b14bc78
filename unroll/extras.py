"""Optional packages, which the extras of the distribution install."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from unroll.core.errors import Problem, UnrollError


def require(*packages: str, extra: str = "onnx", fix: str | None = None) -> None:
    """Refuse to go on without packages, of an extra or such as `fix` tells how to install.

    Raises:
        UnrollError: naming the packages, and the extra or the fix.

    Example:
        >>> require("torch")
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        fix = fix or f"pip install 'torch-unroll[{extra}]'"
        raise UnrollError(Problem("unroll", f"needs {', '.join(missing)} for this", fix))


def is_onnx(model: Any) -> bool:
    """Tell whether something is given as an ONNX model, or as a path of one, whether or not `onnx` is installed."""
    return isinstance(model, (str, os.PathLike)) or type(model).__module__.partition(".")[0] in ("onnx", "onnx_ir")

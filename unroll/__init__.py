"""Recurrent layers as explicit unrolled operations."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from unroll.core.version import VERSION as __version__  # noqa: F401 (no name that a star takes)

if TYPE_CHECKING:
    from unroll.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Torch takes seconds, which a command that only tells of itself does not need: all public names come at once.
    api = import_module("unroll.api")
    if name in globals():  # a folder, from its import on
        return globals()[name]
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return import_module("unroll.api").__all__


class _Package(ModuleType):
    """The type of this package, by which `import unroll; unroll(model)` is a call of the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.unroll(*args, **kwargs)


sys.modules[__name__].__class__ = _Package

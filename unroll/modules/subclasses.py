"""The classes that stand in for recurrent layers, also for subclasses of the user's own.

A subclass that prepares its arguments and calls `super().forward` keeps its code: the class is built
once more on top of `Unrolled`, and the `super()` in its methods bound to the new class.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from unroll.core.errors import Problem, UnrollError
from unroll.core.recurrence import CELL_MODES, LAYERS
from unroll.modules.layers import Unrolled
from unroll.modules.methods import KERNEL_NAMES, function_of, names
from unroll.modules.stand_ins import STAND_INS

# Names that a subclass may define without changing what the layer computes. `forward` is looked at more closely.
HARMLESS = {"forward", "reset_parameters", "flatten_parameters", "extra_repr", "__init__", "__repr__"}
HARMLESS |= {"__module__", "__doc__", "__annotations__", "__constants__", "__static_attributes__", "__firstlineno__"}


def replacement_class(name: str, layer: nn.Module) -> type[Unrolled]:
    """Return the class that stands in for a recurrent layer's.

    Raises:
        UnrollError: for a class that does something of its own that cannot be honoured.
    """
    kind = parametrize.type_before_parametrizations(layer)
    place, called = name or kind.__name__, f"{kind.__module__}.{kind.__qualname__}"
    if "quantized" in kind.__module__.split("."):
        raise UnrollError(Problem(place, f"{called} is quantized", "unroll the float module, then quantize the result"))
    objection = next((o for base in kind.__mro__ if (o := _objection(base))), None)
    if objection is None and not issubclass(kind, (*LAYERS, *CELL_MODES)):
        objection = "is no subclass of torch.nn.LSTM, GRU, RNN or their cells"
    if objection:
        rule = f"unroll(model, rules={{{kind.__name__}: function from the layer to a module}})"
        fix = f"give a rule, {rule}, or leave it out by where="
        raise UnrollError(Problem(place, f"{called} {objection}", fix))
    return rebase(kind)


def _objection(kind: type) -> str | None:
    """Say why methods of this class, a subclass or a mixin, cannot run on top of `Unrolled`; None if they can."""
    if kind in (*STAND_INS, nn.Module, object) or kind.__module__ in ("typing", "abc"):
        return None
    own = {name for name in vars(kind) if name in vars(nn.RNNBase) or name in vars(nn.LSTM)} - HARMLESS
    own |= vars(kind).keys() & {"__init_subclass__", "__getstate__", "__reduce__", "__reduce_ex__"}
    if own:
        return f"overrides {', '.join(sorted(own))}"
    for name, method in vars(kind).items():
        if name == "__init__":
            continue
        method, wrapped = function_of(method)
        if method is None:
            continue
        named = names(method)
        rebinds = "__class__" in method.__code__.co_freevars
        if name == "forward" and not (rebinds and "forward" in named):
            return "overrides forward without calling super().forward"
        if rebinds and wrapped:
            return f"calls super() in {name}, a {wrapped}"
        if rebinds and kind.__name__ in named:
            return f"names its own class in {name}, where super() without arguments would do"
        if found := named & KERNEL_NAMES:
            return f"reaches past super() in {name}, by {', '.join(sorted(found))}"
    return None


def assign_class(layer: Any, kind: type) -> None:
    """Give a layer a class, and on top of it the properties that its parametrizations need."""
    names = list(layer.parametrizations) if parametrize.is_parametrized(layer) else []
    layer.__class__ = kind
    if names:
        parametrize._inject_new_class(layer)
        for name in names:
            parametrize._inject_property(layer, name)


@functools.cache
def rebase(kind: type) -> type:
    """Return the class as it would be with `Unrolled` layers for bases in place of torch's."""
    if not issubclass(kind, (nn.RNNBase, nn.RNNCellBase)):
        return kind
    if kind in STAND_INS:
        return STAND_INS[kind]
    cell = types.CellType()
    namespace = {
        name: _rebound(value, cell) for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")
    }
    # No import finds the new class: pickles have the class that it was made of.
    namespace |= {"__reduce_ex__": _reduce, "origin": kind}
    new = types.new_class(kind.__name__, tuple(map(rebase, kind.__bases__)), {}, lambda body: body.update(namespace))
    cell.cell_contents = new
    return new


def _rebound(value: Any, cell: types.CellType) -> Any:
    """Return a function with the cell that `super()` reads replaced."""
    if not isinstance(value, types.FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    closure = tuple(cell if name == "__class__" else old for name, old in free)
    new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    new.__kwdefaults__ = value.__kwdefaults__
    return functools.update_wrapper(new, value)


def _reduce(self: Unrolled, protocol: int) -> tuple[Any, ...]:
    return _empty, (self.origin,), self.__getstate__()


def _empty(origin: type) -> Unrolled:
    """Make an instance without contents of the class that stands in for `origin`, for unpickling."""
    kind: Any = rebase(origin)
    return kind.__new__(kind)

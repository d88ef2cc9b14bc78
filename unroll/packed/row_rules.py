"""The functions of torch that treat each row by itself, so that rows of padding among them do no harm.

A table, by the functions' names: `torch.add`, `Tensor.add_`, `+` and `aten.add.Tensor` are all `add`. What is not in
it may mix rows, as far as is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.fx.experimental.symbolic_shapes import statically_known_true


def _names(text: str) -> set[str]:
    return set(text.split())


ELEMENTWISE = _names(
    """
    abs acos acosh add addcdiv addcmul alpha_dropout and asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor bool ceil celu clamp clamp_max clamp_min clip clone contiguous copysign cos cosh cpu cuda detach div
    divide double dropout elu empty_like eq erf erfc exp exp2 expm1 fill float floor floor_divide floordiv fmod
    full_like gelu ge greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside hypot int
    invert isfinite isinf isnan le leaky_relu lerp less less_equal lgamma log log10 log1p log2 logaddexp logical_and
    logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum minimum mish mod mul multiply
    nan_to_num ne neg negative not_equal ones_like or positive pow rand_like randn_like real reciprocal relu relu6
    remainder requires_grad rrelu round rsqrt rsub selu sgn sigmoid sign silu sin sinh softplus softshrink softsign
    sqrt square sub subtract tan tanh tanhshrink threshold to to_copy true_divide truediv trunc type_as where xlogy
    xor zero zeros_like bfloat16 rmul radd rtruediv rpow rfloordiv rmod rand ror rxor rdiv iadd isub imul itruediv
    ifloordiv imod ipow iand ior ixor idiv data
    """
)
"""Functions of each entry, with scalars, with each other, and with tensors that have no rows"""

READS = _names(
    """
    size shape dim ndim ndimension dtype device layout is_floating_point is_complex is_contiguous is_cuda is_cpu
    is_meta is_sparse is_quantized is_leaf is_nested numel nelement len stride get_device element_size itemsize nbytes
    type grad_fn grad names output_nr sym_size sym_stride sym_numel is_same_size is_inference is_conj is_neg version
    hash
    """
)
"""Functions whose result is no tensor"""

NEW = {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
"""Functions whose result is like their argument in dtype and device alone, and has none of its rows"""


class Along(NamedTuple):
    """The place where a function is told its dimensions, which may be any but that of the rows."""

    position: int
    keyword: str = "dim"
    default: Any = None
    new: int = 0
    """The number of dimensions that the result has more"""
    many: bool = False
    """True if all arguments from here on are dimensions"""
    others: bool = False
    """True if there may be a tensor without rows among the arguments"""


DIMENSIONS = {
    **dict.fromkeys(
        _names(
            "softmax log_softmax softmin sum mean prod amax amin argmax argmin max min var std logsumexp cumsum "
            "cumprod all any narrow select squeeze select_copy nansum median var_mean std_mean count_nonzero"
        ),
        Along(1),
    ),
    **dict.fromkeys(["sort", "argsort", "glu"], Along(1, default=-1)),
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "tensor_split"], Along(2, default=0)),
    **dict.fromkeys(["cat", "concat", "unbind"], Along(1, default=0)),
    **dict.fromkeys(["norm", "vector_norm", "repeat_interleave"], Along(2)),
    **dict.fromkeys(["normalize", "cosine_similarity"], Along(2, default=1)),
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], Along(1, many=True)),
    "flip": Along(1, "dims", many=True),
    "roll": Along(2, "dims"),
    "stack": Along(1, default=0, new=1),
    "unsqueeze": Along(1, new=1),
    "topk": Along(2, default=-1),
    "gather": Along(1),
    "index_select": Along(1, others=True),
    "slice": Along(1, default=0),
    "flatten": Along(1, "start_dim", default=0),
    "unflatten": Along(1),
}

INPUT_FIRST = {
    "linear": 2,
    "matmul": 2,
    "mm": 2,
    "imatmul": 2,
    "embedding": 1,
    "prelu": 2,
    "layer_norm": 2,
    "rms_norm": 2,
    "group_norm": 2,
    "batch_norm": 2,
}
"""Functions of rows and of weights, and the least number of dimensions that the rows must have"""


@dataclass(frozen=True)
class Seen:
    """A tensor among the arguments of a function."""

    shape: Sequence[Any]
    padded: bool
    """True if rows of padding are among its rows, which dimension 0 counts"""


def mixes_rows(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a function may mix the rows of its arguments, with a `Seen` for each tensor in these.

    Example:
        >>> rows = Seen((12, 4), padded=True)
        >>> mixes_rows("mean", [rows, -1], {}), mixes_rows("mean", [rows, 0], {}), mixes_rows("mean", [rows], {})
        (False, True, True)
    """
    try:
        return not _keeps_rows(name, list(args), dict(kwargs))
    except (TypeError, ValueError, IndexError):  # arguments that are not like those that the table knows
        return True


def _keeps_rows(name: str, args: list[Any], kwargs: dict[str, Any]) -> bool:
    tensors = list(_tensors([args, kwargs]))
    if kwargs.get("out") is not None:
        return False
    if name in READS or name in NEW:
        return True
    if name == "where" and len(args) + len(kwargs) == 1:  # the indices of what is true
        return False
    if name in ELEMENTWISE or (name in ("max", "min") and len(tensors) > 1):
        return _broadcast(tensors)
    if name in INPUT_FIRST:
        return _input_first(name, args, kwargs, tensors)
    if name in DIMENSIONS:
        return _along(DIMENSIONS[name], args, kwargs, tensors)
    if name in FORMS and tensors[0].padded and len(tensors) == 1:
        return FORMS[name](list(tensors[0].shape), args[1:], kwargs)
    if name == "getitem":
        return args[0].padded and _index(args[0], args[1])
    if name == "setitem":
        return args[0].padded and _index(args[0], args[1]) and _fits(args[2], args[0], args[1])
    return False


def _tensors(value: Any) -> Iterator[Seen]:
    if isinstance(value, Seen):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _broadcast(tensors: list[Seen]) -> bool:
    """Tell whether rows meet rows alone, or what has none."""
    ranks = {len(t.shape) for t in tensors if t.padded}
    if len(ranks) != 1:
        return False
    (rank,) = ranks
    # tensors of lower rank do not reach dimension 0; of size 1 there, all rows meet the same
    return all(
        t.padded or len(t.shape) < rank or (len(t.shape) == rank and statically_known_true(t.shape[0] == 1))
        for t in tensors
    )


def _input_first(name: str, args: list[Any], kwargs: dict[str, Any], tensors: list[Seen]) -> bool:
    input = args[0] if args else kwargs.get("input")
    if not isinstance(input, Seen) or not input.padded or sum(t.padded for t in tensors) != 1:
        return False
    rank, given = len(input.shape), dict(enumerate(args))
    if rank < INPUT_FIRST[name]:
        return False
    if name in ("matmul", "mm", "imatmul"):
        # of more, a weight's dimensions of its own would be taken for those of the rows
        return all(len(t.shape) <= 2 for t in tensors[1:])
    if name in ("layer_norm", "rms_norm"):
        # the last dimensions are normalized over, as many as there are sizes
        sizes = given.get(1, kwargs.get("normalized_shape"))
        return len(sizes if isinstance(sizes, (list, tuple)) else [sizes]) < rank
    if name == "batch_norm":  # in training its mean is over rows
        return given.get(5, kwargs.get("training", False)) is False
    if name == "embedding":  # neither may change the table, nor count how often an entry is read
        return given.get(3, kwargs.get("max_norm")) is None and not given.get(5, kwargs.get("scale_grad_by_freq"))
    return True


def _along(spec: Along, args: list[Any], kwargs: dict[str, Any], tensors: list[Seen]) -> bool:
    shapes = [len(t.shape) for t in tensors if t.padded]
    if len(set(shapes)) != 1 or not (spec.others or all(t.padded for t in tensors)):
        return False
    dims: Any = args[spec.position :] if spec.many else args[spec.position : spec.position + 1]
    if not dims:
        names = (spec.keyword, "dim", "axis", "dims", "dim0", "dim1", "axis0", "axis1")
        dims = [kwargs[key] for key in dict.fromkeys(names) if key in kwargs] or [spec.default]
    dims = [d for group in dims for d in (group if isinstance(group, (list, tuple)) else [group])]
    # dimension 0 may be given as -rank too; None, for all dimensions, is no int
    rank = shapes[0] + spec.new
    return bool(dims) and all(type(d) is int and d % rank != 0 for d in dims)


Form = Callable[[list[Any], list[Any], dict[str, Any]], bool]


def _sizes(args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    given: list[Any] = args or [kwargs[key] for key in ("shape", "size", "dims", "repeats") if key in kwargs]
    return list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _reshaped(shape: list[Any], args: list[Any], kwargs: dict[str, Any]) -> bool:
    first, *features = _sizes(args, kwargs)
    if _same(first, -1):  # as many rows, if each keeps its number of entries
        return _same(math.prod(features), math.prod(shape[1:]))
    return _same(first, shape[0])


def _expanded(shape: list[Any], args: list[Any], kwargs: dict[str, Any]) -> bool:
    sizes = _sizes(args, kwargs)
    return len(sizes) == len(shape) and (_same(sizes[0], -1) or _same(sizes[0], shape[0]))


def _repeated(shape: list[Any], args: list[Any], kwargs: dict[str, Any]) -> bool:
    sizes = _sizes(args, kwargs)
    return len(sizes) == len(shape) and _same(sizes[0], 1)


def _permuted(shape: list[Any], args: list[Any], kwargs: dict[str, Any]) -> bool:
    return _sizes(args, kwargs)[0] in (0, -len(shape))


FORMS: dict[str, Form] = {
    "reshape": _reshaped,
    "view": _reshaped,
    "expand": _expanded,
    "repeat": _repeated,
    "tile": _repeated,
    "permute": _permuted,
}


def _index(rows: Seen, index: Any) -> bool:
    """Tell whether an index takes all rows as they are."""
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = [part for part in parts if part is not None and part is not Ellipsis]
    whole = isinstance(parts[0], slice) and parts[0] == slice(None)
    if not whole and not (parts[0] is Ellipsis and len(taken) < len(rows.shape)):
        return False
    # two lists, or a list and a number, may have their axis put before that of the rows
    lists = [part for part in taken if not isinstance(part, (int, slice))]
    return not lists or (len(lists) == 1 and not any(isinstance(p, int) for p in taken) and not _any_padded(lists))


def _fits(value: Any, rows: Seen, index: Any) -> bool:
    """Tell whether a value for indexed rows is of the same rows, or has none."""
    if not isinstance(value, Seen) or not value.shape:
        return True
    parts = list(index) if isinstance(index, tuple) else [index]
    return value.padded and len(value.shape) == len(rows.shape) - sum(isinstance(p, int) for p in parts)


def _any_padded(parts: list[Any]) -> bool:
    return any(t.padded for t in _tensors(parts))

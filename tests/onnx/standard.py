"""The ONNX standard's recurrent operators in NumPy, written from its equations, and models that hold one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

COUNTS = {"LSTM": 4, "GRU": 3, "RNN": 1}
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}
DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
FUNCTIONS = {
    "Relu": lambda x, a, b: np.maximum(x, 0),
    "Tanh": lambda x, a, b: np.tanh(x),
    "Sigmoid": lambda x, a, b: 1 / (1 + np.exp(-x)),
    "Affine": lambda x, a, b: a * x + b,
    "LeakyRelu": lambda x, a, b: np.where(x >= 0, x, a * x),
    "ThresholdedRelu": lambda x, a, b: np.where(x >= a, x, 0),
    "ScaledTanh": lambda x, a, b: a * np.tanh(b * x),
    "HardSigmoid": lambda x, a, b: np.minimum(np.maximum(a * x + b, 0), 1),
    "Elu": lambda x, a, b: np.where(x >= 0, x, a * (np.exp(np.minimum(x, 0)) - 1)),
    "Softsign": lambda x, a, b: x / (1 + np.abs(x)),
    "Softplus": lambda x, a, b: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0),
}
ALPHAS = {"LeakyRelu": 0.01, "ThresholdedRelu": 1.0, "HardSigmoid": 0.2, "Elu": 1.0}
ALPHAS = {name: float(np.float32(alpha)) for name, alpha in ALPHAS.items()}  # as attributes are stored
ALPHAS |= {"Affine": None, "ScaledTanh": None}  # the standard has no default
BETAS = {"HardSigmoid": 0.5, "Affine": None, "ScaledTanh": None}


def directions(attributes: dict[str, Any]) -> list[bool]:
    """For each direction, whether it is backwards."""
    return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[
        attributes.get("direction", "forward")
    ]


def evaluate(kind: str, attributes: dict[str, Any], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Y, Y_h and for an LSTM Y_c. Padding of Y is zero, as ONNX Runtime has it."""
    x, swap = inputs["X"], attributes.get("layout", 0)
    h0, c0 = inputs.get("initial_h"), inputs.get("initial_c")
    if swap:
        x, h0, c0 = (None if v is None else v.swapaxes(0, 1) for v in (x, h0, c0))
    steps, batch, _ = x.shape
    size = inputs["R"].shape[2]
    functions = _functions(kind, attributes, len(directions(attributes)))
    lengths = inputs.get("sequence_lens", np.full(batch, steps))
    y = np.zeros((steps, len(directions(attributes)), batch, size), x.dtype)
    finals = np.zeros((STATES[kind], len(directions(attributes)), batch, size), x.dtype)
    for d, backwards in enumerate(directions(attributes)):
        for row in range(batch):
            h = np.zeros(size, x.dtype) if h0 is None else h0[d, row]
            c = np.zeros(size, x.dtype) if c0 is None else c0[d, row]
            order = range(lengths[row])
            for t in reversed(order) if backwards else order:
                h, c = _step(kind, attributes, functions[d], inputs, d, x[t, row], h, c)
                y[t, d, row] = h
            finals[:, d, row] = [h, c][: STATES[kind]]
    results = [y, *finals]
    if swap:
        results = [y.transpose(2, 0, 1, 3), *(s.swapaxes(0, 1) for s in finals)]
    return results


def _functions(kind, attributes, count):
    names = attributes.get("activations", DEFAULTS[kind] * count)
    alphas, betas = (iter(attributes.get(f"activation_{which}", [])) for which in ("alpha", "beta"))
    clip, found = attributes.get("clip"), []
    for name in names:
        a = next(alphas, ALPHAS[name]) if name in ALPHAS else None
        b = next(betas, BETAS[name]) if name in BETAS else None
        size = len(DEFAULTS[kind])
        of_c = len(found) % size == 2  # h of an LSTM, which ONNX Runtime does not clip
        limit = np.inf if clip is None or of_c else clip
        found.append(lambda x, name=name, a=a, b=b, limit=limit: FUNCTIONS[name](np.clip(x, -limit, limit), a, b))
    return [found[k * size : (k + 1) * size] for k in range(count)]


def _step(kind, attributes, functions, inputs, d, x, h, c):
    size, count = len(h), COUNTS[kind]
    w, r = inputs["W"][d], inputs["R"][d]
    b = inputs.get("B", np.zeros((d + 1, 2 * count * size), x.dtype))[d]
    wb, rb = np.split(b, 2)
    if kind == "RNN":
        return functions[0](w @ x + r @ h + wb + rb), c
    if kind == "GRU":
        (wz, wr, wh), (rz, rr, rh) = np.split(w, 3), np.split(r, 3)
        (wbz, wbr, wbh), (rbz, rbr, rbh) = np.split(wb, 3), np.split(rb, 3)
        z = functions[0](wz @ x + rz @ h + wbz + rbz)
        reset = functions[0](wr @ x + rr @ h + wbr + rbr)
        if attributes.get("linear_before_reset", 0):
            new = functions[1](wh @ x + reset * (rh @ h + rbh) + wbh)
        else:
            new = functions[1](wh @ x + rh @ (reset * h) + rbh + wbh)
        return (1 - z) * new + z * h, c
    pi, po, pf = np.split(inputs.get("P", np.zeros((d + 1, 3 * size), x.dtype))[d], 3)
    i, o, f, g = np.split(w @ x + r @ h + wb + rb, 4)
    i, f = functions[0](i + pi * c), functions[0](f + pf * c)
    f = 1 - i if attributes.get("input_forget", 0) else f
    c = f * c + i * functions[1](g)
    return functions[0](o + po * c) * functions[2](c), c


ORDER = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def draw(
    kind: str,
    attributes: dict[str, Any],
    *,
    optional: tuple[str, ...] = (),
    steps: int = 4,
    batch: int = 3,
    features: int = 2,
    size: int = 3,
    dtype: Any = np.float64,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Random inputs of a node, by the standard's names."""
    random = np.random.default_rng(seed)
    d, count = len(directions(attributes)), COUNTS[kind]
    lead, state = ((batch, steps), (batch, d)) if attributes.get("layout", 0) else ((steps, batch), (d, batch))
    shapes = {
        "X": (*lead, features),
        "W": (d, count * size, features),
        "R": (d, count * size, size),
        "B": (d, 2 * count * size),
        "initial_h": (*state, size),
        "initial_c": (*state, size),
        "P": (d, 3 * size),
    }
    inputs = {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    inputs["sequence_lens"] = random.integers(1, steps + 1, size=batch).astype(np.int32)
    return {name: inputs[name] for name in ORDER if name in ("X", "W", "R") or name in optional}


def node(kind: str, attributes: dict[str, Any], given: Any, outputs: list[str] | None = None, name: str = "rnn") -> Any:
    """The node itself; `given` are the names of its inputs."""
    names = [n if n in given else "" for n in ORDER[: 8 if kind == "LSTM" else 6]]
    while not names[-1]:
        names.pop()
    outputs = ["Y", "Y_h", "Y_c"][: 1 + STATES[kind]] if outputs is None else outputs
    return helper.make_node(kind, names, outputs, name=name, **attributes)


def model(
    kind: str,
    attributes: dict[str, Any],
    inputs: dict[str, np.ndarray],
    *,
    known: tuple[str, ...] = ("W", "R", "B", "P"),
    dynamic: tuple[str, ...] = (),
    outputs: list[str] | None = None,
    opset: int = 22,
) -> onnx.ModelProto:
    """A model of one node.

    Args:
        known: inputs that are initializers.
        dynamic: of `steps` and `batch`, what the model leaves open.
        outputs: names of the outputs, "" for one that is not wanted.
    """
    attributes = {"hidden_size": inputs["R"].shape[2], **attributes}
    made = node(kind, attributes, inputs, outputs)
    swap = attributes.get("layout", 0)
    steps, batch = inputs["X"].shape[:2][:: -1 if swap else 1]
    sizes = {"steps": "T" if "steps" in dynamic else int(steps), "batch": "N" if "batch" in dynamic else int(batch)}
    d, size = len(directions(attributes)), inputs["R"].shape[2]
    lead = [sizes["batch"], sizes["steps"]] if swap else [sizes["steps"], sizes["batch"]]
    state = [sizes["batch"], d, size] if swap else [d, sizes["batch"], size]
    shapes = {"X": [*lead, inputs["X"].shape[2]], "sequence_lens": [sizes["batch"]]}
    shapes |= {"initial_h": state, "initial_c": state, "Y_h": state, "Y_c": state}
    shapes["Y"] = [*lead, d, size] if swap else [sizes["steps"], d, sizes["batch"], size]
    element = helper.np_dtype_to_tensor_dtype(inputs["X"].dtype)

    def info(name: str) -> Any:
        kind = onnx.TensorProto.INT32 if name == "sequence_lens" else element
        shape = shapes[name] if name in shapes else list(inputs[name].shape)
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [made],
        "graph",
        [info(name) for name in inputs if name not in known],
        [info(name) for name in made.output if name],
        [numpy_helper.from_array(inputs[name], name) for name in inputs if name in known],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)

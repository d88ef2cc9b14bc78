"""The table of TensorRT for RTX, held both ways against the library: what it offers is built, and nothing else is."""

from __future__ import annotations

import pytest

from tests.runtimes.nodes import TYPES, in_type, node_models
from unroll import check
from unroll.targets import building, engines
from unroll.targets.tables import read_target

pytest.importorskip("tensorrt_rtx_bindings")
pytestmark = pytest.mark.runtimes


# Models that the library refuses for reasons that no table can tell: the kernels that it has for the sizes of a head,
# values of inputs, or faults of its own.
BEYOND_TABLES = {
    "Attention": "test_attention_",
    "CastLike": "4",
    "DequantizeLinear": "4",
    "Dropout": "test_training_dropout",
    "LpPool": "",
    "Loop": "test_loop11",
    "MatMul": "test_matmul_1d_3d",
    "Mod": "fmod_0",
    "QuantizeLinear": "test_quantizelinear_",
    "ScatterElements": "duplicate_indices",
}
BEYOND_TYPES = {"Attention", "GroupNormalization", "LpPool", "Scan"}
"""Operators whose model in other types is refused for such a reason, or is not valid"""


def disagreements(operator):
    found = []
    for name, model in node_models()[operator]:
        if operator not in BEYOND_TABLES or BEYOND_TABLES[operator] not in name:
            found += compared(name, model)
    models = [model for _, model in node_models()[operator] if model.graph.input]
    float_ones = [m for m in models if m.graph.input[0].type.tensor_type.elem_type == 1][:1]
    for model in float_ones:
        for kind in TYPES if operator not in BEYOND_TYPES else ():
            if (changed := in_type(model, kind)) is not None:
                found += compared(kind, changed)
    return found


def compared(name, model):
    verdict = check(model, target="tensorrt_rtx", build=True)
    table = [row for row in verdict.rows if row.operator != "engine"]
    built = verdict.engine is not None
    if bool(table) == built:
        yield name, sorted({row.finding for row in table}), [r.finding for r in verdict.rows if r.operator == "engine"]


@pytest.mark.parametrize("operator", sorted(node_models()))
def test_operator(operator, monkeypatch):
    if operator != "RoiAlign":  # which ends the process after many others
        # two thousand models of one node, each built in less time than a process takes to start
        monkeypatch.setattr(building, "run_apart", lambda given, limit: engines.answer(given))
    assert disagreements(operator) == []


# In no test of the standard by themselves: of these the table is that of the data-center library.
UNTRIED = """
Constant GlobalLpPool ImageScaler ParametricSoftplus RandomNormal RandomNormalLike RandomUniform
RandomUniformLike ScaledTanh
"""


def test_operators_that_are_not_tried_are_known():
    assert set(read_target("tensorrt_rtx").operators) - set(node_models()) == set(UNTRIED.split())

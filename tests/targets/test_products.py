"""`check(model, target="pt2e")`: products that a quantizer left in float."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from unroll import UnrollError, check, trace, unroll

decomposed = torch.ops.quantized_decomposed


def through(x):
    """The tensor as integers and back, as PT2E writes it."""
    integers = decomposed.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)
    return decomposed.dequantize_per_tensor(integers, 0.1, 0, -128, 127, torch.int8)


def verdict(function):
    return check(make_fx(function)(torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)), target="pt2e")


def test_products_of_integers():
    found = verdict(
        lambda x, w, b: (
            torch.addmm(b, through(x), through(w).t()),
            nn.functional.linear(through(x).reshape(1, 2, 3).squeeze(0), through(w), b),
            torch.bmm(through(x)[None], through(w).T.contiguous()[None]),
        )
    )
    assert found.ok and found.nodes == 3
    assert str(found) == "pt2e: 0 of 3 products are float"


def test_products_in_float():
    found = verdict(
        lambda x, w, b: (
            torch.addmm(through(b), x, w.t()),
            torch.mm(through(x).tanh(), through(w).t()),
            torch.mm(through(x), w.t()),
            torch.mm(through(x), through(w).t()),
        )
    )
    assert str(found) == (
        "pt2e: 3 of 4 products are float:\n"
        "  aten.addmm.default  is float: addmm\n"
        "  aten.mm.default     is float, though its weight is not: mm\n"
        "  aten.mm.default     is float, though what it is applied to is not: mm_1"
    )
    with pytest.raises(UnrollError, match="plan='quantize'"):
        found.check()


def test_recurrent_operators_count():
    program = torch.export.export(nn.Sequential(nn.GRU(3, 5)), (torch.zeros(4, 1, 3),))
    assert str(check(program, target="pt2e")).startswith("pt2e: 1 of 1 products are float:\n  aten.gru.input ")
    assert str(check(unroll(program), target="pt2e")).startswith("pt2e: 5 of 5 products are float:")


def test_models_that_are_not_programs():
    with pytest.raises(UnrollError, match="is a call_module of 0, which is no aten operator"):
        check(trace(nn.Sequential(nn.Linear(3, 5))), target="pt2e")
    with pytest.raises(UnrollError, match="give an ExportedProgram"):
        check(nn.Linear(3, 5), target="pt2e")
    with pytest.raises(UnrollError, match="of which nothing is built here"):
        check(torch.export.export(nn.Linear(3, 5), (torch.zeros(2, 3),)), target="pt2e", build=True)

"""The table of docs/training.md: which transforms of PyTorch take fused layers, and which unrolled ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

from tests.cases import KINDS
from unroll import unroll

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*RNN module weights are not part of single contiguous chunk:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*_flat_weights:UserWarning"),
]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"
F64 = torch.float64


def first(result):
    """The output of a layer, or the next `h` of a cell."""
    return result[0] if isinstance(result, tuple) else result


def of_weights(layer, x):
    """A function of the weights, and the weights."""
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    return lambda w, x=x: first(functional_call(layer, w, (x,))).square().sum(), weights


def of_samples(layer, x):
    function, weights = of_weights(layer, x)
    return vmap(grad(lambda w, x: function(w, x.unsqueeze(-2))), (None, -2))(weights, x)


def of_models(layer, x):
    weights, buffers = stack_module_state([layer, layer])
    return vmap(lambda w, b: first(functional_call(layer, (w, b), (x,))))(weights, buffers)


def twice(layer, x):
    x = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(first(layer(x)).square().sum(), [x], create_graph=True)
    return torch.autograd.grad(once.square().sum(), [x])


TRANSFORMS = {
    "autograd, twice": twice,
    "`func.grad` of weights": lambda layer, x: grad(of_weights(layer, x)[0])(of_weights(layer, x)[1]),
    "`vjp`": lambda layer, x: vjp(lambda x: first(layer(x)), x)[1](torch.ones_like(first(layer(x)))),
    "`jvp`": lambda layer, x: jvp(lambda x: first(layer(x)), (x,), (x,)),
    "`linearize`": lambda layer, x: linearize(lambda x: first(layer(x)), x)[1](x),
    "`jacrev`": lambda layer, x: jacrev(lambda x: first(layer(x)))(x),
    "`jacfwd`": lambda layer, x: jacfwd(lambda x: first(layer(x)))(x),
    "`hessian`": lambda layer, x: hessian(lambda x: first(layer(x)).square().sum())(x),
    "`vmap` over inputs": lambda layer, x: vmap(lambda x: first(layer(x)))(torch.stack([x, x])),
    "`vmap` over weights, an ensemble": of_models,
    "`vmap(grad)`, each sample": of_samples,
    "`torch.compile(fullgraph=True)`": lambda layer, x: torch.compile(layer, fullgraph=True, backend="eager")(x),
}


def works(transform, layer, x):
    torch.compiler.reset()
    try:
        TRANSFORMS[transform](layer, x)
    except Exception:
        return False
    return True


def row(transform):
    """A line of the table: of each kind of layer, what the transform takes."""
    entries = []
    for kind in KINDS:
        layer, x = getattr(nn, kind)(3, 4, dtype=F64), torch.randn(*([] if "Cell" in kind else [2]), 2, 3, dtype=F64)
        assert works(transform, unroll(layer), x), f"{transform} of an unrolled {kind}"
        entries.append("both" if works(transform, layer, x) else "unrolled")
    return f"| {' | '.join([transform, *entries])} |"


# torch.func.linearize folds constants so, of whatever it is given
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_table_says_what_works(transform):
    assert row(transform) in PAGE.read_text()


def test_the_table_has_no_other_lines():
    text = PAGE.read_text()
    assert f"| {' | '.join(['', *KINDS])} |".replace("|  |", "| |") in text
    found = re.findall(r"^\| ([^|]+) \| (?:both|unrolled) \|", text, re.MULTILINE)
    assert found == list(TRANSFORMS)


def results(name):
    """The figures of a file, of the processor and by the command that the page names."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert "--save" in found["command"] or f"`{found['command']}`" in PAGE.read_text()
    return found


def test_figures_of_recomputing():
    found = results("recompute")
    assert found["machine"]["cpu"] in PAGE.read_text()
    for row in found["rows"]:
        forms = row["forms"].values()
        figures = [f"{form['peak_mb']:.0f}" for form in forms] + [f"{form['seconds']:.1f}" for form in forms]
        assert f"| {row['layer']} | {row['steps']:,} | {' | '.join(figures)} |\n" in PAGE.read_text()


def test_figures_of_the_ensemble():
    found = results("ensemble")
    together, unrolled, fused = (f"{1000 * seconds:.1f} ms" for seconds in found["cpu_seconds"].values())
    said = (
        f"takes {together} of CPU time for all, a loop over the unrolled models {unrolled}, one over the fused models"
    )
    assert f"{said} {fused}, on one thread of an {found['machine']['cpu']}" in " ".join(PAGE.read_text().split())
    assert (found["models"], found["threads"]) == (16, 1)


def test_figures_of_quantizing():
    for row in results("quantize")["rows"]:
        sizes = [f"{size / 1000:.0f}" for size in row.get("bytes", [])] or ["", ""]
        cells = [row["by"], row.get("plan", ""), row["right"], *sizes, row.get("int8_weights", "")]
        line = "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)
        assert f"{line}\n" in PAGE.read_text()

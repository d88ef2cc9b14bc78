"""Errors of gradients against float64, added up step by step and as one product.

PYTHONPATH=. python benchmarks/gradients.py     # a minute; writes benchmarks/results/gradients.json
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from unroll import Plan, unroll
from unroll.bench.machine import command, machine

RESULTS = Path(__file__).parent / "results" / "gradients.json"
STEPS, BATCH, HIDDEN = 64, 64, 128


def errors(kind: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the largest error of each parameter's gradient, of its largest value, as torch and each plan have it."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(HIDDEN, HIDDEN, dtype=dtype)
    wide = getattr(nn, kind)(HIDDEN, HIDDEN, dtype=torch.float64)
    wide.load_state_dict(layer.state_dict())
    x, along = (torch.randn(STEPS, BATCH, HIDDEN).to(dtype) for _ in range(2))
    exact = torch.autograd.grad(wide(x.double())[0], list(wide.parameters()), along.double())
    forms = {"torch": layer} | {how: unroll(layer, plan=Plan(gradients=how)) for how in ("stepwise", "joined")}
    found = {}
    for name, form in forms.items():
        grads = torch.autograd.grad(form(x)[0], list(layer.parameters()), along)
        each = [(g.double() - e).abs().max() / e.abs().max() for g, e in zip(grads, exact, strict=True)]
        found[name] = [float(f"{error:.2e}") for error in each]
    return found


def main() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    pairs = [(kind, dtype) for kind in ("LSTM", "GRU", "RNN") for dtype in dtypes]
    rows = [{"kind": kind, "dtype": str(dtype), **errors(kind, dtype)} for kind, dtype in pairs]
    sizes = {"steps": STEPS, "batch": BATCH, "hidden": HIDDEN}
    order = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    found = {"command": command(), "machine": machine(), **sizes, "parameters": order, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(row["kind"], row["dtype"], {name: row[name][1] for name in ("torch", "stepwise", "joined")})


if __name__ == "__main__":
    main()

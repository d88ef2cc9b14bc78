"""Which loops of PyTorch work in which of its versions: results, gradients and seconds to compile.

    python benchmarks/loops.py            # a few minutes, for the PyTorch that is installed
    python benchmarks/loops.py --calls    # only what calls of a program in blocks cost, half a minute

`scan` is tried as the library uses it, in blocks of four steps of a bidirectional LSTM, at lengths that four does not
divide; `while_loop` and `nested_compile_region` with a plain tanh recurrence in blocks. Then come the CPU seconds of a
call of an exported program, with gradients and without. Adds what it finds to benchmarks/results/loops.json, under the
version.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from unroll import Plan, unroll
from unroll.bench.machine import command, machine
from unroll.modules import loops

RESULTS = Path(__file__).parent / "results" / "loops.json"
BLOCK = 4
LAYER = nn.LSTM(8, 16, bidirectional=True)


class Scan(nn.Module):
    """As the library does it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = unroll(LAYER, plan=Plan(time=BLOCK))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Plain(nn.Module):
    """A recurrence of one weight, step by step; the others do the same in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.3, 64).reshape(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x, x.new_zeros(x.shape[1:]))[0]

    def steps(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        put_out = []
        for piece in x.unbind(0):
            h = torch.tanh(piece + h @ self.weight)
            put_out.append(h)
        return torch.stack(put_out), h.clone()


class While(Plain):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops import while_loop

        count = x.shape[0] // BLOCK
        blocks = x.reshape(count, BLOCK, *x.shape[1:])

        def going(k: Tensor, h: Tensor, out: Tensor) -> Tensor:
            return k < count

        def body(k: Tensor, h: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            rows, h = self.steps(blocks.index_select(0, k.reshape(1)).squeeze(0), h)
            return k + 1, h, out.index_put((k,), rows)

        start = torch.zeros((), dtype=torch.int64), x.new_zeros(x.shape[1:]), torch.zeros_like(blocks)
        return while_loop(going, body, start)[-1].reshape(x.shape)


@torch.compiler.nested_compile_region
def region(model: Plain, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return model.steps(x, h)


class Nested(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h, found = x.new_zeros(x.shape[1:]), []
        for piece in x.split(BLOCK):
            rows, h = region(self, piece, h)
            found.append(rows)
        return torch.cat(found)


def judged(pairs: list[tuple[Tensor, Tensor]]) -> str:
    return "right" if all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs) else "WRONG"


def inference(run: Callable[..., Any], original: Callable[..., Any], lengths: list[int]) -> str:
    with torch.no_grad():
        return judged([(run(x), original(x)) for x in (torch.randn(steps, 3, 8) for steps in lengths)])


def training(run: Callable, ours: nn.Module, original: nn.Module, lengths: list[int]) -> str:
    pairs = []
    for steps in lengths:
        x = torch.randn(steps, 3, 8)
        grads = torch.autograd.grad(run(x).sin().sum(), list(ours.parameters()))
        pairs += zip(grads, torch.autograd.grad(original(x).sin().sum(), list(original.parameters())), strict=True)
    return judged(pairs)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LAYER

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def trials() -> dict[str, Callable[[], str]]:
    def exported(
        kind: type[nn.Module], reference: nn.Module, lengths: list[int], *, strict: bool, trained: bool
    ) -> str:
        model = kind()
        with torch.set_grad_enabled(trained):
            spec = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
            program = torch.export.export(model, (torch.randn(8, 2, 8),), dynamic_shapes=spec, strict=strict)
        run = program.module()
        return training(run, run, reference, lengths) if trained else inference(run, reference, lengths)

    def compiled(
        kind: type[nn.Module], reference: nn.Module, lengths: list[int], *, trained: bool, dynamic: bool
    ) -> str:
        torch._dynamo.reset()
        model = kind()
        run = torch.compile(model, fullgraph=True, dynamic=dynamic)
        return training(run, model, reference, lengths) if trained else inference(run, reference, lengths)

    fused, plain = Fused(), Plain()
    rest = [1, 2, 7, 8, 30]
    return {
        "scan, export": lambda: exported(Scan, fused, rest, strict=False, trained=False),
        "scan, strict export": lambda: exported(Scan, fused, rest, strict=True, trained=False),
        "scan, gradients of a program": lambda: exported(Scan, fused, [11], strict=False, trained=True),
        "scan, Inductor, fixed length": lambda: compiled(Scan, fused, [11], trained=False, dynamic=False),
        "scan, Inductor, any length": lambda: compiled(Scan, fused, [11, 9, 30], trained=False, dynamic=True),
        "scan, Inductor, training": lambda: compiled(Scan, fused, [11, 13], trained=True, dynamic=False),
        "while_loop, export": lambda: exported(While, plain, [8, 16], strict=False, trained=False),
        "while_loop, Inductor, fixed length": lambda: compiled(While, plain, [12], trained=False, dynamic=False),
        "while_loop, Inductor, training": lambda: compiled(While, plain, [12], trained=True, dynamic=False),
        "nested region, Inductor, fixed length": lambda: compiled(Nested, plain, [12], trained=False, dynamic=False),
        "nested region, Inductor, training": lambda: compiled(Nested, plain, [12], trained=True, dynamic=False),
    }


def calls(block: int, rounds: int = 7) -> dict[str, float]:
    """Median CPU seconds of a call of a program of `nn.GRU(8, 16)` in blocks, over 50 steps, by the way to call it."""
    x = torch.randn(50, 2, 8)

    def program(model: nn.Module, *, freeze: bool = False) -> nn.Module:
        blocks = unroll(model, plan=Plan(time=block), freeze=freeze)
        return torch.export.export(blocks, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()

    layer = nn.GRU(8, 16)
    run, frozen = program(layer), program(layer, freeze=True)
    fixed = program(copy.deepcopy(layer).requires_grad_(False))

    def backward() -> None:
        run(x)[0].sum().backward()

    def inference() -> None:
        with torch.no_grad():
            run(x)

    ways: dict[str, Callable[[], Any]] = {
        "with gradients": lambda: run(x),
        "with gradients, and backward": backward,
        "under no_grad": inference,
        "of freeze=True": lambda: frozen(x),
        "of requires_grad_(False)": lambda: fixed(x),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            taken[name].append(time.process_time() - begin)
    return {name: round(statistics.median(each[1:]), 5) for name, each in taken.items()}


def keep(found: dict[str, Any]) -> None:
    """Write down what was found with the PyTorch that is installed, beside what is known of it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(torch.__version__.partition("+")[0], {}).update(found)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", action="store_true", help="only what calls cost")
    only_calls = parser.parse_args().calls
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not only_calls:
        try_loops()
    found = {}
    for block in (1, 4, 8):
        found[f"time={block}"] = calls(block)
        print(f"time={block}", found[f"time={block}"], flush=True)
    keep({"calls": {"command": command(), "machine": machine(), "cpu_seconds": found}})


def try_loops() -> None:
    loops.is_trained = lambda place, tensors: False  # what PyTorch makes of it, where the library refuses
    found = {}
    for name, trial in trials().items():
        begin = time.perf_counter()
        try:
            result = trial()
        except Exception as error:
            result = f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
        found[name] = {"result": result, "seconds": round(time.perf_counter() - begin, 1)}
        print(f"{name:40} {result}", flush=True)
        keep({"machine": machine(), "trials": found})


if __name__ == "__main__":
    main()

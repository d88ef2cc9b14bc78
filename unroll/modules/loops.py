"""Blocks of steps inside a loop that `torch.export` and `torch.compile` keep as one: `torch.scan`.

The loop is `torch._higher_order_ops.scan`, a prototype of PyTorch; docs/lengths.md has a table of what works in
which version. Its body is compiled once, whatever the number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional

from unroll.core.cells import State
from unroll.core.errors import Problem, UnrollWarning
from unroll.core.plan import Plan
from unroll.core.scan import Step, mask_state, scan
from unroll.core.torch_version import LOOP_TRAINS_COMPILED, LOOP_WANTS_TRAINED_STATE


def is_captured(rows: Tensor) -> bool:
    """Tell whether a graph is being made of what runs now. Otherwise there is no loop to be had: Python has its own.

    `torch.compiler.is_compiling` alone is true in all threads while one of them exports.
    """
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and is_fake(rows))


def is_exporting() -> bool:
    """Tell whether `torch.export` runs, which Dynamo says of every compilation in PyTorch 2.11."""
    return torch.compiler._is_exporting_flag


# For Dynamo, a value that no guard compares: the flag is one for all threads, and while one of them exports, compiled
# models of others would be compiled anew. What `torch.compiler.assume_constant_result` does, which loads Dynamo.
is_exporting._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def is_written(rows: Tensor) -> bool:
    """Tell whether what runs now is written down, step by step, in a graph, also by `make_fx`."""
    return is_captured(rows) or get_proxy_mode() is not None


def warn_of_fixed_length(place: str, steps: Any, plan: Plan) -> None:
    """Warn where steps are written one by one for a length that is open while `torch.export` runs plain Python.

    It then fixes the length: with an error for a named or dynamic one, and for `Dim.AUTO` in silence.
    """
    fixed = not has_static_value(steps) and plan.block is None
    if fixed and is_exporting() and not torch.compiler.is_dynamo_compiling():
        finding = "is given an open length, which steps that are written one by one fix"
        fix = "for any length give unroll a plan with a loop, plan='time=8'"
        warnings.warn(str(Problem(place, finding, fix)), UnrollWarning, stacklevel=2)


def is_trained(place: str, tensors: Iterable[Any]) -> bool:
    """Tell whether gradients would go through a loop that gets them wrong, in silence: compiled, before PyTorch 2.15.

    Dynamo then stops with the reason, or without `fullgraph` goes on, and the steps are to be written one by one.
    """
    if not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
        return False
    if is_exporting() or LOOP_TRAINS_COMPILED:
        return False
    finding = f"{place} would be trained in blocks by torch.compile, where PyTorch before 2.15 gets gradients wrong"
    fix = "leave Plan(time='explicit') for training, or call the model under torch.no_grad()"
    torch._dynamo.graph_break(msg=f"unroll: {finding}; {fix}")  # Dynamo explains it so only if named
    return True


def over_blocks(
    steps: Any, block: int, mask: Tensor | None, given: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, State]]:
    """Make the loop of a `Target`, over blocks of steps.

    Where the number of steps is known, those that fill no block come after the loop. Where it is symbolic, the last
    block is filled up, and steps past the end leave the state as it is; there are then always two blocks or more, as
    `scan` would take one for a constant.

    Args:
        steps: T, a number or a `SymInt`.
        block: how many steps are written.
        mask: boolean `[T * B, 1]`: the rows that have a step, the others keep their state; None if all have.
        given: what gradients may be asked for.
    """

    def loop(step: Step, xs: tuple[Tensor, ...], state: State, *, reverse: bool) -> tuple[Tensor, State]:
        state = _tie(state, given)
        # Each [T, B, n], the mask last.
        pieces = [x.reshape(steps, -1, x.shape[-1]) for x in (*xs, *([] if mask is None else [mask]))]

        def run(state: State, pieces: list[Tensor]) -> tuple[State, Tensor]:
            """Run explicit steps over pieces `[k, B, n]`: what they read, the mask, and where the last block is filled
            up, their numbers.
            """

            def masked_step(t: int, x: tuple[Tensor, ...], state: State) -> State:
                new = step(t, x[: len(xs)], state)
                if mask is not None:
                    new = mask_state(x[len(xs)], new, state)
                # Inductor finds the symbol of the number of steps only if the body reads it.
                return new if len(x) == len(xs) + (mask is not None) else mask_state(x[-1] < steps, new, state)

            each = zip(*(piece.unbind(0) for piece in pieces), strict=True)
            outputs, state = scan(masked_step, list(each), state, reverse=reverse)
            return tuple(s.clone() for s in state), torch.stack(outputs)  # results of a loop may not share memory

        if has_static_value(steps):  # Dynamo takes a symbolic number for an int
            looped = steps // block * block if steps >= 2 * block else 0
            # Part 0 is the loop's, part 1 the rest, which runs first in reverse.
            parts = [[p[:looped] for p in pieces], [p[looped:] for p in pieces]]
            found: list[Tensor] = []
            for k in (1, 0) if reverse else (0, 1):
                if k == 0 and looped:
                    rows, state = _scan(run, parts[0], state, block, looped // block, reverse=reverse)
                elif k == 1 and looped < steps:
                    state, rows = run(state, parts[1])
                else:
                    continue
                found.append(rows)
            return torch.cat(found[::-1] if reverse else found).flatten(0, 1), state
        # ceil(T / block) + 1, which is never 1.
        blocks = (steps + 2 * block - 1) // block
        padded = [functional.pad(p, (0, 0, 0, 0, 0, blocks * block - steps)) for p in pieces]
        padded.append(torch.arange(blocks * block, device=xs[0].device))
        rows, state = _scan(run, padded, state, block, blocks, reverse=reverse)
        # Neither a slice, whose bound torch would have to prove, nor a view, whose strides would keep the batch open.
        rows = rows.index_select(0, torch.arange(steps, device=rows.device)).flatten(0, 1)
        return rows.clone(memory_format=torch.contiguous_format), state

    return loop


def _scan(
    run: Callable, pieces: list[Tensor], state: State, block: int, blocks: Any, *, reverse: bool
) -> tuple[Tensor, State]:
    """Return `h` after every step, `[blocks * block, B, P]`, and the last state."""
    from torch._higher_order_ops import scan

    xs = [piece.reshape(blocks, block, *piece.shape[1:]) for piece in pieces]
    state = tuple(s.clone(memory_format=torch.contiguous_format) for s in state)  # without a look at its strides
    state, rows = scan(run, state, xs, reverse=reverse)
    return rows.flatten(0, 1), state


def _tie(state: State, given: Sequence[Tensor]) -> State:
    """Return the state that a loop begins with, computed of all that gradients may be asked for, where loops want it.

    Its values stay, whatever those of `given` are, which get a gradient of zero by it.
    """
    if not LOOP_WANTS_TRAINED_STATE:
        return state
    tie = torch.stack([tensor.sum().to(state[0].dtype) for tensor in given]).sum()
    return tuple(torch.where(state[0].new_zeros((), dtype=torch.bool), tie, s) for s in state)

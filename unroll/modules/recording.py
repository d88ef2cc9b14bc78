"""Gates and states of unrolled layers, to be looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Where, chooses, read_where, unknown_names
from unroll.modules.find import is_compiled, walk_objects
from unroll.modules.layers import Unrolled
from unroll.modules.recorder import SINKS, Step


class Tensors(Mapping[str, Tensor]):
    """Tensors `[T, B, H]`, made of those of the steps when they are asked for."""

    def __init__(self, steps: Mapping[str, Sequence[Step]]) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __contains__(self, name: object) -> bool:
        return name in self._steps

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._steps:
            raise UnrollError(Problem(f"gates[{name!r}]", "was not recorded", f"there are {', '.join(self) or 'none'}"))
        steps = self._steps[name]
        if len({step.batch for step in steps}) > 1:
            finding = f"was recorded with batches of {sorted({step.batch for step in steps})}"
            raise UnrollError(Problem(f"gates[{name!r}]", finding, "record each call by itself"))
        return torch.stack([step.whole(self._of(step)) for step in steps])

    def _of(self, step: Step) -> Tensor:
        return step.value


class Gradients(Tensors):
    """The gradients of recorded tensors, after a backward pass; zeros in steps that none came to."""

    def _of(self, step: Step) -> Tensor:
        if not step.value.requires_grad:
            raise UnrollError(Problem("gates.grad", "has none of what was run without", "run the model with gradients"))
        return torch.zeros_like(step.value) if step.value.grad is None else step.value.grad


class Record(Tensors):
    """The gates and states that `record` has kept, by name.

    Attributes:
        grad: the gradients of the same, by the same names, after a backward pass.
    """

    def __init__(self, names: Mapping[int, str], pattern: Where) -> None:
        self._names, self._pattern = names, pattern
        self._seen: dict[str, None] = {}
        steps: dict[str, list[Step]] = {}
        super().__init__(steps)
        self.grad = Gradients(steps)
        self._kept = steps

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def name_of(self, layer: Any) -> str | None:
        return self._names.get(id(layer))

    def wants(self, name: str) -> bool:
        self._seen[name] = None
        return chooses(self._pattern, [name], nn.Identity())

    def add(self, name: str, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.value.requires_grad:
                step.value.retain_grad()
        self._kept.setdefault(name, []).extend(steps)

    def check(self) -> None:
        """Refuse to have recorded nothing, or nothing of a pattern.

        Raises:
            UnrollError: naming the gates that there were.
        """
        if not self._seen:
            fix = "call the model itself inside: what torch.compile, torch.export and traces made of it records nothing"
            raise UnrollError(Problem("record(model)", "no layer of it was run", fix))
        unknown_names(self._pattern, list(self._seen), "gate", "gates").check()


@contextmanager
def record(model: nn.Module, gates: Where = None) -> Iterator[Record]:
    """Record the gates and states of unrolled layers while a model runs.

    They have the names that graphs have, without the step: `encoder.rnn.l0.forget`, `encoder.rnn.l1.reverse.h`. Each is
    `[T, B, H]`, with what gradients go through, and `record.grad` has their gradients after a backward pass. Calls of
    one layer follow each other along T; what a packed row does not have is zeros. Nothing is recorded, and nothing is
    paid, outside of the context, in other threads, and in graphs that are made of a run.

    An LSTM has `input`, `forget`, `cell`, `output`, and the states `h` and `c`; a GRU `reset`, `update`, `new` and `h`;
    an RNN `h`.

    Args:
        model: a module with unrolled layers.
        gates: which: a name or shell pattern, `"*.forget"`, several of them, or all by default.

    Returns:
        A context, which gives a mapping from names to tensors.

    Raises:
        UnrollError: for a model without unrolled layers, compiled ones, and layers whose steps are stacked; at the end
            if no layer was run, or none of the names that were asked for is there.

    Example:
        >>> model = nn.Sequential(nn.LSTM(3, 5))
        >>> with record(unrolled := unroll(model), "*.forget") as gates:
        ...     output, _ = unrolled(torch.zeros(7, 2, 3))
        >>> {name: tuple(gate.shape) for name, gate in gates.items()}
        {'0.l0.forget': (7, 2, 5)}
        >>> output.sum().backward()
        >>> gates.grad["0.l0.forget"].shape
        torch.Size([7, 2, 5])
    """
    if not isinstance(model, nn.Module):
        fix = "give an nn.Module with unrolled layers"
        raise UnrollError(Problem("record(model)", f"got {type(model).__name__}", fix))
    found = Record(_names(model), read_where(gates))
    with SINKS.set((*(SINKS.value or ()), found)):
        yield found
    found.check()


def _names(model: nn.Module) -> dict[int, str]:
    """Return the names of the unrolled layers in a model, by `id`."""
    names: dict[int, str] = {}
    problems = Problems()
    for name, module in walk_objects(model):
        if isinstance(module, Unrolled) and id(module) not in names:
            names[id(module)] = name or module.place
            recurrence, plan = module.recurrence, module.plan
            stacks = plan.directions == "stacked" and recurrence.bidirectional
            if stacks or (plan.layers == "wavefront" and recurrence.num_layers > 1 and not recurrence.bidirectional):
                fix = "record unroll(model, plan=Plan()), which has the same parameters"
                problems.add(name or module.place, f"runs with {plan}, several passes in one step", fix)
        if isinstance(module, nn.Module) and is_compiled(module):
            problems.add(name or "record(model)", "is compiled, and graphs record nothing", "record the module itself")
    if not names and not problems:
        problems.add("record(model)", "has no unrolled layer", "record what unroll(module) returns")
    problems.check()
    return names

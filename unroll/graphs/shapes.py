"""The shapes of a graph's values, by a run on fake tensors without the steps of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.core.arguments import as_args, as_result, as_states, check_arguments
from unroll.core.errors import Problem, UnrollError
from unroll.core.recurrence import Frame, Recurrence, read_layer
from unroll.graphs.calls import form_of, operands
from unroll.graphs.functions import bind
from unroll.modules.layers import Unrolled
from unroll.packed.contexts import keep_padding
from unroll.packed.guard import CAPTURED
from unroll.packed.sequences import is_padded


class FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors, without the steps of its layers, and keeps the results."""

    problem: Problem | None = None
    """The reason that it stopped before the end, if it did"""

    def of(self, args: Any) -> dict[fx.Node, torch.Tensor]:
        """Run the graph on fake tensors like `args`, and return those of its nodes, as far as the run went."""
        self.found: dict[fx.Node, torch.Tensor] = {}
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        fakes = pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), as_args(args))
        try:
            with mode, CAPTURED.set(True), keep_padding(_layer_on_packed):
                self.run(*fakes)
        except UnrollError as error:  # without what the interpreter adds to the text
            raise UnrollError(*error.problems) from None
        except Exception as error:  # it may have come after all layers, and then does no harm
            finding = f"the graph cannot be run on fake tensors like these ({type(error).__name__}: {error})"
            self.problem = Problem("args", finding, "give arguments that fit the graph, or steps=")
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        form = form_of(n)
        # Packed rows are split by the contents of a tensor, which a fake one lacks.
        result = self._packed(n) if form and form[1] == "packed" else super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.found[n] = result
        elif is_padded(result):
            # [T, B, F], as of an input that is not packed.
            self.found[n] = result.data.unflatten(0, (result.batch_sizes.steps, result.batch_sizes.count))
        return result

    def _packed(self, n: fx.Node) -> Any:
        given: Any = self.map_nodes_to_values(bind("packed", n.args, n.kwargs), n)
        states: Any = as_states(given["hx"])
        features = states[0].shape[-1] * (2 if given["bidirectional"] else 1)
        return given["input"].new_empty(given["input"].shape[0], features), *states

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, fx.GraphModule) and not kwargs:
            inner = type(self)(layer)
            inner.found = self.found
            return inner.run(*args)
        if not isinstance(layer, Unrolled):
            return super().call_module(target, args, kwargs)
        input, state = operands(args, kwargs)
        recurrence = layer.recurrence
        if is_padded(input):
            return _on_packed(recurrence, target, input, state)
        if not isinstance(input, torch.Tensor):
            return layer(input, state)
        check_arguments(recurrence, target, input, state)
        frame = recurrence.frame(input.shape)
        final = as_result([input.new_empty(shape) for shape in recurrence.state_shapes(frame)])
        return final if recurrence.is_cell else (input.new_empty(recurrence.output_shape(frame)), final)


def _on_packed(recurrence: Recurrence, place: str, input: Any, state: Any) -> tuple[PackedSequence, Any]:
    """Return anything of the right sizes for a layer's results on padded rows, without its steps."""
    frame = Frame(True, input.batch_sizes.steps, input.batch_sizes.count)
    check_arguments(recurrence, place, input.data, state, rows=frame.batch)
    states = [input.data.new_empty(shape) for shape in recurrence.state_shapes(frame)]
    features = recurrence.output_shape(frame)[-1]
    return PackedSequence(input.data.new_empty(len(input.data), features), *input[1:]), as_result(states)


def _layer_on_packed(layer: Any, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """Do the same for torch's own layers, which `where` has not chosen."""
    return _on_packed(read_layer(layer), type(layer).__name__, input, hx)

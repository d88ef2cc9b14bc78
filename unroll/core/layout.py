"""Weights that were laid out once, in place of parameters, for layers and graphs that are trained no more."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from unroll.core import schedule
from unroll.core.cells import Affine, Prepared, Value
from unroll.core.passes import Layout, scope
from unroll.core.plan import Plan
from unroll.core.recurrence import Problem, Recurrence, UnrollError
from unroll.graphs.users import is_written
from unroll.modules.subclasses import assign_class

if TYPE_CHECKING:
    from unroll.graphs.lowering import Call

MEND = "freeze the module, unroll(module, freeze=True), before it becomes a graph"


class Frozen(NamedTuple):
    """Where the weights of a frozen layer are, laid out for the steps."""

    layout: Layout
    """With names of buffers in place of tensors"""
    dtype: torch.dtype
    """Of the parameters that they were made of"""

    @classmethod
    def of(
        cls, recurrence: Recurrence, weights: Sequence[Tensor], plan: Plan, keep: Callable[[str, Tensor], str]
    ) -> Frozen:
        """Lay out weights, and keep the results: `keep` is given a name and a tensor, and says where it went."""

        def kept(prefix: str, prepared: Prepared) -> Prepared:
            # What is only a view of a parameter, such as a transposed projection, would change with it.
            return _mapped(prepared, lambda t, kind: keep(f"{prefix}_{kind}", t.detach().clone()))

        with torch.no_grad():
            layout = schedule.prepare(recurrence, recurrence.weights(weights), plan)
            passes = [kept(scope(recurrence, k).replace(".", "_"), p) for k, p in enumerate(layout.passes)]
            stacks = [kept(f"stack{k}", p) for k, p in enumerate(layout.stacks)]
        return cls(Layout(passes, stacks, layout.widths), weights[0].dtype)

    @property
    def first(self) -> str:
        """One of the buffers."""
        return self.layout.passes[0].inputs[0].weight

    @property
    def names(self) -> list[str]:
        """All buffers."""
        found: list[str] = []
        self._with(lambda name, kind: found.append(name))
        return found

    def under(self, place: str) -> Frozen:
        """The same, named from a module that has the layer at `place`."""
        return self._replace(layout=self._with(lambda name, kind: f"{place}.{name}"))

    def read(self, layer: Any, cast: torch.dtype | None, dtype: torch.dtype | None) -> Layout:
        """The tensors, for a run of the layer on rows of `dtype`, in which autocast makes weights `cast`.

        Raises:
            UnrollError: for another dtype than that of the parameters: biases were added up in that one.
        """
        held = layer.like.dtype
        found = cast if cast and held == self.dtype else held
        if found != self.dtype:
            finding = f"was frozen in {self.dtype}, and now runs in {found}"
            mend = f"convert what is not frozen by .to({found}), and freeze that; autocast needs layers that are not"
            raise UnrollError(Problem(layer.place, finding, mend))
        return self._with(lambda name, kind: getattr(layer, name), dtype)

    def written(self, call: Call) -> Layout:
        """Nodes that read the buffers, for a call in a graph, which then refuses to run in another dtype."""
        writer, module = call.writer, call.node.graph.owning_module

        def read(name: str, kind: str) -> Value:
            return writer.value("get_attr", name).named(f"{writer.layer}.{name.rpartition('.')[2]}")

        layout = self._with(read, operator.attrgetter(self.first)(module).dtype)
        first = layout.passes[0].inputs[0].weight.node
        found = writer.node("call_function", getattr, (first, "dtype"))
        same = writer.node("call_function", operator.eq, (found, self.dtype))
        message = f"{call.name}: was frozen in {self.dtype}; convert what is not frozen, and freeze that"
        writer.node("call_function", torch._assert, (same, message))
        return layout

    def filled(self, tensor: Callable[[str], Any], dtype: torch.dtype | None) -> Layout:
        """The layout with other tensors in it, asked for by kind in the order of `names`, for rows of `dtype`."""
        return self._with(lambda _, kind: tensor(kind), dtype)

    def _with(self, change: Callable[[Any, str], Any], dtype: torch.dtype | None = None) -> Layout:
        precision = schedule.precision_of(dtype)
        passes, stacks = (
            [_mapped(p, change)._replace(precision=precision) for p in several]
            for several in (self.layout.passes, self.layout.stacks)
        )
        return Layout(passes, stacks, self.layout.widths)


def _mapped(prepared: Prepared, change: Callable[[Any, str], Any]) -> Prepared:
    """The same with `change(value, kind)` in place of each value; kinds are such as `weight_hh0`."""

    def of(maps: Iterable[Affine], kind: str) -> tuple[Affine, ...]:
        return tuple(
            m._replace(
                weight=change(m.weight, f"weight_{kind}{k}"),
                bias=None if m.bias is None else change(m.bias, f"bias_{kind}{k}"),
            )
            for k, m in enumerate(maps)
        )

    projection = None if prepared.projection is None else of([prepared.projection], "hr")[0]
    return prepared._replace(inputs=of(prepared.inputs, "ih"), hidden=of(prepared.hidden, "hh"), projection=projection)


def freeze_layer(layer: Any) -> None:
    """Lay out the weights of an `Unrolled` layer once for all, in buffers, and take its parameters away.

    Parametrizations of the weights are computed as they are after `eval()`, and taken away too.

    Raises:
        UnrollError: if something else than the layer holds the weights.
    """
    if layer.frozen is not None:
        return
    recurrence = layer.recurrence
    names = [name for group in recurrence.weight_names for name in group]
    parametrizations = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    foreign = [n for n in names if n not in layer._parameters and n not in layer._buffers and n not in parametrizations]
    if foreign:
        mend = "make it a parameter (remove_weight_norm, prune.remove), or leave the layer out by where="
        raise UnrollError(Problem(layer.place, f"{', '.join(foreign)} is set from outside before each call", mend))

    for name in parametrizations:
        layer.parametrizations[name].eval()  # power iterations would go on, in tensors that the original shares
    weights = [weight for group in layer.all_weights for weight in group]
    kept: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> str:
        kept[name] = tensor
        return name

    frozen = Frozen.of(recurrence, weights, layer.plan, keep)
    for name in names:
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
        if name in parametrizations:
            del layer.parametrizations[name]
    if parametrizations:
        assign_class(layer, parametrize.type_before_parametrizations(layer))
    for name, tensor in kept.items():
        layer.register_buffer(name, tensor)
    layer.frozen = frozen


def freeze_attributes(
    module: fx.GraphModule, place: str, recurrence: Recurrence, weights: Sequence[fx.Node], plan: Plan
) -> Frozen:
    """Lay out the weights of a call, which its graph reads from attributes of its module, in buffers of the module.

    Raises:
        UnrollError: for weights that are computed in the graph or given to it, or are written to.
    """
    problems = []
    for node in weights:
        if node.op == "placeholder":
            problems.append(Problem(place, f"takes its weight {node.name} as an input of the graph", MEND))
        elif node.op != "get_attr":
            problems.append(Problem(place, f"takes its weight {node.name} from other operations of the graph", MEND))
        elif any(is_written(n) for n in module.graph.find_nodes(op="get_attr") if n.target == node.target):
            problems.append(Problem(place, f"has the weight {node.target}, to which the graph writes", MEND))
    if problems:
        raise UnrollError(*dict.fromkeys(problems))

    def keep(name: str, tensor: Tensor) -> str:
        name = f"frozen_{place}_{name}".replace(".", "_")
        while hasattr(module, name):
            name += "_"
        module.register_buffer(name, tensor)
        return name

    return Frozen.of(recurrence, [operator.attrgetter(str(w.target))(module) for w in weights], plan, keep)


def drop_unread(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Take away those attributes of a graph module, by their paths, that the graph has no use for."""
    names = set(names)
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in names and not node.users:
            module.graph.erase_node(node)
    used: set[int] = set()
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            found = operator.attrgetter(str(node.target))(module)
            tensors = (*found.parameters(), *found.buffers()) if isinstance(found, nn.Module) else (found,)
            used |= set(map(id, tensors))
    for name in names:
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        if id(getattr(holder, last, None)) not in used and hasattr(holder, last):
            delattr(holder, last)

"""Chains of calls in a graph that hand a state from one to the next."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Where, chooses, unknown_names
from unroll.graphs.calls import Call, Metadata, ModuleCall, call_of, form_of, graph_parts, layer_name
from unroll.graphs.effects import uses
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled
from unroll.streams.states import MIXED_STATES, call_name, no_state, packed_problem, reads_the_future


class Chain:
    """Calls of a layer that hand a state from one to the next, as it is, of which the first has none."""

    def __init__(self, first: Call) -> None:
        self.first = self.last = first

    def continues(self, call: Call) -> bool:
        """Tell whether a call begins with the last states of the chain, as they are."""
        if call.starts != self.last.finals:
            return False
        parts = [part for reading in self.last.finals for part in _parts(*reading)]
        # Nodes compare by their order in the graph.
        return not any(does.writes and user < call.node for part in parts for user, does in uses(part))


def find_chains(module: fx.GraphModule, where: Where, known: Metadata) -> dict[str, Chain]:
    """Find the chains of a graph, by the names that `call_name` makes for their states without `h` and `c`.

    Raises:
        UnrollError: with every layer that cannot be streamed.
    """
    problems = Problems()
    calls: list[Call] = []
    for node in module.graph.nodes:
        with problems:
            if call := _read(module, node, known):
                calls.append(call)
    names = [name for call in calls for name in call.names]
    problems += unknown_names(where, names)
    chains: dict[str, list[Chain]] = {}
    foreign: dict[str, Call] = {}
    for call in calls:
        asked = module.get_submodule(call.name) if isinstance(call, ModuleCall) else call.node
        if not chooses(where, call.names, asked):  # pyright: ignore[reportArgumentType]
            continue
        of_layer = chains.setdefault(call.path, [])
        if call.recurrence.bidirectional:
            problems.append(reads_the_future(call.place))
        elif call.packed:
            problems.append(packed_problem(call.place))
        elif call.is_stateless:
            of_layer.append(Chain(call))
        elif chain := next((chain for chain in of_layer if chain.continues(call)), None):
            chain.last = call
        else:
            foreign[call.path] = call
    # A state of the model's own is left alone where all calls of the layer have one.
    problems += [Problem(call.place, *MIXED_STATES) for name, call in foreign.items() if chains[name]]
    problems += _out_of_reach(module, where)
    found: dict[str, Chain] = {}
    for name, of_layer in chains.items():
        for k, chain in enumerate(of_layer):
            key = call_name(name, k, "")
            if key in found:
                problems.add(key or chain.first.place, "is the name of two states", "rename the layer")
            found[key] = chain
    if not found and not problems:
        problems.append(no_state("graph"))
    problems.check()
    return found


def _read(module: fx.GraphModule, node: fx.Node, known: Metadata) -> Call | None:
    """Read the call that a node is, if it is one of a recurrent layer."""
    call = call_of(module, node, known)
    if isinstance(call, ModuleCall) and call.has_own_forward:
        finding = "has a forward of its own, which does not tell what state it begins with"
        raise UnrollError(Problem(call.name, finding, "use streaming(module), or trace into it"))
    return call


def _out_of_reach(module: fx.GraphModule, where: Where) -> Iterator[Problem]:
    """Yield a problem for each layer inside of what the graph calls as a whole: other modules, branches and loops."""
    fix = "use streaming(module), or trace into it"
    for part in graph_parts(module)[1:]:
        for node in part.graph.nodes:
            if form_of(node) and chooses(where, [layer_name(node)], node):
                yield Problem(layer_name(node), "runs inside of another graph, such as a branch or a loop", fix)
    for node in module.graph.find_nodes(op="call_module"):
        outer = module.get_submodule(str(node.target))
        for name, layer in outer.named_modules():
            full = f"{node.target}.{name}"
            if name and (is_recurrent(layer) or isinstance(layer, Unrolled)) and chooses(where, [full], layer):
                yield Problem(full, f"runs inside of {node.target}, which the graph calls as a whole", fix)


def _parts(node: fx.Node, path: tuple[int, ...]) -> Iterator[fx.Node]:
    """Yield the nodes that hold this part of what a node returned."""
    if not path:
        yield node
        return
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == path[0]:
            yield from _parts(user, path[1:])

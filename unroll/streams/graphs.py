"""Named states for graphs and exported programs: each layer's zeros become inputs, and its last states outputs."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Where
from unroll.graphs.calls import FunctionCall, Metadata, tensor_metadata
from unroll.graphs.code import recompile_late
from unroll.graphs.programs import copied_entry, copied_graph, rebuilt, refuse_merged
from unroll.streams.chains import Chain, find_chains
from unroll.streams.states import ARGUMENT, State, call_name, fixed_rows, without_rows, zero_states


def stream_graph(
    module: fx.GraphModule, args: tuple[Any, ...], where: Where
) -> tuple[fx.GraphModule, dict[str, Chain]]:
    """Copy the graph, to take a dictionary `state` after its other arguments and to return output and state.

    Returns:
        The copy, and the chains of its calls.
    """
    if isinstance(module.graph._codegen, _PyTreeCodeGen):
        fix = "give the ExportedProgram that it comes from"
        raise UnrollError(Problem("streaming(graph)", "flattens its arguments, as graphs of torch.export do", fix))
    module = copied_graph(module)
    graph, (known, problems) = module.graph, _known(module, args)
    chains = find_chains(module, where, known)
    placeholders = graph.find_nodes(op="placeholder")
    if any(node.target == ARGUMENT for node in placeholders):
        raise UnrollError(Problem(ARGUMENT, "is an argument of the graph already", "call it by another name"))
    example = _examples(chains, known, problems)
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
        state = graph.placeholder(ARGUMENT)
    state.meta["states"] = {name: value.new_zeros(value.shape) for name, value in example.items()}
    recurrences = {name: chain.first.recurrence for name, (chain, _) in _states(chains).items()}
    state.meta["unbatched"] = [name for name, s in example.items() if without_rows(recurrences[name], s.dim())]
    inputs: dict[str, fx.Node] = {}
    with graph.inserting_before(state.next):
        for name in example:
            inputs[name] = graph.create_node("call_function", operator.getitem, (state, name), name=_identifier(name))
        # by methods: whoever unpickles the graph traces it anew, and len of a proxy cannot be traced
        others = graph.call_function(operator.sub, (graph.call_method("keys", (state,)), list(example)))
        fits = graph.call_method("isdisjoint", (others, others))  # there are none
        message = f"state: has a name which is no state; the states are: {', '.join(example)}"
        graph.call_function(torch._assert, (fits, message))
    finals = _rewire(chains, inputs)
    output = graph.output_node()
    output.args = ((output.args[0], finals),)
    output.meta.pop("val", None)
    graph.lint()
    recompile_late(module)
    return module, chains


def stream_program(program: ExportedProgram, where: Where) -> tuple[ExportedProgram, dict[str, Chain]]:
    """Copy the program, to take a further keyword argument `state` and to return output and state.

    Returns:
        The copy, and the chains of its calls.
    """
    refuse_merged(program)
    module = copied_graph(program.graph_module)
    graph, known = module.graph, tensor_metadata(module)
    chains = find_chains(module, where, known)
    example = _examples(chains, known)
    signature = copy.deepcopy(program.graph_signature)
    first, *rest = [copied_entry(entry) for entry in program.module_call_graph]
    call = first.signature
    assert call is not None
    args, kwargs = pytree.tree_unflatten([0] * call.in_spec.num_leaves, call.in_spec)
    if ARGUMENT in kwargs or ARGUMENT in (call.forward_arg_names or ()):
        raise UnrollError(Problem(ARGUMENT, "is an argument of the program already", "call it by another name"))

    nodes: dict[str, fx.Node] = {}
    last = graph.find_nodes(op="placeholder")[-1]
    values = _values(chains)
    for name in example:
        with graph.inserting_after(last):
            last = graph.placeholder(f"{ARGUMENT}_{_identifier(name)}")
        with values[name].fake_mode:
            last.meta["val"] = torch.empty_like(values[name])
        nodes[name] = last
        signature.input_specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=last.name), None))
    finals = _rewire(chains, nodes)
    output = graph.output_node()
    results: Any = output.args[0]
    output.args = ((*results, *finals.values()),)
    for node in finals.values():
        signature.output_specs.append(OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None))

    # The states are the last leaves of arguments and results, in the order of `example`.
    structure = dict.fromkeys(example, 0)
    returned = pytree.tree_unflatten([0] * call.out_spec.num_leaves, call.out_spec)
    call = replace(
        call,
        in_spec=pytree.tree_structure((args, {**kwargs, ARGUMENT: structure})),
        out_spec=pytree.tree_structure((returned, structure)),
        forward_arg_names=[*call.forward_arg_names, ARGUMENT] if call.forward_arg_names is not None else None,
    )
    given, named = program.example_inputs or ((), {})
    state = {name: value.new_zeros(value.shape) for name, value in example.items()}
    inputs = (given, {**named, ARGUMENT: state}) if program.example_inputs else None
    return rebuilt(program, module, signature, [replace(first, signature=call), *rest], inputs), chains


def example_state(model: Any) -> State | None:
    """Return zeros for the named states of a graph or program, shaped as in the example; None if it has none."""
    if isinstance(model, ExportedProgram):
        state = (model.example_inputs or ((), {}))[1].get(ARGUMENT)
        return state if isinstance(state, dict) else None
    if isinstance(model, fx.GraphModule):
        return state_metadata(model).get("states")
    return None


def initial_state(model: fx.GraphModule | ExportedProgram, batch: int | None = None) -> State:
    """Return zeros to begin with.

    Args:
        model: a graph or program with named states.
        batch: rows of the states, as for `zero_states`; of a program with fixed sizes, those that it has.
    """
    if isinstance(model, fx.GraphModule):
        told = state_metadata(model)
        return zero_states(told["states"], batch, told["unbatched"])
    example = example_state(model)
    assert example is not None
    found = zero_states(example, batch)
    sizes = _sizes(model)
    problems = Problems(
        fixed_rows(batch, name, sizes[name])
        for name, state in found.items()
        if any(isinstance(size, int) and size != given for size, given in zip(sizes[name], state.shape))
    )
    problems.check()
    return found


def state_metadata(module: fx.GraphModule) -> dict[str, Any]:
    """Return the metadata of the argument for the states: zeros by name, and the names of those without rows."""
    metadata = [node.meta for node in module.graph.find_nodes(op="placeholder") if node.target == ARGUMENT]
    return metadata[0] if metadata else {}


def _sizes(program: ExportedProgram) -> dict[str, list[Any]]:
    """Return the shape of each state that a program asks for, with symbols where that is open."""
    spec = program.call_spec.in_spec
    assert spec is not None
    order = pytree.tree_unflatten(list(program.graph_signature.user_inputs), spec)[1][ARGUMENT]
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return {name: list(nodes[given].meta["val"].shape) for name, given in order.items()}


def _known(module: fx.GraphModule, args: tuple[Any, ...]) -> tuple[dict[fx.Node, Any], Problems]:
    """Return what metadata and a run on fake tensors like the arguments tell, and why that stopped if it did."""
    known, problems = tensor_metadata(module), Problems()
    if args:
        trial = copied_graph(module)
        try:
            FakeTensorProp(trial, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args)
        except Exception as error:
            finding = f"the graph cannot be run on fake tensors like these ({type(error).__name__}: {error})"
            problems.add("args", finding, "give arguments that fit the graph")
        told = tensor_metadata(trial)
        known |= {node: told[there] for node, there in zip(module.graph.nodes, trial.graph.nodes) if there in told}
    return known, problems


def _states(chains: Mapping[str, Chain]) -> dict[str, tuple[Chain, int]]:
    """Return, by the name of each state, its chain and its number in that."""
    return {
        call_name(name, 0, part): (chain, k)
        for name, chain in chains.items()
        for k, part in enumerate(chain.first.recurrence.cell.states)
    }


def _examples(chains: Mapping[str, Chain], known: Metadata, problems: Sequence[Problem] = ()) -> State:
    """Make a tensor like each state, by its name. The problems are why it may not be known."""
    found = {name: chain.first.example(k, known) for name, (chain, k) in _states(chains).items()}
    unknown = dict.fromkeys(chain.first.place for name, (chain, _) in _states(chains).items() if found[name] is None)
    if unknown:
        finding, fix = "the size of its state is unknown", "give example inputs"
        raise UnrollError(*problems, *(Problem(place, finding, fix) for place in unknown))
    return {name: example for name, example in found.items() if example is not None}


def _values(chains: Mapping[str, Chain]) -> dict[str, Any]:
    """Return the metadata of the zeros in whose place a state comes, by its name."""
    return {
        name: chain.first.zeros[k].meta["val"]
        for name, (chain, k) in _states(chains).items()
        if isinstance(chain.first, FunctionCall)
    }


def _rewire(chains: Mapping[str, Chain], inputs: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """Give each chain its state, and return the nodes of the next one."""
    for name, chain in chains.items():
        chain.first.give([inputs[call_name(name, 0, part)] for part in chain.first.recurrence.cell.states])
    return {name: _copied(*chain.last.finals[k]) for name, (chain, k) in _states(chains).items()}


def _copied(node: fx.Node, path: tuple[int, ...]) -> fx.Node:
    """Copy a part of what a node returned, before anything can write into that."""
    with node.graph.inserting_before(node.next):
        value = node.meta.get("val")
        for index in path:
            node = node.graph.call_function(operator.getitem, (node, index))
            value = node.meta["val"] = None if value is None else value[index]
        copied = node.graph.call_function(torch.ops.aten.clone.default, (node,))
    if value is not None:
        copied.meta["val"] = value.clone()
    return copied


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)

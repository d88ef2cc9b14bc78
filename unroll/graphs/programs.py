"""The pass on `torch.export.ExportedProgram`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram, ModuleCallEntry
from torch.nn import functional
from torch.utils import _pytree as pytree

from unroll.core import schedule
from unroll.core.arguments import as_result, as_states
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.layout import lay_out
from unroll.core.limits import check_written
from unroll.core.options import TOLD, Where, unknown_names
from unroll.core.patching import without_gc
from unroll.core.plan import Plan, Preset
from unroll.core.presets import Situation
from unroll.core.recurrence import Frame
from unroll.graphs.calls import form_of, graph_parts, layer_name, tensor_metadata
from unroll.graphs.code import recompile_late
from unroll.graphs.functions import FUNCTIONS, read_on_tensors
from unroll.graphs.lowering import Lowering
from unroll.graphs.rewrite import find_calls, rewrite


def unroll_program(program: ExportedProgram, *, where: Where, plan: Plan) -> ExportedProgram:
    """Return a copy of the program with explicit gate operations in place of recurrent operators.

    Parameters, buffers and constants are those of the original; their names, the dynamic shapes and the
    signature stay.
    """
    refuse_merged(program)
    signature = copy.deepcopy(program.graph_signature)
    entries = [copied_entry(entry) for entry in program.module_call_graph]
    # made before it is rewritten, as making it writes the graph's code
    made = rebuilt(program, copied_graph(program.graph_module), signature, entries, program.example_inputs)
    parts = graph_parts(made.graph_module)
    names = [layer_name(node) for part in parts for node in part.graph.nodes if form_of(node)]
    problems = unknown_names(where, names)
    found: list[tuple[fx.GraphModule, list[Lowering]]] = []
    for part in parts:
        with problems:
            found.append((part, find_calls(part, where, plan, tensor_metadata(part), TOLD)))
    if callable(where) and names and not any(calls for _, calls in found):
        fix = f"it is asked about the name and the fx.Node of each call; the names are: {', '.join(names)}"
        problems.add("where", "picks none of the program's recurrent calls", fix)
    problems.check()
    with without_gc():
        for part, calls in found:
            rewrite(part.graph, calls, asserts=False)
            recompile_late(part)
            if part is not made.graph_module:
                continue
            # Signatures name the nodes of results, which are gone by now.
            for old, new in (pair for call in calls for pair in call.replaced.items()):
                signature.replace_all_uses(old.name, new.name)
                for entry in entries:
                    if entry.signature is not None:
                        entry.signature.replace_all_uses_with(old, new)
        made.validate()
    return made


def refuse_merged(program: ExportedProgram) -> None:
    """Refuse a program whose example has one tensor for several arguments, of which it reads some in place of others.

    Raises:
        UnrollError: naming each argument that is not read any more.
    """
    examples = pytree.tree_leaves(program.example_inputs or ((), {}))
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    given = [(nodes[str(name)], x) for name, x in zip(program.graph_signature.user_inputs, examples)]
    read = {id(x) for node, x in given if node.users and isinstance(x, torch.Tensor)}
    finding = "was exported with the tensor of another argument, which torch.export read in its place"
    fix = "export the program with a tensor of its own for each argument"
    Problems(Problem(str(node.name), finding, fix) for node, x in given if id(x) in read and not node.users).check()


def rebuilt(
    program: ExportedProgram, module: fx.GraphModule, signature: Any, entries: list[ModuleCallEntry], inputs: Any
) -> ExportedProgram:
    """Make a program of another graph module, with the tensors and the sizes of this one.

    Args:
        program: what the rest is taken from.
        module: its graph module.
        signature: of its graph.
        entries: of its module call graph.
        inputs: its example inputs.
    """
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=entries,
        example_inputs=inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def copied_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy with graphs of its own, which shares tensors and the contents of metadata."""
    graph = copy.deepcopy(module.graph)
    for new, old in zip(graph.nodes, module.graph.nodes, strict=True):
        if new.name != old.name:  # a name of Python's, such as `input`, which the signature keeps all the same
            new.name = old.name
    copied = fx.GraphModule(module, graph, type(module).__name__)
    copied.meta.update(module.meta)
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, copied_graph(child))
    return copied


def copied_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    """Return a copy with names of its own."""
    if entry.signature is None:
        return entry
    inputs, outputs = copy.deepcopy((entry.signature.inputs, entry.signature.outputs))
    return replace(entry, signature=replace(entry.signature, inputs=inputs, outputs=outputs))


def decompositions(plan: Plan | Preset | None = None) -> dict[Any, Callable[..., Any]]:
    """Return decompositions of the recurrent aten operators, for `ExportedProgram.run_decompositions`.

    They keep dropout between layers in training, which torch's own lose. `unroll(program)` gives the
    same operations and is much faster; the table is for those who decompose the rest of a program too.

    Args:
        plan: how the steps are laid out.

    Returns:
        A function for each operator, to be added to a table of others.

    Example:
        >>> program = torch.export.export(nn.Sequential(nn.GRU(3, 5)), (torch.zeros(2, 1, 3),))
        >>> table = torch.export.default_decompositions() | decompositions()
        >>> any("gru" in str(node.target) for node in program.run_decompositions(table).graph.nodes)
        False
    """
    operators = {target: form for target, form in FUNCTIONS.items() if isinstance(target, torch._ops.OpOverload)}
    plan = Plan.of(plan)
    plan.refuse_training("decompositions(plan=...)")
    if plan.block:
        fix = "export unroll(module, plan=...) in place of decomposing, or leave time='explicit'"
        raise UnrollError(Problem("decompositions(plan=...)", f"cannot make blocks, time={plan.time}", fix))
    return {target: partial(_decomposed, *form, plan) for target, form in operators.items()}


def _decomposed(kind: str, form: str, plan: Plan, *args: Any, **kwargs: Any) -> Any:
    """Compute on tensors what the operator computes, in explicit steps."""
    given, weights, recurrence = read_on_tensors(kind, form, args, kwargs)
    input, state = given["input"], given["hx"]
    sizes = given["batch_sizes"].tolist() if form == "packed" else None
    batched, steps, batch = Frame(True, len(sizes), sizes[0]) if sizes else recurrence.frame(input.shape)
    check_written(kind, None if recurrence.is_cell else steps)
    known = batch if isinstance(batch, int) else None
    at = Situation(recurrence, steps, known, bool(sizes), input.device.type, "graph")
    result = schedule.run(
        recurrence,
        lay_out(recurrence, recurrence.weights(weights), plan.resolve(at), input.dtype),
        input if sizes else schedule.flat_rows(recurrence, input, batched=batched),
        as_states(state),
        steps=steps,
        sizes=sizes,
        dropout=partial(functional.dropout, p=given["dropout"]) if given["train"] and given["dropout"] else None,
    )
    states = schedule.joined_states(recurrence, result, batched=batched)
    if recurrence.is_cell:
        return as_result(states)
    rows = schedule.joined_rows(result.outputs)
    return rows if sizes else schedule.joined_output(recurrence, result.outputs, batched=batched), *states

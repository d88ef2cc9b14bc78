"""The pass on `torch.export.ExportedProgram`."""

from __future__ import annotations

import copy

from torch import fx
from torch.export import ExportedProgram

from unroll.calls import Call, known_values
from unroll.functions import form_of, layer_name
from unroll.graphs import find_calls, rewrite
from unroll.plan import Plan
from unroll.recurrence import Problem, UnrollError
from unroll.trees import Where, unknown_names


def unroll_program(program: ExportedProgram, *, where: Where, plan: Plan) -> ExportedProgram:
    """A copy of the program with explicit gate operations in place of recurrent operators.

    Parameters, buffers and constants are those of the original; their names, the dynamic shapes and the
    signature stay.
    """
    module = _copied(program.graph_module)
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]  # branches of control flow, too
    names = [layer_name(node) for part in parts for node in part.graph.nodes if form_of(node)]
    problems: list[Problem] = unknown_names(where, names)
    found: list[tuple[fx.GraphModule, list[Call]]] = []
    for part in parts:
        try:
            found.append((part, find_calls(part, where, plan, known_values(part), None)))
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*problems)
    signature = copy.deepcopy(program.graph_signature)
    calls_graph = copy.deepcopy(program.module_call_graph)
    for part, calls in found:
        rewrite(part.graph, calls, asserts=False)
        if part is not module:
            part.recompile()
            continue
        for old, new in (pair for call in calls for pair in call.replaced.items()):
            signature.replace_all_uses(old.name, new.name)
            for entry in calls_graph:
                if entry.signature is not None:
                    entry.signature.replace_all_uses_with(old, new)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with graphs of its own, which shares tensors and the contents of metadata."""
    graph = copy.deepcopy(module.graph)
    for new, old in zip(graph.nodes, module.graph.nodes, strict=True):
        if new.name != old.name:  # a name of Python's, such as `input`, which the signature keeps all the same
            new.name = old.name
    copied = fx.GraphModule(module, graph)
    copied.meta.update(module.meta)
    for name, child in module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _copied(child))
    return copied

"""Names of tensors on their way through torch's exporter, which calls what it computes by names without a dot."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

APART = "unroll_names_apart."
"""What a name begins with meanwhile"""


def name_apart(program: ExportedProgram) -> ExportedProgram:
    """Return the program with names of tensors that no value of a graph can have: a buffer may be called `zeros`."""
    renamed = {spec.target for spec in program.graph_signature.input_specs if spec.target and "." not in spec.target}
    if not renamed:
        return program

    def name(target: str | None) -> str | None:
        return f"{APART}{target}" if target in renamed else target

    old = program.graph_signature
    signature = ExportGraphSignature(
        [replace(spec, target=name(spec.target)) for spec in old.input_specs],
        [replace(spec, target=name(spec.target)) for spec in old.output_specs],
    )
    return ExportedProgram(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=signature,
        state_dict={str(name(key)): value for key, value in program.state_dict.items()},
        range_constraints=dict(program.range_constraints),
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants={str(name(key)): value for key, value in program.constants.items()},
        verifiers=program.verifiers,
    )


def name_back(model: ir.Model) -> None:
    """Give the tensors of a translated model their names, with a dot and a number where another value has it."""
    taken = {value.name for graph in model.graphs() for node in graph for value in node.outputs}
    taken |= {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(APART):
            wanted = candidate = value.name.removeprefix(APART)
            number = 0
            while candidate in taken:
                number += 1
                candidate = f"{wanted}.{number}"
            taken.add(candidate)
            value.name = candidate

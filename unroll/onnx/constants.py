"""Values of an ONNX graph that are known before it runs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll.core.errors import refusing


def known_constant(value: ir.Value) -> Any:
    """Return what a value always is, if known: an initializer that is no input of the model, or a constant."""
    if value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Identity" and producer.domain == "" and producer.inputs[0]:
        return known_constant(producer.inputs[0])
    return constant(value)


def known_tensor(value: ir.Value) -> torch.Tensor | None:
    """Return what a value always is, as a tensor of torch, if that is known."""
    tensor = known_constant(value)
    if tensor is None:
        return None
    raw = tensor.raw if isinstance(tensor, tensor_adapters.TorchTensor) else None
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    place, fix = str(value.name), "give the path of the model in place of what was read from it, with its data whole"
    held = "its data is in a file that" if isinstance(tensor, ir.ExternalTensor) else "its data"
    with refusing(place, f"{held} cannot be read", fix):
        dtype, array = tensor_adapters.to_torch_dtype(tensor.dtype), tensor.numpy()
    if dtype is torch.bfloat16:  # no type of numpy's own: taken by its bits
        return torch.from_numpy(array.view("uint16").copy()).view(dtype)
    return torch.from_numpy(array.copy())


def constant(value: ir.Value) -> Any:
    """Return the tensor of an initializer or a `Constant` node, if the value is one."""
    producer = value.producer()
    if (
        producer is not None
        and producer.op_type == "Constant"
        and producer.domain == ""
        and "value" in producer.attributes
    ):
        attribute = producer.attributes["value"]
        return None if attribute.is_ref() else attribute.as_tensor()  # get_const_tensor would name the tensor
    return ir.convenience.get_const_tensor(value)


def is_zero(value: ir.Value) -> bool:
    """Tell whether a value is known to be zeros, also of a size that only the running model knows."""
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.op_type in ("Expand", "Identity"):
        first = producer.inputs[0]
        return first is not None and is_zero(first)
    if producer is not None and producer.domain == "" and producer.op_type == "ConstantOfShape":
        filled = producer.attributes.get("value")
        return filled is None or (filled.ref_attr_name is None and not filled.as_tensor().numpy().any())
    tensor = known_tensor(value)
    return tensor is not None and not tensor.any()

"""Engines of TensorRT, the data-center library, built and run where it is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from unroll.core.errors import Problem, UnrollError

ENGINE_TYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""TensorRT's names of types whose elements lie in memory as PyTorch's do"""


def engine_type(name: str) -> torch.dtype:
    """Return the type of a tensor that an engine may write to."""
    if name not in ENGINE_TYPES:
        finding = f"gives a result of the type {name}"
        raise UnrollError(Problem("TensorRT", finding, f"let the model return {', '.join(ENGINE_TYPES)}"))
    return ENGINE_TYPES[name]


def engine_run(path: Path, inputs: Sequence[Tensor], device: str) -> tuple[Callable[[], list[Tensor]], Path]:
    """Build an engine of an ONNX file, beside it, and return a function that runs it, and the engine's own file.

    Args:
        path: the file.
        inputs: the tensors that it is run with, in its order.
        device: of its results.
    """
    import tensorrt as trt  # pyright: ignore[reportMissingImports]

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    strongly = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # in later versions the only way
    network = builder.create_network(0 if strongly is None else 1 << int(strongly))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(os.fspath(path)):
        raise UnrollError(Problem("TensorRT", f"refuses the file ({parser.get_error(0)})", "see its list of operators"))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    engine_bytes = builder.build_serialized_network(network, config)
    if engine_bytes is None:
        raise UnrollError(Problem("TensorRT", "builds no engine", "see its log"))
    written_engine = path.with_suffix(".engine")
    written_engine.write_bytes(engine_bytes)
    engine = trt.Runtime(logger).deserialize_cuda_engine(engine_bytes)
    context = engine.create_execution_context()
    names = [engine.get_tensor_name(k) for k in range(engine.num_io_tensors)]
    given = iter(inputs)
    held: dict[str, Tensor] = {}
    for name in names:
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            held[name] = next(given).detach().contiguous()
        else:
            dtype = engine_type(engine.get_tensor_dtype(name).name)
            held[name] = torch.empty(tuple(engine.get_tensor_shape(name)), dtype=dtype, device=device)
        context.set_tensor_address(name, held[name].data_ptr())
    outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]

    def run() -> list[Tensor]:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise UnrollError(Problem("TensorRT", "fails to run its engine", "see its log"))
        return [held[name] for name in outputs]  # keeps the inputs too, whose addresses the engine has

    return run, written_engine

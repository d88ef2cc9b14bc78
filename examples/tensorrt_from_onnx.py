"""Engines of TensorRT from an unrolled ONNX file and from one with the LSTM operator, for any batch from 1 to 16.

    python examples/tensorrt_from_onnx.py              # all of it: needs a GPU and tensorrt
    python examples/tensorrt_from_onnx.py --prepare    # the files alone, held against the table of what is offered

Both engines are compared with the eager model and timed, in float32, float16 and bfloat16: networks are strongly typed,
so that an engine computes in the types of its file. The same without Python, for the unrolled file in float32:

    trtexec --onnx=unrolled-float32.onnx --stronglyTyped --noTF32 --saveEngine=unrolled-float32.engine \
        --minShapes=x:1x32x64 --optShapes=x:4x32x64 --maxShapes=x:16x32x64 --shapes=x:4x32x64

Written from the documentation and sources of TensorRT 11.1 (NVIDIA/TensorRT at a892d22267d9: `pyCore.cpp` in
`python/src/infer` and its docstrings, `samples/python/introductory_parser_samples`, `samples/common/sampleOptions.cpp`)
and NVIDIA's guide for moving from 10.x. It has not been run with TensorRT yet; `--prepare` has.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from tensorrt_from_export import BATCHES, FEATURES, STEPS, TOLERANCES, models, report, sequences
from torch import Tensor, nn

from unroll import check, compare, export_onnx


def written(model: nn.Module, dtype: torch.dtype, folder: Path) -> tuple[Path, Path]:
    """The model as an unrolled file, which uses nothing that TensorRT does not offer, and with the LSTM operator."""
    name = str(dtype).removeprefix("torch.")
    ours, theirs = folder / f"unrolled-{name}.onnx", folder / f"lstm-{name}.onnx"
    example = sequences(BATCHES[1], "cpu", dtype)
    # The check runs ONNX Runtime, which on a CPU has no bfloat16, and whose version 1.31.1 ends without a word while
    # it optimizes float16 for any batch.
    checked, batch = dtype == torch.float32, ({0: "batch"},)
    print(export_onnx(model, example, ours, plan="tensorrt", input_names=["x"], dynamic_shapes=batch, check=checked))
    print(check(ours, target="tensorrt").check())
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer exporter: it would write the steps in its own way
        torch.onnx.export(
            model, (example,), theirs, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
        )
    return ours, theirs


class Engine:
    """What TensorRT makes of a file with one input, `x`, and one output."""

    def __init__(self, path: Path) -> None:
        import tensorrt as trt

        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        # Version 11 knows no other networks, and ignores the flag.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(path)):
            raise RuntimeError("\n".join(str(parser.get_error(k)) for k in range(parser.num_errors)))
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((batch, STEPS, FEATURES) for batch in BATCHES))
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT builds no engine of {path}; its log says why")
        self.engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(k) for k in range(self.engine.num_io_tensors)]
        (self.output,) = (n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT)
        types = {trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16}
        self.dtype = types[self.engine.get_tensor_dtype(self.output)]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self.context.set_input_shape("x", tuple(x.shape))
        result = torch.empty(tuple(self.context.get_tensor_shape(self.output)), dtype=self.dtype, device=x.device)
        self.context.set_tensor_address("x", x.data_ptr())
        self.context.set_tensor_address(self.output, result.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT fails to run its engine; its log says why")
        return result


def main(folder: Path) -> None:
    for (model, dtype), (on_gpu, _) in zip(models("cpu"), models("cuda"), strict=True):
        ours, theirs = written(model, dtype, folder)
        engines = {"unrolled engine": Engine(ours)}
        try:
            engines["LSTM engine"] = Engine(theirs)
        except RuntimeError as error:  # the standard knows no LSTM in bfloat16 before its version 22
            print(f"TensorRT does not take {theirs.name}: {error}")
        inputs = [(sequences(batch, "cuda", dtype),) for batch in BATCHES]
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):  # TensorRT waits more often on the default one
            for engine in engines.values():
                print(compare(on_gpu, engine, inputs, reference=False, rtol=TOLERANCES[dtype]).check())
            forms = {"eager": on_gpu, **engines}
            for (x,) in inputs:
                report(dtype, len(x), {name: lambda form=form, x=x: form(x) for name, form in forms.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="write and check the files alone, on the CPU")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if given.prepare:
            for model, dtype in models("cpu"):
                written(model, dtype, folder)
        elif not torch.cuda.is_available():
            sys.exit("needs a CUDA device; --prepare does what needs none")
        else:
            main(folder)

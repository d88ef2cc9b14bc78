"""An unrolled ExportedProgram in Torch-TensorRT, for any batch from 1 to 16, in float32, float16 and bfloat16.

    python examples/tensorrt_from_export.py              # all of it: needs a GPU and torch-tensorrt
    python examples/tensorrt_from_export.py --prepare    # the programs alone, held against the table of what is offered

Each engine is compared with the eager model. Timed are the eager model, whose layers are cuDNN's, what Torch-TensorRT
makes of the program as torch.export writes it, recurrent operators and all, and what it makes of the unrolled one.

Written from the documentation and sources of Torch-TensorRT 2.9.0 and 2.14.0a0 (pytorch/TensorRT at d7f2062810df,
`docsrc/user_guide/compilation/dynamo_export.rst` and `py/torch_tensorrt/dynamo/_compiler.py`). Of it `--prepare` has
been run. Without a GPU, `make test-torch-tensorrt` has converted such programs: all nodes of unrolled ones, none left
to PyTorch (LSTM in two layers both ways and with projection, GRU, RNN), and of the original ones too (LSTM, LSTM with
projection, GRU, by hand), whose layers PyTorch's own decompositions write out in steps before. Packed batches cannot
be exported as they are; unrolled, all of their arithmetic is converted, and what looks at the lengths is left to
PyTorch; see docs/tensorrt.md. No engine of Torch-TensorRT has been loaded yet, which needs a driver.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from unroll import check, compare, unroll

STEPS, FEATURES = 32, 64
BATCHES = (1, 4, 16)
"""The smallest, the one that engines are tuned for, and the largest"""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""By how much an engine may differ from the eager model, relative to the largest value"""


class Tagger(nn.Module):
    """`[B, 32, 64]` to `[B, 32, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 128, num_layers=2, bidirectional=True, batch_first=True)
        self.tags = nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.tags(self.lstm(x)[0])


def models(device: str) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """The model in each type, with the same numbers but for rounding."""
    torch.manual_seed(0)
    model = Tagger().eval()
    for dtype in TOLERANCES:
        yield copy.deepcopy(model).to(device, dtype), dtype


def sequences(batch: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, STEPS, FEATURES, generator=torch.Generator().manual_seed(batch)).to(device, dtype)


def exported(model: nn.Module, device: str, dtype: torch.dtype) -> ExportedProgram:
    """The model as a program for any of these batches."""
    batch = Dim("batch", min=BATCHES[0], max=BATCHES[-1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights")  # said of every nn.LSTM
        return export(model, (sequences(BATCHES[1], device, dtype),), dynamic_shapes=({0: batch},))


def prepared(program: ExportedProgram) -> ExportedProgram:
    """The program unrolled, which uses nothing that Torch-TensorRT does not convert."""
    unrolled = unroll(program, plan="tensorrt")
    print(check(unrolled, target="torch_tensorrt").check())
    return unrolled


def engine(program: ExportedProgram, dtype: torch.dtype, *, whole: bool) -> Callable[[Tensor], Tensor]:
    """What Torch-TensorRT makes of a program; `whole` allows it no operators that are left to PyTorch."""
    import torch_tensorrt

    least, usual, most = ((batch, STEPS, FEATURES) for batch in BATCHES)
    return torch_tensorrt.dynamo.compile(
        program,
        arg_inputs=[torch_tensorrt.Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=dtype)],
        use_explicit_typing=True,  # types are those of the program; later versions know no other way
        disable_tf32=True,
        require_full_compilation=whole,
    )


def milliseconds(function: Callable[[], object], calls: int = 100) -> float:
    """How long a call keeps the GPU busy, or waiting."""
    for _ in range(10):
        function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def report(dtype: torch.dtype, batch: int, forms: dict[str, Callable[[], object]]) -> None:
    """A line with the time of each form."""
    times = "  ".join(f"{name} {milliseconds(form):8.3f} ms" for name, form in forms.items())
    print(f"{str(dtype).removeprefix('torch.'):9} batch {batch:2}  {times}")


def main() -> None:
    for model, dtype in models("cuda"):
        program = exported(model, "cuda", dtype)
        forms = {"eager": model, "unrolled engine": engine(prepared(program), dtype, whole=True)}
        try:
            forms["program as it is"] = engine(program, dtype, whole=False)
        except Exception as error:  # whatever it says: the row is left out
            print(f"Torch-TensorRT does not take the recurrent operators: {type(error).__name__}")
        with torch.no_grad():
            inputs = [(sequences(batch, "cuda", dtype),) for batch in BATCHES]
            print(compare(model, forms["unrolled engine"], inputs, reference=False, rtol=TOLERANCES[dtype]).check())
            for (x,) in inputs:
                report(dtype, len(x), {name: lambda form=form, x=x: form(x) for name, form in forms.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make and check the programs alone, on the CPU")
    if parser.parse_args().prepare:
        for model, dtype in models("cpu"):
            unrolled = prepared(exported(model, "cpu", dtype))
            inputs = [(sequences(batch, "cpu", dtype),) for batch in BATCHES]
            print(compare(model, unrolled.module(), inputs, rtol=TOLERANCES[dtype]).check())
    elif not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --prepare does what needs none")
    else:
        main()

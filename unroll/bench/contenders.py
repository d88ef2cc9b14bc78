"""The forms of a model that are measured side by side: a table of names and of functions that build them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unroll.bench.cuda_graphs import captured, checked
from unroll.bench.engines import engine_run
from unroll.bench.subjects import Subject, Task, tensors
from unroll.core.errors import Problem, UnrollError
from unroll.core.plan import Plan
from unroll.export.exporting import export_onnx
from unroll.graphs.dynamo import compile as unroll_compile
from unroll.unrolling import unroll

RECURRENT = {"LSTM", "GRU", "RNN"}


@dataclass(frozen=True)
class Built:
    """A form that can be called.

    Attributes:
        run: one call.
        graphs: the number of operations of each graph that was compiled or written, filled in by the first call at
            the latest; None where there is none.
        files: those written and needed to run.
        results: the tensors of what a call returns, in the model's order.
    """

    run: Callable[[], Any]
    graphs: Sequence[int] | None = None
    files: Sequence[Path] = ()
    results: Callable[[Any], list[Tensor]] = tensors


@dataclass(frozen=True)
class Contender:
    """One form: its name in tables, the function that builds it, and its demands.

    Attributes:
        title: for people.
        build: makes it from a task, a plan and an empty directory.
        plans: those that are measured if none is asked for; none for forms that do not unroll.
        needs: modules, imported before the clock starts.
        device: the one kind of device that it runs on; None for any.
        trains: true if it has gradients.
        in_torch: true if PyTorch runs it and knows its memory on a GPU.
        keeps: true if the recurrent layer stays one operation.
    """

    title: str
    build: Callable[[Task, Plan, Path], Built]
    plans: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    device: str | None = None
    trains: bool = False
    in_torch: bool = True
    keeps: bool = False

    @property
    def unrolls(self) -> bool:
        return bool(self.plans)


def obstacle(contender: Contender, subject: Subject) -> str | None:
    """Return the reason why a contender cannot run, or None, as far as that can be told without trying.

    Example:
        >>> obstacle(CONTENDERS["unrolled-aoti"], Subject("LSTM", backward=True))
        'has no gradients'
    """
    missing = [name for name in contender.needs if find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}, not installed here"
    if contender.device and torch.device(subject.device).type != contender.device:
        return f"is for {'a GPU' if contender.device == 'cuda' else 'a CPU'} alone"
    if subject.backward and not contender.trains:
        return "has no gradients"
    return None


def _eager(task: Task, plan: Plan, folder: Path) -> Built:
    return Built(task.runner(task.model))


def _eager_unrolled(task: Task, plan: Plan, folder: Path) -> Built:
    return Built(task.runner(unroll(task.model, plan=plan)))


def _compiled(task: Task, function: Callable[..., Any], **options: Any) -> Built:
    counts = counted_graphs()
    return Built(task.runner(torch.compile(function, **options)), counts)


def _compile(task: Task, plan: Plan, folder: Path) -> Built:
    return _compiled(task, task.model)


def _eager_cudagraph(task: Task, plan: Plan, folder: Path) -> Built:
    return Built(captured(task.runner(task.model)))


def _compile_allow_rnn(task: Task, plan: Plan, folder: Path) -> Built:
    from torch._dynamo import config

    config.allow_rnn = True
    return _compiled(task, task.model)


def _allow_rnn_cudagraphs(task: Task, plan: Plan, folder: Path) -> Built:
    from torch._dynamo import config

    config.allow_rnn = True
    built = _compiled(task, task.model, mode="reduce-overhead")
    return replace(built, run=checked(built.run))


def _unrolled(task: Task, plan: Plan) -> Any:
    """Unroll the model; for inference with its weights laid out once."""
    return unroll(task.model, plan=plan, freeze=not task.subject.backward)


def _unroll_compile(task: Task, plan: Plan, folder: Path) -> Built:
    counts = counted_graphs()
    return Built(task.runner(unroll_compile(task.model, plan=plan)), counts)


def _unrolled_compile(task: Task, plan: Plan, folder: Path, **options: Any) -> Built:
    return _compiled(task, _unrolled(task, plan), fullgraph=True, **options)


_unrolled_cpp = partial(_unrolled_compile, options={"cpp_wrapper": True})


def _unrolled_cudagraphs(task: Task, plan: Plan, folder: Path) -> Built:
    built = _compiled(task, _unrolled(task, plan), fullgraph=True, mode="reduce-overhead")
    return replace(built, run=checked(built.run))


def _unrolled_aoti(task: Task, plan: Plan, folder: Path) -> Built:
    import torch._inductor as inductor

    counts = counted_graphs()
    program = torch.export.export(_unrolled(task, plan), task.args, dict(task.kwargs))
    path = inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return Built(task.runner(inductor.aoti_load_package(path)), counts, [Path(path)])


def counted_graphs() -> list[int]:
    """Return a list to which Inductor, from now on, adds the number of operations of each graph that it compiles."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    counts: list[int] = []

    class Count(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            counts.append(sum(node.op not in ("placeholder", "get_attr", "output") for node in graph.nodes))

        def uuid(self) -> str:
            return "count"

    config.post_grad_custom_post_pass = Count()  # a setting of the process, which runs one contender
    return counts


def _onnx(task: Task, plan: Plan, folder: Path) -> Built:
    """Export the model as torch does, by the older exporter if that keeps the layer: it knows more of them."""
    import onnx

    path = folder / "model.onnx"
    failure: Exception | None = None
    for dynamo in (False, True):
        try:
            torch.onnx.export(
                task.model, task.args, path, kwargs=dict(task.kwargs), dynamo=dynamo, external_data=False, verbose=False
            )
        except Exception as error:
            failure = failure or error
        else:
            if RECURRENT & {node.op_type for node in onnx.load(path).graph.node}:
                return onnxruntime_run(task, path)
    said = f" ({first_line(failure)})" if failure else ""
    raise UnrollError(
        Problem("torch.onnx.export", f"writes no recurrent operator{said}", "see its documentation for what it knows")
    )


def _onnx_unrolled(task: Task, plan: Plan, folder: Path) -> Built:
    return onnxruntime_run(task, _exported(task, plan, folder))


def _onnx_decomposed(task: Task, plan: Plan, folder: Path) -> Built:
    path = folder / "model.onnx"
    program = torch.export.export(task.model, task.args, dict(task.kwargs)).run_decompositions()
    torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)
    return onnxruntime_run(task, path)


def _exported(task: Task, plan: Plan, folder: Path) -> Path:
    return export_onnx(task.model, task.args, folder / "model.onnx", kwargs=task.kwargs, plan=plan, check=False).path


def _inputs(task: Task) -> list[Tensor]:
    """Return the model's tensors in the order in which a file takes them."""
    from unroll.export.inputs import in_order

    return tensors((task.args, in_order(task.model, task.kwargs)))


def written(path: Path) -> tuple[list[int], list[Path]]:
    """Count the nodes of a file, those of inner graphs too, and name the files that belong to it."""
    import onnx_ir

    graph = onnx_ir.load(path).graph
    return [sum(1 for _ in graph.all_nodes())], [path, path.with_name(f"{path.name}.data")]


def onnxruntime_run(task: Task, path: Path) -> Built:
    """Load a file in ONNX Runtime, with inputs and outputs where the model would have them."""
    import onnxruntime

    on_gpu = torch.device(task.subject.device).type == "cuda"
    provider, settings = ("CUDAExecutionProvider", {"use_tf32": "0"}) if on_gpu else ("CPUExecutionProvider", {})
    if provider not in onnxruntime.get_available_providers():
        raise UnrollError(Problem("ONNX Runtime", f"has no {provider} here", "install onnxruntime-gpu"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = task.subject.threads, 4
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=[(provider, settings)])
    names = [value.name for value in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in _inputs(task)]
    feed = dict(zip(names, arrays, strict=True))
    graphs, files = written(path)
    if not on_gpu:
        return Built(lambda: session.run(None, feed), graphs, files, lambda found: [*map(torch.from_numpy, found)])
    # Inputs go to the GPU once and outputs stay there, so that no call has copies in its time.
    binding = session.io_binding()
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
    for value in session.get_outputs():
        binding.bind_output(value.name, "cuda")

    def results(_: Any) -> list[Tensor]:
        return [torch.from_numpy(array) for array in binding.copy_outputs_to_cpu()]

    return Built(lambda: session.run_with_iobinding(binding), graphs, files, results)


def _tensorrt(task: Task, plan: Plan, folder: Path) -> Built:
    path = _exported(task, plan, folder)
    run, engine = engine_run(path, _inputs(task), task.subject.device)
    return Built(run, written(path)[0], [engine])


def first_line(error: BaseException | None) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


INDUCTOR = ("torch._inductor.compile_fx",)

ONNX = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")

FUSED = "eager"
"""The contender against which the others are held: the model as PyTorch runs it"""

CONTENDERS: dict[str, Contender] = {
    FUSED: Contender("fused layer, eager", _eager, trains=True, keeps=True),
    "eager-unrolled": Contender("unrolled, eager", _eager_unrolled, ("default",), trains=True),
    "compile": Contender("torch.compile of the fused layer", _compile, needs=INDUCTOR, trains=True, keeps=True),
    "compile-allow-rnn": Contender("torch.compile with allow_rnn", _compile_allow_rnn, needs=INDUCTOR, trains=True),
    "eager-cudagraph": Contender(
        "fused layer in a CUDA graph", _eager_cudagraph, device="cuda", trains=True, keeps=True
    ),
    "compile-allow-rnn-cudagraphs": Contender(
        "torch.compile with allow_rnn, CUDA graphs", _allow_rnn_cudagraphs, needs=INDUCTOR, device="cuda", trains=True
    ),
    "unroll-compile": Contender("unroll.compile", _unroll_compile, ("inductor",), needs=INDUCTOR, trains=True),
    "unrolled-compile": Contender(
        "torch.compile, unrolled", _unrolled_compile, ("default", "products=sums"), needs=INDUCTOR, trains=True
    ),
    "unrolled-cpp": Contender(
        "torch.compile, unrolled, cpp_wrapper", _unrolled_cpp, ("default",), INDUCTOR, device="cpu", trains=True
    ),
    "unrolled-cudagraphs": Contender(
        "torch.compile, unrolled, CUDA graphs", _unrolled_cudagraphs, ("default",), INDUCTOR, device="cuda", trains=True
    ),
    "unrolled-aoti": Contender("AOTInductor, unrolled", _unrolled_aoti, ("default",), INDUCTOR),
    "onnx": Contender("ONNX Runtime, recurrent operator", _onnx, needs=ONNX, in_torch=False, keeps=True),
    "onnx-unrolled": Contender(
        "ONNX Runtime, unrolled", _onnx_unrolled, ("gates=paired", "gates=merged"), needs=ONNX, in_torch=False
    ),
    "onnx-decomposed": Contender("ONNX Runtime, PyTorch's decomposition", _onnx_decomposed, needs=ONNX, in_torch=False),
    "tensorrt": Contender(
        "TensorRT, unrolled", _tensorrt, ("gates=merged",), needs=("tensorrt", *ONNX[:3]), device="cuda", in_torch=False
    ),
}
"""Every form by the name it is asked for"""

"""Symbolic tracing with recurrent layers as single nodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from unroll.core.alone import alone
from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import patched
from unroll.core.signatures import told
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled

PACKING = (rnn.pack_padded_sequence, rnn.pad_packed_sequence)


@told
def trace(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Trace a model symbolically, with recurrent layers and (un)packing of sequences as single nodes.

    Args:
        model: what `torch.fx.symbolic_trace` takes.
        concrete_args: arguments to fix, as for `torch.fx.symbolic_trace`.

    Raises:
        UnrollError: if the model's control flow cannot be traced.

    Example:
        >>> [node.op for node in trace(nn.Sequential(nn.GRU(3, 5))).graph.nodes]
        ['placeholder', 'call_module', 'output']
    """
    if is_recurrent(model):
        fix = "trace a module that holds it, such as nn.Sequential(layer)"
        raise UnrollError(Problem(type(model).__name__, "is itself a recurrent layer, with nothing around it", fix))
    try:
        tracer = _Tracer()
        with alone(), _packed_by_node(tracer):
            graph = tracer.trace(model, concrete_args)
        for node in graph.nodes:  # torch would declare these by dotted names, on which every later trace stumbles
            if node.target in PACKING:
                node.meta.pop("is_wrapped", None)
    except (TraceError, TypeError) as error:
        fix = "use unroll(module), which needs no trace, or the graph of torch.export"
        raise UnrollError(Problem(type(model).__name__, f"cannot be traced symbolically ({error})", fix)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


def need_no_tracer(module: fx.GraphModule) -> None:
    """Let torch's own tracer read a pickle of a graph that `trace` made, if nothing in it is packed any more."""
    packs = any(node.target in PACKING for node in module.graph.nodes)
    if module._tracer_cls is _Tracer and not packs:
        module._tracer_cls = module.graph._tracer_cls = None


def trace_inside(module: nn.Module) -> fx.GraphModule | None:
    """Trace a module into all that it calls but recurrent layers; return None if its code cannot be traced."""
    tracer = _Tracer(inside=True)
    try:
        with alone():
            graph = tracer.trace(module)
            return fx.GraphModule(tracer.root, graph)
    except Exception:  # whatever the code raises when it is given proxies
        return None


@contextmanager
def _packed_by_node(tracer: fx.Tracer) -> Iterator[None]:
    """Make a `PackedSequence` of values of the graph a node, while this lasts."""
    made = PackedSequence.__new__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        proxies = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, fx.Proxy)]
        if any(proxy.tracer is tracer for proxy in proxies):
            return tracer.create_proxy("call_function", PackedSequence, args, kwargs)
        return made(cls, *args, **kwargs)

    with patched(PackedSequence, __new__=staticmethod(new)):
        yield


class _Tracer(fx.Tracer):
    """Traces with recurrent layers as single nodes, and modules of PyTorch's own as such too unless `inside`."""

    def __init__(self, *, inside: bool = False) -> None:
        self.inside = inside
        super().__init__(autowrap_functions=PACKING)
        self._autowrap_search.append(rnn)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_recurrent(m) or isinstance(m, Unrolled):
            return True
        return not self.inside and super().is_leaf_module(m, module_qualified_name)

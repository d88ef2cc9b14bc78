"""Feeds a sequence piece by piece, and carries the state."""

from __future__ import annotations

import io
import os
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError
from unroll.streams.graphs import example_state, initial_state, state_metadata
from unroll.streams.modules import Streaming
from unroll.streams.states import check_state_names


class Stream:
    """Feeds pieces to a streaming model and carries the state from each to the next, in torch or in ONNX Runtime.

    Runs without gradients. A stream can be copied and pickled with its state, for actors and workers; one over a file
    if it was made of the path. For training, call the model itself with `state=`.

    Args:
        model: what `unroll.streaming` returned, what `unroll.unroll` made of that, or the path of a file (or an
            `onnxruntime.InferenceSession` of one) that `unroll.export_onnx` wrote for it.
        batch: rows of the states, as for `initial_state`.

    Attributes:
        state: by name, a tensor each, in memory of its own. Rows of it may be set, say to zeros where another
            sequence begins. None for a file of an open batch until the first piece has told the number of rows, if
            `batch` does not.

    Raises:
        UnrollError: for what is no streaming model.

    Example:
        >>> from unroll import streaming
        >>> x = torch.randn(7, 2, 3)
        >>> stream = Stream(streaming(nn.GRU(3, 5), x), batch=2)
        >>> for piece in x.split(3):
        ...     output, last = stream(piece)
        >>> torch.equal(stream.state["h"], last)
        True
    """

    def __init__(self, model: Any, batch: int | None = None) -> None:
        # a path is of this folder, wherever a copy is read
        self._model = os.path.abspath(model) if isinstance(model, (str, os.PathLike)) else model
        self._run, self._initial = _runner(self._model)
        self.reset(batch)

    def __getstate__(self) -> dict[str, Any]:
        if type(self._model).__name__ == "InferenceSession":
            finding = "runs an InferenceSession, which cannot be copied or pickled"
            raise UnrollError(Problem("Stream", finding, "make it of the path of the file: Stream(path)"))
        kept = {key: value for key, value in vars(self).items() if key not in ("_run", "_initial")}
        if isinstance(self._model, fx.GraphModule):
            told = state_metadata(self._model)  # which a pickle of the graph has not
            kept["_told"] = {key: told[key] for key in ("states", "unbatched")}
        if isinstance(self._model, ExportedProgram):  # of which torch cannot read a pickle
            torch.export.save(self._model, saved := io.BytesIO())
            kept["_model"] = saved.getvalue()
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._model, fx.GraphModule):
            state_metadata(self._model).update(self.__dict__.pop("_told"))
        if isinstance(self._model, bytes):
            self._model = torch.export.load(io.BytesIO(self._model))
        self._run, self._initial = _runner(self._model)

    def initial_state(self, batch: int | None = None) -> Any:
        """Return zeros for this many rows, or for as many as in the example; None for as many as a file finds."""
        return self._initial(batch)

    def reset(self, batch: int | None = None) -> None:
        """Begin anew, with zeros for this many rows, or for as many as it began with before."""
        if batch is not None or not hasattr(self, "_batch"):
            self._batch = batch
        self.state: Any = self._initial(self._batch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output for one piece; the state goes on to the next."""
        output, self.state = self._run(*args, state=self.state, **kwargs)
        return output


def _runner(model: Any) -> tuple[Any, Any]:
    """Return functions that take a piece and a state, and that give the first state."""
    if isinstance(model, (str, os.PathLike)) or type(model).__name__ == "InferenceSession":
        from unroll.extras import require

        require("onnxruntime")
        from unroll.streams.runtime import runner

        return runner(model)
    if isinstance(model, Streaming):
        return torch.no_grad()(model), model.initial_state
    example = example_state(model)
    if example is None:
        finding = f"is a {type(model).__name__} without named states"
        raise UnrollError(
            Problem("Stream(model)", finding, "give what unroll.streaming returned, or a file made of it")
        )
    run = model.module() if isinstance(model, ExportedProgram) else model

    def checked(*args: Any, state: Any, **kwargs: Any) -> Any:
        check_state_names("state", state, example)
        return run(*args, state=state, **kwargs)

    return torch.no_grad()(checked), partial(initial_state, model)

"""What models do with the rows of packed sequences, of which some are padding in a graph."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import unroll as library
from tests.cases import Case, flat
from tests.checks import assert_same
from unroll import Plan, UnrollError, export_onnx, packing, trace, unroll
from unroll.packed.row_rules import Seen, mixes_rows

torch.set_num_threads(1)

F64 = torch.float64
STEPS, FEATURES = 5, 4
X = torch.randn(STEPS, 3, FEATURES, dtype=F64, generator=torch.Generator().manual_seed(0))
LENGTHS, OTHERS = torch.tensor([5, 2, 3]), torch.tensor([1, 4, 2])


class Worked(nn.Module):
    """Packs, does `work(model, rows)`, runs a layer, and pads."""

    def __init__(self, work, *, returned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.work, self.returned = work, returned
        self.linear, self.norm = nn.Linear(FEATURES, FEATURES, dtype=F64), nn.LayerNorm(FEATURES, dtype=F64)
        self.batch_norm = nn.BatchNorm1d(FEATURES, dtype=F64)
        self.gru = nn.GRU(FEATURES, 3, dtype=F64)

    def forward(self, x: Tensor, lengths: Tensor):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        rows = self.work(self, packed.data)
        if self.returned:
            return rows
        output, h = self.gru(PackedSequence(rows, *packed[1:]))
        output = PackedSequence(output.data * 2, *output[1:])
        return pad_packed_sequence(output, total_length=STEPS)[0], h


def many(m, rows):
    """What treats each row by itself, in many ways."""
    a = functional.dropout(torch.relu(m.linear(rows)), 0.0, training=True) - 1
    b = m.norm(m.batch_norm(a)).softmax(-1) + a.mean(1, keepdim=True)
    c = torch.cat(b.chunk(2, dim=-1)[::-1], 1)[:, [1, 0, 3, 2]] @ m.linear.weight
    d = c.view(-1, 2, 2).transpose(1, 2).flatten(1).to(torch.float32).double()
    e = torch.where(d > 0, d, torch.zeros_like(d)).mul_(2).clamp(max=1)
    return e + e.new_zeros(FEATURES) + rows[..., :1] * torch.stack(e.unbind(1), 1).flip(1)


MIXED = {
    "mean": lambda m, rows: rows - rows.mean(),
    "sum": lambda m, rows: rows - rows.sum(0),
    "softmax": lambda m, rows: rows.softmax(0),
    "flip": lambda m, rows: rows.flip(0),
    "reshape": lambda m, rows: rows.reshape(4, -1).reshape(-1, 4),
    "getitem": lambda m, rows: rows - rows[0],
    "t": lambda m, rows: rows @ (rows.t() @ rows),
    "sort": lambda m, rows: rows.sort(0)[0],
    "cumsum": lambda m, rows: rows.cumsum(0),
    "batch_norm": lambda m, rows: functional.batch_norm(rows, None, None, training=True),
    "mse_loss": lambda m, rows: rows * functional.mse_loss(rows, rows + 1),
}


def made(form: str, model: nn.Module, *args: Tensor, path=None, **options):
    if form in ("export", "strict"):
        with packing():
            return torch.export.export(unroll(model), args, strict=form == "strict", **options).module()
    torch.compiler.reset()
    if form in ("compile", "torch.compile"):
        ours = form == "compile"
        make, model = (library.compile, model) if ours else (torch.compile, unroll(model))
        compiled = make(model, backend="aot_eager", fullgraph=True, **options)

        def inside(*given):
            with torch.no_grad(), nullcontext() if ours else packing():
                return compiled(*given)

        return inside
    assert form == "onnx"
    import onnxruntime

    export_onnx(model, args, path / "m.onnx", **options)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "m.onnx", settings)

    def run(*given: Tensor) -> list[Tensor]:
        feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), given, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


DYNAMO = ["strict", "compile", "torch.compile"]
FORMS = ["export", "onnx", *DYNAMO]


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_themselves(form, tmp_path):
    model = Worked(many).eval()
    ours = made(form, model, X, LENGTHS, path=tmp_path)
    for lengths in (LENGTHS, OTHERS):
        with torch.no_grad():
            assert_same(list(flat(ours(X, lengths))), list(flat(model(X, lengths))))


OF_DYNAMO = {"mean", "getitem", "t", "batch_norm"}
"""A function, an item, a method, and what takes its result for rows: what Dynamo tells apart"""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "export") for name in MIXED),
        *(pytest.param(n, "strict", marks=() if n in OF_DYNAMO else pytest.mark.heavy) for n in MIXED),
    ],
)
def test_rows_that_are_mixed_are_refused(name, form):
    with pytest.raises(UnrollError, match=f"is given to {name}, which may mix its rows, .* do it before packing"):
        made(form, Worked(MIXED[name]).eval(), X, LENGTHS)


@pytest.mark.parametrize("form", ["onnx", "compile", "torch.compile"])
@pytest.mark.parametrize("name", ["mean", "batch_norm"])
def test_rows_that_are_mixed_are_refused_everywhere(name, form, tmp_path):
    with pytest.raises(Exception, match=f"is given to {name}, which may mix its rows"):
        made(form, Worked(MIXED[name]).eval(), X, LENGTHS, path=tmp_path)(X, LENGTHS)


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_leave_the_model(form, tmp_path):
    with pytest.raises(Exception, match="leaves the model, with rows of padding"):
        made(form, Worked(many, returned=True).eval(), X, LENGTHS, path=tmp_path)(X, LENGTHS)


def test_nothing_of_the_marks_is_left():
    with packing():
        program = torch.export.export(unroll(Worked(many).eval()), (X, LENGTHS), strict=True)
    assert not [node for node in program.graph.nodes if "released" in node.name or "watched" in node.name]


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "mixes"),
    [
        ("add", [Seen((6, 4), True), Seen((4,), False)], {}, False),
        ("add", [Seen((6, 4), True), Seen((6, 4), False)], {}, True),
        ("add", [Seen((6,), True), Seen((6, 6), True)], {}, True),
        ("mul", [Seen((6, 4), True), Seen((3, 1, 1), False)], {}, True),
        ("softmax", [Seen((6, 4), True)], {"dim": -2}, True),
        ("max", [Seen((6, 4), True)], {}, True),
        ("max", [Seen((6, 4), True), 1], {}, False),
        ("sum", [Seen((6, 4), True), (0, 1)], {}, True),
        ("stack", [[Seen((6, 4), True), Seen((6, 4), True)], -1], {}, False),
        ("stack", [[Seen((6, 4), True)]], {}, True),
        ("cat", [[Seen((6, 4), True), Seen((6, 4), False)], 1], {}, True),
        ("view", [Seen((6, 4), True), 6, -1], {}, False),
        ("view", [Seen((6, 4), True), -1, 8], {}, True),
        ("permute", [Seen((6, 4, 2), True), 0, 2, 1], {}, False),
        ("permute", [Seen((6, 4, 2), True), (1, 0, 2)], {}, True),
        ("expand", [Seen((6, 1), True), -1, 3], {}, False),
        ("expand", [Seen((6, 1), True), 2, 6, 3], {}, True),
        ("linear", [Seen((6,), True), Seen((2, 6), False)], {}, True),
        ("matmul", [Seen((6, 4), True), Seen((6, 4, 2), False)], {}, True),
        ("matmul", [Seen((4, 6), False), Seen((6, 4), True)], {}, True),
        ("embedding", [Seen((6,), True), Seen((9, 4), False)], {}, False),
        ("embedding", [Seen((6,), True), Seen((9, 4), False)], {"max_norm": 1.0}, True),
        ("layer_norm", [Seen((6, 4), True), (6, 4)], {}, True),
        ("getitem", [Seen((6, 4), True), (slice(None), None, 0)], {}, False),
        ("getitem", [Seen((6, 4), True), (..., 0, 0)], {}, True),
        ("getitem", [Seen((6, 4, 2), True), (slice(None), 0, [1])], {}, True),
        ("setitem", [Seen((6, 4), True), (slice(None), 0), Seen((6,), False)], {}, True),
        ("setitem", [Seen((6, 4), True), (slice(None), 0), Seen((6,), True)], {}, False),
        ("setitem", [Seen((6, 4), True), (slice(None), 0), 1.0], {}, False),
        ("add", [Seen((6, 4), True), 1], {"out": Seen((6, 4), False)}, True),
        ("where", [Seen((6, 4), True)], {}, True),
        ("unknown", [Seen((6, 4), True)], {}, True),
    ],
)
def test_the_table(name, args, kwargs, mixes):
    assert mixes_rows(name, args, kwargs) is mixes


class Lists(nn.Module):
    """Packs by lengths that are Python numbers, the constants or those read from a tensor."""

    def __init__(self, constant=None, total=STEPS) -> None:
        super().__init__()
        self.gru, self.constant, self.total = nn.GRU(FEATURES, 3, dtype=F64), constant, total

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, self.constant or lengths.tolist(), enforce_sorted=False)
        return pad_packed_sequence(self.gru(packed)[0], total_length=self.total)[0] + 0 * lengths.sum()


@pytest.mark.parametrize("total", [STEPS, None])
@pytest.mark.parametrize("form", ["export", "onnx"])
def test_lengths_read_as_a_list(form, total, tmp_path):
    model = Lists(total=total).eval()
    ours = made(form, model, X, LENGTHS, path=tmp_path)
    for lengths in (LENGTHS, OTHERS):
        assert_same(list(flat(ours(X, lengths))), [model(X, lengths)])


def test_dynamo_reads_no_list_of_lengths():
    with pytest.raises(Exception, match="data-dependent"):
        made("strict", Lists().eval(), X, LENGTHS)


@pytest.mark.parametrize("form", [*FORMS, "graph"])
def test_lengths_that_are_constants(form, tmp_path):
    model, args = Lists(constant=[2, 5, 1]).eval(), (X, LENGTHS)
    ours = unroll(trace(model), args) if form == "graph" else made(form, model, *args, path=tmp_path)
    assert_same(list(flat(ours(*args))), [model(*args)])


class Started(nn.Module):
    """Packs, runs a layer from initial states, and pads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, getattr(nn, kind)(FEATURES, 3, 2, bidirectional=True, dtype=F64)

    def forward(self, x, lengths, h, c):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, final = self.layer(packed, (h, c) if self.kind == "LSTM" else h + c)
        return pad_packed_sequence(output, total_length=STEPS)[0], final


@pytest.mark.parametrize("form", [*FORMS, "graph"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_initial_states(kind, form, tmp_path):
    model, state = Started(kind).eval(), (torch.randn(4, 3, 3, dtype=F64), torch.randn(4, 3, 3, dtype=F64))
    args = (X, LENGTHS, *state)
    ours = unroll(trace(model), args) if form == "graph" else made(form, model, *args, path=tmp_path)
    for lengths in (LENGTHS, OTHERS):
        given = (X, lengths, *state)
        assert_same(list(flat(ours(*given))), list(flat(model(*given))))


@pytest.mark.parametrize("form", ["export", "compile"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_dropout_between_layers_in_training(rate, form):
    model = Case("GRU", form="packed", num_layers=2, bidirectional=True, dropout=rate).model(F64).train()
    x, lengths = Case("GRU", form="packed").tensors(F64)
    ours = made(form, model, x, lengths)
    assert_same(list(flat(ours(x, lengths))), list(flat(model(x, lengths))))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.heavy)])
def test_blocks_in_a_program_of_any_length(strict):
    torch.compiler.reset()

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(FEATURES, 3, 2, bidirectional=True, dtype=F64)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            packed = PackedSequence(torch.relu(packed.data), *packed[1:])
            output, state = self.lstm(packed)
            return pad_packed_sequence(output, total_length=x.shape[0])[0], state

    model, args = Encoder().eval(), (torch.randn(7, 4, FEATURES, dtype=F64), torch.tensor([7, 2, 3, 1]))
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    with torch.no_grad(), packing():
        ours = torch.export.export(
            unroll(model, plan=Plan(time=3)), args, dynamic_shapes=shapes, strict=strict
        ).module()
    with torch.no_grad():
        for steps, lengths in ((7, [1, 1, 4, 2]), (3, [1, 2, 3, 1]), (11, [10, 2, 8]), (2, [2, 1, 2, 1, 1])):
            given = torch.randn(steps, len(lengths), FEATURES, dtype=F64), torch.tensor(lengths)
            assert_same(list(flat(ours(*given))), list(flat(model(*given))))


@pytest.mark.parametrize("plan", ["default", "time=3"])
def test_blocks_in_files_and_compiled_models(plan, tmp_path):
    case = Case("LSTM", bidirectional=True, form="packed", steps=7)
    model, args = case.model(F64).eval(), case.tensors(F64)
    batch = Dim("B")
    shapes = ({0: Dim("T"), 1: batch}, ({0: batch},))
    ours = made("onnx", model, *args, path=tmp_path, dynamic_shapes=shapes, plan=plan)
    compiled = made("compile", model, plan=plan)
    for lengths in ([7, 6, 1], [2, 2, 2]):
        given = args[0], torch.tensor(lengths)
        expected = list(flat(model(*given)))
        assert_same(ours(*given), expected)
        with torch.no_grad():
            assert_same(list(flat(compiled(*given))), expected)

"""Models that pack sequences, in every form they can be rewritten to: equal to eager for every choice of lengths."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import unroll as library
from tests.checks import assert_same, gradients
from unroll import UnrollError, export_onnx, packing, trace, unroll

torch.set_num_threads(1)

F64 = torch.float64
STEPS, BATCH, FEATURES = 5, 3, 4


class Encoder(nn.Module):
    """Packs, works on the rows, runs two layers in a row, and pads."""

    def __init__(self, kind: str, *, ordered: bool, first: bool, total: int | None, layers: int = 1, two: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.ordered, self.first, self.total = ordered, first, total
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.one = getattr(nn, kind)(FEATURES, 3, layers, batch_first=first, bidirectional=two)
        self.two = nn.GRU(3 * (1 + two), 2, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=self.first, enforce_sorted=self.ordered)
        data = torch.relu(self.linear(packed.data))
        packed = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        packed, one = self.one(packed)
        packed, two = self.two(packed)
        padded, lengths = pad_packed_sequence(packed, self.first, padding_value=-1.0, total_length=self.total)
        return padded, lengths, one, two

    def input(self, batch: int = BATCH, steps: int = STEPS) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, steps) if self.first else (steps, batch)
        return torch.randn(*shape, FEATURES, generator=generator, dtype=F64)


ENCODERS = {
    "LSTM, sorted": functools.partial(Encoder, "LSTM", ordered=True, first=True, total=STEPS, layers=2),
    "GRU, as long as the longest": functools.partial(Encoder, "GRU", ordered=False, first=False, total=None),
    "RNN, longer": functools.partial(Encoder, "RNN", ordered=False, first=True, total=STEPS + 2, layers=2, two=False),
}
EXAMPLE = torch.tensor([5, 3, 3])


@functools.cache
def made(name: str) -> Encoder:
    return ENCODERS[name]().double().eval()


@functools.cache
def rewritten(name: str, form: str):
    model = made(name)
    args = (model.input(), EXAMPLE)
    if form == "graph":
        return unroll(trace(model), args)
    if form in ("export", "strict"):
        with packing():
            return torch.export.export(unroll(model), args, strict=form == "strict").module()
    if form == "graph exported":
        with packing():
            return torch.export.export(rewritten(name, "graph"), args).module()
    assert form == "compile"
    return library.compile(model, backend="aot_eager")


def lengths_for(model: Encoder, most: int = STEPS):
    drawn = st.lists(st.integers(1, most), min_size=BATCH, max_size=BATCH)
    return drawn.map(lambda values: torch.tensor(sorted(values, reverse=True) if model.ordered else values))


FORMS = ["graph", "export", "strict", "graph exported", "compile"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.heavy) if name.startswith("GRU") else name for name in ENCODERS]
)
def test_every_choice_of_lengths(name, form):
    model, ours = made(name), rewritten(name, form)

    @settings(max_examples=12, deadline=None)
    @given(lengths_for(model))
    def agree(lengths):
        with torch.no_grad():
            assert_same(ours(model.input(), lengths), model(model.input(), lengths))

    agree()


@pytest.mark.parametrize("lengths", [[5, 3, 3], [5, 5, 5], [1, 1, 1], [4, 2, 1]], ids=str)
@pytest.mark.parametrize("form", ["graph", "export", "compile"])
def test_gradients(form, lengths):
    name = "GRU, as long as the longest"
    model, ours, lengths = made(name), rewritten(name, form), torch.tensor(lengths)
    expected = gradients(model, (model.input(), lengths))
    found = gradients(ours, (model.input(), lengths))
    assert_same(found["input 0"], expected["input 0"])
    for key, gradient in expected.items():
        if key in found:
            assert_same(found[key], gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[5, 3, 0], [6, 3, 3], [-1, -1, -1]], ids=str)
def test_bad_lengths_stop_the_graph(form, lengths):
    name = "RNN, longer"
    with torch.no_grad(), pytest.raises((RuntimeError, AssertionError), match=r"[Ll]ength|longest"):
        rewritten(name, form)(made(name).input(), torch.tensor(lengths))


@pytest.mark.parametrize("form", FORMS)
def test_unsorted_lengths_stop_the_graph(form):
    name = "LSTM, sorted"
    with torch.no_grad(), pytest.raises(RuntimeError, match="sorted"):
        rewritten(name, form)(made(name).input(), torch.tensor([2, 5, 3]))


@pytest.mark.parametrize("form", ["export", "onnx"])
def test_total_length_below_the_longest_stops_the_graph(form, tmp_path):
    model = Encoder("GRU", ordered=False, first=True, total=3).double().eval()
    good, bad, x = torch.tensor([3, 1, 2]), torch.tensor([4, 1, 2]), model.input()
    if form == "export":
        with packing():
            ours = torch.export.export(unroll(model), (x, good)).module()
        assert_same(ours(x, good), model(x, good))
    else:
        ours = session(model, tmp_path, x, good)
        assert_same(ours(x, good), list(flat(model(x, good))))
    with pytest.raises(Exception, match=r"total_length|data bounds"):
        ours(x, bad)


def flat(results):
    return torch.utils._pytree.tree_leaves(results)


def session(model, folder, *args, **options):
    import onnxruntime

    export_onnx(model, args, folder / "m.onnx", **options)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 4, 1
    runner = onnxruntime.InferenceSession(folder / "m.onnx", settings)
    names = [value.name for value in runner.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in runner.run(None, feed)]

    return run


@pytest.mark.parametrize("form", ["fixed", pytest.param("batch", marks=pytest.mark.heavy), "time"])
@pytest.mark.parametrize("name", ENCODERS)
def test_onnx(name, form, tmp_path):
    model = made(name)
    time, batch = (1, 0) if model.first else (0, 1)
    open_sizes = {batch: Dim("B")} | ({time: Dim("T")} if form == "time" else {})
    shapes = None if form == "fixed" else (open_sizes, {0: open_sizes[batch]})
    run = session(model, tmp_path, model.input(), EXAMPLE, dynamic_shapes=shapes)

    @settings(max_examples=12, deadline=None)
    @given(lengths_for(model))
    def agree(lengths):
        with torch.no_grad():
            assert_same(run(model.input(), lengths), list(flat(model(model.input(), lengths))))

    agree()
    for lengths in ([5, 3, 0], [6, 5, 5], *([[3, 4, 5]] if model.ordered else [])):
        with pytest.raises(Exception, match="data bounds"):
            run(model.input(), torch.tensor(lengths))
    if form == "time":
        for lengths in ([3, 2, 2, 1], [1, 1, 1, 1]):
            x = model.input(4, 3)
            assert_same(run(x, torch.tensor(lengths)), list(flat(model(x, torch.tensor(lengths)))))


def test_dynamic_batch_in_a_program():
    model = made("RNN, longer")
    batch = Dim("B")
    with packing():
        ours = torch.export.export(
            unroll(model), (model.input(), EXAMPLE), dynamic_shapes=({0: batch}, {0: batch})
        ).module()
    for lengths in ([5, 1], [2, 3, 1, 5], [4]):
        x = model.input(len(lengths))
        assert_same(ours(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))


@pytest.mark.heavy
def test_inductor():
    model = made("RNN, longer")
    compiled = torch.compile(unroll(model), fullgraph=True)
    for lengths in ([5, 3, 1], [1, 2, 2]):
        args = model.input(), torch.tensor(lengths)
        with torch.no_grad():
            with packing():
                found = compiled(*args)
            assert_same(found, model(*args))


def changed():
    codes = pack_padded_sequence.__code__, pad_packed_sequence.__code__
    return nn.utils.rnn._VF, nn.LSTM.forward, *codes, torch._dynamo.config.dont_skip_tracing  # pyright: ignore


def test_nothing_is_left_changed():
    before = changed()

    def fail():
        with packing():
            assert all(now is not then for now, then in zip(changed(), before, strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert changed() == before


class Applied(nn.Module):
    """A function as a module, for exporters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def exported(function, *args, **options):
    with packing():
        return torch.export.export(function if isinstance(function, nn.Module) else Applied(function), args, **options)


def test_layers_of_torch_are_refused():
    model = made("LSTM, sorted")
    with pytest.raises(UnrollError, match=r"LSTM: is given a packed sequence .* export or compile unroll"):
        exported(model, model.input(), EXAMPLE)


def test_models_run_eagerly_meanwhile():
    model = made("LSTM, sorted")
    with packing():
        assert_same(unroll(model)(model.input(), EXAMPLE), model(model.input(), EXAMPLE))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(
    ("x", "lengths", "message"),
    [
        ((5, 3, 2), torch.tensor([5, 3, 3, 1]), "there are 4 lengths for 3 rows"),
        ((5, 3, 2), [5, 3, 3, 1], "there are 4 lengths for 3 rows"),
        ((5, 0, 2), torch.zeros(0, dtype=torch.int64), "the input is empty"),
        ((5, 1, 2), torch.tensor([[5]]), "lengths are 2-D; give lengths.cpu\\(\\), 1-D"),
        ((5, 1, 2), torch.tensor(5), "lengths are 0-D"),
        ((5, 1, 2), 5, "lengths are 5; give a length for each row"),
        ((5, 1, 2), None, "lengths are None; give a length for each row"),
    ],
)
def test_shapes_that_torch_refuses(x, lengths, message, ordered):
    def pack(x):
        return pad_packed_sequence(pack_padded_sequence(x, lengths, enforce_sorted=ordered), total_length=5)[0]

    x = torch.zeros(x)
    with pytest.raises(UnrollError, match=message):
        exported(pack, x)
    with packing(eager=True), pytest.raises(UnrollError, match=message):
        pack(x)
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        pack(x)


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x, lengths):
        return pad_packed_sequence(self.rnn(pack_padded_sequence(x, lengths))[0], total_length=5)[0]


def test_a_list_of_lengths_that_the_model_itself_refuses(tmp_path):
    with pytest.raises(UnrollError, match=r"Sorted: fails itself on the example arguments .*greater than 0"):
        export_onnx(Sorted().eval(), (torch.randn(5, 3, 3), [5, 4, 0]), tmp_path / "model.onnx")


def test_too_few_lengths_leave_no_rows_out(tmp_path):
    """Where torch sorts them, it takes the rows that it has lengths for."""
    model, batch = made("RNN, longer"), Dim("B")
    x, shapes = model.input(), ({0: batch}, {0: batch})
    program = exported(unroll(model), x, EXAMPLE, dynamic_shapes=shapes).module()
    run = session(model, tmp_path, x, EXAMPLE, dynamic_shapes=shapes)
    for lengths in ([5], [5, 3]):
        few = torch.tensor(lengths)
        assert len(model(x, few)[0]) == len(lengths)
        with pytest.raises(AssertionError, match=r"Guard failed: .*size\(\)\[0\] == .*size\(\)\[0\]"):
            program(x, few)
        with pytest.raises(UnrollError, match=f"there are {len(lengths)} lengths for 3 rows"):
            exported(lambda x, few: model(x, few)[0], x, few)
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            run(x, few)


def test_sequences_packed_outside_are_refused_inside():
    packed = pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 2]))
    with pytest.raises(UnrollError, match=r"packed outside of the graph, or outside of unroll\.packing"):
        exported(lambda x: x + pad_packed_sequence(packed)[0], torch.zeros(5, 2, 3))


class Normed(nn.Module):
    """Does with packed rows what has no gradient at zero, before and after a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.RNN(2, 2, bidirectional=True, dtype=F64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        rows = packed.data / packed.data.norm(dim=-1, keepdim=True)
        packed = self.rnn(PackedSequence(rows, *packed[1:]))[0]
        backwards = packed.data[:, 2:]  # begins past the end of a row, with a state of zeros
        rows = packed.data / backwards.norm(dim=-1, keepdim=True)
        return pad_packed_sequence(PackedSequence(rows, *packed[1:]), total_length=4)[0]


@pytest.mark.parametrize("form", ["export", "blocks", "compile"])
def test_gradients_whatever_the_padding_holds(form):
    model, lengths = Normed(), torch.tensor([1, 4, 2])
    x = torch.randn(4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    if form == "compile":
        torch.compiler.reset()
        ours = library.compile(model, backend="aot_eager")
    else:
        with torch.no_grad():
            ours = exported(unroll(model, plan="time=2" if form == "blocks" else None), x, lengths).module()
    for content in (0.0, float("nan")):
        x = torch.where((torch.arange(4)[:, None] < lengths)[..., None], x, content)
        expected, found = gradients(model, (x, lengths)), gradients(ours, (x, lengths))
        assert not any(gradient.isnan().any() for gradient in expected.values())
        assert_same({name.removeprefix("_orig_mod."): gradient for name, gradient in found.items()}, expected)


@pytest.mark.parametrize("form", ["export", "compile", "onnx"])
def test_integers_stay_integers(form, tmp_path):
    def pad(x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(packed, padding_value=-1.0, total_length=6)

    x, lengths = torch.randint(1, 9, (5, 3)), torch.tensor([2, 5, 1])
    if form == "onnx":
        found = session(Applied(pad).eval(), tmp_path, x, lengths)(x, lengths)
    elif form == "export":
        found = exported(pad, x, lengths).module()(x, lengths)
    else:
        found = library.compile(pad, backend="eager")(x, lengths)
    expected = pad(x, lengths)
    assert expected[0].dtype == torch.int64
    assert_same(list(found), list(expected))


class Two(nn.Module):
    """Two layers on one packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.GRU(FEATURES, 3, dtype=F64), nn.GRU(3, 2, dtype=F64)

    def forward(self, x: Tensor, lengths: Tensor):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed, h = self.two(self.one(packed)[0])
        return pad_packed_sequence(packed, total_length=x.shape[0])[0], h


@pytest.mark.parametrize("where", ["one", "two"])
def test_layers_are_chosen_in_a_graph(where):
    model, x = Two(), torch.randn(STEPS, BATCH, FEATURES, dtype=F64)
    ours = unroll(trace(model), (x, EXAMPLE), where=where)
    left = [node.target for node in ours.graph.find_nodes(op="call_module")]
    assert left == ["two" if where == "one" else "one"]
    for lengths in ([5, 3, 3], [1, 2, 4]):
        assert_same(ours(x, torch.tensor(lengths)), model(x, torch.tensor(lengths)))


def test_layers_cannot_be_chosen_elsewhere(tmp_path):
    model, args = Two().eval(), (torch.randn(STEPS, BATCH, FEATURES, dtype=F64), EXAMPLE)
    with pytest.raises(UnrollError, match=r"GRU: is given a packed sequence and is not chosen by where="):
        export_onnx(model, args, tmp_path / "m.onnx", where="one")
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"of which where= cannot choose"):
        library.compile(model, backend="eager", where="one")(*args)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_rewritten_graph_is_exported(steps, strict):
    model, x = Two(), torch.randn(steps, BATCH, FEATURES, dtype=F64)
    graph = unroll(trace(model), (x, torch.tensor([steps, 1, 1])))
    ours = exported(graph, x, torch.tensor([steps, 1, 1]), strict=strict).module()
    assert_same(ours(x, torch.tensor([1, steps, 1])), model(x, torch.tensor([1, steps, 1])))


READS = {
    "size": lambda sizes: sizes.size(0),
    "a sum": lambda sizes: 1 + sizes.sum(),
    "an item": lambda sizes: sizes[0],
    "len": len,
    "iteration": list,
    "a function": torch.max,
    "a comparison": lambda sizes: sizes > 1,
}


def reading(read):
    def run(x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(packed)[0] / read(packed.batch_sizes)

    return run


@pytest.mark.parametrize("name", READS)
def test_batch_sizes_are_not_read(name):
    with pytest.raises(UnrollError, match=r"packed\.batch_sizes: is read, and depends on lengths"):
        exported(reading(READS[name]), torch.randn(5, 3, 2), EXAMPLE)


@pytest.mark.parametrize("form", ["strict", "compile"])
@pytest.mark.parametrize("name", ["size", "len", "a function"])
def test_dynamo_tells_that_batch_sizes_are_not_read(name, form):
    torch.compiler.reset()
    run, args = reading(READS[name]), (torch.randn(5, 3, 2), EXAMPLE)
    make = functools.partial(exported, run, strict=True) if form == "strict" else library.compile(run, backend="eager")
    with pytest.raises(Exception, match=r"packed\.batch_sizes.*is read, and depends on lengths"):
        make(*args)


def test_dynamo_tells_why_a_layer_of_torch_is_refused():
    model = made("LSTM, sorted")
    with pytest.raises(Exception, match=r"LSTM.*is given a packed sequence .*export or compile unroll"):
        exported(model, model.input(), EXAMPLE, strict=True)


def test_dynamo_tells_of_shapes_that_torch_refuses():
    with pytest.raises(Exception, match="there are 2 lengths for 3 rows"):
        library.compile(lambda x, lengths: pack_padded_sequence(x, lengths).data.shape, backend="eager")(
            torch.zeros(5, 3, 2), torch.tensor([5, 3])
        )


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("returned", ["all", "batch_sizes"])
def test_packed_sequences_do_not_leave_the_model(returned, strict):
    def pack(x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return packed if returned == "all" else (x, packed.batch_sizes)

    with pytest.raises(Exception, match=r"leaves the model, .*rows of padding among its rows"):
        exported(pack, torch.zeros(5, 3, 2), EXAMPLE, strict=strict)


def test_an_export_without_packing_says_that_it_is_missing():
    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 2)

        def forward(self, x, lengths):
            return self.gru(pack_padded_sequence(x, lengths))[1]

    with pytest.raises(UnrollError, match=r"^gru: .* within `with unroll\.packing\(\):`"):
        torch.export.export(unroll(Packs()), (torch.zeros(5, 2, 3), torch.tensor([5, 2])))


@pytest.mark.parametrize("form", ["export", "compile", "torch.compile", "graph"])
def test_packed_sequences_do_not_come_from_outside(form):
    torch.compiler.reset()
    model, packed = nn.Sequential(nn.GRU(3, 2)), pack_padded_sequence(torch.zeros(5, 2, 3), torch.tensor([5, 2]))
    make = {
        "export": lambda: torch.export.export(unroll(model), (packed,)),
        "compile": lambda: library.compile(model, backend="eager")(packed),
        "torch.compile": lambda: torch.compile(unroll(model), backend="eager", fullgraph=True)(packed),
        "graph": lambda: unroll(trace(model), (packed,)),
    }
    with pytest.raises(Exception, match="is given a sequence that was packed outside of the graph"):
        make[form]()


def test_packed_sequences_from_outside_break_the_graph_and_agree():
    torch.compiler.reset()
    model, packed = nn.GRU(3, 2), pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 2]))
    for compiled in (
        library.compile(model, backend="eager", fullgraph=False),
        torch.compile(unroll(model), backend="eager"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(compiled(packed)[0].data, model(packed)[0].data)

"""The comparator: that it agrees, and above all that it can fail."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tests.checks import problems
from unroll import Report, UnrollError, compare, export_onnx, unroll

F64 = torch.float64


class Changed(nn.Module):
    """A layer whose results somebody tampered with."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer = layer
        self.change = change

    def forward(self, *args, **kwargs):
        return self.change(*self.layer(*args, **kwargs))


def at(tensor, value):
    """With another value in one place."""
    tensor = tensor.clone()
    tensor[(-1,) * tensor.dim()] = value
    return tensor


LAYER = nn.GRU(6, 5)
INPUT = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))

WRONG = {
    "value": (lambda y, h: (y * 1.001, h), r"output\[0\]: is .* from the float64 result, more than .*; the original "),
    "one value": (lambda y, h: (at(y, 0.5), h), r"output\[0\]: is .* from the float64 result"),
    "state": (lambda y, h: (y, h * 1.001), r"output\[1\]: is .* from the float64 result"),
    "sign": (lambda y, h: (y, -h), r"output\[1\]: is .* from the float64 result"),
    "NaN": (lambda y, h: (at(y, float("nan")), h), r"output\[0\]: is inf from the float64 result"),
    "infinity": (lambda y, h: (at(y, float("inf")), h), r"output\[0\]: is inf from the float64 result"),
    "shape": (lambda y, h: (y[:3], h), r"output\[0\]: has shape torch.Size\(\[3, 3, 5\]\), the original "),
    "broadcast": (lambda y, h: (y, h[:, :1]), r"output\[1\]: has shape torch.Size\(\[1, 1, 5\]\), the original "),
    "rank": (lambda y, h: (y, h[0]), r"output\[1\]: has shape "),
    "dtype": (lambda y, h: (y.double(), h), r"output\[0\]: has dtype torch.float64, the original torch.float32"),
    "device": (lambda y, h: (y.to("meta"), h), r"output\[0\]: has device meta, the original cpu"),
    "pair": (lambda y, h: (y, (h,)), r"output: is \(tensor, \(tensor,\)\), the original \(tensor, tensor\)"),
    "list": (lambda y, h: [y, h], r"output: is \[tensor, tensor\], the original \(tensor, tensor\)"),
    "one": (lambda y, h: y, r"output: is tensor, the original \(tensor, tensor\)"),
    "nothing": (lambda y, h: (y, None), r"output\[1\]: is None, the original tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_seen(name):
    change, words = WRONG[name]
    report = compare(LAYER, Changed(LAYER, change), (INPUT,))
    assert not report.ok
    with pytest.raises(UnrollError, match=f"{words}.*the rewritten model is not the original"):
        report.check()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_seen_without_a_reference(name):
    assert not compare(LAYER, Changed(LAYER, WRONG[name][0]), (INPUT,), reference=False).ok
    in_double = copy.deepcopy(LAYER).double()
    change = WRONG["dtype"][0] if name != "dtype" else lambda y, h: (y.float(), h)
    assert not compare(
        in_double, Changed(in_double, change if name == "dtype" else WRONG[name][0]), (INPUT.double(),)
    ).ok


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reference", [False, True])
def test_the_limit_follows_the_dtype(dtype, reference):
    layer = nn.LSTM(6, 5, dtype=dtype)
    input, epsilon = INPUT.to(dtype), torch.finfo(dtype).eps
    factors = {F64: (1e-7, 1e-13), torch.float32: (1e-3, 1e-9)}
    seen, unseen = factors.get(dtype, (20 * epsilon, 0.0))
    for factor, ok in ((seen, False), (unseen, True)):
        other = Changed(layer, lambda y, s, factor=factor: ((y.double() * (1 + factor)).to(dtype), s))
        assert compare(layer, other, (input,), reference=reference).ok == ok


def test_a_tolerance_of_ones_own():
    other = Changed(LAYER, lambda y, h: (y * 1.001, h))
    assert compare(LAYER, other, (INPUT,), rtol=1e-2).ok
    assert not compare(LAYER, other, (INPUT,), rtol=1e-4).ok


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"])
def test_a_wrong_gradient_is_seen(name):
    """The value is right and its gradient by one parameter is not."""

    class Detached(nn.GRU):
        def forward(self, *args):
            kept = {n: p.detach() if n == name else p for n, p in self.named_parameters()}
            return torch.func.functional_call(self.inner[0], kept, args)

    layer = copy.deepcopy(LAYER)
    other = Detached(6, 5)
    other.load_state_dict(layer.state_dict())
    other.inner = [layer]
    assert compare(layer, other, (INPUT,)).ok
    report = compare(layer, other, (INPUT,), gradients=True)
    assert [row.place for row in report.rows if row.finding] == [f"gradient of {name}"]


class Attending(nn.Module):
    """The gradient of the last bias is zero: it moves all that goes into the softmax alike."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.linear = nn.Linear(6, 1)

    def forward(self, x):
        y = self.gru(x)[0]
        return (torch.softmax(self.linear(y), 1) * y).sum(1)


@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float32, 30), (F64, 5)], ids=str)
def test_the_rounding_of_a_gradient_that_cancels_is_no_difference(dtype, seeds):
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, x = Attending().to(dtype), torch.randn(3, 8, 4, dtype=dtype)
        before = copy.deepcopy(model.state_dict())
        compare(model, unroll(model), x, gradients=True).check()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


class Skewed(nn.Module):
    """The values are right, and one gradient is `factor` of what it is, and `more`."""

    def __init__(self, model, name, factor, more=0.0):
        super().__init__()
        self.gru, self.linear, self.inner = model.gru, model.linear, [model]
        self.name, self.factor, self.more = name, factor, more

    def forward(self, x):
        given = dict(self.inner[0].named_parameters())
        p = given[self.name]
        given[self.name] = p + (p - p.detach()) * (self.factor - 1)
        return torch.func.functional_call(self.inner[0], given, x) + (p - p.detach()).sum() * self.more


@pytest.mark.parametrize(
    ("dtype", "seen", "unseen"), [(torch.float32, 1e-4, 1e-9), (F64, 2e-9, 5e-10), (torch.bfloat16, 0.1, 0)], ids=str
)
def test_cancellation_excuses_no_wrong_gradient(dtype, seen, unseen):
    torch.manual_seed(8)
    model, x = Attending().to(dtype), torch.randn(3, 8, 4, dtype=dtype)
    for name, _ in model.named_parameters():
        if name != "linear.bias":
            report = compare(model, Skewed(model, name, 1 + seen), x, gradients=True)
            assert [row.place for row in report.rows if row.finding] == [f"gradient of {name}"]
            assert compare(model, Skewed(model, name, 1 + unseen), x, gradients=True).ok
    report = compare(model, Skewed(model, "linear.bias", 1, more=seen), x, gradients=True)
    assert [row.place for row in report.rows if row.finding] == ["gradient of linear.bias"]


def test_a_run_that_changes_the_model_excuses_nothing():
    """Its own memory would be taken for rounding, if not every run began with the same."""

    class Remembering(Attending):
        kept = 0.0

        def forward(self, x):
            self.kept += 1.0
            return super().forward(x) * self.kept

    torch.manual_seed(8)
    model, x = Remembering(), torch.randn(3, 8, 4)
    assert not compare(model, Skewed(copy.deepcopy(model), "linear.weight", 1 + 1e-4), [(x,), (x,)], gradients=True).ok
    compare(model, unroll(model), [(x,), (x,)], gradients=True).check()


def test_a_wrong_gradient_of_an_input_is_seen():
    class Cut(nn.GRU):
        def forward(self, x):
            return super().forward(x.detach())

    other = Cut(6, 5)
    other.load_state_dict(LAYER.state_dict())
    report = compare(LAYER, other, (INPUT,), gradients=True)
    assert [row.place for row in report.rows if row.finding] == ["gradient of input[0][0]"]


def test_parameters_that_are_missing_or_too_many_are_seen():
    report = compare(LAYER, lambda x: LAYER(x), (INPUT,), gradients=True)
    assert {row.finding for row in report.rows if row.place.startswith("gradient of weight")} == {"is missing"}
    report = compare(lambda x: LAYER(x), LAYER, (INPUT,), gradients=True)
    assert {row.finding for row in report.rows if row.place.startswith("gradient of weight")} == {
        "is not in the original"
    }


def test_what_is_no_tensor_is_compared_too():
    assert compare(lambda: (1, "a", None), lambda: (1, "a", None), ()).ok
    assert not compare(lambda: (1, "a"), lambda: (1, "b"), ()).ok
    assert not compare(lambda: 1, lambda: 1.0, ()).ok
    assert not compare(lambda: torch.tensor([1, 2]), lambda: torch.tensor([1, 3]), ()).ok
    (row,) = compare(lambda: {"a": torch.ones(1)}, lambda: {"b": 2}, ()).rows
    assert row.finding == "is {'b': 2}, the original {'a': tensor}"
    nan = torch.tensor([float("nan"), float("inf"), 1.0])
    assert compare(lambda: nan, lambda: nan.clone(), ()).ok
    assert not compare(lambda: nan, lambda: -nan, ()).ok
    assert compare(lambda: torch.zeros(0), lambda: torch.zeros(0), ()).ok


@dataclass
class Found:
    output: torch.Tensor
    name: str


class Finding(nn.Module):
    def __init__(self, change=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.change = nn.GRU(3, 5), change

    def forward(self, x):
        return Found(self.rnn(x)[0] + self.change, "gru")


def test_tensors_in_a_dataclass_are_compared():
    x = torch.randn(4, 2, 3)
    assert compare(Finding(), unroll(Finding()), x, gradients=True).ok
    assert "output['output']: is 1.00e-03" in problems(compare(Finding(), Finding(change=1e-3), x).check)[0]


def test_an_exported_program_is_run():
    x = torch.randn(4, 2, 3)
    model = nn.Sequential(nn.GRU(3, 5)).eval()
    program = torch.export.export(model, (x,))
    assert compare(program, unroll(program), x).ok and compare(model, program, x).ok


def test_several_inputs_are_all_compared():
    def only_long(y, h):
        return (y * 1.1 if len(y) > 3 else y), h

    report = compare(LAYER, Changed(LAYER, only_long), [(INPUT[:2],), (INPUT,), (INPUT[:1],)])
    assert [row.place for row in report.rows if row.finding] == ["input 1: output[0]"]


def test_of_each_input_the_worst_is_told_and_how_many_more():
    report = compare(LAYER, Changed(LAYER, lambda y, h: (y * 1.1, h * 2)), [(INPUT,), (INPUT[:2],)])
    with pytest.raises(UnrollError) as caught:
        report.check()
    assert sorted(problem.place for problem in caught.value.problems) == ["input 0: output[1]", "input 1: output[1]"]
    assert all(problem.finding.endswith("; 1 more on this input") for problem in caught.value.problems)


def test_keyword_arguments():
    hx = torch.ones(1, 3, 5)
    assert compare(LAYER, unroll(LAYER), (INPUT,), {"hx": hx}, gradients=True).ok
    other = Changed(LAYER, lambda y, h: (y, h))
    other.forward = lambda input, hx=None: LAYER(input)
    assert not compare(LAYER, other, (INPUT,), {"hx": hx}).ok


def test_dropout_draws_alike():
    layer = nn.GRU(6, 5, num_layers=3, dropout=0.5, dtype=F64)
    assert compare(layer, unroll(layer), (INPUT.double(),), gradients=True).ok
    assert not compare(layer, unroll(copy.deepcopy(layer).eval()), (INPUT.double(),)).ok


def test_neither_module_nor_input_is_changed():
    layer, input = nn.GRU(6, 5), INPUT.clone().requires_grad_()
    before = copy.deepcopy(layer.state_dict())
    compare(layer, unroll(layer), (input,), gradients=True)
    assert input.grad is None and all(p.grad is None for p in layer.parameters())
    assert layer.weight_hh_l0.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


def test_the_report():
    report = compare(LAYER, Changed(LAYER, lambda y, h: (y * 1.001, -h)), (INPUT,))
    assert isinstance(report, Report)
    assert report.worst.place == "output[1]"
    lines = str(report).splitlines()
    assert lines[0].split() == ["shape", "dtype", "difference", "error", "original's"]
    assert lines[1].startswith("output[0]  4x3x5  float32  ") and "from the float64 result" in lines[1]
    with pytest.raises(UnrollError) as caught:
        report.check()
    assert [problem.place for problem in caught.value.problems] == ["output[1]", "output[0]"]
    good = compare(LAYER, unroll(LAYER), (INPUT,))
    assert good.check() is good
    assert all(line.endswith("ok") for line in str(good).splitlines()[1:])


def test_a_model_that_cannot_be_copied_asks_for_no_reference():
    layer = nn.GRU(6, 5)
    layer.generator = (i for i in range(3))
    with pytest.raises(UnrollError, match=r"cannot be copied to float64 .*compare with reference=False"):
        compare(layer, layer, (INPUT,))
    assert compare(layer, layer, (INPUT,), reference=False).ok


def test_two_files(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    from tests.onnx import standard

    inputs = standard.draw("LSTM", {}, dtype=np.float32)
    model = standard.model("LSTM", {}, inputs)
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(unroll(model), tmp_path / "b.onnx")
    x = torch.from_numpy(inputs["X"])
    assert compare(tmp_path / "a.onnx", str(tmp_path / "b.onnx"), x).check().rows[0].place == "output['Y']"
    assert compare(tmp_path / "a.onnx", tmp_path / "b.onnx", (), {"X": x}).ok
    onnx.save(standard.model("LSTM", {}, inputs | {"W": inputs["W"] * 1.01}), tmp_path / "c.onnx")
    assert not compare(tmp_path / "a.onnx", tmp_path / "c.onnx", x).ok
    with pytest.raises(UnrollError, match=r"takes X; give a tensor for each"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx", (x, x))
    with pytest.raises(UnrollError, match=r"fails in ONNX Runtime"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx", (x[:, :, :1],))
    with pytest.raises(UnrollError, match="gradients"):
        compare(tmp_path / "a.onnx", tmp_path / "b.onnx", (x,), gradients=True)


class Nested(nn.Module):
    """Takes a state by name, and returns tensors inside of others."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, **options)

    def forward(self, x, state=None):
        output, last = self.rnn(x, state)
        return {"output": output, "state": last}


@pytest.mark.parametrize("model", [nn.LSTM(3, 4), Nested()], ids=["layer", "nested"])
def test_a_model_and_its_file(model, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx_ir")
    x, state = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    inputs = [((x,), {}), ((x, state), {}), *([((x,), {"state": state})] if type(model) is Nested else [])]
    for k, (args, kwargs) in enumerate(inputs):
        path = tmp_path / f"{k}.onnx"
        export_onnx(model.eval(), args, path, kwargs=kwargs)
        for report in (compare(model, path, args, kwargs), compare(path, model, args, kwargs)):
            assert len(report.check().rows) == 3
        with torch.no_grad():
            other = copy.deepcopy(model)
            next(other.parameters()).mul_(1.1)
        assert [bool(row.finding) for row in compare(other, path, args, kwargs).rows] == [True] * 3


class Keeping(nn.Module):
    """Keeps its state: in a buffer that it writes, in one that it replaces, or in an attribute."""

    def __init__(self, how):
        super().__init__()
        self.how, self.rnn = how, nn.GRU(3, 4)
        state = torch.zeros(1, 2, 4)
        if how == "attribute":
            self.state = state
        else:
            self.register_buffer("state", state)

    def forward(self, x):
        out, last = self.rnn(x, self.state.clone())
        if self.how == "written":
            self.state.copy_(last.detach())
        else:
            self.state = last.detach()
        return out, self.state


@pytest.mark.parametrize("how", ["written", "replaced"])
@pytest.mark.parametrize("gradients", [False, True])
def test_each_run_begins_with_the_same_buffers(how, gradients):
    model, inputs = Keeping(how), [(torch.randn(5, 2, 3),) for _ in range(2)]
    before = model.state
    rewritten = unroll(model)
    assert rewritten.state is before
    assert compare(model, rewritten, inputs, gradients=gradients).ok
    assert model.state is before and rewritten.state is before and not before.any()
    assert not compare(model, lambda x: (model.rnn(x)[0], torch.zeros(1, 2, 4)), inputs[0]).ok


def test_a_state_in_an_attribute_is_named():
    model, x = Keeping("attribute"), torch.randn(5, 2, 3)
    rewritten = unroll(model)
    model(x)  # from here on the two go different ways
    report = compare(model, rewritten, (x,), reference=False)
    (first, *_) = problems(report.check)
    fix = "the original keeps state between calls in state: make it an argument and a result"
    assert first.endswith(f"; {fix}")
    other = nn.GRU(3, 4)
    (first, *_) = problems(compare(nn.GRU(3, 4), other, (x,)).check)
    assert first.endswith("; the rewritten model is not the original")


def test_a_state_in_an_attribute_is_named_by_the_check_of_an_export(tmp_path):
    model, x = Keeping("attribute").eval(), torch.randn(5, 2, 3)
    model(x)
    (first, *_) = problems(export_onnx, model, x, tmp_path / "model.onnx")
    assert "the original keeps state between calls" in first


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.GRUCell])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(kind, value, tmp_path):
    model, x = nn.Sequential(kind(3, 4)).eval(), torch.randn(2, 3) if kind is nn.GRUCell else torch.randn(5, 2, 3)
    name = "0.weight_hh" if kind is nn.GRUCell else "0.weight_hh_l0"
    model.get_parameter(name).data[1, 2] = value
    said = f"; {name} holds NaN or infinity, which the first step from zeros leaves out; "
    assert said in problems(compare(model, unroll(model), (x,)).check)[0]
    assert said in problems(export_onnx, model, x, tmp_path / "model.onnx")[0]


def test_gradients_of_a_compiled_model_have_the_names_of_the_original():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model_with_compiled_part = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    for compiled in (torch.compile(model, backend="eager"), model_with_compiled_part):
        report = compare(model, compiled, (torch.randn(2, 3),), gradients=True).check()
        assert "gradient of 0.weight" in {row.place for row in report.rows}

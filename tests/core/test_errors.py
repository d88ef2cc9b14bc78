"""What torch refuses is refused, in words that name the place, the finding and the fix."""

import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unroll as package
from tests.by_version import MISSING_KEYWORD
from tests.cases import PROJECTION, Case
from unroll import Plan, Problem, UnrollError, streaming, unroll
from unroll.core.errors import refusing


def zeros(*shape, **kwargs):
    return torch.zeros(shape, **kwargs)


LSTM = Case("LSTM", num_layers=2, bidirectional=True)
PROJECTED = Case("LSTM", proj_size=PROJECTION)
GRU = Case("GRU")
FIRST = Case("GRU", batch_first=True)
LSTM_CELL, GRU_CELL = Case("LSTMCell"), Case("GRUCell")

REFUSED = {
    "1-D": (GRU, (zeros(6),), "GRU: input: is 1-D, [6]; give a 2-D or 3-D tensor"),
    "4-D": (GRU, (zeros(1, 4, 3, 6),), "GRU: input: is 4-D, [1, 4, 3, 6]; give a 2-D or 3-D tensor"),
    "features": (GRU, (zeros(4, 3, 7),), "GRU: input: has shape [4, 3, 7]; its last size must be input_size=6"),
    "unbatched features": (GRU, (zeros(4, 7),), "GRU: input: has shape [4, 7]; its last size must be input_size=6"),
    "no steps": (
        GRU,
        (zeros(0, 3, 6),),
        "GRU: input: has no time steps, [0, 3, 6]; give a sequence of at least one step",
    ),
    "no steps, batch first": (
        FIRST,
        (zeros(3, 0, 6),),
        "GRU: input: has no time steps, [3, 0, 6]; give a sequence of at least one step",
    ),
    "no steps, unbatched": (
        GRU,
        (zeros(0, 6),),
        "GRU: input: has no time steps, [0, 6]; give a sequence of at least one step",
    ),
    "double": (
        GRU,
        (zeros(4, 3, 6).double(),),
        "GRU: input: has dtype torch.float64, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.float64)",
    ),
    "integers": (
        GRU,
        (zeros(4, 3, 6).long(),),
        "GRU: input: has dtype torch.int64, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.int64)",
    ),
    "device": (
        GRU,
        (zeros(4, 3, 6, device="meta"),),
        "GRU: input: is on meta, the weights on cpu; give cpu, or move the module",
    ),
    "state's batch": (
        GRU,
        (zeros(4, 3, 6), zeros(1, 4, 5)),
        "GRU: h_0: has shape [1, 4, 5]; it must be [1, 3, 5]",
    ),
    "state's layers": (
        GRU,
        (zeros(4, 3, 6), zeros(2, 3, 5)),
        "GRU: h_0: has shape [2, 3, 5]; it must be [1, 3, 5]",
    ),
    "state's rank": (GRU, (zeros(4, 3, 6), zeros(3, 5)), "GRU: h_0: has shape [3, 5]; it must be [1, 3, 5]"),
    "state's rank, unbatched": (
        GRU,
        (zeros(4, 6), zeros(1, 1, 5)),
        "GRU: h_0: has shape [1, 1, 5]; it must be [1, 5]",
    ),
    "state's batch, batch first": (
        FIRST,
        (zeros(3, 4, 6), zeros(3, 1, 5)),
        "GRU: h_0: has shape [3, 1, 5]; it must be [1, 3, 5]",
    ),
    "state's dtype": (
        GRU,
        (zeros(4, 3, 6), zeros(1, 3, 5).double()),
        "GRU: h_0: has dtype torch.float64, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.float64)",
    ),
    "state's device": (
        GRU,
        (zeros(4, 3, 6), zeros(1, 3, 5, device="meta")),
        "GRU: h_0: is on meta, the weights on cpu; give cpu, or move the module",
    ),
    "pair for a GRU": (
        GRU,
        (zeros(4, 3, 6), (zeros(1, 3, 5), zeros(1, 3, 5))),
        "GRU: state: is tuple; give a tensor, or None for zeros",
    ),
    "tensor for an LSTM": (
        LSTM,
        (zeros(4, 3, 6), zeros(4, 3, 5)),
        "LSTM: state: is Tensor; give a pair (h_0, c_0), or None for zeros",
    ),
    "one of two": (
        LSTM,
        (zeros(4, 3, 6), (zeros(4, 3, 5),)),
        "LSTM: state: is tuple; give a pair (h_0, c_0), or None for zeros",
    ),
    "three": (
        LSTM,
        (zeros(4, 3, 6), (zeros(4, 3, 5),) * 3),
        "LSTM: state: is tuple; give a pair (h_0, c_0), or None for zeros",
    ),
    "half a state": (
        LSTM,
        (zeros(4, 3, 6), (zeros(4, 3, 5), None)),
        "LSTM: state: is tuple; give a pair (h_0, c_0), or None for zeros",
    ),
    "c": (
        LSTM,
        (zeros(4, 3, 6), (zeros(4, 3, 5), zeros(4, 2, 5))),
        "LSTM: c_0: has shape [4, 2, 5]; it must be [4, 3, 5]",
    ),
    "h as large as c": (
        PROJECTED,
        (zeros(4, 3, 6), (zeros(1, 3, 5), zeros(1, 3, 5))),
        "LSTM: h_0: has shape [1, 3, 5]; it must be [1, 3, 2]",
    ),
    "several": (
        LSTM,
        (zeros(4, 3, 7).double(), (zeros(1), zeros(2))),
        "2 problems\n"
        "LSTM: input: has shape [4, 3, 7]; its last size must be input_size=6\n"
        "LSTM: input: has dtype torch.float64, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.float64)",
    ),
    "several states": (
        LSTM,
        (zeros(4, 3, 6), (zeros(1), zeros(2, device="meta"))),
        "3 problems\n"
        "LSTM: h_0: has shape [1]; it must be [4, 3, 5]\n"
        "LSTM: c_0: has shape [2]; it must be [4, 3, 5]\n"
        "LSTM: c_0: is on meta, the weights on cpu; give cpu, or move the module",
    ),
    "a list": (GRU, ([1.0],), "GRU: input: is list; give a tensor"),
    "nothing": (GRU, (None,), "GRU: input: is NoneType; give a tensor"),
    "packed features": (
        GRU,
        (pack_sequence([zeros(2, 7)]),),
        "GRU: input: has shape [2, 7]; its last size must be input_size=6",
    ),
    "packed vectors": (GRU, (pack_sequence([zeros(2)]),), "GRU: input: is 1-D, [2]; give a 2-D tensor"),
    "packed state": (
        GRU,
        (pack_sequence([zeros(2, 6)]), zeros(1, 2, 5)),
        "GRU: h_0: has shape [1, 2, 5]; it must be [1, 1, 5]",
    ),
    "packed dtype": (
        GRU,
        (pack_sequence([zeros(2, 6).half()]),),
        "GRU: input: has dtype torch.float16, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.float16)",
    ),
    "cell's rank": (GRU_CELL, (zeros(4, 3, 6),), "GRUCell: input: is 3-D, [4, 3, 6]; give a 1-D or 2-D tensor"),
    "cell's features": (
        GRU_CELL,
        (zeros(3, 5),),
        "GRUCell: input: has shape [3, 5]; its last size must be input_size=6",
    ),
    "cell's state": (
        GRU_CELL,
        (zeros(3, 6), zeros(2, 5)),
        "GRUCell: h_0: has shape [2, 5]; it must be [3, 5]",
    ),
    "cell's unbatched state": (
        GRU_CELL,
        (zeros(6), zeros(1, 5)),
        "GRUCell: h_0: has shape [1, 5]; it must be [5]",
    ),
    "cell's pair": (
        LSTM_CELL,
        (zeros(3, 6), (zeros(3, 5), zeros(3, 6))),
        "LSTMCell: c_0: has shape [3, 6]; it must be [3, 5]",
    ),
    "cell's dtype": (
        LSTM_CELL,
        (zeros(3, 6).double(),),
        "LSTMCell: input: has dtype torch.float64, the weights torch.float32; "
        "convert it with .to(torch.float32), or the module with .to(torch.float64)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused(name):
    case, args, words = REFUSED[name]
    layer = case.layer()
    with pytest.raises((RuntimeError, ValueError, TypeError, AttributeError, IndexError)):
        layer(*args)
    with pytest.raises(UnrollError) as caught:
        unroll(layer)(*args)
    assert str(caught.value) == words
    assert all(isinstance(problem, Problem) and all(problem) for problem in caught.value.problems)


def test_the_place_is_the_layers_name():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.GRU(6, 5))})
    with pytest.raises(UnrollError, match=r"^encoder\.0: input: is 1-D"):
        unroll(model)["encoder"](zeros(6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
@pytest.mark.parametrize("case", [GRU, LSTM, GRU_CELL], ids=str)
def test_what_autocast_does_not_cast_is_refused_under_it_too(case, dtype):
    layer, (input,) = case.layer(), case.args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            layer(input.to(dtype))
        with pytest.raises(UnrollError, match=f"input: has dtype {dtype}"):
            unroll(layer)(input.to(dtype))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda: unroll(3.5),
            "unroll(model): got float; give ",
        ),
        (
            lambda: unroll(nn.GRU),
            "unroll(model): got the class GRU; give a layer or model of it: GRU(...)",
        ),
        (
            lambda: unroll(nn.GRU(6, 5).forward),
            "unroll(model): got the method forward of a GRU; give the module itself",
        ),
        (
            lambda: unroll(nn.GRU(6, 5).state_dict()),
            "unroll(model): got a dictionary of tensors; give the model that loads it by load_state_dict",
        ),
        (
            lambda: unroll(nn.GRU(6, 5), wher="x"),
            "unroll(wher=...): is no argument; did you mean where?",
        ),
        (
            lambda: unroll(nn.GRU(6, 5), where=lambda name: True),
            "where=...: is a function that does not take two arguments; give a function of name and layer: ",
        ),
        (
            lambda: unroll(nn.GRU(6, 5))(zeros(4, 3, 6).numpy()),
            "GRU: input: is a NumPy array; give a tensor: torch.from_numpy(array)",
        ),
        (
            lambda: streaming(nn.GRU(6, 5)),
            "streaming(args): is missing; give example inputs, streaming(model, args), on which a module is run",
        ),
        (
            lambda: unroll(nn.GRU(6, 5), steps=3),
            "unroll(steps=...): was given for a module, which runs at any length; leave steps out",
        ),
        (
            lambda: unroll(nn.GRU(6, 5), (zeros(4, 3, 6),)),
            "unroll(args=...): was given for a module, which runs at any length; leave args out",
        ),
        (
            lambda: package.check("m.onnx"),
            f"check(...): {MISSING_KEYWORD}: 'target'; the arguments are model, target, build",
        ),
        (
            lambda: package.compile(nn.GRU(6, 5), plans="inductor"),
            "compile(plans=...): is no argument; did you mean plan?",
        ),
        (
            lambda: package.trace(nn.Sequential(nn.GRU(6, 5)), steps=3),
            "trace(steps=...): is no argument; the arguments are model, concrete_args",
        ),
        (
            lambda: package.inspect(nn.GRU(6, 5), target="webnn"),
            "inspect(target=...): is no argument; the arguments are model, args, ",
        ),
        (
            lambda: Plan(gates="one"),
            "Plan(gates=...): got 'one'; choose one of 'merged', 'paired', 'split'",
        ),
        (
            lambda: package.trace(nn.LSTM(6, 5)),
            "LSTM: is itself a recurrent layer, with nothing around it; "
            "trace a module that holds it, such as nn.Sequential(layer)",
        ),
    ],
)
def test_wrong_use_of_the_functions(function, words):
    with pytest.raises(UnrollError) as caught:
        function()
    assert str(caught.value).startswith(words)


def test_errors_can_be_sent_between_processes():
    error = UnrollError(Problem("a", "b", "c"), Problem("d", "e", "f"))
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.problems) == (str(error), error.problems)
    assert str(error) == "2 problems\na: b; c\nd: e; f"


def read_after(handled):
    """Read what cannot be read, while another error is handled."""
    try:
        raise handled
    except KeyError:
        with refusing("model", "cannot be read", "write it again"):
            try:
                raise ValueError("cut short")
            except ValueError as error:
                raise TypeError("no number") from error


def test_what_was_handled_before_is_not_told_as_the_cause():
    with pytest.raises(UnrollError, match=r"^model: cannot be read \(ValueError: cut short\); write it again$"):
        read_after(KeyError("another"))


def test_the_package_is_called_as_its_function():
    assert isinstance(package(nn.GRU(3, 5)), package.Unrolled) and dir(package) == package.__all__


def test_the_arguments_of_functions_can_be_read():
    for name in ("unroll", "export_onnx", "compare", "streaming"):
        assert len(inspect.signature(getattr(package, name)).parameters) > 4

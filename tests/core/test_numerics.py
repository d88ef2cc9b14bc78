"""Every dtype against the float64 result, autocast, dropout and its seeds, packed sequences."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.cases import CHOSEN, DROPOUT, KINDS, LAYER_KINDS, PACKED, Case, flat, replace
from tests.checks import assert_equal, assert_same, gradients, repacked
from unroll import compare, unroll

F64 = torch.float64
LOW = [torch.float32, torch.bfloat16, torch.float16]


# --- dtypes -----------------------------------------------------------------------------------------------------------


def large(case):
    """With so many values that the largest error of one is no accident."""
    return replace(case, batch=64, steps=16)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", [large(case) for case in CHOSEN], ids=str)
def test_at_most_twice_as_far_from_float64_as_torch(case, dtype):
    layer = case.layer(dtype)
    inputs = [case.args(dtype, seed=seed) for seed in range(3)]
    compare(layer, unroll(layer), inputs).check()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_long_sequences_in_every_dtype(kind, dtype):
    case = Case(kind, num_layers=2, bidirectional=True, steps=100, batch=16)
    layer = case.layer(dtype)
    compare(layer, unroll(layer), case.args(dtype)).check()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_float32(kind):
    case = large(Case(kind))
    layer = case.layer()
    compare(layer, unroll(layer), case.args(), gradients=True).check()


@pytest.mark.parametrize("dtype", [F64, *LOW], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_saturated_gates(kind, dtype):
    """Inputs of a thousand, where a careless sigmoid overflows."""
    case = Case(kind, state=True)
    layer = case.layer(dtype)
    input, state = case.args(dtype)
    ours, theirs = unroll(layer)(input * 1000, state), layer(input * 1000, state)
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02) if dtype != F64 else assert_same(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_go_where_they_go_in_torch(kind, bad):
    case = Case(kind)
    layer = case.layer(F64)
    (input,) = case.args(F64)
    input[(1,) * input.dim()] = bad
    for a, b in zip(flat(unroll(layer)(input)), flat(layer(input)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_torchs_dtypes(kind, dtype, state):
    case = Case(kind, state=state)
    layer = case.layer()
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        ours = unroll(layer)(*case.args())
        try:
            theirs = layer(*case.args())
        except RuntimeError as error:  # not every processor has oneDNN's float16 LSTM
            if "primitive descriptor" not in str(error) or (kind, dtype) != ("LSTM", torch.float16):
                raise
            theirs = None
    if theirs is None:
        theirs = case.layer(dtype)(*case.args(dtype))
    exact = case.layer(F64)(*case.args(F64))
    for a, b, e in zip(flat(ours), flat(theirs), flat(exact), strict=True):
        assert a.dtype == b.dtype
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()


AUTOCAST_CASES = [case for case in CHOSEN + PACKED if case.num_layers == 2 or case.packed or case.proj_size]


@pytest.mark.parametrize("case", AUTOCAST_CASES + DROPOUT, ids=str)
def test_autocast_of_layers(case):
    layer = case.layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(5)
        ours = unroll(layer)(*case.args())
        torch.manual_seed(5)
        theirs = layer(*case.args())
    assert [t.dtype for t in flat(ours)] == [t.dtype for t in flat(theirs)]
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_float64_alone(kind):
    case = Case(kind, state=True)
    layer = case.layer(F64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(unroll(layer)(*case.args(F64)), layer(*case.args(F64)))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_backward(kind):
    case = Case(kind)
    layer = case.layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (gradients(f, case.args()) for f in (unroll(layer), layer))
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        scale = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.05, atol=0.05 * scale)


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, *LOW], ids=str)
@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_same_seed_same_dropout(case, dtype):
    layer = case.layer(dtype)
    results = []
    for each in (layer, unroll(layer)):
        torch.manual_seed(5)
        results.append(each(*case.args(dtype)))
    tolerance = {F64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}[dtype]
    assert_same(results[1], results[0], rtol=tolerance)


@pytest.mark.parametrize("form", ["packed", "unsorted", "unbatched"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_same_seed_same_dropout_in_other_forms(kind, form):
    case = Case(kind, num_layers=3, dropout=0.4, bidirectional=True, form=form)
    layer = case.layer(F64)
    results = []
    for each in (layer, unroll(layer)):
        torch.manual_seed(5)
        results.append(each(*case.args(F64)))
    assert_same(results[1], results[0])


def test_dropout_draws_anew_each_time_and_only_in_training():
    ours = unroll(nn.GRU(6, 5, num_layers=2, dropout=0.5))
    x = torch.randn(4, 3, 6)
    assert not torch.equal(ours(x)[0], ours(x)[0])
    ours.eval()
    assert_equal(ours(x), ours(x))
    ours.train()
    assert not torch.equal(ours(x)[0], ours(x)[0])


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_train_and_eval_switch(case):
    layer = case.layer(F64)
    model, ours = nn.Sequential(layer), unroll(nn.Sequential(layer))
    for mode in (True, False, True):
        results = []
        for each in (model, ours):
            each.train(mode)
            torch.manual_seed(6)
            results.append(each(*case.args(F64)))
        assert_same(results[1], results[0])


def test_an_original_in_eval_unrolls_in_eval():
    layer = nn.GRU(6, 5, num_layers=2, dropout=0.5).eval()
    x = torch.randn(4, 3, 6)
    assert_equal(unroll(layer)(x), unroll(layer)(x))


def test_dropout_of_everything():
    layer = nn.GRU(6, 5, num_layers=2, dropout=1.0, dtype=F64)
    x = torch.randn(4, 3, 6, dtype=F64)
    assert_same(unroll(layer)(x), layer(x))


# --- packed sequences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [5, 1, 1], [1, 2, 3, 4, 5], [2, 7, 2, 7, 1], [4, 3, 2, 1]])
def test_packed_lengths(lengths, kind, two):
    layer = Case(kind, num_layers=2, bidirectional=two).layer(F64)
    packed = pack_sequence([torch.randn(n, 6, dtype=F64) for n in lengths], enforce_sorted=False)
    assert_same(unroll(layer)(packed), layer(packed))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_packed_is_each_sequence_alone(kind):
    layer = unroll(Case(kind, bidirectional=True).layer(F64))
    sequences = [torch.randn(n, 6, dtype=F64) for n in (2, 5, 3)]
    padded, _ = pad_packed_sequence(layer(pack_sequence(sequences, enforce_sorted=False))[0])
    for k, sequence in enumerate(sequences):
        assert_same(padded[: len(sequence), k], layer(sequence)[0])
        assert not padded[len(sequence) :, k].any()


def test_packed_in_packed_out():
    case = replace(PACKED[1], state=False)
    (packed,) = case.args(F64)
    output, _ = unroll(case.layer(F64))(packed)
    assert type(output) is PackedSequence
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(output, name) is getattr(packed, name)


def test_several_packed_layers_with_work_between():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.GRU(6, 5, bidirectional=True, dtype=F64)
            self.second = nn.LSTM(10, 4, batch_first=True, dtype=F64)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            packed, _ = self.first(packed)
            packed = repacked(packed, packed.data.relu() + 1)
            packed, (h, _) = self.second(packed)
            return pad_packed_sequence(packed, batch_first=True, total_length=9)[0], h

    model = Model()
    args = torch.randn(3, 7, 6, dtype=F64), torch.tensor([2, 7, 5])
    assert_same(unroll(model)(*args), model(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_in_lower_precision(case, dtype):
    layer = case.layer(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.04}[dtype]
    assert_same(unroll(layer)(*case.args(dtype)), layer(*case.args(dtype)), rtol=tolerance)

"""norms.kernels.rows against literal float64 references, and its three forms against each other."""

import pytest
import torch
from torch import nn

from norms.kernels import native
from norms.kernels.rows import _by_torch, _plain, normalize_rows

EPS = 1e-5
KINDS = {"layer2d": (True, False), "pn": (True, True), "rms": (False, False)}  # centred, unbiased
# P of 1, fewer positions than a vector has, more than a block; C of 2, primes, more than a block; N of 1
SHAPES = [(1, 2, 1), (3, 5), (2, 2, 3), (3, 7, 11, 13), (1, 3, 131), (2, 64, 4, 4), (4, 37, 2, 3, 5), (2, 300, 3, 3)]


def lying(x, last):
    """x with its channels innermost, or contiguous."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def literal(x, weight, bias, kind, eps=EPS):
    """The equations in loops; x (N, C, *), all in float64."""
    centred, unbiased = KINDS[kind]
    flat = x.reshape(*x.shape[:2], -1)
    rows = []
    for n in range(flat.shape[0]):
        for p in range(flat.shape[2]):
            v = flat[n, :, p]
            away = v - v.sum() / len(v) if centred else v
            h = away / torch.sqrt((away**2).sum() / (len(v) - unbiased) + eps)
            h = h if weight is None else h * weight
            rows.append(h if bias is None else h + bias)
    return torch.stack(rows).reshape(flat.shape[0], flat.shape[2], -1).movedim(-1, 1).reshape(x.shape)


def draw(shape, dtype, last, affine=True):
    torch.manual_seed(0)
    x, dy = (lying(torch.randn(shape, dtype=torch.float64), last).to(dtype) for _ in range(2))
    kind = torch.promote_types(dtype, torch.float32)
    parameters = [torch.randn(shape[1], dtype=kind) if affine else None for _ in range(2)]
    return x, dy, *parameters


def derived(function, x, weight, bias, dy):
    """y and the gradients of x, weight and bias."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y = function(*inputs)
    given = [t for t in inputs if t is not None]
    return y.detach(), *torch.autograd.grad(y, given, dy)


def assert_is_the_equation(shape, dtype, last, kind, affine, **tolerance):
    x, dy, weight, bias = draw(shape, dtype, last, affine)
    centred, unbiased = KINDS[kind]
    got = derived(lambda *t: normalize_rows(*t, EPS, centred=centred, unbiased=unbiased), x, weight, bias, dy)
    exact = [None if t is None else t.double() for t in (x, weight, bias, dy)]
    want = derived(lambda *t: literal(*t, kind), *exact)
    assert got[0].dtype == got[1].dtype == dtype
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_equation_in_outputs_and_gradients(shape, last, kind, affine):
    assert_is_the_equation(shape, torch.float64, last, kind, affine)
    assert_is_the_equation(shape, torch.float32, last, kind, affine, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("shape", [(2, 64, 4, 4), (3, 7, 11, 13)], ids=str)
def test_bfloat16_is_computed_in_float32(shape, last, kind):
    assert_is_the_equation(shape, torch.bfloat16, last, kind, True, rtol=8e-3, atol=1e-2)


@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
def test_one_channel_is_its_bias(last):
    x, dy, weight, bias = draw((2, 1, 3, 3), torch.float64, last)
    y, dx, d_weight, d_bias = derived(lambda *t: normalize_rows(*t, EPS), x, weight, bias, dy)
    torch.testing.assert_close(y, bias.expand_as(y.movedim(1, -1)).movedim(-1, 1))
    for nothing in (dx, d_weight):
        torch.testing.assert_close(nothing, torch.zeros_like(nothing), rtol=0, atol=1e-9)
    torch.testing.assert_close(d_bias, dy.sum().view(1))


@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("kind", ["layer2d", "pn"])
@pytest.mark.parametrize("channels", [16, 67, 600])
def test_large_means_in_float32_lose_less_than_a_thousandth(channels, kind, last):
    x, dy, weight, bias = draw((2, channels, 5, 7), torch.float32, last)
    x = x + 1e4 * torch.randn(2, 1, 5, 7).sign()
    got = derived(lambda *t: normalize_rows(*t, EPS, unbiased=KINDS[kind][1]), x, weight, bias, dy)
    exact = derived(lambda *t: literal(*t, kind), *(t.double() for t in (x, weight, bias, dy)))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_first_and_second_derivatives_are_exact(affine, last, kind):
    x, _, weight, bias = draw((2, 5, 3, 2), torch.float64, last, affine)
    centred, unbiased = KINDS[kind]
    inputs = [None if t is None else t.requires_grad_() for t in (x, weight, bias)]

    def f(*given):
        return normalize_rows(*given, EPS, centred=centred, unbiased=unbiased)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)
    # and of what serves float16 and other devices
    assert torch.autograd.gradgradcheck(lambda *given: _by_torch(*given, EPS, centred, unbiased), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_all_forms_give_the_same_in_the_same_layout(affine, last, kind, dtype):
    x, dy, weight, bias = draw((2, 6, 3, 4), dtype, last, affine)
    options = (EPS, *KINDS[kind])
    forms = (lambda *t: normalize_rows(*t, EPS, centred=options[1], unbiased=options[2]), _plain, _by_torch)
    found = [
        derived(form if i == 0 else lambda *t, form=form: form(*t, *options), x, weight, bias, dy)
        for i, form in enumerate(forms)
    ]
    loose = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    for other in found[1:]:
        assert found[0][0].stride() == other[0].stride()
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, **loose)


@pytest.mark.native
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
def test_the_library_serves_what_it_says_and_torch_the_rest(last, monkeypatch):
    calls = []
    rows = native.rows
    monkeypatch.setattr(native, "rows", lambda *a: calls.append(a) or rows(*a))
    x, _, weight, bias = draw((2, 6, 3, 4), torch.float32, last)
    y = normalize_rows(x, weight, bias, EPS)
    assert len(calls) == 1
    assert y.stride() == x.stride()
    half = normalize_rows(x.half(), weight, bias, EPS)
    assert len(calls) == 1
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_gives_none_and_gradients_of_zero(kind):
    x, weight, bias = torch.randn(0, 4, 3, 3), torch.randn(4), torch.randn(4)
    centred, unbiased = KINDS[kind]
    found = derived(
        lambda *t: normalize_rows(*t, EPS, centred=centred, unbiased=unbiased), x, weight, bias, torch.randn(0, 4, 3, 3)
    )
    assert found[0].shape == found[1].shape == x.shape
    assert not found[2].any()
    assert not found[3].any()


@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
def test_views_of_any_stride_and_offset_are_read_right(last):
    x, dy, weight, bias = draw((6, 12, 9, 10), torch.float64, last)
    for cut in (
        lambda t: t[1:],
        lambda t: t[:, :7],
        lambda t: t[:, :, 1:, ::2],
        lambda t: t.transpose(2, 3),
        lambda t: t[:1, 1:2].expand(3, 7, 9, 10),
    ):
        view, back = cut(x), cut(dy)
        own = [p[: view.shape[1]] for p in (weight, bias)]
        got = derived(lambda *t: normalize_rows(*t, EPS), view, *own, back)
        want = derived(lambda *t: normalize_rows(*t, EPS), view.contiguous(), *own, back.contiguous())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.native
def test_an_offset_off_the_alignment_of_vectors_is_read_right():
    x, dy, weight, bias = draw((3, 16, 8, 8), torch.float32, False)
    room = torch.empty(x.numel() + 1)
    shifted = room[1:].view(x.shape).copy_(x)
    for a, b in zip(
        derived(lambda *t: normalize_rows(*t, EPS), shifted, weight, bias, dy),
        derived(lambda *t: normalize_rows(*t, EPS), x, weight, bias, dy),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.native
@pytest.mark.parametrize("last", [False, True], ids=["side", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, last):
    x, dy, weight, bias = draw((9, 40, 31, 17), dtype, last)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(derived(lambda *t: normalize_rows(*t, EPS), x, weight, bias, dy))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.native
def test_a_bad_value_stays_at_its_position():
    for bad in (float("nan"), float("inf")):
        for last in (False, True):
            x, _, weight, bias = draw((2, 19, 5, 5), torch.float32, last)
            x[1, 3, 2, 2] = bad
            wrong = normalize_rows(x, weight, bias, EPS).isnan().any(1)
            assert wrong[1, 2, 2]
            assert wrong.sum() == 1


@pytest.mark.native
def test_only_what_wants_a_gradient_gets_one():
    x, dy, weight, bias = draw((2, 6, 3, 4), torch.float64, False)
    want = derived(lambda *t: normalize_rows(*t, EPS), x, weight, bias, dy)
    for wanted in ((True, False, False), (False, True, True), (False, False, True)):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        normalize_rows(*inputs, EPS).backward(dy)
        for t, w, g in zip(inputs, wanted, want[1:], strict=True):
            assert (t.grad is not None) == w
            if w:
                torch.testing.assert_close(t.grad, g)


@pytest.mark.native
def test_the_backward_keeps_the_input_and_the_parameters_alone():
    x, _, weight, bias = draw((2, 6, 3, 4), torch.float32, True)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    kept = normalize_rows(*inputs, EPS).grad_fn.saved_tensors
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in inputs]


def test_torchs_own_layer_norm_over_the_channels_is_the_same():
    x, _, weight, bias = draw((3, 24, 6, 7), torch.float32, True)
    theirs = nn.LayerNorm(24, eps=EPS)
    with torch.no_grad():
        theirs.weight.copy_(weight)
        theirs.bias.copy_(bias)
    torch.testing.assert_close(
        normalize_rows(x, weight, bias, EPS), theirs(x.movedim(1, -1)).movedim(-1, 1), rtol=1e-5, atol=1e-5
    )

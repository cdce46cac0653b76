"""iebn and sn against literal float64 transcriptions, and what they become in special cases."""

import copy
import io

import pytest
import torch

from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import hold, situation

EPS = 1e-5
CASES = [("iebn", {}), ("iebn", {"momentum": None}), ("sn", {}), ("sn", {"momentum": 0.4}), ("sn", {"momentum": None})]
SHAPES = [(4, 6, 5), (4, 6, 3, 2), (2, 6, 2, 1, 2)]
STATE = ("running_mean", "running_var", "num_batches_tracked")
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
both = pytest.mark.parametrize("name", ["iebn", "sn"])


def build(name, options=None, channels=6, **contract):
    """A layer whose parameters are off their start."""
    layer = make_norm(name, **(options or {}))(channels, **contract)
    with torch.no_grad():
        for i, (key, p) in enumerate(layer.named_parameters()):
            p.copy_(torch.linspace(0.5, 1.5, p.numel()) if "weight" in key else torch.linspace(-1, 1 + i, p.numel()))
    return layer


def moments(v):
    """Mean and biased variance of all values of a tensor."""
    mean = v.sum() / v.numel()
    return mean, ((v - mean) ** 2).sum() / v.numel()


def softmax(logits):
    return torch.exp(logits) / torch.exp(logits).sum()


def literal(layer, x, state, training):
    """The papers' equations in loops; x (N, C, P) float64 -> y, buffers (mean, var, number of batches)."""
    y, (n, c, p) = torch.empty_like(x), x.shape
    one, zero = torch.ones(c, dtype=x.dtype), torch.zeros(c, dtype=x.dtype)
    weight, bias = (one, zero) if layer.weight is None else (layer.weight, layer.bias)
    batch = [moments(x[:, j]) for j in range(c)] if training else list(zip(*state[:2], strict=True))
    for i in range(n):
        for j in range(c):
            mean, var = batch[j]
            scale = weight[j]
            if hasattr(layer, "gate_weight"):
                gate = x[i, j].sum() / p * layer.gate_weight[j] + layer.gate_bias[j]
                scale = scale / (1 + torch.exp(-gate))
            else:
                three = moments(x[i, j]), moments(x[i]), (mean, var)
                mean = sum(w * part[0] for w, part in zip(softmax(layer.mean_logits), three, strict=True))
                var = sum(w * part[1] for w, part in zip(softmax(layer.var_logits), three, strict=True))
            y[i, j] = (x[i, j] - mean) / torch.sqrt(var + EPS) * scale + bias[j]
    if training:
        m = 1 / (state[2] + 1) if layer.momentum is None else layer.momentum
        new_mean = torch.stack([part[0] for part in batch]).detach()
        new_var = torch.stack([part[1] for part in batch]).detach() * (n * p) / (n * p - 1)
        state = (1 - m) * state[0] + m * new_mean, (1 - m) * state[1] + m * new_var, state[2] + 1
    return y, state


def check_against_literal(layer, x, state, training):
    """Output, gradients of x and of every parameter, and the buffers; returns the literal's buffers."""
    x = x.requires_grad_()
    y = layer.train(training)(x)
    truth, state = literal(layer, x.flatten(2), state, training)
    truth = truth.reshape(x.shape)
    torch.testing.assert_close(y, truth)
    inputs, dy = [x, *layer.parameters()], torch.randn_like(x)
    got, want = (torch.autograd.grad(out, inputs, dy) for out in (y, truth))
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)
    for key, value in zip(STATE, state, strict=True):
        torch.testing.assert_close(getattr(layer, key), torch.as_tensor(value).to(getattr(layer, key).dtype))
    return state


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_is_the_equation_in_outputs_gradients_and_buffers_over_several_steps(name, options, shape, affine):
    torch.manual_seed(0)
    layer = build(name, options, affine=affine, dtype=torch.float64)
    assert (layer.weight is None) == (layer.bias is None) == (not affine)
    state = (torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), 0)
    for step in range(3):
        x = torch.randn(shape, dtype=torch.float64) * (step + 1) + torch.arange(6.0).view(6, *[1] * (len(shape) - 2))
        state = check_against_literal(layer, x, state, True)
    check_against_literal(layer, x.detach(), state, False)


def test_iebn_takes_values_without_positions():
    layer = build("iebn", dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer(x[:, :, None])[:, :, 0])


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_and_second_derivatives_are_exact(name, training):
    torch.manual_seed(0)
    layer = build(name, dtype=torch.float64)
    layer(torch.randn(4, 6, 2, 2, dtype=torch.float64) * 2 + 1)
    layer.train(training)
    names = [key for key, _ in layer.named_parameters()]

    def f(x, *parameters):
        with hold(layer):
            return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(4, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_survives_large_means_in_float32(name, layout):
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 16, 16) + 1e4).contiguous(memory_format=layout)
    layer = make_norm(name)(6, affine=False)
    if name == "iebn":  # a gate that does not saturate there
        with torch.no_grad():
            layer.gate_weight.fill_(1e-4)
    truth = literal(copy.deepcopy(layer).double(), x.double().flatten(2), (0, 0, 0), True)[0].reshape(x.shape)
    # as near as bn, whose channels_last kernel is 0.02 off here; differences of squares are 100 off
    torch.testing.assert_close(layer(x).double(), truth, atol=0.03 if name == "iebn" else 5e-3, rtol=0)


@both
@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last_is_kept_and_gives_the_same(name, layout):
    layer = build(name)
    x = torch.randn((4, 6, 3, 4) if layout is torch.channels_last else (4, 6, 3, 2, 2))
    for training in (True, False):
        for slices in (1, 2):
            layer.train(training)
            with hold(layer), situation(layer, slices=slices):
                y = layer(x.contiguous(memory_format=layout))
                assert y.is_contiguous(memory_format=layout)
                torch.testing.assert_close(y, layer(x))


@both
def test_bfloat16_input_is_computed_in_float32_and_given_back(name):
    x = (torch.randn(5, 6, 8, 8) + 3).bfloat16()
    layer = build(name)
    for training in (True, False):
        layer.train(training)
        with hold(layer):
            want = layer(x.float())
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, want.bfloat16(), atol=0.01, rtol=0.01)
    assert layer.running_var.dtype == torch.float32


@every_case
def test_a_saved_layer_has_the_same_future_and_a_copy_its_own(name, options):
    layer, fresh = build(name, options), make_norm(name, **options)(6)
    x, later = torch.randn(5, 6, 3, 3) * 2 + 1, torch.randn(5, 6, 3, 3) - 1
    layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(layer)
    before = [b.clone() for b in layer.buffers()]
    twin(later)
    assert all(map(torch.equal, layer.buffers(), before))
    with hold(layer):
        layer(later)
    assert all(map(torch.equal, layer.buffers(), before))
    assert torch.equal(layer(later), fresh(later))
    for a, b, c in zip(layer.buffers(), fresh.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@every_case
@pytest.mark.parametrize("slices", [2, 4])
def test_slices_at_once_are_slices_one_after_the_other_buffers_included(name, options, slices):
    together, single = (build(name, options) for _ in range(2))
    x = torch.randn(8, 6, 3, 3) * 2 + 1
    for _ in range(2):
        with situation(together, slices=slices):
            y = together(x)
        for k in range(slices):
            torch.testing.assert_close(y[k::slices], single(x[k::slices]))
    for a, b in zip(together.buffers(), single.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@both
@pytest.mark.parametrize("slices", [1, 2])
def test_recalibrated_moments_are_those_of_all_values(name, slices):
    batches = [torch.randn(8, 6, 3, 3) * 2 + i for i in range(3)]
    layer, bn = build(name), make_norm("bn")(6)
    for norm in (layer, bn):
        recalibrate(norm, batches, slices)
    for key in STATE:
        torch.testing.assert_close(getattr(layer, key), getattr(bn, key), atol=1e-5, rtol=1e-5)


@both
def test_a_training_step_on_the_meta_device_and_a_fake_cuda_forward(name):
    layer = make_norm(name)(6, device="meta")
    layer(torch.randn(4, 6, 4, 4, device="meta", requires_grad=True)).sum().backward()
    assert all(p.grad.is_meta for p in layer.parameters())
    with torch._subclasses.FakeTensorMode():
        layer = make_norm(name)(6, device="cuda")
        for mode in (True, False):
            assert layer.train(mode)(torch.empty(4, 6, 4, 4, device="cuda")).device.type == "cuda"


# --- identities ---------------------------------------------------------------------------------------------------


def outputs_and_gradients(layer, x, dy):
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)


def test_iebn_starts_as_bn_scaled_by_sigmoid_of_minus_one():
    iebn, bn = make_norm("iebn")(6), make_norm("bn")(6)
    x = torch.randn(4, 6, 3, 3) * 2 + 1
    for mode in (True, False):
        torch.testing.assert_close(iebn.train(mode)(x), bn.train(mode)(x) * torch.sigmoid(torch.tensor(-1.0)))


def test_iebn_with_an_open_gate_is_bn():
    iebn, bn = build("iebn"), build("bn")
    with torch.no_grad():
        iebn.gate_weight.zero_(), iebn.gate_bias.fill_(100)
    x, dy = torch.randn(4, 6, 3, 3, requires_grad=True), torch.randn(4, 6, 3, 3)
    for mode in (True, False):
        iebn.train(mode), bn.train(mode)
        torch.testing.assert_close(outputs_and_gradients(iebn, x, dy), outputs_and_gradients(bn, x, dy))
    for key in STATE:
        torch.testing.assert_close(getattr(iebn, key), getattr(bn, key))


def test_the_gate_of_iebn_sees_the_raw_mean_that_bn_removes():
    layer, x = build("iebn", affine=False), torch.randn(4, 6, 3, 3)
    y, shifted = layer(x), layer(x + 3)
    factor = torch.sigmoid((x.mean((2, 3)) + 3) * layer.gate_weight + layer.gate_bias) / torch.sigmoid(
        x.mean((2, 3)) * layer.gate_weight + layer.gate_bias
    )
    torch.testing.assert_close(shifted, y * factor[:, :, None, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("place", "other"), [(0, "in"), (1, "ln"), (2, "bn")])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sn_with_all_weight_on_one_part_is_that_norm_in_outputs_and_gradients(place, other, training):
    torch.manual_seed(0)
    sn, norm = build("sn", dtype=torch.float64), build(other, dtype=torch.float64)
    with torch.no_grad():
        for logits in (sn.mean_logits, sn.var_logits):
            logits.zero_()[place] = 1e4
    sn(before := torch.randn(4, 6, 3, 3, dtype=torch.float64) * 2 + 1), norm(before)
    sn.train(training), norm.train(training)
    x, dy = torch.randn(2, 4, 6, 3, 3, dtype=torch.float64)
    x = x.requires_grad_()
    torch.testing.assert_close(outputs_and_gradients(sn, x, dy), outputs_and_gradients(norm, x, dy))
    if other == "bn":
        for key in STATE:
            torch.testing.assert_close(getattr(sn, key), getattr(norm, key))


def test_sn_may_take_the_mean_of_one_part_and_the_variance_of_another():
    sn = make_norm("sn")(6, affine=False, dtype=torch.float64)
    with torch.no_grad():
        sn.mean_logits[0] = sn.var_logits[1] = 1e4
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64) + torch.arange(6.0).view(6, 1, 1)
    want = (x - x.mean((2, 3), keepdim=True)) / torch.sqrt(x.var((1, 2, 3), correction=0, keepdim=True) + EPS)
    torch.testing.assert_close(sn(x), want)


def test_sn_starts_with_equal_weights_and_learns_them():
    sn = make_norm("sn")(6)
    assert sn.mean_logits.tolist() == sn.var_logits.tolist() == [1.0] * 3
    (sn(torch.randn(4, 6, 3, 3) * torch.arange(1.0, 7).view(6, 1, 1)) ** 3).sum().backward()
    assert (sn.mean_logits.grad != 0).all()
    assert (sn.var_logits.grad != 0).all()


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("iebn")(6)(torch.randn(1, 6, 1, 1)), "more than 1 value"),
        (lambda: make_norm("iebn")(6)(torch.randn(4, 5, 2, 2)), "6 channels"),
        (lambda: make_norm("iebn")(0), "num_channels=0"),
        (lambda: make_norm("sn")(6)(torch.randn(4, 6, 1, 1)), "more than one position"),
        (lambda: make_norm("sn")(6).eval()(torch.randn(4, 6)), "more than one position"),
        (lambda: make_norm("sn")(6)(torch.randn(4, 5, 2, 2)), "6 channels"),
        (lambda: make_norm("sn")(6)(torch.randn(6)), "6 channels"),
        (lambda: make_norm("sn", momentum=-0.1)(6), "momentum=-0.1"),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()


@both
def test_a_batch_that_the_slices_do_not_divide_is_refused(name):
    layer = make_norm(name)(6)
    with situation(layer, slices=3), pytest.raises(ValueError, match="3 norm batches"):
        layer(torch.randn(4, 6, 3, 3))
    assert layer.num_batches_tracked == 0

"""bn and bgn against torch and against literal float64 transcriptions; BGN's identities, slices, sizes and memory."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norms.layers.bgn import bgn_groups
from norms.registry import make_norm
from norms.situation import hold, situation

EPS = 1e-5


def literal(x, groups, slices=1, eps=EPS):
    """The paper's equations of BGN, in loops: y, means (K, G), unbiased variances (K, G)."""
    y, means, variances = torch.empty_like(x), [], []
    for k in range(slices):
        part = x[k::slices]
        flat = part.reshape(len(part), -1)  # channel-major
        size = flat.shape[1] // groups
        out = torch.empty_like(flat)
        for g in range(groups):
            v = flat[:, g * size : (g + 1) * size]
            mean = v.sum() / v.numel()
            var = ((v - mean) ** 2).sum() / v.numel()
            out[:, g * size : (g + 1) * size] = (v - mean) / torch.sqrt(var + eps)
            means.append(mean)
            variances.append(var * v.numel() / (v.numel() - 1))
        y[k::slices] = out.reshape(part.shape)
    return y, torch.stack(means).reshape(slices, -1), torch.stack(variances).reshape(slices, -1)


def per_channel(p, x):
    return p.view(-1, *[1] * (x.dim() - 2))


def vary(layer):
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, layer.num_channels))
            layer.bias.copy_(torch.linspace(-1, 1, layer.num_channels))
    return layer


def bgn(channels, groups, *, momentum=0.1, **contract):
    return vary(make_norm("bgn", num_groups=groups, momentum=momentum)(channels, **contract))


def lay(x, channels_last):
    if not channels_last:
        return x
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def buffers_equal(a, b, **tolerance):
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


# --- bn is torch.nn.BatchNorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 5, 3), (2, 6, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_bn_is_torchs_batch_norm(shape, momentum, affine):
    torch.manual_seed(0)
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    theirs = kind[len(shape)](6, momentum=momentum, affine=affine)
    ours = vary(make_norm("bn", momentum=momentum)(6, affine=affine))
    theirs.load_state_dict(ours.state_dict())
    for _ in range(3):
        x = torch.randn(shape) * 2 + 3
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn(shape)
        outputs = ours(a), theirs(b)
        torch.testing.assert_close(*outputs)
        grads = [
            torch.autograd.grad(y, [z, *layer.parameters()], dy)
            for y, z, layer in zip(outputs, (a, b), (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*grads)
    buffers_equal(ours, theirs)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("mean", [0, 1e3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bn_is_no_further_from_the_truth_than_torch(mean, channels_last):
    ours, theirs = make_norm("bn")(6), torch.nn.BatchNorm2d(6)
    x = lay(torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)) + mean, channels_last)
    truth = literal(x.double(), 6)[0]
    away, their_own = ((y.double() - truth).abs().max() for y in (ours(x), theirs(x)))
    assert away <= their_own + 1e-6
    buffers_equal(ours, theirs, rtol=1e-5, atol=1e-5)


# --- bgn is its equation ------------------------------------------------------------------------------------------


@st.composite
def sizes(draw):
    """(N, C, *), a G that divides D, a K that divides N, with at least two values per statistic."""
    k, m = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = (k * m, draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    values = math.prod(shape[1:])
    valid = [g for g in range(1, values + 1) if values % g == 0 and m * values // g >= 2]
    return None if not valid else (shape, draw(st.sampled_from(valid)), k)


@settings(max_examples=100, deadline=None)
@given(sizes().filter(bool), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_bgn_is_the_equation_for_every_valid_size_layout_and_slicing(size, channels_last, affine, seed):
    shape, groups, slices = size
    check_equation(shape, groups, slices, channels_last, affine, seed)


def check_equation(shape, groups, slices, channels_last, affine, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = lay(x, channels_last and len(shape) in (4, 5)).requires_grad_()
    layer = bgn(shape[1], groups, affine=affine, dtype=torch.float64, momentum=1.0)
    with situation(layer, slices=slices):
        y = layer(x)
    truth, means, variances = literal(x, groups, slices)
    if affine:
        truth = truth * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(layer.running_mean, means[-1].detach())
    torch.testing.assert_close(layer.running_var, variances[-1].detach())
    inputs = [x, *layer.parameters()]
    got, want = (torch.autograd.grad(out, inputs, dy) for out in (y, truth))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


CASES = [(1, 1), (2, 1), (6, 1), (12, 1), (8, 1), (4, 2), (3, 2), (24, 2)]  # (G, K) for x (4, 6, 2, 2)


@pytest.mark.parametrize(("groups", "slices"), CASES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_bgn_first_and_second_derivatives_are_exact(groups, slices, channels_last):
    torch.manual_seed(0)
    layer = bgn(6, groups, dtype=torch.float64)
    x = lay(torch.randn(4, 6, 2, 2, dtype=torch.float64), channels_last).requires_grad_()

    def f(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)))
    with hold(layer), situation(layer, slices=slices):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)
        layer.eval()
        if slices == 1:
            assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("groups", [1, 3, 4, 12, 96])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_bgn_survives_large_means_in_float32(groups, channels_last):
    torch.manual_seed(0)
    x = lay(torch.randn(64, 12, 8, 8) + 1e4, channels_last)
    y = bgn(12, groups, affine=False)(x)
    # as near as torch.nn.BatchNorm2d, whose channels_last kernel is 0.02 off here; differences of squares are 100 off
    torch.testing.assert_close(y.double(), literal(x.double(), groups)[0], atol=0.03, rtol=0)


def test_bgn_survives_channels_of_very_different_means():
    torch.manual_seed(0)
    x = torch.randn(8, 4, 16, 16) + torch.tensor([-1e3, 0.0, 0.0, 1e3]).view(4, 1, 1)
    for channels_last in (False, True):
        y = bgn(4, 2, affine=False)(lay(x, channels_last))
        torch.testing.assert_close(y.double(), literal(x.double(), 2)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bn", "bgn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_keeps_dtype_and_computes_in_float32_or_better(name, dtype, training):
    torch.manual_seed(0)
    x = (torch.randn(8, 6, 8, 8) + 3).to(dtype)
    groups = 6 if name == "bn" else 3
    layer = vary(make_norm(name, **({} if name == "bn" else {"num_groups": groups}))(6)).train(training)
    y = layer(x)
    truth = literal(x.double(), groups)[0] if training else x.double() / math.sqrt(1 + EPS)
    truth = truth * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    eps = torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    assert y.dtype == dtype
    assert layer.running_mean.dtype == torch.float32
    torch.testing.assert_close(y, truth.to(dtype), atol=2 * eps, rtol=2 * eps)
    if training:
        mean = literal(x.double(), groups)[1][0] * 0.1
        torch.testing.assert_close(layer.running_mean.double(), mean, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bn", "bgn"])
def test_gradients_of_bfloat16_inputs_and_autocast(name):
    torch.manual_seed(0)
    layer = vary(make_norm(name, **({} if name == "bn" else {"num_groups": 3}))(6))
    x = torch.randn(8, 6, 8, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    dy = torch.randn(8, 6, 8, 8).bfloat16()
    wide = x.detach().float().requires_grad_()
    got = torch.autograd.grad(y, (x, layer.weight), dy)
    want = torch.autograd.grad(layer(wide), (wide, layer.weight), dy.float())
    assert (y.dtype, got[0].dtype, got[1].dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(got[0].float(), want[0], atol=0.03, rtol=0.03)
    torch.testing.assert_close(got[1], want[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["bn", "bgn"])
def test_a_module_cast_whole_still_works(name):
    x = torch.randn(4, 6, 4, 4).bfloat16()
    layer = make_norm(name, **({} if name == "bn" else {"num_groups": 3}))(6).bfloat16()
    assert layer(x).dtype == layer.eval()(x).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.bfloat16
    assert layer.running_mean.abs().sum() > 0


# --- identities ---------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_bgn_with_as_many_groups_as_channels_is_bn_buffers_included(n, c, h, w, channels_last):
    x = lay(torch.randn(n, c, h, w), channels_last)
    a, b = bgn(c, c), vary(make_norm("bn")(c))
    assert torch.equal(a(x), b(x))
    buffers_equal(a, b, rtol=0, atol=0)
    assert torch.equal(a.eval()(x), b.eval()(x))
    assert a.equivalent_to == "bn"
    assert bgn(c, 2 * c).equivalent_to is None


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(2, 4), st.booleans())
def test_bgn_of_one_sample_is_gn_in_training(groups, size, h, w, channels_last):
    x = lay(torch.randn(1, groups * size, h, w, dtype=torch.float64), channels_last)
    gn = vary(make_norm("gn", num_groups=groups)(groups * size, dtype=torch.float64))
    torch.testing.assert_close(bgn(groups * size, groups, dtype=torch.float64)(x), gn(x))


def test_bgn_with_one_group_is_ln_pooled_over_the_batch():
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    pooled = x.transpose(0, 1).reshape(1, 6, 12, 3)  # one sample that holds all of them
    want = make_norm("ln")(6, dtype=torch.float64)(pooled).reshape(6, 4, 3, 3).transpose(0, 1)
    torch.testing.assert_close(bgn(6, 1, affine=False)(x), want)


@pytest.mark.parametrize("groups", [1, 2, 6, 12, 9])
def test_bgn_ignores_scale_and_shift_of_the_batch_and_the_order_of_samples(groups):
    x = torch.randn(8, 6, 3, 6, dtype=torch.float64)
    layer = bgn(6, groups, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(layer(50 * x + 7), y, atol=1e-4, rtol=1e-4)
    order = torch.randperm(8)
    torch.testing.assert_close(layer(x[order]), y[order])
    changed = x.clone()
    changed[0] *= 3
    assert (layer(changed)[1:] - y[1:]).abs().max() > 0.01  # batch mates matter
    layer.eval()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))  # and do not in evaluation


# --- running statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_bgn_moves_running_statistics_of_size_g_and_evaluation_uses_them(groups, momentum):
    torch.manual_seed(0)
    layer = bgn(6, groups, momentum=momentum)
    mean, var = torch.zeros(groups, dtype=torch.float64), torch.ones(groups, dtype=torch.float64)
    for seen in range(1, 4):
        x = torch.randn(4, 6, 2, 2) * 2 + 1
        layer(x)
        _, new_mean, new_var = literal(x.double(), groups)
        m = 1 / seen if momentum is None else momentum
        mean, var = (1 - m) * mean + m * new_mean[0], (1 - m) * var + m * new_var[0]
    torch.testing.assert_close(layer.running_mean.double(), mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, atol=1e-6, rtol=1e-5)
    assert layer.num_batches_tracked == 3
    flat = x.double().reshape(4, groups, -1)
    want = ((flat - mean[:, None]) / torch.sqrt(var[:, None] + EPS)).reshape(x.shape)
    want = want * per_channel(layer.weight, x) + per_channel(layer.bias, x)
    for channels_last in (False, True):
        torch.testing.assert_close(layer.eval()(lay(x, channels_last)).double(), want, atol=1e-5, rtol=1e-5)
    assert layer.num_batches_tracked == 3
    layer.reset_running_stats()
    fresh = bgn(6, groups, momentum=momentum)
    buffers_equal(layer, fresh, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bn", "bgn"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("slices", [2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_slices_at_once_are_slices_one_after_the_other_buffers_included(name, momentum, slices, channels_last):
    torch.manual_seed(0)
    together = vary(make_norm(name, momentum=momentum, **({} if name == "bn" else {"num_groups": 3}))(6))
    single = copy.deepcopy(together)
    for _ in range(2):
        x = lay(torch.randn(16, 6, 4, 4) * 2 + 1, channels_last).requires_grad_()
        dy = torch.randn(16, 6, 4, 4)
        with situation(together, slices=slices):
            y = together(x)
        parts = [single(x[k::slices]) for k in range(slices)]
        other = torch.stack(parts, dim=1).reshape(x.shape)
        torch.testing.assert_close(y, other)
        torch.testing.assert_close(
            torch.autograd.grad(y, (x, together.weight), dy), torch.autograd.grad(other, (x, single.weight), dy)
        )
    buffers_equal(together, single)
    together.eval()
    with situation(together, slices=slices):  # evaluation has no norm batches
        torch.testing.assert_close(together(x[:3]), single.eval()(x[:3]))


def test_slices_must_divide_the_batch_and_leave_two_values_each():
    layer = bgn(4, 4)
    with situation(layer, slices=3), pytest.raises(ValueError, match="8 does not split into 3"):
        layer(torch.randn(8, 4, 2, 2))
    with situation(layer, slices=8), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(8, 4, 1, 1))


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "groups"),
    [(1, 1), (2, 1), (3, 1), (4, 2), (7, 2), (8, 16), (16, 64), (31, 64), (32, 128), (64, 256), (128, 512), (999, 512)],
)
def test_the_papers_groups_per_norm_batch(batch, groups):
    assert bgn_groups(batch) == groups


def test_auto_takes_the_largest_divisor_of_c_and_paper_the_exact_number():
    def resolved(rule, batch, channels):
        return make_norm("bgn", num_groups=rule, norm_batch_size=batch)(channels).num_groups

    assert [resolved("auto", 8, c) for c in (16, 24, 64, 7, 34)] == [16, 12, 16, 7, 2]
    assert [resolved("auto", b, 64) for b in (1, 2, 4, 8, 16, 128)] == [1, 1, 2, 16, 64, 64]
    assert resolved("paper", 128, 64) == 512
    assert make_norm("bgn", norm_batch_size=16)(64).equivalent_to == "bn"
    assert make_norm("bgn", norm_batch_size=8)(64).equivalent_to is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_norm("bgn")(8), "norm_batch_size"),
        (lambda: make_norm("bgn", num_groups="paper")(8), "norm_batch_size"),
        (lambda: make_norm("bgn", norm_batch_size=0)(8), "norm_batch_size=0"),
        (lambda: make_norm("bgn", num_groups=0)(8), "num_groups=0"),
        (lambda: make_norm("bgn", num_groups="half")(8), "num_groups"),
        (lambda: make_norm("bgn", num_groups=5)(4)(torch.randn(2, 4, 3, 3)), "nearest valid number is 4"),
        (lambda: make_norm("bgn", num_groups=5)(4).eval()(torch.randn(2, 4, 3, 3)), "nearest valid number is 4"),
        (lambda: make_norm("bgn", num_groups=36)(4)(torch.randn(1, 4, 3, 3)), "more than 1 value per group"),
        (lambda: make_norm("bn")(4)(torch.randn(1, 4, 1, 1)), "more than 1 value per channel"),
        (lambda: make_norm("bn")(4)(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("bn")(4)(torch.randn(4)), "4 channels"),
        (lambda: make_norm("bn", momentum=2.0)(4), "momentum=2.0"),
        (lambda: make_norm("bn", eps=0.0)(4), "eps=0.0"),
        (lambda: make_norm("bn")(0), "num_channels=0"),
    ],
)
def test_bad_input_is_a_clear_value_error(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_groups_inside_channels_are_tied_to_the_trained_size():
    layer = bgn(4, 8)
    layer.eval()(torch.randn(2, 4, 6, 6))  # nothing was trained, so there is nothing to mismatch
    layer.train()(torch.randn(2, 4, 4, 4))
    reloaded = bgn(4, 8)
    reloaded.load_state_dict(layer.state_dict())
    for other in (layer, reloaded, copy.deepcopy(layer)):
        other.eval()(torch.randn(2, 4, 4, 4))
        with pytest.raises(ValueError, match=r"trained size \(4, 4\); given \(2, 8\)"):
            other(torch.randn(2, 4, 2, 8))
        other.reset_running_stats()
        other(torch.randn(2, 4, 2, 8))
    free = bgn(4, 2)
    free(torch.randn(2, 4, 4, 4))
    assert free.eval()(torch.randn(2, 4, 2, 8)).shape == (2, 4, 2, 8)


def test_hold_puts_buffers_and_the_trained_size_back():
    layer = bgn(4, 8)
    with hold(layer):
        layer(torch.randn(2, 4, 4, 4))
        assert layer.num_batches_tracked == 1
    assert layer.num_batches_tracked == 0
    assert layer.trained_size is None


# --- memory, copies, compilation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 8, 48, 64, 512])
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_nothing_the_size_of_the_input_is_kept_beyond_the_input(groups, slices, channels_last):
    x = lay(torch.randn(32, 64, 12, 12), channels_last).requires_grad_()
    layer = bgn(64, groups)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), situation(layer, slices=slices):
        y = layer(x)
    total = x.numel() * x.element_size()
    own = {x.data_ptr(), layer.weight.data_ptr(), layer.bias.data_ptr()}
    assert x.data_ptr() in kept
    assert sum(size for at, size in kept.items() if at not in own) < 0.05 * total
    assert y.stride() == x.stride()


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_inputs_that_lie_otherwise_in_memory_give_the_same(groups):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 4, 4)
    layer = bgn(6, groups)
    for odd in (
        x.flip(3).flip(3),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([x, x], 1)[:, :6],
        lay(x.repeat_interleave(2, 0), True)[::2],
    ):
        odd = odd.detach().requires_grad_()
        plain = x.clone().requires_grad_()
        a, b = layer(odd), layer(plain)
        torch.testing.assert_close(a, b)
        # the gradient of a sum arrives expanded, with strides of 0
        torch.testing.assert_close(
            torch.autograd.grad(a.sum() + a[0].square().sum(), odd),
            torch.autograd.grad(b.sum() + b[0].square().sum(), plain),
        )


def test_torch_func_grad_goes_through():
    layer = bgn(6, 3, dtype=torch.float64)
    x = torch.randn(4, 6, 2, 2, dtype=torch.float64)

    def f(x):  # as for torch's own layer, the state that a call changes must belong to the transformed function
        state = {name: value.clone() for name, value in layer.named_buffers()}
        return torch.func.functional_call(layer, state, (x,)).sin().sum()

    wanted = torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(torch.func.grad(f)(x), wanted)


@pytest.mark.parametrize("frozen", ["input", "affine"])
def test_only_what_asks_for_a_gradient_gets_one(frozen):
    layer = bgn(6, 3).requires_grad_(frozen != "affine")
    x = torch.randn(4, 6, 2, 2, requires_grad=frozen != "input")
    layer(x).square().sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (layer.weight.grad is None) == (layer.bias.grad is None) == (frozen == "affine")


@pytest.mark.parametrize("options", [("bn", {}), ("bgn", {"num_groups": 3}), ("bgn", {"num_groups": 12})], ids=str)
def test_copies_pickles_and_reloads(options):
    name, chosen = options
    layer = vary(make_norm(name, **chosen)(6))
    layer(torch.randn(4, 6, 4, 4))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    state = io.BytesIO()
    torch.save(layer.state_dict(), state)
    state.seek(0)
    fresh = make_norm(name, **chosen)(6)
    fresh.load_state_dict(torch.load(state, weights_only=True))
    x = torch.randn(4, 6, 4, 4)
    for other in (copy.deepcopy(layer), torch.load(stream, weights_only=False), fresh):
        assert torch.equal(copy.deepcopy(layer).eval()(x), other.eval()(x))
        assert torch.equal(copy.deepcopy(layer)(x), other.train()(x))


COMPILED = [("bn", {}, 1), ("bn", {"momentum": None}, 2), ("bgn", {"num_groups": 3}, 2), ("bgn", {"num_groups": 12}, 1)]


@pytest.mark.parametrize(("name", "chosen", "slices"), COMPILED)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_compiles_in_one_graph_in_both_modes(name, chosen, slices, channels_last):
    torch.compiler.reset()
    layer = vary(make_norm(name, **chosen)(6))
    check_compiled(layer, "aot_eager", slices, channels_last)


def test_compiles_with_inductor():
    torch.compiler.reset()
    check_compiled(bgn(6, 3), "inductor", 1, False)


def check_compiled(layer, backend, slices, channels_last):
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        x = lay(torch.randn(4, 6, 4, 4), channels_last).requires_grad_()
        dy = torch.randn(4, 6, 4, 4)
        with situation(layer, slices=slices), situation(twin, slices=slices):
            a, b = compiled(x), twin(x)
            torch.testing.assert_close(a, b)
            assert a.stride() == b.stride()
            torch.testing.assert_close(
                torch.autograd.grad(a, (x, layer.weight), dy), torch.autograd.grad(b, (x, twin.weight), dy)
            )
    buffers_equal(layer, twin)
    layer.eval(), twin.eval()
    torch.testing.assert_close(compiled(x), twin(x))


@pytest.mark.parametrize("groups", [3, 6, 12])
def test_a_training_step_on_the_meta_device_and_a_fake_cuda_forward(groups):
    layer = make_norm("bgn", num_groups=groups)(6, device="meta")
    layer(torch.randn(4, 6, 4, 4, device="meta", requires_grad=True)).sum().backward()
    assert layer.weight.grad.is_meta
    with torch._subclasses.FakeTensorMode():
        layer = make_norm("bgn", num_groups=groups)(6, device="cuda")
        for mode in (True, False):
            assert layer.train(mode)(torch.empty(4, 6, 4, 4, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_an_empty_batch_is_evaluated_to_an_empty_one(groups):
    layer = make_norm("bgn", num_groups=groups)(8).eval()
    assert layer(torch.zeros(0, 8, 4, 4)).shape == (0, 8, 4, 4)

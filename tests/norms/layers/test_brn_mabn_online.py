"""brn, mabn, online against literal float64 transcriptions of forward, backward and state over several steps."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import after_update, hold, situation

EPS = 1e-5
SHAPES = [(3, 4, 5), (4, 4, 3, 5), (2, 4, 2, 3, 2), (1, 4, 3, 3), (6, 4)]
NAMES = ["brn", "mabn", "online"]
WEIGHT = torch.zeros(1)  # what shows mabn that a convolution precedes


def build(name, channels=4, *, affine=True, dtype=torch.float64, **options):
    layer = make_norm(name, **options)(channels, affine=affine, dtype=dtype)
    if affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
            layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer


def call(layer, x):
    return layer(x, weight=WEIGHT) if layer.norm_info.needs else layer(x)


def step(layer, x, dy, progress=1.0):
    """One training step; the output and the gradients of x and the parameters."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(layer, x)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    after_update(layer, lambda: None, progress)
    return y.detach(), grads


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def batches(shape, steps, seed=0):
    """(x, dy) of several steps, whose means and spreads wander."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        head = (*shape[:2], *[1] * (len(shape) - 2))
        x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        spread = 0.5 + torch.randn(head, generator=generator, dtype=torch.float64).abs()
        yield x * spread * (1 + t % 3) + torch.randn(head, generator=generator, dtype=torch.float64), dy


def affine_of(layer):
    if layer.weight is None:
        return torch.ones(layer.num_channels, dtype=torch.float64), torch.zeros(layer.num_channels, dtype=torch.float64)
    return layer.weight.detach().double(), layer.bias.detach().double()


def flat(x):
    """(N, C, *) -> (N, C, P)."""
    return x.reshape(x.shape[0], x.shape[1], -1)


def check(layer, y, grads, truth, dx, d_weight, d_bias):
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(grads[0], dx)
    if layer.weight is not None:
        torch.testing.assert_close(grads[1], d_weight)
        torch.testing.assert_close(grads[2], d_bias)
    else:
        assert len(grads) == 1


# --- brn ----------------------------------------------------------------------------------------------------------


def literal_brn(x, weight, bias, mean, var, r_limit, d_limit):
    """Algorithm 1 of the paper for one batch: y (differentiable), batch mean, unbiased batch variance."""
    y, means, variances = [], [], []
    for c in range(x.shape[1]):
        v = x[:, c]
        mean_b = v.mean()
        var_b = ((v - mean_b) ** 2).mean()
        sigma_b, sigma = torch.sqrt(var_b + EPS), torch.sqrt(var[c] + EPS)
        r = min(max((sigma_b / sigma).item(), 1 / r_limit), r_limit)
        d = min(max(((mean_b - mean[c]) / sigma).item(), -d_limit), d_limit)
        y.append(((v - mean_b) / sigma_b * r + d) * weight[c] + bias[c])
        means.append(mean_b.detach())
        variances.append(var_b.detach() * v.numel() / (v.numel() - 1))
    return torch.stack(y, dim=1), torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.3), (False, 0.3), (True, None)])
def test_brn_is_the_equation_in_outputs_gradients_and_state(shape, affine, momentum):
    layer = build("brn", affine=affine, momentum=momentum, r_max=1.5, d_max=0.5, warmup=0.1, r_until=0.5, d_until=0.3)
    weight, bias = (p.requires_grad_() for p in affine_of(layer))
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    corrected = False
    for t, (x, dy) in enumerate(batches(shape, 12)):
        progress = t / 12  # done when this batch is forwarded
        settled = t * (1 if momentum is None else momentum) >= 1
        r_limit = 1 + 0.5 * min(max((progress - 0.1) / 0.4, 0), 1) * settled
        d_limit = 0.5 * min(max((progress - 0.1) / 0.2, 0), 1) * settled
        corrected |= d_limit > 0
        z = x.clone().requires_grad_()
        truth, new_mean, new_var = literal_brn(z, weight, bias, mean, var, r_limit, d_limit)
        wanted = torch.autograd.grad(truth, [z, weight, bias], dy)
        y, grads = step(layer, x, dy, (t + 1) / 12)
        # the progress is a float32 tensor, also in a layer of float64
        check(layer, y, grads, truth.detach(), *wanted)
        share = 1 / (t + 1) if momentum is None else momentum
        mean, var = mean + share * (new_mean - mean), var + share * (new_var - var)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, var)
    assert corrected
    shape = (-1, *[1] * (x.dim() - 2))
    truth = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + EPS) * weight.view(shape) + bias.view(shape)
    torch.testing.assert_close(layer.eval()(x), truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_brn_with_limits_1_and_0_is_bn(dtype):
    ours, bn = build("brn", r_max=1.0, d_max=0.0, dtype=dtype), build("bn", dtype=dtype)
    for x, dy in batches((8, 4, 3, 3), 15):
        y, grads = step(ours, x.to(dtype), dy.to(dtype))
        other, other_grads = step(bn, x.to(dtype), dy.to(dtype))
        torch.testing.assert_close(y, other)
        torch.testing.assert_close(grads, other_grads)
    torch.testing.assert_close(ours.running_mean, bn.running_mean)
    torch.testing.assert_close(ours.running_var, bn.running_var)
    torch.testing.assert_close(ours.eval()(x.to(dtype)), bn.eval()(x.to(dtype)))


def test_brn_after_its_warm_up_differs_from_bn_by_exactly_r_and_d():
    layer, bn = build("brn", affine=False), build("bn", affine=False)
    for x, dy in batches((8, 4, 3, 3), 12):
        before = layer.running_mean.clone(), layer.running_var.clone()
        y, other = step(layer, x, dy)[0], step(bn, x, dy)[0]
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    r = torch.sqrt((var + EPS) / (before[1] + EPS))
    d = (mean - before[0]) / torch.sqrt(before[1] + EPS)
    assert r.max() < 3
    assert r.min() > 1 / 3
    assert d.abs().max() < 5
    torch.testing.assert_close(y, other * r.view(1, -1, 1, 1) + d.view(1, -1, 1, 1))
    # nothing is clipped, so it is what evaluation would have given
    torch.testing.assert_close(y, F.batch_norm(x, *before))


@pytest.mark.parametrize(
    ("progress", "r_limit", "d_limit"),
    [
        (0.0, 1, 0),
        (0.04, 1, 0),
        (0.12, 1 + 2 * 0.08 / 0.26, 2.5),
        (0.2, 1 + 2 * 0.16 / 0.26, 5),
        (0.3, 3, 5),
        (1, 3, 5),
    ],
)
def test_brn_relaxes_its_limits_linearly_with_the_progress_of_training(progress, r_limit, d_limit):
    layer = build("brn")
    far = torch.full((4,), 1e6, dtype=torch.float64)
    after_update(layer, lambda: None, progress)
    assert layer.correction(far, far)[0].tolist() == [1] * 4  # the running statistics are still their start
    layer.num_batches_tracked.fill_(10)
    for mean, var, sign in ((far, far, 1), (-far, 0 * far, -1)):
        r, d = layer.correction(mean, var)
        torch.testing.assert_close(r, torch.full_like(far, r_limit**sign))
        torch.testing.assert_close(d, torch.full_like(far, sign * d_limit))


@pytest.mark.parametrize("momentum", [0.2, 0.98, None])
@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("lost", [(), (0,), (1,), (1, 3)], ids=str)
def test_brn_takes_norm_batches_at_once_as_one_after_the_other(momentum, slices, lost):
    """Past the warm-up, so that r and d count, from whatever statistics each norm batch finds; those of a channel
    that overflowed are left out."""
    options = {"momentum": momentum, "r_max": 1.5, "d_max": 0.7}
    together, single = build("brn", **options), build("brn", **options)
    bn, differing = build("bn", momentum=momentum), 0.0
    for t, (x, dy) in enumerate(batches((8, 4, 3, 3), 6)):
        if t == 5:
            for k in lost:
                if k < slices:
                    x[k::slices, 2] = float("inf")
        z = x.clone().requires_grad_()
        parts = [step(single, x[k::slices], dy[k::slices], float(t > 0)) for k in range(slices)]
        with situation(together, slices=slices):
            y = together(z)
        grads = torch.autograd.grad(y, [z, *together.parameters()], dy)
        differing = max(differing, (bn(x)[:, :2] - y[:, :2]).abs().max().item())
        for k, (own, own_grads) in enumerate(parts):
            torch.testing.assert_close(y[k::slices], own, equal_nan=True)
            torch.testing.assert_close(grads[0][k::slices], own_grads[0], equal_nan=True)
        for i in (1, 2):
            torch.testing.assert_close(grads[i], sum(own[1][i] for own in parts), equal_nan=True)
        torch.testing.assert_close(state(together), state(single))
        for each in (together, single):
            after_update(each, lambda: None, 1.0)
    assert differing > 0.1
    assert together.running_mean.isfinite().all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_brn_takes_norm_batches_at_once_at_large_means(layout):
    layer, exact = build("brn", dtype=torch.float32), build("brn")
    for one in (layer, exact):
        one.running_mean.fill_(1e4)
        one.num_batches_tracked.fill_(10)
        after_update(one, lambda: None, 1.0)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 4, 8, 8, generator=generator) + 1e4).contiguous(memory_format=layout)
    for one in (layer, exact):
        one.requires_grad_(False)
    with situation(layer, slices=4), situation(exact, slices=4):
        torch.testing.assert_close(layer(x).double(), exact(x.double()), atol=3e-3, rtol=0)


# --- mabn ---------------------------------------------------------------------------------------------------------


class LiteralMabn:
    """The official code's order of things, with our rules for what is averaged when."""

    def __init__(self, layer, window, momentum):
        self.weight, self.bias = affine_of(layer)
        self.window, self.momentum = window, momentum
        self.chis, self.psis = [], []
        self.running = torch.ones(layer.num_channels, dtype=torch.float64)

    def step(self, x, dy, averaging, renorm):
        chi_t = torch.stack([x[:, c].square().mean() for c in range(x.shape[1])])
        self.chis = [*self.chis, chi_t][-self.window - 1 :]
        full = len(self.chis) > self.window
        self.chis = self.chis[-self.window :] if not full else self.chis
        recent = self.chis[-self.window :]
        chi = torch.stack(recent).mean(0) if averaging else chi_t
        r = torch.ones_like(chi)
        if renorm and full:
            r = (torch.sqrt(chi + EPS) / torch.sqrt(self.running + EPS)).clamp(0.2, 5)
        first = len(self.psis) == 0
        share = 1.0 if first else self.momentum
        self.running = (1 - share) * self.running + share * chi
        y, g, z, psi_t = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x), torch.empty_like(chi)
        for c in range(x.shape[1]):
            z[:, c] = x[:, c] / torch.sqrt(chi[c] + EPS)
            y[:, c] = self.weight[c] * r[c] * z[:, c] + self.bias[c]
            g[:, c] = dy[:, c] * self.weight[c] * r[c]
            psi_t[c] = (g[:, c] * z[:, c]).mean()
        self.psis.append(psi_t)
        psi = torch.stack(self.psis[-self.window :]).mean(0) if averaging else psi_t
        dx = torch.empty_like(x)
        d_weight, d_bias = torch.empty_like(chi), torch.empty_like(chi)
        for c in range(x.shape[1]):
            dx[:, c] = (g[:, c] - z[:, c] * psi[c]) / torch.sqrt(chi[c] + EPS)
            d_weight[c], d_bias[c] = (dy[:, c] * r[c] * z[:, c]).sum(), dy[:, c].sum()
        return y, dx, d_weight, d_bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("affine", "window"), [(True, 3), (False, 3), (True, 1)])
def test_mabn_is_its_code_in_outputs_gradients_and_state(shape, affine, window):
    layer = build("mabn", affine=affine, buffer_size=window, momentum=0.1, warmup=0.2, renorm_from=0.6)
    literal = LiteralMabn(layer, window, 0.1)
    for t, (x, dy) in enumerate(batches(shape, 10)):
        wanted = literal.step(x, dy, averaging=t >= 2, renorm=t >= 6)
        check(layer, *step(layer, x, dy, (t + 1) / 10), *wanted)
        torch.testing.assert_close(layer.running_var, literal.running)
        assert not layer.running_mean.any()
        for history, values in ((layer.chi_history, literal.chis), (layer.psi_history, literal.psis)):
            held = torch.stack([h for h in history if h.any()]).sort(0).values
            torch.testing.assert_close(held, torch.stack(values[-window:]).sort(0).values)
    assert layer.num_batches_tracked == layer.num_backwards_tracked == 10
    shape = (-1, *[1] * (x.dim() - 2))
    truth = x / torch.sqrt(literal.running.view(shape) + EPS) * literal.weight.view(shape) + literal.bias.view(shape)
    torch.testing.assert_close(call(layer.eval(), x), truth)


@pytest.mark.parametrize(
    "options", [{"buffer_size": 1, "renorm_from": 1.0}, {"warmup": 1.0, "renorm_from": 1.0}], ids=str
)
def test_mabn_of_one_batch_is_rms_over_it_with_the_exact_gradient(options):
    layer = build("mabn", **options)
    shape = (1, -1, 1, 1)
    for x, dy in batches((4, 4, 3, 3), 4):
        z = x.clone().requires_grad_()
        truth = z / torch.sqrt(z.square().mean((0, 2, 3), keepdim=True) + EPS)
        truth = truth * layer.weight.view(shape) + layer.bias.view(shape)
        wanted = torch.autograd.grad(truth, [z, layer.weight, layer.bias], dy)
        check(layer, *step(layer, x, dy, 0.9), truth.detach(), *wanted)


def test_mabn_needs_a_convolution_and_centres_its_filters():
    layer = build("mabn")
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64) + 1
    centred = layer.transform_weight(weight)
    for filter, before in zip(centred, weight, strict=True):
        torch.testing.assert_close(filter, before - before.sum() / 12)
    for mode in (True, False):
        with pytest.raises(ValueError, match="needs a convolution"):
            layer.train(mode)(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="leaves nothing"):
        layer.transform_weight(torch.randn(4, 1, 1, 1))


@pytest.mark.parametrize(("norm_batch", "window"), [(None, 16), (1, 32), (2, 16), (16, 2), (32, 1), (128, 1)])
def test_mabns_window_holds_32_images(norm_batch, window):
    assert make_norm("mabn", norm_batch_size=norm_batch)(4).buffer_size == window
    with pytest.raises(ValueError, match=r'option "buffer_size" given .all.: an integer or "auto" is needed, not text'):
        make_norm("mabn", buffer_size="all")


def test_mabn_averages_all_second_moments_with_momentum_none():
    layer = build("mabn", momentum=None, warmup=0.9, renorm_from=1.0)
    seen = []
    for x, dy in batches((4, 4, 3, 3), 5):
        step(layer, x, dy, 0.0)
        seen.append(x.square().mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, torch.stack(seen).mean(0))


# --- online -------------------------------------------------------------------------------------------------------


class LiteralOnline:
    """The paper's recurrences, sample by sample."""

    def __init__(self, layer, decay, backward_decay, compensation):
        self.weight, self.bias = affine_of(layer)
        self.decay, self.backward_decay, self.compensation = decay, backward_decay, compensation
        c = layer.num_channels
        self.mean, self.error_1, self.error_y = (torch.zeros(c, dtype=torch.float64) for _ in range(3))
        self.var = torch.ones(c, dtype=torch.float64)
        self.seen = 0

    def out(self, y, weight, bias):
        """One sample's output (C, P) from the normalized y."""
        z = y * weight[:, None] + bias[:, None]
        if self.compensation == "layer_scaling":
            z = z / torch.sqrt(z.square().mean() + EPS)
        return z.clamp(-5, 5) if self.compensation == "clamp" else z

    def step(self, x, dy):
        shape, x, dy = x.shape, flat(x), flat(dy)
        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        outputs, dx, grads = [], [], []
        for t in range(len(x)):
            self.seen += 1
            a = 1 - 1 / self.seen if self.decay is None else self.decay
            sigma = torch.sqrt(self.var + EPS)
            y = ((x[t] - self.mean[:, None]) / sigma[:, None]).requires_grad_()
            out = self.out(y, weight, bias)
            outputs.append(out.detach())
            m, v = x[t].mean(1), ((x[t] - x[t].mean(1, keepdim=True)) ** 2).mean(1)
            self.var = a * self.var + (1 - a) * v + a * (1 - a) * (m - self.mean) ** 2
            self.mean = a * self.mean + (1 - a) * m
            g, *of_parameters = torch.autograd.grad(out, [y, weight, bias], dy[t])
            y = y.detach()
            grads.append(of_parameters)
            g = g - (1 - self.backward_decay) * self.error_y[:, None] * y
            self.error_y = self.error_y + (g * y).mean(1)
            dx.append(g / sigma[:, None] - (1 - self.backward_decay) * self.error_1[:, None])
            self.error_1 = self.error_1 + dx[-1].mean(1)
        d_weight, d_bias = (sum(parts) for parts in zip(*grads, strict=True))
        return torch.stack(outputs).reshape(shape), torch.stack(dx).reshape(shape), d_weight, d_bias

    def evaluate(self, x):
        y = (flat(x) - self.mean[:, None]) / torch.sqrt(self.var + EPS)[:, None]
        return torch.stack([self.out(one, self.weight, self.bias) for one in y]).reshape(x.shape)


@pytest.mark.parametrize("compensation", ["layer_scaling", "clamp", "none"])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 1, 1), (9, 4, 2, 8)], ids=str)
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.2), (False, 1 / 1024), (True, None)])
def test_online_is_the_recurrence_in_outputs_gradients_and_state(shape, compensation, affine, momentum):
    layer = build("online", affine=affine, momentum=momentum, backward_momentum=0.1, compensation=compensation)
    literal = LiteralOnline(layer, None if momentum is None else 1 - momentum, 0.9, compensation)
    clamped = False
    for x, dy in batches(shape, 4):
        if compensation == "clamp":
            x = 2 * x
        wanted = literal.step(x, dy)
        check(layer, *step(layer, x, dy), *wanted)
        clamped |= bool((wanted[0].abs() == 5).any())
        torch.testing.assert_close(layer.running_mean, literal.mean)
        torch.testing.assert_close(layer.running_var, literal.var)
        torch.testing.assert_close(layer.error_product, literal.error_y)
        torch.testing.assert_close(layer.error_mean, literal.error_1)
    assert layer.num_batches_tracked == 4 * shape[0]
    torch.testing.assert_close(layer.eval()(x), literal.evaluate(x))
    if compensation == "clamp" and len(shape) > 3:
        assert clamped or shape[2:] == (1, 1)


def test_onlines_defaults_are_the_papers_for_cifar_10():
    layer = build("online")
    assert (1 - layer.momentum, 1 - layer.backward_momentum) == (1023 / 1024, 127 / 128)


@pytest.mark.parametrize("compensation", ["layer_scaling", "clamp", "none"])
def test_online_without_control_is_differentiated_exactly_but_for_its_statistics(compensation):
    layer = build("online", backward_momentum=0.0, momentum=0.0, compensation=compensation)
    layer.running_mean.fill_(0.3)
    layer.running_var.fill_(2.0)
    shape = (1, -1, 1, 1)
    for x, dy in batches((4, 4, 3, 3), 2):
        z = x.clone().requires_grad_()
        truth = (z - 0.3) / (2 + EPS) ** 0.5 * layer.weight.view(shape) + layer.bias.view(shape)
        if compensation == "layer_scaling":
            truth = truth / torch.sqrt(truth.square().mean((1, 2, 3), keepdim=True) + EPS)
        if compensation == "clamp":
            truth = truth.clamp(-5, 5)
        wanted = torch.autograd.grad(truth, [z, layer.weight, layer.bias], dy)
        check(layer, *step(layer, x, dy), truth.detach(), *wanted)


@pytest.mark.parametrize("compensation", ["layer_scaling", "none"])
def test_online_goes_on_where_a_batch_is_cut(compensation):
    whole, cut = (build("online", compensation=compensation) for _ in range(2))
    for x, dy in batches((6, 4, 3, 3), 3):
        y, grads = step(whole, x, dy)
        parts = [step(cut, x[i : i + 2], dy[i : i + 2]) for i in (0, 2, 4)]
        torch.testing.assert_close(torch.cat([part[0] for part in parts]), y)
        torch.testing.assert_close(torch.cat([part[1][0] for part in parts]), grads[0])
        torch.testing.assert_close(state(cut), state(whole))


# --- all three ----------------------------------------------------------------------------------------------------


def trained(name, steps=5, **options):
    layer = build(name, **({"buffer_size": 3} if name == "mabn" else {}), **options)
    for x, dy in batches((4, 4, 3, 3), steps, seed=7):
        step(layer, x.to(layer.running_mean.dtype), dy.to(layer.running_mean.dtype))
    return layer


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_after_hold_leaves_every_buffer_alone(name):
    layer = trained(name)
    before, tensors = state(layer), [id(b) for b in layer.buffers()]
    x, dy = next(batches((4, 4, 3, 3), 1))
    x.requires_grad_()
    with hold(layer):
        y = call(layer, x)
    torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(state(layer), before, rtol=0, atol=0)
    assert tensors == [id(b) for b in layer.buffers()]
    if name != "brn":  # outside of it the backward does move some
        torch.autograd.grad(call(layer, x), x, dy)
        moved = {"mabn": "psi_history", "online": "error_product"}[name]
        assert not torch.equal(state(layer)[moved], before[moved])


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_reloads_have_the_same_future_backward_state_included(name):
    layer = trained(name)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh = build(name, **({"buffer_size": 3} if name == "mabn" else {}))
    fresh.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    copied, before = copy.deepcopy(layer), state(layer)
    results = []
    for other in (fresh, copied):
        results.append([step(other, x, dy) for x, dy in batches((4, 4, 3, 3), 5, seed=3)])
        torch.testing.assert_close(state(layer), before, rtol=0, atol=0)
    results.append([step(layer, x, dy) for x, dy in batches((4, 4, 3, 3), 5, seed=3)])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)
    layer.reset_running_stats()
    start, now = state(build(name, **({"buffer_size": 3} if name == "mabn" else {}))), state(layer)
    torch.testing.assert_close(now, start, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [[64], [32, 32], [40, 8, 16]], ids=str)
def test_recalibration_pools_all_values_and_the_training_output_agrees(name, cuts):
    layer = trained(name)
    x = torch.cat([x for x, _ in batches((16, 4, 3, 3), 4)])

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x):
            return call(self.norm, x)

    recalibrate(Net(), x.split(cuts))
    assert layer.momentum == {"brn": 0.1, "mabn": 0.02, "online": 1 / 1024}[name]
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)), rtol=2e-2 if name == "online" else 1e-3, atol=0)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
    y = x / torch.sqrt(mean.square() + var + EPS) if name == "mabn" else (x - mean) / torch.sqrt(var + EPS)
    y = y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    if name == "online":
        y = y / torch.sqrt(y.square().mean((1, 2, 3), keepdim=True) + EPS)
    torch.testing.assert_close(call(layer.eval(), x), y, rtol=1e-2, atol=1e-2)
    if name == "brn":
        torch.testing.assert_close(layer.train()(x), y, rtol=1e-2, atol=1e-2)


def test_norm_batches_are_normalized_by_their_own_statistics_while_recalibrating():
    outputs = {}
    x = next(batches((32, 4, 3, 3), 1))[0]
    for name in NAMES:
        layer = trained(name, affine=False)
        layer.reset_running_stats()
        layer.momentum = 1.0
        for scale in (5, 1, 1):
            outputs[name] = call(layer, scale * x)
    for name in ("brn", "online"):
        got = outputs[name]
        if name == "online":  # which scales each sample
            got = got / got.square().mean((1, 2, 3), keepdim=True).sqrt()
        wanted = F.batch_norm(x, None, None, training=True)
        if name == "online":
            wanted = wanted / wanted.square().mean((1, 2, 3), keepdim=True).sqrt()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_channels_last_is_kept_and_gives_the_same(name, layout, large):
    shape = (5, 4, 3, 4) if layout is torch.channels_last else (5, 4, 3, 2, 2)
    if large:
        shape = (3, 32, *[16] * (len(shape) - 2)) if len(shape) == 4 else (3, 32, 4, 8, 8)
    layers = [build(name, shape[1], **({"buffer_size": 2} if name == "mabn" else {})) for _ in range(2)]
    for x, dy in batches(shape, 4):
        y, grads = step(layers[0], x.contiguous(memory_format=layout), dy)
        other, other_grads = step(layers[1], x, dy.contiguous(memory_format=layout))
        assert y.is_contiguous(memory_format=layout)
        assert grads[0].is_contiguous(memory_format=layout)
        assert other.is_contiguous()
        torch.testing.assert_close(y, other)
        torch.testing.assert_close(grads, other_grads)
    torch.testing.assert_close(state(layers[0]), state(layers[1]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_survives_large_means_in_float32(name, layout):
    layer, exact = build(name, dtype=torch.float32), build(name)
    generator = torch.Generator().manual_seed(0)
    for one in (layer, exact):
        one.running_mean.fill_(1e4 if name != "mabn" else 0)
    for _ in range(3):
        x = (torch.randn(8, 4, 8, 8, generator=generator) + 1e4).contiguous(memory_format=layout)
        dy = torch.randn(8, 4, 8, 8, generator=generator)
        y, grads = step(layer, x, dy)
        truth, wanted = step(exact, x.double(), dy.double())
        # torch's own batch norm is off by 5e-3 in channels_last
        torch.testing.assert_close(y.double(), truth, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(grads[0].double(), wanted[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(call(layer.eval(), x).double(), call(exact.eval(), x.double()), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_input_types_are_kept_and_computed_in_float32(name, dtype):
    layer, exact = build(name, dtype=torch.float32), build(name)
    for x, dy in batches((4, 4, 5, 5), 4):
        x, dy = (x + 3).to(dtype), dy.to(dtype)
        y, grads = step(layer, x, dy)
        truth, wanted = step(exact, x.double(), dy.double())
        assert y.dtype == grads[0].dtype == dtype
        assert grads[1].dtype == torch.float32
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), truth, atol=eps, rtol=eps)
        torch.testing.assert_close(grads[0].double(), wanted[0], atol=2 * eps, rtol=2 * eps)
        torch.testing.assert_close(grads[1].double(), wanted[1], atol=1e-3, rtol=1e-3)
    assert all(b.dtype == torch.float32 for b in layer.buffers() if b.is_floating_point())
    assert call(layer.eval(), x).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_hold_the_statistics_fixed(name):
    """The gradient of x is a function of dy and the weight through no statistics of x, so there it is exact."""
    layer = trained(name)
    x, dy = next(batches((3, 4, 2, 2), 1))

    def gradient(x, dy, weight):
        with hold(layer):
            inputs = (x,) if name != "mabn" else (x, WEIGHT)
            y = torch.func.functional_call(layer, {"weight": weight}, inputs)
        return torch.autograd.grad(y, x, dy, create_graph=True)[0]

    x.requires_grad_()
    inputs = dy.requires_grad_(), layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda dy, weight: gradient(x, dy, weight), inputs, fast_mode=True)
    assert torch.autograd.grad(gradient(x, *inputs).square().sum(), x)[0].isfinite().all()
    with hold(layer):
        plain = torch.autograd.grad(call(layer, x), x, dy)[0]
    torch.testing.assert_close(gradient(x, dy, layer.weight), plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", ["input", "affine"])
def test_only_what_asks_for_a_gradient_gets_one(name, frozen):
    layer = build(name).requires_grad_(frozen != "affine")
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=frozen != "input")
    call(layer, x).square().sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (layer.weight.grad is None) == (layer.bias.grad is None) == (frozen == "affine")


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step_on_the_meta_device_and_a_fake_cuda_forward(name):
    layer = make_norm(name)(6, device="meta")
    call(layer, torch.randn(4, 6, 4, 4, device="meta", requires_grad=True)).sum().backward()
    assert layer.weight.grad.is_meta
    with torch._subclasses.FakeTensorMode():
        layer = make_norm(name)(6, device="cuda")
        for mode in (True, False):
            layer.train(mode)
            x = torch.empty(4, 6, 4, 4, device="cuda")
            y = layer(x, weight=x) if name == "mabn" else layer(x)
            assert y.device.type == "cuda"


@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_has_the_same_gradients_and_state_also_after_hold(name):
    torch.compiler.reset()
    layer = trained(name, steps=12)
    twin, whole = copy.deepcopy(layer), layer.norm_info.compiles
    compiled = torch.compile(layer, fullgraph=whole, backend="aot_eager")
    kwargs = {"weight": WEIGHT} if name == "mabn" else {}
    for x, dy in batches((4, 4, 3, 3), 2):
        x.requires_grad_()
        before = state(layer)
        with hold(layer):
            y = compiled(x, **kwargs)
        torch.autograd.grad(y, x, dy)
        torch.testing.assert_close(state(layer), before, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x, **kwargs), x, dy), torch.autograd.grad(call(twin, x), x, dy)
        )
        torch.testing.assert_close(state(layer), state(twin))


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("brn", r_max=0.5)(4), "r_max=0.5"),
        (lambda: make_norm("brn", d_max=-1.0)(4), "d_max=-1.0"),
        (lambda: make_norm("brn", warmup=0.5)(4), "warmup=0.5"),
        (lambda: make_norm("brn", r_until=1.5)(4), "r_until=1.5"),
        (lambda: make_norm("brn")(4)(torch.randn(1, 4, 1, 1)), r"at least 2 value\(s\)"),
        (lambda: make_norm("mabn", buffer_size=0)(4), "buffer_size=0"),
        (lambda: make_norm("mabn", r_max=0.9)(4), "r_max=0.9"),
        (lambda: make_norm("mabn", warmup=0.5)(4), "warmup=0.5"),
        (lambda: make_norm("online", momentum=1.0)(4), "momentum=1.0"),
        (lambda: make_norm("online", backward_momentum=1.0)(4), "backward_momentum=1.0"),
        (lambda: make_norm("online", compensation="scale")(4), "compensation"),
        (lambda: make_norm("online")(0), "num_channels=0"),
        (lambda: make_norm("brn", eps=0.0)(4), "eps=0.0"),
        (lambda: make_norm("mabn", momentum=2.0)(4), "momentum=2.0"),
        (lambda: make_norm("online")(4)(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("mabn")(4)(torch.randn(4), WEIGHT), "4 channels"),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()


def test_mabns_r_is_clipped_and_waits_for_a_full_window():
    layer = build("mabn", buffer_size=1, warmup=0.0, renorm_from=0.0)
    layer.after_update(1.0)
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    rms = torch.sqrt(x.square().mean((0, 2, 3), keepdim=True) + EPS)
    plain = x / rms * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    layer.running_var.fill_(1e-4)
    torch.testing.assert_close(layer(x, WEIGHT), plain)  # one batch does not fill more than a window of one
    for running, r in ((1e-4, 5.0), (1e6, 0.2)):
        layer.running_var.fill_(running)
        expected = r * x / rms * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
        torch.testing.assert_close(layer(x, WEIGHT), expected)


def test_training_after_a_recalibration_does_not_count_mabns_mean_twice():
    layer = build("mabn", momentum=0.5)
    x = torch.randn(64, 4, 3, 3, dtype=torch.float64) + 3
    layer.running_mean.copy_(x.mean((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3), correction=0))
    layer.num_batches_tracked.fill_(1)
    layer(x, WEIGHT)
    square = x.square().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean, torch.zeros_like(square))
    torch.testing.assert_close(layer.running_var, square)


def test_online_counts_the_samples_of_a_recalibration():
    layer = build("online")
    recalibrate(
        torch.nn.Sequential(layer),
        [torch.randn(8, 4, 3, 3, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)],
    )
    assert layer.num_batches_tracked == 12

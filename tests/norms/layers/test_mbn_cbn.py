"""mbn and cbn against literal float64 transcriptions over several updates, bn as their special case, and what they
keep: second looks, gradients at hand or not, copies, files, MAML's weights."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import after_update, hold, situation
from tasks.nets.blocks import conv_norm_act

EPS = 1e-5
CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
SHAPES = [(3, 2, 5), (3, 2, 4, 5), (2, 2, 3, 3, 2)]
C = 4


class Net(nn.Module):
    """norm(conv(x)); the norm gets the weight where it declares so. float64 unless told."""

    def __init__(self, norm, dim=4, *, seed=0, groups=1, affine=True, dtype=torch.float64, channels_in=2):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = CONV[dim](channels_in, C, 3, padding=1, bias=False, groups=groups, dtype=dtype)
        self.norm = vary(norm(C, affine=affine, dtype=dtype))

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y, weight=self.conv.weight) if "conv_weight" in self.norm.norm_info.needs else self.norm(y)


def vary(layer):
    if layer.weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 1.5, C))
            layer.bias.copy_(torch.linspace(-1, 1, C))
    return layer


def batches(shape, count, dtype=torch.float64):
    """Batches of quite different mean and spread."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).mul_(1 + i % 3).add_(i % 2).to(dtype)
        for i in range(count)
    ]


def pulls(count, x):
    shape = (x.shape[0], C, *x.shape[2:])
    return [torch.randn(shape, generator=torch.Generator().manual_seed(50 + i), dtype=x.dtype) for i in range(count)]


def moments(y):
    """Mean and biased variance per channel, in loops."""
    means, variances = [], []
    for c in range(y.shape[1]):
        v = y[:, c]
        means.append(v.sum() / v.numel())
        variances.append(((v - means[-1]) ** 2).sum() / v.numel())
    return torch.stack(means), torch.stack(variances)


def normalized(y, mean, var, layer, eps_outside=False):
    channels = []
    for c in range(y.shape[1]):
        root = torch.sqrt(var[c]) + EPS if eps_outside else torch.sqrt(var[c] + EPS)
        out = (y[:, c] - mean[c]) / root
        channels.append(out if layer.weight is None else out * layer.weight[c] + layer.bias[c])
    return torch.stack(channels, dim=1)


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def bn_of(layer, momentum=0.1):
    affine = layer.weight is not None
    twin = make_norm("bn", momentum=momentum)(C, affine=affine, dtype=layer.running_mean.dtype)
    if affine:
        twin.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    return twin


def through_a_file(layer):
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


# --- mbn: the equation ------------------------------------------------------------------------------------------------


class LiteralMbn:
    """The paper's rule with a list as memory, newest first; every forward of a step may be looked at again."""

    def __init__(self, memory, momentum):
        self.size, self.momentum, self.memory = memory, momentum, []

    def combine(self, entries):
        alpha = [(1 - self.momentum) ** age for age in range(len(entries))]
        alpha = [a / sum(alpha) for a in alpha]
        mean = sum(a * m for a, (m, _) in zip(alpha, entries, strict=True))
        var = sum(a * (v + (m - mean) ** 2) for a, (m, v) in zip(alpha, entries, strict=True))
        return mean, var

    def train(self, y, layer):
        entry = moments(y)
        window = [entry, *self.memory][: self.size]
        self.memory = [tuple(t.detach() for t in entry), *self.memory][: self.size]
        return normalized(y, *self.combine(window), layer)

    def look(self, y, layer, row):
        entry = moments(y)
        if row < len(self.memory):
            self.memory[row] = entry
            return normalized(y, *self.combine(self.memory[row:]), layer)
        return normalized(y, *self.combine([entry, *self.memory][: self.size]), layer)

    def evaluate(self, y, layer):
        return normalized(y, *self.combine(self.memory), layer)


@pytest.mark.parametrize("per_update", [1, 2])
@pytest.mark.parametrize(("memory", "momentum"), [(3, 0.1), (2, 0.5), (4, 0.0), (1, 0.1)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mbn_is_the_equation_over_six_updates_with_second_looks(shape, memory, momentum, per_update):
    affine = memory != 2
    net = Net(make_norm("mbn", memory=memory, momentum=momentum), len(shape), affine=affine)
    layer, literal = net.norm, LiteralMbn(memory, momentum)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    data = batches(shape, 6 * per_update)
    for step in range(6):
        given = [x.clone().requires_grad_() for x in data[step * per_update : (step + 1) * per_update]]
        outputs = [net(x) for x in given]  # several forwards before a backward
        truth = [literal.train(net.conv(x), layer) for x in given]
        loss, true_loss = (
            sum((y * g).sum() for y, g in zip(ys, pulls(per_update, given[0]), strict=True)) for ys in (outputs, truth)
        )
        torch.testing.assert_close(outputs, truth)
        inputs = [*given, *net.parameters()]
        grads = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(grads, torch.autograd.grad(true_loss, inputs))
        for p, g in zip(net.parameters(), grads[per_update:], strict=True):
            p.grad = g
        optimizer.step()
        looks = []
        after_update(net, lambda given=given, looks=looks: looks.extend(net(x) for x in given), (step + 1) / 6)
        with torch.no_grad():
            truth = [literal.look(net.conv(x), layer, per_update - 1 - j) for j, x in enumerate(given)]
            torch.testing.assert_close(looks, truth)
            entries = len(literal.memory)
            torch.testing.assert_close(layer.memory_mean[:entries], torch.stack([m for m, _ in literal.memory]))
            torch.testing.assert_close(layer.memory_var[:entries], torch.stack([v for _, v in literal.memory]))
            torch.testing.assert_close((layer.running_mean, layer.running_var), literal.combine(literal.memory))
            net.eval()
            torch.testing.assert_close(net(given[0]), literal.evaluate(net.conv(given[0]), layer))
            net.train()
    assert layer.num_batches_tracked == 6 * per_update


def test_mbn_evaluates_by_the_rule_it_trains_by():
    layer = vary(make_norm("mbn")(C, dtype=torch.float64))
    for x in batches((3, C, 4, 4), 4):
        y = layer(x)
    torch.testing.assert_close(layer.eval()(x), y)


@pytest.mark.parametrize("options", [{"memory": 1}, {"momentum": 1.0}, {}], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_mbn_without_a_past_is_bn(options, affine):
    layer = vary(make_norm("mbn", **options)(C, affine=affine, dtype=torch.float64))
    twin = bn_of(layer, momentum=1.0)
    for x in batches((3, C, 4, 4), 3 if options else 1):
        x.requires_grad_()
        y, expected, g = layer(x), twin(x), torch.randn(x.shape, dtype=x.dtype)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y, [x, *layer.parameters()], g),
            torch.autograd.grad(expected, [x, *twin.parameters()], g),
        )
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    if "momentum" in options:  # no memory at all: bn's buffer, unbiased
        torch.testing.assert_close(layer.running_var, twin.running_var)


@pytest.mark.parametrize("shape", [(3, C), (2, C, 3, 2)], ids=str)
def test_mbn_has_exact_first_and_second_derivatives(shape):
    layer = make_norm("mbn", momentum=0.4)(C, dtype=torch.float64)
    for x in batches(shape, 3):
        layer(x)

    def f(x, weight, bias):
        with hold(layer):
            return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = [batches(shape, 1)[0], torch.linspace(0.5, 1.5, C).double(), torch.linspace(-1, 1, C).double()]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


# --- mbn: whose look is whose -----------------------------------------------------------------------------------------


def test_more_looks_than_forwards_change_nothing():
    layer = make_norm("mbn")(C)
    xs = batches((3, C, 4, 4), 4, torch.float32)
    layer(xs[0])
    after_update(layer, lambda: layer(xs[1]), 0.5)
    before = state(layer)
    after_update(layer, lambda: None, 0.6)  # an update without a forward
    after_update(layer, lambda: [layer(x) for x in xs], 0.7)
    after = state(layer)
    for key in ("running_mean", "running_var", "memory_mean", "memory_var", "num_batches_tracked"):
        assert torch.equal(before[key], after[key]), key
    layer(xs[2])
    after_update(layer, lambda: [layer(x) for x in xs], 0.8)
    torch.testing.assert_close(layer.memory_mean[:2], torch.stack([xs[0].mean((0, 2, 3)), xs[1].mean((0, 2, 3))]))


def test_a_look_at_an_empty_memory_leaves_the_start():
    layer = make_norm("mbn")(C)
    after_update(layer, lambda: layer(torch.randn(3, C, 4, 4)), 0.5)
    assert layer.running_mean.abs().max() == 0
    assert layer.running_var.min() == 1
    assert not layer.memory_number.any()


def test_the_support_of_maml_is_not_looked_at_again():
    layer = make_norm("mbn", memory=4)(C)
    xs = batches((3, C, 4, 4), 6, torch.float32)
    for i in (0, 2):
        with situation(layer, part="context"):
            layer(xs[i])
        with situation(layer, part="query"):
            layer(xs[i + 1])
    after_update(layer, lambda: [layer(xs[4]), layer(xs[5])], 0.5)
    order = [xs[i].mean((0, 2, 3)) for i in (5, 2, 4, 0)]  # newest first: look 2, support 2, look 1, support 1
    torch.testing.assert_close(layer.memory_mean, torch.stack(order))


def test_slices_are_looked_at_slice_by_slice():
    layer, twin = (make_norm("mbn", memory=5)(C) for _ in range(2))
    for x in batches((4, C, 3, 3), 3, torch.float32):

        def forward(x=x):
            with situation(layer, slices=2):
                layer(x)

        forward()
        after_update(layer, forward, 0.5)
        for part in (x[0::2], x[1::2]):
            twin(part)
        after_update(twin, lambda x=x: (twin(x[0::2]), twin(x[1::2])), 0.5)
        same_state(state(layer), state(twin))


@pytest.mark.parametrize("sizes", [(6, 6), (4, 8)], ids=str)
def test_recalibrated_mbn_has_the_moments_of_all_values(sizes):
    net = Net(make_norm("mbn"))
    for x in batches((3, 2, 4, 4), 4):
        net(x)
        after_update(net, lambda x=x: net(x), 0.5)
    x = torch.cat(batches((4, 2, 4, 4), 3))
    recalibrate(net, x.split(sizes))
    values = net.conv(x).detach().movedim(1, 0).flatten(1)
    torch.testing.assert_close(net.norm.running_mean, values.mean(1))
    torch.testing.assert_close(net.norm.running_var, values.var(1))
    assert net.norm.momentum == 0.1


def test_recalibrated_cbn_has_the_moments_of_all_values_and_no_history():
    net = Net(make_norm("cbn", burn_in=0.0))
    for x in batches((3, 2, 4, 4), 4):
        net(x)
    x = torch.cat(batches((4, 2, 4, 4), 3))
    recalibrate(net, x.split(6))
    values = net.conv(x).detach().movedim(1, 0).flatten(1)
    torch.testing.assert_close(net.norm.running_mean, values.mean(1))
    torch.testing.assert_close(net.norm.running_var, values.var(1))
    assert net.norm.past_count == 0


# --- cbn: the equation ------------------------------------------------------------------------------------------------


class LiteralCbn:
    """The paper's rule with lists, in the second moment nu, each channel's derivative by itself."""

    def __init__(self, size, invalid, eps_outside):
        self.size, self.invalid, self.eps_outside, self.past, self.dropped = size, invalid, eps_outside, [], 0

    def __call__(self, y, w, layer):
        mu, nu = [], []
        for c in range(C):
            v = y[:, c]
            mu.append(v.sum() / v.numel())
            nu.append((v * v).sum() / v.numel())
        means, variances = [], []
        for c in range(C):
            window = [(mu[c], nu[c])]
            for past in self.past:
                change = w.detach()[c] - past["w"][c]
                a = past["mu"][c] + (past["dmu"][c] * change).sum()
                b = past["nu"][c] + (past["dnu"][c] * change).sum()
                if b < a * a:
                    self.dropped += 1
                    if self.invalid == "drop":
                        continue
                    b = a * a
                window.append((a, b))
            mean = sum(m for m, _ in window) / len(window)
            means.append(mean)
            variances.append(sum(n for _, n in window) / len(window) - mean**2)
        derivatives = [
            torch.stack([torch.autograd.grad(s[c], w, retain_graph=True)[0][c] for c in range(C)]) for s in (mu, nu)
        ]
        entry = {"w": w.detach().clone(), "mu": torch.stack(mu).detach(), "nu": torch.stack(nu).detach()}
        self.past = [entry | dict(zip(("dmu", "dnu"), derivatives, strict=True)), *self.past][: self.size]
        return normalized(y, torch.stack(means), torch.stack(variances), layer, self.eps_outside)


@pytest.mark.parametrize(
    ("shape", "options", "groups", "affine"),
    [
        ((3, 2, 4, 5), {}, 1, True),
        ((3, 2, 5), {"buffer_num": 2}, 1, True),
        ((2, 2, 3, 3, 2), {"invalid": "clamp"}, 1, False),
        ((3, 2, 4, 5), {"invalid": "clamp", "eps_outside": True}, 1, True),
        ((3, 2, 4, 5), {"buffer_num": 1}, 2, True),  # grouped
        ((3, C, 4, 5), {"eps_outside": True}, C, False),  # depthwise
    ],
    ids=str,
)
def test_cbn_is_the_equation_over_updates(shape, options, groups, affine):
    """Steps that grow until some corrected entries have no variance; the history takes no gradient."""
    net = Net(make_norm("cbn", burn_in=0.0, **options), len(shape), groups=groups, affine=affine, channels_in=shape[1])
    layer = net.norm
    literal = LiteralCbn(
        options.get("buffer_num", 3), options.get("invalid", "drop"), options.get("eps_outside", False)
    )
    twin = bn_of(layer)
    for step, x in enumerate(batches(shape, 8)):
        x.requires_grad_()
        y = net(x)
        truth = literal(net.conv(x), net.conv.weight, layer)
        twin(net.conv(x))
        torch.testing.assert_close(y, truth)
        pull = pulls(1, x)[0]
        inputs = [x, *net.parameters()]
        grads = torch.autograd.grad(y, inputs, pull)
        torch.testing.assert_close(grads, torch.autograd.grad(truth, inputs, pull))
        torch.testing.assert_close(layer.running_mean, twin.running_mean)
        torch.testing.assert_close(layer.running_var, twin.running_var)
        with torch.no_grad():
            rate = [0.02, 0.02, 0.02, 0.1, 0.3, 1.0, 3.0, 3.0][step]
            for p, g in zip(net.parameters(), grads[1:], strict=True):
                p.sub_(g, alpha=rate * p.abs().mean() / math.sqrt(g.square().mean()))
        after_update(net, lambda: None, 1.0)
    assert literal.dropped > 0
    with torch.no_grad():
        expected = normalized(net.conv(x), layer.running_mean, layer.running_var, layer, layer.eps_outside)
        torch.testing.assert_close(net.eval()(x), expected)


def kept(layer):
    """mean' and nu' of the layer's one entry at a weight."""

    def at(weight):
        past = layer._past(weight, torch.float64)
        return past.mean, past.var + past.mean**2

    return at


@pytest.mark.parametrize("groups", [1, 2])
def test_a_corrected_mean_is_exact_and_the_second_moment_off_by_a_square(groups):
    net = Net(make_norm("cbn", buffer_num=1, burn_in=0.0), groups=groups)
    x = batches((4, 2, 6, 6), 1)[0]
    net(x)
    start = net.conv.weight.detach().clone()
    change = torch.randn_like(start) * 0.02
    errors = []
    for size in (1.0, 0.5):
        with torch.no_grad():
            net.conv.weight.copy_(start + size * change)
            y = net.conv(x).movedim(1, 0).flatten(1)
        mean, nu = kept(net.norm)(net.conv.weight)
        torch.testing.assert_close(mean, y.mean(1), rtol=1e-10, atol=1e-10)
        errors.append((nu - y.square().mean(1)).abs())
    assert errors[0].min() > 1e-8
    torch.testing.assert_close(errors[0] / errors[1], torch.full((C,), 4.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_cbn_follows_moving_weights_where_the_past_as_it_was_does_not():
    """One batch at moving weights: what bn gives is right."""
    corrected, plain = Net(make_norm("cbn", burn_in=0.0)), Net(make_norm("cbn", burn_in=0.0))
    x, errors = batches((4, 2, 6, 6), 1)[0] + 1, []
    for net in (corrected, plain):
        for _ in range(4):
            errors.append((net(x) - bn_of(net.norm)(net.conv(x))).abs().max())
            with torch.no_grad():
                net.conv.weight.add_(0.0005)
                if net is plain:
                    net.norm.past_dmean.zero_()
                    net.norm.past_dvar.zero_()
    assert errors[3] < 0.2 * errors[7]


# --- cbn: where it is bn ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{"buffer_num": 0, "burn_in": 0.0}, {"burn_in": 0.5}], ids=str)
def test_cbn_without_a_history_is_bn(options, momentum):
    net = Net(make_norm("cbn", momentum=momentum, **options), dtype=torch.float32)
    twin = bn_of(net.norm, momentum)
    for i, x in enumerate(batches((3, 2, 4, 4), 4, torch.float32)):
        y, z = net(x), net.conv(x)
        expected = twin(z)
        assert torch.equal(y, expected)
        g = torch.randn_like(y)
        torch.testing.assert_close(
            torch.autograd.grad(y, [net.conv.weight, *net.norm.parameters()], g),
            torch.autograd.grad(expected, [net.conv.weight, *twin.parameters()], g),
        )
        after_update(net, lambda: None, 0.1 * i)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(net.norm, name), getattr(twin, name))
    assert torch.equal(net.eval()(x), twin.eval()(net.conv(x)))
    assert net.norm.equivalent_to == (None if options.get("buffer_num", 3) else "bn")
    assert net.norm.past_count == 0


def test_cbn_leaves_its_burn_in_when_progress_says_so():
    net = Net(make_norm("cbn", burn_in=0.5))
    x, other = batches((3, 2, 4, 4), 2)
    for progress, entries in ((0.25, 0), (0.49, 0), (0.5, 0), (0.75, 1), (1.0, 2)):
        net(x)
        assert net.norm.past_count == entries
        after_update(net, lambda: None, progress)
    expected = bn_of(net.norm)(net.conv(other))
    assert (net(other) - expected).abs().max() > 0.1


def test_cbn_on_one_batch_at_one_weight_is_bn():
    net = Net(make_norm("cbn", burn_in=0.0))
    x = batches((3, 2, 4, 4), 1)[0]
    for _ in range(6):
        torch.testing.assert_close(net(x), bn_of(net.norm)(net.conv(x)))
    assert net.norm.past_count == 6


# --- cbn: whose derivatives -------------------------------------------------------------------------------------------


def test_without_gradients_the_history_is_used_and_nothing_enters_it():
    net = Net(make_norm("cbn", burn_in=0.0))
    a, b = batches((3, 2, 4, 4), 2)
    net(a)
    with torch.no_grad():
        before, y = state(net.norm), net(b)
    assert torch.equal(before["past_count"], net.norm.past_count)
    assert torch.equal(before["past_mean"], net.norm.past_mean)
    torch.testing.assert_close(y, net(b).detach())
    assert net.norm.past_count == 2


def test_a_frozen_convolution_needs_no_derivative():
    net, free = (Net(make_norm("cbn", burn_in=0.0)) for _ in range(2))
    net.conv.weight.requires_grad_(False)
    for x in batches((3, 2, 4, 4), 5):
        torch.testing.assert_close(net(x), free(x))
    assert net.norm.past_count == 5
    assert net.norm.past_dmean.abs().max() == 0


def test_no_graph_outlives_its_step():
    net = Net(make_norm("cbn", burn_in=0.0))
    for x in batches((3, 2, 4, 4), 2):
        hidden = net.conv(x)
        seen = weakref.ref(hidden)
        net.norm(hidden, weight=net.conv.weight)
        del hidden
        gc.collect()
        assert seen() is None
    assert not any(b.requires_grad for b in net.norm.buffers())


def test_weights_inside_a_second_order_graph():
    """MAML: the weight is no leaf, and its gradient is differentiated."""
    net = Net(make_norm("cbn", burn_in=0.0))
    support, query, other = batches((4, 2, 4, 4), 3)
    net(other)
    start = net.conv.weight

    def meta(layer, w):
        hidden = F.conv2d(support, w, padding=1)
        inner = layer(hidden, weight=w).pow(3).sum()
        adapted = w - 0.01 * torch.autograd.grad(inner, w, create_graph=True)[0]
        hidden = F.conv2d(query, adapted, padding=1)
        return layer(hidden, weight=adapted).pow(3).sum(), adapted

    copies = copy.deepcopy(net.norm)
    loss, adapted = meta(net.norm, start)
    gradient = torch.autograd.grad(loss, start)[0]
    assert gradient.isfinite().all()
    assert torch.equal(net.norm.past_weight[2], adapted.detach().flatten(1))
    # the history constant, a literal composition has the same second-order gradient
    literal = LiteralCbn(3, "drop", False)
    literal(net.conv(other), start, copies)
    hidden = F.conv2d(support, start, padding=1)
    inner = literal(hidden, start, copies).pow(3).sum()
    fast = start - 0.01 * torch.autograd.grad(inner, start, create_graph=True)[0]
    truth = literal(F.conv2d(query, fast, padding=1), fast, copies).pow(3).sum()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradient, torch.autograd.grad(truth, start)[0])


def test_under_autocast_derivatives_are_those_of_statistics_in_float32():
    net = Net(make_norm("cbn", burn_in=0.0), dtype=torch.float32)
    x = (torch.randn(8, 2, 16, 16) + 5).bfloat16().float()
    with torch.no_grad():
        net.conv.weight.copy_(net.conv.weight.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    assert y.dtype == torch.bfloat16
    assert all(b.dtype == torch.float32 for b in net.norm.buffers() if b.is_floating_point())
    hidden = F.conv2d(x.double(), net.conv.weight.detach().double(), padding=1)
    n = hidden.numel() // C
    for got, pull in (
        (net.norm.past_dmean, torch.ones_like(hidden) / n),
        (net.norm.past_dvar, 2 * (hidden - hidden.mean((0, 2, 3), keepdim=True)) / n),
    ):
        expected = conv2d_weight(x.double(), net.conv.weight.shape, pull, padding=1).flatten(1)
        torch.testing.assert_close(got[0].double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_weight_of_another_size_starts_a_new_history():
    layer = make_norm("cbn", burn_in=0.0)(C)
    for size in (3, 3, 1):
        weight = torch.randn(C, 2, size, size, requires_grad=True)
        x = F.conv2d(torch.randn(3, 2, 5, 5), weight)
        y = layer(x, weight=weight)
    torch.testing.assert_close(y, make_norm("bn")(C)(x))
    assert layer.past_weight.shape == (3, C, 2)
    assert layer.past_count == 1


# --- both: numbers, formats, what is kept -----------------------------------------------------------------------------


def trained(name, count=5, **options):
    if name == "cbn":
        options.setdefault("burn_in", 0.0)
    net = Net(make_norm(name, **options))
    return step(net, batches((3, 2, 4, 4), count))


def step(net, data, progress=0.5):
    for x in data:
        y = net(x)
        grads = torch.autograd.grad(y.square().sum(), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads, strict=True):
                p.sub_(g, alpha=1e-3)
        after_update(net, lambda x=x: net(x), progress)
    return net


NAMES = ["mbn", "cbn"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_survives_large_means_in_float32(name, layout):
    """x of mean 1e4 and deviation 1 through a depthwise 1x1 convolution whose weight moves."""
    torch.manual_seed(0)
    options = {"burn_in": 0.0} if name == "cbn" else {}
    single, double = (make_norm(name, **options)(C, dtype=dtype) for dtype in (torch.float32, torch.float64))
    for i in range(4):
        x = (torch.randn(8, C, 16, 16) + 1e4).contiguous(memory_format=layout)
        outputs = []
        for layer, dtype in ((single, torch.float32), (double, torch.float64)):
            weight = torch.full((C, 1, 1, 1), 1 + i / 1024, dtype=dtype, requires_grad=True)
            y = x.to(dtype) * weight.view(1, C, 1, 1)
            outputs.append(layer(y, **({"weight": weight} if name == "cbn" else {})))
        assert outputs[0].is_contiguous(memory_format=layout)
        # bn's own kernel is off by 1e-3, and by 1e-2 for channels_last
        atol = 3e-3 if layout is torch.contiguous_format else 2e-2
        torch.testing.assert_close(outputs[0].double(), outputs[1], atol=atol, rtol=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_input_is_computed_in_float32(name):
    net = Net(make_norm(name, **({"burn_in": 0.0} if name == "cbn" else {})), dtype=torch.float32)
    twin = copy.deepcopy(net)
    inputs = {"weight": net.conv.weight} if name == "cbn" else {}
    others = {"weight": twin.conv.weight} if name == "cbn" else {}
    for x in batches((3, 2, 4, 4), 3, torch.float32):
        hidden = net.conv(x).bfloat16()
        y = net.norm(hidden, **inputs)
        # a straight-through cast, so that both know the same derivative
        z = twin.conv(x)
        expected = twin.norm(z + (hidden.float() - z).detach(), **others)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16())
    assert all(b.dtype == torch.float32 for b in net.norm.buffers() if b.is_floating_point())


@pytest.mark.parametrize("name", NAMES)
def test_resumes_from_a_file_with_the_same_future(name):
    net = trained(name)
    fresh = Net(make_norm(name, **({"burn_in": 0.0} if name == "cbn" else {})), seed=9)
    fresh.load_state_dict(through_a_file(net), strict=True)
    more = batches((3, 2, 4, 4), 4)
    step(net, more), step(fresh, more)
    same_state(state(net), state(fresh))
    empty = Net(make_norm(name, **({"burn_in": 0.0} if name == "cbn" else {})))
    net.load_state_dict(through_a_file(empty), strict=True)  # a filled layer becomes empty
    step(net, more), step(empty, more)
    same_state(state(net), state(empty))


def test_a_history_of_other_sizes_is_refused():
    net, other = trained("cbn"), Net(make_norm("cbn", buffer_num=2))
    with pytest.raises(RuntimeError, match="size mismatch for norm"):
        other.load_state_dict(net.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_and_hold_moves_nothing(name):
    net = trained(name)
    twin, before, tensors = copy.deepcopy(net), state(net.norm), [id(b) for b in net.norm.buffers()]
    more = batches((3, 2, 4, 4), 3)
    step(twin, more, progress=0.9)
    same_state(before, state(net.norm))
    with hold(net):
        for x in more:
            net(x)
    same_state(before, state(net.norm))
    assert tensors == [id(b) for b in net.norm.buffers()]
    step(net, more, progress=0.9)
    same_state(state(net), state(twin))


@pytest.mark.parametrize("name", NAMES)
def test_hold_keeps_a_fresh_layer_fresh(name):
    net = Net(make_norm(name, **({"burn_in": 0.0} if name == "cbn" else {})))
    before = state(net.norm)
    with hold(net):
        net(batches((3, 2, 4, 4), 1)[0])
    same_state(before, state(net.norm))


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_the_past(name):
    net = trained(name)
    net.norm.reset_running_stats()
    assert net.norm.running_mean.abs().max() == 0
    assert net.norm.running_var.min() == net.norm.running_var.max() == 1
    assert net.norm.num_batches_tracked == 0
    x = batches((3, 2, 4, 4), 1)[0]
    torch.testing.assert_close(net(x), bn_of(net.norm)(net.conv(x)))


@pytest.mark.parametrize("name", NAMES)
def test_steps_on_the_meta_device_and_a_fake_cuda_forward(name):
    net = conv_norm_act(
        2, C, 3, norm=make_norm(name, **({"burn_in": 0.0} if name == "cbn" else {})), activation=None, device="meta"
    )
    for _ in range(2):
        net(torch.empty(3, 2, 4, 4, device="meta")).sum().backward()
        after_update(net, lambda: net(torch.empty(3, 2, 4, 4, device="meta")), 0.5)
    assert net.norm.weight.grad.is_meta
    assert all(b.is_meta for b in net.norm.buffers())
    with torch._subclasses.FakeTensorMode():
        layer = make_norm(name)(C, device="cuda")
        weight = {"weight": torch.empty(C, 2, 3, 3, device="cuda")} if name == "cbn" else {}
        for mode in (True, False):
            assert layer.train(mode)(torch.empty(3, C, 4, 4, device="cuda"), **weight).device.type == "cuda"
        if name == "mbn":
            after_update(layer.train(), lambda: layer(torch.empty(3, C, 4, 4, device="cuda")), 0.5)
        else:
            # of a frozen weight no derivative is taken, which a pretended device has not
            layer.train().after_update(1.0)
            for _ in range(2):
                assert layer(torch.empty(3, C, 4, 4, device="cuda"), **weight).device.type == "cuda"


def call_cbn(x, weight, **options):
    return make_norm("cbn", **{"burn_in": 0.0, **options})(C)(x, weight=weight)


@pytest.mark.parametrize(
    ("build_and_call", "words"),
    [
        (lambda: make_norm("mbn", memory=0)(C), "memory=0"),
        (lambda: make_norm("mbn", momentum=None)(C), "momentum"),
        (lambda: make_norm("mbn", momentum=1.5)(C), "momentum=1.5"),
        (lambda: make_norm("mbn", eps=0.0)(C), "eps=0.0"),
        (lambda: make_norm("mbn")(0), "num_channels=0"),
        (lambda: make_norm("mbn")(C)(torch.randn(1, C, 1, 1)), "more than 1 value"),
        (lambda: make_norm("mbn")(C)(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("mbn")(C).eval()(torch.randn(2, 5, 3, 3)), "4 channels"),
        (lambda: make_norm("cbn", buffer_num=-1)(C), "buffer_num=-1"),
        (lambda: make_norm("cbn", burn_in=1.5)(C), "burn_in=1.5"),
        (lambda: make_norm("cbn", invalid="keep")(C), "invalid"),
        (lambda: make_norm("cbn")(C)(torch.randn(2, C, 3, 3)), "weight of the convolution before it, and none"),
        (lambda: make_norm("cbn")(C).eval()(torch.randn(2, C, 3, 3)), "none was passed"),
        (lambda: call_cbn(torch.randn(2, C, 3, 3), torch.randn(5, 2, 3, 3)), r"must be \(4, \*\)"),
        (lambda: call_cbn(torch.randn(1, C, 1, 1), torch.randn(C, 2, 1, 1)), "more than 1 value"),
        (lambda: call_cbn(torch.randn(2, 5, 3, 3), torch.randn(C, 2, 1, 1)), "4 channels"),
        (lambda: call_cbn(torch.randn(2, C, 3, 3), torch.randn(C, 2, 1, 1, requires_grad=True)), "does not depend"),
        (
            lambda: call_cbn(torch.randn(2, C, 3, 3, requires_grad=True), torch.randn(C, 2, 1, 1, requires_grad=True)),
            "does not depend",
        ),
    ],
)
def test_bad_input_is_a_clear_value_error(build_and_call, words):
    with pytest.raises(ValueError, match=words):
        build_and_call()


def test_cbn_with_eps_outside_is_finite_where_nothing_varies():
    layer = make_norm("cbn", burn_in=0.0, eps_outside=True)(C)
    weight = torch.zeros(C, 2, 1, 1, requires_grad=True)
    for _ in range(2):
        y = layer(F.conv2d(torch.ones(2, 2, 3, 3), weight), weight=weight)
        assert torch.autograd.grad(y.sum() + y.square().sum(), weight)[0].isfinite().all()


def test_what_a_recalibration_in_the_middle_of_training_forwards_is_not_looked_at_again():
    layer = make_norm("mbn")(3, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    batches = torch.randn(3, 8, 3, 4, 4, generator=draw, dtype=torch.float64)
    recalibrate(layer, [batches[0], batches[1] + 1])
    layer(batches[2])
    before = layer.memory_mean.clone()
    look = batches[2] + 5
    after_update(layer, lambda: layer(look), 0.5)
    torch.testing.assert_close(layer.memory_mean[0], look.mean((0, 2, 3)))
    assert torch.equal(layer.memory_mean[1:], before[1:])


def test_defaults_of_what_is_remembered():
    assert make_norm("mbn")(3).memory == 3
    assert (make_norm("cbn")(3).buffer_num, make_norm("cbn")(3).burn_in) == (3, 0.1)

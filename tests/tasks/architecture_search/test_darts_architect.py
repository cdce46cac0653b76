"""The architecture's gradient against a float64 finite difference; what a search step may and may not change."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parts.norm_choices import one_of_each_kind
from torch import nn

from norms import registry
from norms.registry import make_norm, norm_names, norm_option_defaults
from tasks.architecture_search import architect
from tasks.architecture_search.architect import (
    SearchStepOptions,
    architecture_optimizer,
    architecture_step,
    first_order_gradient,
    second_order_gradient,
    weights_step,
)
from tasks.architecture_search.genotype import OPERATIONS
from tasks.architecture_search.networks import SearchNetwork
from tasks.base import Diverged
from tasks.schedule import sgd

OPTIONS = {n: {"num_groups": 2} for n in norm_names() if "num_groups" in norm_option_defaults(n)}


def generator(purpose):
    return torch.Generator().manual_seed(sum(purpose.encode()))


def build(norm="bn", **options):
    factory = make_norm(norm, **OPTIONS.get(norm, {}))
    facts = {"in_channels": 1, "num_classes": 3, "generator": generator} | options
    return SearchNetwork(2, 3, norm=factory, **facts)


def batch(seed, n=8, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=draw).to(dtype), torch.arange(n) % 3


def optimizers(net, rate=0.05, momentum=0.9):
    weights = sgd(net.body, learning_rate=rate, momentum=momentum, weight_decay=0.01, nesterov=False)
    return weights, architecture_optimizer(net, 0.1, 1e-3)


def state(net):
    return {name: value.clone() for name, value in net.state_dict().items() if isinstance(value, torch.Tensor)}


def assert_same(one, two, but=()):
    assert one.keys() == two.keys()
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert {name for name in moved if not name.startswith(tuple(but))} == set()
    return moved


# The gradient


def smooth(net):
    """Every relu a softplus, every max pooling an average: the unrolled loss is then smooth in the architecture."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(3, child.stride, 1, count_include_pad=False))
    return net


def unrolled_case(momentum):
    net = smooth(build("gn", generator=generator)).double()
    with torch.no_grad():
        for parameter in net.architecture.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    weights, _ = optimizers(net, rate=0.2, momentum=momentum)
    training, held_out = batch(1, dtype=torch.float64), batch(2, dtype=torch.float64)
    # one ordinary step first, so that there is a momentum
    weights_step(net, weights, batch(3, dtype=torch.float64), SearchStepOptions())

    def loss_on(part):
        return F.cross_entropy(net(part[0]), part[1])

    return net, weights, lambda: loss_on(training), lambda: loss_on(held_out)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_second_order_agrees_with_the_finite_difference_of_the_unrolled_loss(momentum):
    net, weights, train_loss, held_out_loss = unrolled_case(momentum)
    architecture = list(net.architecture.parameters())
    gradient = second_order_gradient(architecture, weights, train_loss, held_out_loss)

    def unrolled_loss():
        """L_val after the optimizer's own step, taken on copies of weights and momentum."""
        before, memory = state(net.body), copy.deepcopy(weights.state_dict())
        weights.zero_grad()
        for parameter, g in zip(
            net.body.parameters(), torch.autograd.grad(train_loss(), list(net.body.parameters())), strict=True
        ):
            parameter.grad = g
        weights.step()
        value = held_out_loss().item()
        net.body.load_state_dict(before, strict=False)
        weights.load_state_dict(memory)
        weights.zero_grad()
        return value

    draw = torch.Generator().manual_seed(5)
    measured, expected = [], []
    for _ in range(4):
        direction = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in architecture]
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for parameter, d in zip(architecture, direction, strict=True):
                    parameter.add_(d, alpha=sign * 1e-4)
            values.append(unrolled_loss())
            with torch.no_grad():
                for parameter, d in zip(architecture, direction, strict=True):
                    parameter.sub_(d, alpha=sign * 1e-4)
        measured.append((values[0] - values[1]) / 2e-4)
        expected.append(sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item())
    # over all directions together: one that is nearly orthogonal to the gradient has no relative precision of its own
    measured, expected = torch.tensor(measured), torch.tensor(expected)
    error = (measured - expected).norm() / measured.norm()
    assert error < 1e-3, f"relative error {error:.2e}"


def test_the_second_order_term_is_not_negligible_where_it_is_tested():
    net, weights, train_loss, held_out_loss = unrolled_case(0.9)
    architecture = list(net.architecture.parameters())
    second = second_order_gradient(architecture, weights, train_loss, held_out_loss)
    first = first_order_gradient(architecture, held_out_loss)
    assert all((s - f).norm() > 0.1 * f.norm() for s, f in zip(second, first, strict=True))


def test_first_order_is_second_order_at_rate_zero():
    net, weights, train_loss, held_out_loss = unrolled_case(0.9)
    architecture = list(net.architecture.parameters())
    for group in weights.param_groups:
        group["lr"] = 0.0
    second = second_order_gradient(architecture, weights, train_loss, held_out_loss)
    first = first_order_gradient(architecture, held_out_loss)
    assert all(torch.equal(s, f) for s, f in zip(second, first, strict=True))


def test_the_candidate_none_takes_weight_from_the_others_only():
    """Its term is left out of the sum; by the softmax it still has a gradient, the one of the literal sum."""
    net = build("gn").double()
    x, labels = batch(0, dtype=torch.float64)
    own = torch.autograd.grad(F.cross_entropy(net(x), labels), list(net.architecture.parameters()))
    literal = copy.deepcopy(net)
    for cell in literal.body.cells:
        for mixed in cell.edges:
            mixed.forward = literal_mixture(mixed)
    expected = torch.autograd.grad(F.cross_entropy(literal(x), labels), list(literal.architecture.parameters()))
    for one, two in zip(own, expected, strict=True):
        assert one[:, 0].abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def literal_mixture(mixed):
    """sum_o weight_o o(x) with `none` as zeros and each convolution's relu computed for itself."""

    def forward(x, positive, weights):
        terms = []
        for index in range(len(OPERATIONS)):
            if index == 0:
                some = mixed.candidates[2](x)  # a pooling: has the output's shape
                terms.append(weights[0] * torch.zeros_like(some))
            else:
                candidate, relu = mixed.candidates[index - 1], mixed.takes_relu[index - 1]
                terms.append(weights[index] * candidate(torch.relu(x) if relu else x))
        return sum(terms)

    return forward


class Sum(nn.Module):
    """Two weights whose gradients are one tensor, and one whose gradient is an expanded constant."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.one, self.two, self.three = (
            nn.Parameter(torch.randn(5, generator=draw, dtype=torch.float64)) for _ in range(3)
        )
        self.a = torch.randn(5, generator=draw, dtype=torch.float64).requires_grad_()

    def loss(self, scale):
        hidden = F.softplus((self.one + self.two) * self.a * scale)
        return hidden.square().sum() + self.three.sum() * self.a.sum() + (self.three * self.a).exp().mean()


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.1)])
def test_weights_whose_gradients_share_memory_are_each_stepped_once(momentum, decay):
    net = Sum()
    groups = [
        {"params": [net.one], "lr": 0.1, "weight_decay": decay},
        {"params": [net.two, net.three], "lr": 0.05, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, momentum=momentum)
    net.loss(0.7).backward()
    optimizer.step()
    optimizer.zero_grad()
    (gradient,) = second_order_gradient([net.a], optimizer, lambda: net.loss(1.0), lambda: net.loss(1.3))

    # the exact one: the step written out and differentiated by autograd
    weights = [net.one, net.two, net.three]
    inner = torch.autograd.grad(net.loss(1.0), weights, create_graph=True)
    moved = []
    for w, g, rate, own in zip(weights, inner, (0.1, 0.05, 0.05), (decay, 0.0, 0.0), strict=True):
        buffer = optimizer.state[w]["momentum_buffer"] if momentum else 0.0
        moved.append(w - rate * (g + own * w + momentum * buffer))
    copy_ = Sum()
    copy_.a = net.a
    del copy_.one, copy_.two, copy_.three
    copy_.one, copy_.two, copy_.three = moved
    (exact,) = torch.autograd.grad(copy_.loss(1.3), [net.a])
    assert (gradient - exact).norm() < 1e-4 * exact.norm()


def test_both_sides_of_the_difference_start_from_the_same_statistics(monkeypatch):
    """A norm whose output depends on what it keeps would else add the change of that to the gradient."""

    @registry.register(name="counts", source="test", mixes_samples=False, keeps_stats=False)
    class Counts(nn.Module):
        def __init__(self, num_channels, *, affine: bool = True):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.calls += 1
            return x * self.calls

    net = build("counts")
    weights, adam = optimizers(net)
    calls = [b for name, b in net.named_buffers() if name.endswith("calls")]
    seen = []
    forward = net.body.forward

    def spy(*inputs):
        y = forward(*inputs)
        seen.append({float(dict(net.named_buffers())["body.stem.norm.calls"])})
        return y

    monkeypatch.setattr(net.body, "forward", spy)
    architecture_step(net, weights, adam, batch(0), batch(1), SearchStepOptions(second_order=True))
    assert seen == [{1.0}] * 4
    assert all(c == 0 for c in calls)


# What a step changes


SERVED = norm_names(without=["domain", "context", "conv_weight"])
KINDS = one_of_each_kind(SERVED)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        pytest.param(name, order, marks=() if name in KINDS[order == "second" :: 2] else pytest.mark.slow)
        for name in SERVED
        for order in ("first", "second")
    ],
)
def test_an_architecture_step_moves_the_architecture_alone(name, order):
    net = build(name)
    weights, adam = optimizers(net)
    options = SearchStepOptions(second_order=order == "second")
    weights_step(net, weights, batch(0), options)
    before, momenta = state(net), copy.deepcopy(weights.state_dict()["state"])
    loss = architecture_step(net, weights, adam, batch(1), batch(2), options)
    assert torch.isfinite(loss)
    moved = assert_same(before, state(net), but=["architecture."])
    assert moved == {"architecture.normal", "architecture.reduce"}
    after = weights.state_dict()["state"]
    assert all(torch.equal(momenta[k]["momentum_buffer"], after[k]["momentum_buffer"]) for k in momenta)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("order", "batches"), [("first", 1), ("second", 3)])
def test_statistics_move_in_architecture_steps_only_where_that_is_asked_for(order, batches):
    """Asked for, they move with each forward of the published code but the one on its unrolled copy: with one batch,
    or the unrolled training loss and the two of the difference."""
    net = build("bn")
    weights, adam = optimizers(net)
    counts = [b for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    for move, expected in ((False, 0), (True, batches)):
        options = SearchStepOptions(second_order=order == "second", move_statistics=move)
        architecture_step(net, weights, adam, batch(1), batch(2), options)
        assert {int(c) for c in counts} == {expected}


def test_a_weights_step_leaves_the_architecture_and_is_the_plain_step():
    net = build("bn")
    plain = copy.deepcopy(net)
    weights, _ = optimizers(net)
    reference, _ = optimizers(plain)
    for seed in range(3):
        loss, correct = weights_step(net, weights, batch(seed), SearchStepOptions(gradient_clip=0.5))
        images, labels = batch(seed)
        reference.zero_grad()
        logits = plain(images)
        expected = F.cross_entropy(logits, labels)
        expected.backward()
        assert nn.utils.clip_grad_norm_(plain.body.parameters(), 0.5) > 0.5
        reference.step()
        torch.testing.assert_close(loss, expected.detach())
        assert correct == (logits.argmax(1) == labels).sum()
    stepped = state(net)
    for name, value in state(plain).items():
        torch.testing.assert_close(stepped[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(net.architecture.normal, plain.architecture.normal)


@pytest.mark.parametrize("order", ["first", "second"])
def test_the_norm_batch_reaches_every_forward(order):
    """Halving the norm batch of doubled data changes nothing for bn, whose slices are then the single batches."""
    single = (torch.arange(4) % 3, torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    images, labels = single[1].repeat_interleave(2, 0), single[0].repeat_interleave(2, 0)
    results = []
    for pair, slices in (((single[1], single[0]), 1), ((images, labels), 2)):
        net = build("bn")
        weights, adam = optimizers(net)
        options = SearchStepOptions(slices=slices, second_order=order == "second")
        architecture_step(net, weights, adam, pair, pair, options)
        weights_step(net, weights, pair, options)
        results.append(torch.cat([p.flatten() for p in net.parameters()]))
    # Adam's first step is the gradient's sign nearly, so a gradient of rounding noise would show as a difference
    assert (results[0] - results[1]).abs().median() < 1e-5
    torch.testing.assert_close(results[0][:200], results[1][:200], rtol=1e-3, atol=1e-3)


def test_a_loss_that_is_not_finite_ends_the_step_and_leaves_the_weights():
    net = build("bn")
    weights, adam = optimizers(net)
    images, labels = batch(0)
    before = state(net)
    bad = (images * float("nan"), labels)
    for second in (False, True):
        options = SearchStepOptions(second_order=second)
        with pytest.raises(Diverged, match=r"step 7, architecture: the loss is nan; not finite: inputs images"):
            architecture_step(net, weights, adam, (images, labels), bad, options, step=7)
        assert_same(before, state(net))
    with pytest.raises(Diverged, match="step 3: the loss is nan"):
        weights_step(net, weights, bad, SearchStepOptions(), step=3)


def test_a_norm_that_looks_again_does_so_after_weights_steps_only(monkeypatch):
    calls = []
    monkeypatch.setattr(architect, "after_update", lambda net, again, progress: calls.append((again(), progress)))
    net = build("bn")
    weights, adam = optimizers(net)
    architecture_step(net, weights, adam, batch(0), batch(1), SearchStepOptions(second_order=True))
    assert calls == []
    weights_step(net, weights, batch(0), SearchStepOptions(), progress=0.25)
    assert [(tuple(logits.shape), progress) for logits, progress in calls] == [((8, 3), 0.25)]


@pytest.mark.parametrize("order", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_whole_search_steps_stay_on_the_meta_device(order):
    net = build("bn", device="meta", generator=None)
    weights, adam = optimizers(net)
    pair = (torch.empty(8, 1, 8, 8, device="meta"), torch.empty(8, dtype=torch.long, device="meta"))
    options = SearchStepOptions(second_order=order == "second")
    assert architecture_step(net, weights, adam, pair, pair, options).is_meta
    assert weights_step(net, weights, pair, SearchStepOptions())[0].is_meta


# Memory


def peak(call):
    """Most bytes that torch's CPU allocator had handed out at once during the call, beyond what was there before."""
    from torch.profiler import ProfilerActivity, profile

    call()  # what is made once (momentum, Adam's moments) is not the step's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = most = 0
    for event in sorted(memory_events(profiler), key=lambda e: e.ts):
        now += event.bytes
        most = max(most, now)
    return most


def memory_events(profiler):
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        with open(file.name, encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
    found = [e for e in events if e.get("name") == "[memory]"]
    assert found
    return [SimpleNamespace(ts=e["ts"], bytes=e["args"]["Bytes"]) for e in found]


@pytest.fixture(scope="module")
def peaks():
    """Peak memory of one search step: ours of both orders, and the same network summed by hand."""

    def ours(second):
        net = build("bn")
        weights, adam = optimizers(net)
        options = SearchStepOptions(second_order=second)

        def step():
            architecture_step(net, weights, adam, batch(0, 32), batch(1, 32), options)
            weights_step(net, weights, batch(0, 32), options)

        return peak(step), sum(4 * p.numel() for p in net.body.parameters())

    net = build("bn")
    for cell in net.body.cells:
        for mixed in cell.edges:
            mixed.forward = literal_mixture(mixed)
    weights, adam = optimizers(net)

    def by_hand():
        for (images, labels), optimizer in ((batch(1, 32), adam), (batch(0, 32), weights)):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()

    first, size = ours(False)
    second, _ = ours(True)
    architecture = sum(4 * p.numel() for p in net.architecture.parameters())
    return SimpleNamespace(first=first, second=second, by_hand=peak(by_hand), weights=size, architecture=architecture)


@pytest.mark.slow
def test_a_search_step_needs_no_more_memory_than_the_plain_sum(peaks):
    assert peaks.first <= 1.1 * peaks.by_hand


@pytest.mark.slow
def test_the_unrolled_step_adds_at_most_one_copy_of_weights_and_momenta(peaks):
    # the architecture's own gradient (1.8 kB) is not the weights'; 1 kB for scalars such as the vector's length
    assert peaks.second <= peaks.first + 2 * peaks.weights + peaks.architecture + 1024

"""MAML on learn2learn: gradients against a functional version, and what the inner loop does to statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import tasks.few_shot.maml as maml_module
from norms.protocol import norm_modules
from norms.registry import make_norm
from tasks.data.episodes import Episode, query_pool
from tasks.data.images import Split
from tasks.few_shot.evaluation import Pool
from tasks.few_shot.maml import Maml, StepStatistics, learner, maml_step
from tasks.few_shot.options import FewShotOptions
from tasks.nets.blocks import conv_norm_act

RATE, STEPS, WAY = 0.3, 2, 3
NORMS = [("none", {}), ("bn", {}), ("ln", {}), ("gn", {"num_groups": 2}), ("bgn", {"num_groups": 2})]


class Tiny(nn.Module):
    def __init__(self, name="bn", options=None, activation=None):
        super().__init__()
        norm = make_norm(name, **(options or {}))
        self.layer = conv_norm_act(1, 4, 3, norm=norm, activation=activation or nn.Softplus())
        self.head = nn.Linear(4, WAY)

    def forward(self, x):
        return self.head(self.layer(x).mean(dim=(2, 3)))


def network(name="bn", options=None, dtype=torch.float64):
    torch.manual_seed(0)
    return Tiny(name, options).to(dtype)


def task(seed=0, dtype=torch.float64, shot=2, queries=4):
    g = torch.Generator().manual_seed(seed)
    support = torch.randn(WAY * shot, 1, 6, 6, generator=g, dtype=dtype)
    query = torch.randn(WAY * queries, 1, 6, 6, generator=g, dtype=dtype)
    return support, torch.arange(WAY).repeat(shot), query, torch.arange(WAY).repeat(queries)


def maml(net, first_order=True, statistics="shared"):
    sets = StepStatistics(net, STEPS) if statistics == "per_step" else None
    return Maml(net, RATE, STEPS, first_order, statistics, sets)


def written_out(net, batch, detach):
    """The meta-loss by hand: plain dictionaries of weights, every step spelt out."""
    support, labels, query, truth = batch
    weights = dict(net.named_parameters())
    for _ in range(STEPS):
        loss = F.cross_entropy(functional_call(net, weights, (support,)), labels)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=not detach, allow_unused=True)
        weights = {
            name: w if g is None else w - RATE * (g.detach() if detach else g)
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        }
    return F.cross_entropy(functional_call(net, weights, (query,)), truth)


def meta_gradient(loss, net):
    gradients = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(net.parameters(), gradients, strict=True)]


@pytest.mark.parametrize(("name", "options"), NORMS)
@pytest.mark.parametrize("first_order", [True, False], ids=["first order", "second order"])
def test_loss_and_gradient_agree_with_a_functional_version_in_float64(name, options, first_order):
    """First order is the same as second order with detached inner gradients: `written_out` is that, literally."""
    net = network(name, options)
    ours, _ = maml(net, first_order).meta_loss(*task())
    theirs = written_out(net, task(), detach=first_order)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for a, b in zip(meta_gradient(ours, net), meta_gradient(theirs, net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_two_orders_differ_in_gradient_and_not_in_loss():
    net = network()
    (first, _), (second, _) = (maml(net, order).meta_loss(*task()) for order in (True, False))
    assert torch.equal(first, second)
    pairs = zip(meta_gradient(first, net), meta_gradient(second, net), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3


class Tied(nn.Module):
    """One weight in two places, one that is not learned, and one that no forward reaches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = (nn.Linear(5, 5, bias=bias) for bias in (False, True, True))
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("first_order", [True, False], ids=["first order", "second order"])
@pytest.mark.parametrize("build", [lambda: network(dtype=torch.float32), Tied], ids=["convolution", "tied"])
def test_steps_are_learn2learns_to_the_last_bit(build, first_order):
    torch.manual_seed(1)
    net = build()
    support, labels, query, truth = task(dtype=torch.float32)
    if isinstance(net, Tied):
        support, query = (images[:, 0, 0, :5].contiguous() for images in (support, query))
    library = maml_module.import_legacy("learn2learn", "this test")
    theirs = library.algorithms.MAML(net, RATE, first_order, allow_unused=True, allow_nograd=True).clone()
    for _ in range(STEPS):
        theirs.adapt(F.cross_entropy(theirs(support), labels))
    ours = maml(net, first_order).adapted(support, labels, steps=STEPS, training=True)
    assert not all(torch.equal(a, w) for a, w in zip(ours.parameters(), net.parameters(), strict=True))
    for a, b in zip(ours.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(a, b)
    learned = [p for p in net.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(F.cross_entropy(adapted(query), truth), learned, materialize_grads=True, allow_unused=True)
        for adapted in (ours, theirs)
    ]
    assert any(g.any() for g in gradients[0])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def statistics(net):
    return {name: b.clone() for name, b in net.named_buffers()}


def count(net):
    return [int(norm.num_batches_tracked) for _, norm in norm_modules(net)]


def test_shared_statistics_are_moved_by_every_forward():
    net = network()
    maml(net).meta_loss(*task())
    assert count(net) == [STEPS + 1]


def test_with_none_only_the_forward_of_queries_moves_statistics():
    net = network()
    before = statistics(net)
    runner = maml(net, statistics="none")
    support, labels, query, truth = task()
    runner.adapted(support, labels, steps=STEPS, training=True)
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    runner.meta_loss(support, labels, query, truth)
    assert count(net) == [1]
    expected = network()
    expected.load_state_dict(net.state_dict() | before)
    maml(expected, statistics="none").adapted(support, labels, steps=STEPS, training=True)(query)
    assert torch.equal(expected.layer.norm.running_mean, net.layer.norm.running_mean)


def test_every_step_has_statistics_of_its_own_and_the_networks_stay():
    net = network()
    before = statistics(net)
    runner = maml(net, statistics="per_step")
    runner.meta_loss(*task())
    runner.meta_loss(*task(1))
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    means = []
    for step in range(STEPS + 1):
        with runner.sets.step(net, step):
            assert count(net) == [2]
            means.append(net.layer.norm.running_mean.clone())
    assert not any(torch.equal(means[i], means[j]) for i in range(3) for j in range(i))
    # the first step sees the weights that the network has: its statistics are those of plain forwards of the supports
    plain = network()
    for seed in (0, 1):
        plain(task(seed)[0])
    torch.testing.assert_close(plain.layer.norm.running_mean, means[0])


def trained(name, options, kind, progress):
    """A network with `norm`, and its statistics in every set, after two updates that told this progress."""
    net = network(name, options)
    runner = maml(net, statistics=kind)
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for seed in (0, 1):
        maml_step(runner, optimizer, [task(seed)], progress=progress)
    steps = range(STEPS + 1)
    kept = []
    for step in steps:
        with runner.statistics_of(net, step):
            kept.append(statistics(net))
    return net, kept


@pytest.mark.parametrize("kind", ["shared", "per_step", "none"])
@pytest.mark.parametrize("name", ["brn", "mabn"])
def test_a_schedule_inside_a_norm_follows_training_in_every_set_of_statistics(name, kind):
    _, kept = trained(name, {}, kind, 0.75)
    assert [float(of_step["layer.norm.progress"]) for of_step in kept] == [0.75] * (STEPS + 1)


@pytest.mark.parametrize("kind", ["shared", "per_step", "none"])
def test_a_second_look_replaces_the_entry_of_the_queries_in_their_set_and_no_other(kind):
    net, kept = trained("mbn", {"memory": 8}, kind, 0.5)
    newest = [of_step["layer.norm.memory_mean"][0] for of_step in kept]
    moved = net.layer.conv(task(1)[2]).mean((0, 2, 3))  # at the updated weights
    looks = [torch.allclose(mean, moved, rtol=0, atol=1e-12) for mean in newest]
    assert looks == ([False] * STEPS + [True] if kind == "per_step" else [True] * (STEPS + 1))


class Rebinding(nn.Module):
    """Replaces its buffer instead of changing it, and counts in extra state, as norms of one's own may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, dtype=torch.float64))
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        self.running_mean = 0.9 * self.running_mean + 0.1 * x.detach().mean().view(1)
        return x

    def get_extra_state(self):
        return torch.tensor(self.seen)

    def set_extra_state(self, state):
        self.seen = int(state)


@pytest.mark.parametrize(("kind", "forwards"), [("shared", STEPS + 1), ("none", 1)])
def test_a_norm_that_replaces_its_buffers_keeps_statistics_as_one_that_changes_them(kind, forwards):
    net = network("none")
    norm, stamped = Rebinding(), net.layer.norm
    norm.norm_info, norm.situation = stamped.norm_info, stamped.situation
    net.layer.norm = norm
    maml(net, statistics=kind).meta_loss(*task())
    assert net.layer.norm.seen == forwards
    assert float(net.layer.norm.running_mean.abs()) > 0


def test_a_parameter_that_is_not_learned_stays_and_does_no_harm():
    net = network()
    net.layer.norm.bias.requires_grad_(False)
    loss, _ = maml(net).meta_loss(*task())
    loss.backward()
    assert net.layer.norm.bias.grad is None
    assert float(net.head.weight.grad.abs().sum()) > 0


def test_a_failure_inside_a_step_puts_the_networks_own_statistics_back():
    net = network()
    own = [b for _, b in net.named_buffers()]
    sets = StepStatistics(net, 1)
    with pytest.raises(ZeroDivisionError), sets.step(net, 0):
        raise ZeroDivisionError
    assert all(a is b for a, (_, b) in zip(own, net.named_buffers(), strict=True))


@pytest.mark.parametrize("kind", ["shared", "per_step", "none"])
def test_adaptation_outside_of_training_keeps_nothing(kind):
    net = network()
    net(torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    runner = maml(net, statistics=kind)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    sets = [] if runner.sets is None else [{k: dict(v) for k, v in s.items()} for s in runner.sets.sets]
    support, labels, _, _ = task()
    adapted = runner.adapted(support, labels, steps=STEPS, training=False)
    assert not torch.equal(adapted.head.weight, net.head.weight)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    now = [] if runner.sets is None else runner.sets.sets
    for a, b in zip(sets, now, strict=True):
        assert all(torch.equal(a[name][k], b[name][k]) for name in a for k in a[name])
    assert net.training


def adapted_by_hand(net, support, labels, steps):
    """Plain gradient steps on a copy, its norms in training mode."""
    clone = copy.deepcopy(net).train()
    for _ in range(steps):
        gradients = torch.autograd.grad(F.cross_entropy(clone(support), labels), list(clone.parameters()))
        with torch.no_grad():
            for p, g in zip(clone.parameters(), gradients, strict=True):
                p.sub_(RATE * g)
    return clone


@pytest.mark.parametrize("statistics_of", ["shared", "per_step", "support"])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_evaluation_is_adaptation_and_then_queries_in_either_way(statistics_of, steps, monkeypatch):
    net = network()
    runner = maml(net, statistics="per_step" if statistics_of == "per_step" else "shared")
    for seed in (3, 4):
        runner.meta_loss(*task(seed))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    support, labels, query, truth = task()
    part = Split(torch.cat([support, query]), torch.zeros(len(support) + len(query), dtype=torch.long))
    pool = Pool(part, query_pool(part, 1, "none", torch.Generator()), lambda x: x)
    where = torch.arange(len(support), len(part))
    episode = Episode(torch.arange(len(support)), labels, where, torch.zeros_like(where), truth)
    seen = []
    real = maml_module.episode_accuracy
    monkeypatch.setattr(maml_module, "episode_accuracy", lambda logits, *a: (seen.append(logits), real(logits, *a))[1])
    runner.evaluate([episode], pool, steps, True, statistics_of == "support")

    clone = adapted_by_hand(net, support, labels, steps)
    together = clone(query)
    norm = clone.layer.norm
    norm._buffers.update({k: b.clone() for k, b in net.layer.norm._buffers.items()})
    if statistics_of == "per_step":
        with runner.sets.step(net, STEPS):
            norm._buffers.update({k: b.clone() for k, b in net.layer.norm._buffers.items()})
    elif statistics_of == "support":
        norm.reset_running_stats()
        norm.momentum = 1.0
        clone(support)
    alone = clone.eval()(query)
    torch.testing.assert_close(seen[0], alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen[1], together, rtol=1e-9, atol=1e-9)
    assert float((alone - together).detach().abs().max()) > 1e-3
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_the_options_of_a_run_reach_its_learner():
    made = [
        learner(network(), FewShotOptions(method="maml", order=order, inner_statistics=kind, inner_steps=7))
        for order, kind in (("first", "shared"), ("second", "per_step"))
    ]
    assert [(m.first_order, m.statistics, m.steps, m.sets is None) for m in made] == [
        (True, "shared", 7, True),
        (False, "per_step", 7, False),
    ]
    assert len(made[1].sets.sets) == 8
    assert learner(network(), FewShotOptions()) is None

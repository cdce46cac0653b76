"""Norms that know domains, against literal float64 versions of their definitions, and their known identities."""

import copy
import itertools

import pytest
import torch
from torch import nn

from norms.registry import make_norm
from norms.running import recalibrate
from norms.situation import predict, situation

DOMAIN_NORMS = ("dsbn", "dual_bn", "bne", "transnorm")
BLOCKS = torch.tensor([0] * 8 + [1] * 4)
MIXED = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1])


def layer_of(name, channels=6, num_domains=2, dtype=torch.float64, **options):
    layer = make_norm(name, num_domains=num_domains, **options)(channels, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64), alpha=0.3)
    return layer


def batch(n=12, channels=6, size=3, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size, size, generator=draw, dtype=torch.float64)
    spread = torch.rand(n, channels, 1, 1, generator=draw, dtype=torch.float64) + 0.5
    return (x * spread + torch.randn(n, channels, 1, 1, generator=draw, dtype=torch.float64)).to(dtype)


def literal(layer, x, domain, slices=1):
    """Training output and the moments (K, D, C) of each slice and domain, value by value from the definitions."""
    n, channels = x.shape[:2]
    y = torch.zeros_like(x)
    means = torch.zeros(slices, layer.num_domains, channels, dtype=x.dtype)
    unbiased = torch.ones_like(means)
    for k, d, c in itertools.product(range(slices), range(layer.num_domains), range(channels)):
        rows = [i for i in range(n) if i % slices == k and domain[i] == d]
        if not rows:
            means[k, d], unbiased[k, d] = layer.running_mean[d], layer.running_var[d]
            continue
        values = torch.stack([x[i, c] for i in rows]).flatten()
        mean = values.sum() / len(values)
        var = ((values - mean) ** 2).sum() / len(values)
        means[k, d, c], unbiased[k, d, c] = mean.detach(), (var * len(values) / (len(values) - 1)).detach()
        weight = layer.weight[d, c] if layer.affine_per_domain else layer.weight[c]
        bias = layer.bias[d, c] if layer.affine_per_domain else layer.bias[c]
        for i in rows:
            y = y.index_put(
                (torch.tensor(i), torch.tensor(c)), (x[i, c] - mean) / (var + layer.eps).sqrt() * weight + bias
            )
    if type(layer).__name__ == "TransNorm":
        factors = torch.stack([1 + literal_alpha(means[k], unbiased[k], layer.eps) for k in range(slices)])
        y = y * torch.stack([factors[i % slices] for i in range(n)])[:, :, None, None]
    return y, means, unbiased


def literal_alpha(mean, var, eps):
    source, target = (mean[d] / (var[d] + eps).sqrt() for d in range(2))
    p = 1 / (1 + (source - target).abs())
    return len(p) * p / p.sum()


def literal_running(start, domain, means, unbiased, momentum=0.1):
    """Running statistics after the slices came one after the other."""
    mean, var = (value.clone() for value in start)
    slices = len(means)
    for k, d in itertools.product(range(slices), range(len(mean))):
        if any(domain[i] == d for i in range(k, len(domain), slices)):
            mean[d] = (1 - momentum) * mean[d] + momentum * means[k, d]
            var[d] = (1 - momentum) * var[d] + momentum * unbiased[k, d]
    return mean, var


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("domain", [BLOCKS, MIXED, 1], ids=["blocks", "mixed", "one"])
@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_training_equals_the_definition_value_by_value(name, domain, slices):
    layer = layer_of(name)
    with situation(layer, domain=MIXED):  # so that what the layer keeps is not its start
        layer(batch(seed=30))
    start = layer.running_mean.clone(), layer.running_var.clone()
    x = batch().requires_grad_()
    told = domain if isinstance(domain, torch.Tensor) else torch.full((12,), domain)
    expected, means, unbiased = literal(layer, x, told, slices)
    pull = batch(seed=7)
    wanted = torch.autograd.grad((expected * pull).sum(), [x, layer.weight, layer.bias])
    running = literal_running(start, told, means, unbiased)
    with situation(layer, domain=domain, slices=slices):
        y = layer(x)
    got = torch.autograd.grad((y * pull).sum(), [x, layer.weight, layer.bias])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close((layer.running_mean, layer.running_var), running, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_evaluation_uses_the_running_statistics_of_the_told_domain(name):
    layer = layer_of(name)
    for seed in (1, 2):
        with situation(layer, domain=BLOCKS):
            layer(batch(seed=seed))
    layer.eval()
    x = batch(seed=3)
    factor = 1 + literal_alpha(layer.running_mean, layer.running_var, layer.eps) if name == "transnorm" else 1.0
    for d in (0, 1):
        weight, bias = (p[d] if layer.affine_per_domain else p for p in (layer.weight, layer.bias))
        scale = (layer.running_var[d] + layer.eps).rsqrt()
        expected = ((x - layer.running_mean[d].view(1, -1, 1, 1)) * (scale * weight).view(1, -1, 1, 1)) + bias.view(
            1, -1, 1, 1
        )
        expected = expected * (factor * torch.ones(6, dtype=x.dtype)).view(1, -1, 1, 1)
        for domain in (d, torch.full((12,), d)):
            with situation(layer, domain=domain):
                torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    with situation(layer, domain=MIXED):
        mixed = layer(x)
    for d in (0, 1):
        with situation(layer, domain=d):
            torch.testing.assert_close(mixed[d == MIXED], layer(x)[d == MIXED])


@pytest.mark.parametrize("domain", [BLOCKS, MIXED], ids=["blocks", "mixed"])
def test_dsbn_on_a_mixed_batch_is_bn_on_each_domains_part(domain):
    layer, x = layer_of("dsbn"), batch()
    parts = []
    for d in (0, 1):
        bn = make_norm("bn")(6, dtype=torch.float64)
        with torch.no_grad():
            bn.weight.copy_(layer.weight[d])
            bn.bias.copy_(layer.bias[d])
        parts.append((bn, bn(x[domain == d])))
    with situation(layer, domain=domain):
        y = layer(x)
    for d, (bn, expected) in enumerate(parts):
        torch.testing.assert_close(y[domain == d], expected)
        torch.testing.assert_close((layer.running_mean[d], layer.running_var[d]), (bn.running_mean, bn.running_var))
        assert layer.num_batches_tracked[d] == bn.num_batches_tracked


@pytest.mark.parametrize("name", ["dsbn", "dual_bn", "bne"])
def test_a_joint_forward_is_two_separate_ones(name):
    joint, separate = layer_of(name), layer_of(name)
    x = batch()
    with situation(joint, domain=BLOCKS):
        together = joint(x)
    parts = []
    for d in (0, 1):
        with situation(separate, domain=d):
            parts.append(separate(x[d == BLOCKS]))
    torch.testing.assert_close(together, torch.cat(parts))
    torch.testing.assert_close(dict(joint.named_buffers()), dict(separate.named_buffers()))


@pytest.mark.parametrize("name", ["dsbn", "dual_bn", "bne", "transnorm"])
def test_with_one_domain_it_is_bn(name):
    layer, bn, x = make_norm(name, num_domains=1)(6), make_norm("bn")(6), batch(dtype=torch.float32)
    factor = 2 if name == "transnorm" else 1  # alpha is 1 where there is nothing to tell apart
    for _ in range(3):
        torch.testing.assert_close(layer(x), factor * bn(x), rtol=0, atol=0)
    assert torch.equal(layer.running_mean[0], bn.running_mean)
    assert torch.equal(layer.running_var[0], bn.running_var)
    assert layer.num_batches_tracked.tolist() == [3]
    torch.testing.assert_close(layer.eval()(x), factor * bn.eval()(x), rtol=0, atol=0)
    if name != "transnorm":
        assert layer.equivalent_to == "bn"


@pytest.mark.parametrize("domain", [0, torch.zeros(12, dtype=torch.long)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_a_domain_that_the_batch_does_not_hold_keeps_its_statistics(name, domain):
    layer = layer_of(name)
    with situation(layer, domain=MIXED):
        layer(batch(seed=1))
    before = copy.deepcopy(dict(layer.named_buffers()))
    with situation(layer, domain=domain):
        layer(batch(seed=2))
    for key, buffer in layer.named_buffers():
        assert torch.equal(buffer[1], before[key][1])
        assert not torch.equal(buffer[0], before[key][0])


def test_a_cumulative_average_counts_each_domains_own_batches():
    layer = layer_of("dsbn", momentum=None)
    x = [batch(seed=s) for s in (1, 2, 3)]
    for images, domain in zip(x, (BLOCKS, 1, torch.zeros(12, dtype=torch.long)), strict=True):
        with situation(layer, domain=domain):
            layer(images)
    expected = [
        (x[0][:8].mean((0, 2, 3)) + x[2].mean((0, 2, 3))) / 2,
        (x[0][8:].mean((0, 2, 3)) + x[1].mean((0, 2, 3))) / 2,
    ]
    torch.testing.assert_close(layer.running_mean, torch.stack(expected))
    assert layer.num_batches_tracked.tolist() == [2, 2]


def test_a_cumulative_average_of_a_domain_that_was_never_seen_is_its_start():
    layer = layer_of("dsbn", momentum=None)
    with situation(layer, domain=torch.zeros(12, dtype=torch.long)):
        layer(batch(seed=1))
    assert torch.equal(layer.running_mean[1], torch.zeros(6, dtype=torch.float64))
    assert torch.equal(layer.running_var[1], torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_domains_may_be_of_any_integer_type(kind):
    layer, twin = layer_of("dsbn"), layer_of("dsbn")
    for mode, domain in itertools.product((True, False), (BLOCKS, MIXED)):
        with situation(layer.train(mode), domain=domain), situation(twin.train(mode), domain=domain.to(kind)):
            assert torch.equal(layer(batch()), twin(batch()))


def test_large_means_in_float32_keep_the_variance_right():
    x = batch(n=64, dtype=torch.float32) + 1000
    domain = torch.arange(64) % 2
    layer, exact = layer_of("dsbn", dtype=torch.float32), layer_of("dsbn")
    with torch.no_grad():
        exact.weight.copy_(layer.weight)
        exact.bias.copy_(layer.bias)
    with situation(layer, domain=domain), situation(exact, domain=domain):
        torch.testing.assert_close(layer(x), exact(x.double()).float(), rtol=1e-3, atol=1e-3)


# --- what a loop says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOMAIN_NORMS)
@pytest.mark.parametrize(
    ("domain", "words"),
    [
        (None, "needs the domain of the images"),
        (2, "domain 2 is not in 0 to 1"),
        (-1, "domain -1 is not in 0 to 1"),
        (torch.tensor([0, 3] * 6), "0 to 3 are not in 0 to 1"),
        (torch.tensor([0, -1] * 6), "-1 to 0 are not in 0 to 1"),
        (torch.tensor([0, 1]), "batch of 12"),
        (torch.tensor([0.0, 1.0] * 6), "torch.float32: integers are needed"),
        (True, "domain True: an integer"),
        (0.0, "domain 0.0: an integer"),
        ("0", "domain '0': an integer"),
    ],
)
def test_a_missing_or_unknown_domain_is_refused(name, domain, words):
    layer = layer_of(name)
    for mode in (True, False):
        with situation(layer.train(mode), domain=domain), pytest.raises(ValueError, match=words):
            layer(batch())


@pytest.mark.parametrize("name", ["dual_bn", "transnorm"])
def test_norms_of_two_domains_refuse_more(name):
    with pytest.raises(ValueError, match="num_domains=3; it has two"):
        make_norm(name, num_domains=3)(4)


@pytest.mark.parametrize("name", DOMAIN_NORMS)
@pytest.mark.parametrize("domain", [torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 0, 0])], ids=["blocks", "mixed"])
def test_one_value_of_a_domain_is_refused_in_training(name, domain):
    layer = layer_of(name)
    with situation(layer, domain=domain), pytest.raises(ValueError, match="more than 1 value per channel and domain"):
        layer(batch(n=4, size=1))


# --- prediction for images of no known domain -------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, name="bne", num_domains=3, channels=6):
        super().__init__()
        norm = make_norm(name, num_domains=num_domains)
        self.first, self.conv, self.second = norm(channels), nn.Conv2d(channels, 4, 3, padding=1), norm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.second(self.conv(self.first(x)).relu()).relu().mean((2, 3)))


def trained(name="bne", num_domains=3):
    torch.manual_seed(0)
    net = Net(name, num_domains)
    for seed in range(3 * num_domains):
        d = seed % num_domains
        with situation(net, domain=d):
            net((1 + d) * batch(seed=seed, dtype=torch.float32) + 3 * d)
    return net.eval()


def test_predict_is_the_weighted_sum_of_the_branches_probabilities():
    net, x = trained(), batch(seed=20, dtype=torch.float32)
    distances = torch.zeros(12, 3)
    probabilities = []
    for d in range(3):
        inputs = {}
        handles = [
            m.register_forward_hook(lambda module, given, out, key=key, to=inputs: to.__setitem__(key, given[0]))
            for key, m in (("first", net.first), ("second", net.second))
        ]
        with situation(net, domain=d):
            probabilities.append(net(x).softmax(1))
        for handle in handles:
            handle.remove()
        for key, norm in (("first", net.first), ("second", net.second)):
            for i, c in itertools.product(range(12), range(norm.num_channels)):
                values = inputs[key][i, c].flatten()
                distances[i, d] += (norm.running_mean[d, c] - values.mean()) ** 2
                distances[i, d] += (norm.running_var[d, c].sqrt() - values.std(correction=0)) ** 2
    weights = (1 / distances) / (1 / distances).sum(1, keepdim=True)
    expected = sum(weights[:, d, None] * probabilities[d] for d in range(3))
    torch.testing.assert_close(predict(net, x).exp(), expected, rtol=1e-4, atol=1e-5)


def test_predict_in_a_told_domain_is_that_branch_and_no_hook_stays():
    net, x = trained(), batch(seed=20, dtype=torch.float32)
    with situation(net, domain=2):
        assert torch.equal(predict(net, x), net(x))
    predict(net, x)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_predict_with_one_domain_is_a_forward():
    net, x = trained("bne", 1), batch(seed=20, dtype=torch.float32)
    assert torch.equal(predict(net, x), net(x))


def test_predict_keeps_double_precision():
    assert predict(trained().double(), batch(seed=20)).dtype == torch.float64


def test_a_sample_that_lies_exactly_on_a_domain_is_predicted_by_it():
    """Its distance is 0 and its weight 1, not 0 / 0."""
    net, x = trained(), batch(seed=20, dtype=torch.float32)[:1]
    for norm in (net.first, net.second):
        norm.branch_distance = lambda given, d: torch.full((1,), float(d))
    with situation(net, domain=0):
        expected = net(x).log_softmax(1)
    torch.testing.assert_close(predict(net, x), expected)


def test_predict_leaves_no_hook_when_a_forward_fails():
    net = trained()
    handle = net.head.register_forward_pre_hook(lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(net, batch(seed=20, dtype=torch.float32))
    handle.remove()
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net.first.situation.domain is None


def test_predict_tells_every_branch_the_part_that_was_told():
    net, told = trained(), []
    net.second.register_forward_pre_hook(lambda norm, given: told.append((norm.situation.domain, norm.situation.part)))
    with situation(net, part="query"):
        predict(net, batch(seed=20, dtype=torch.float32))
    assert told == [(0, "query"), (1, "query"), (2, "query")]


def test_predict_leans_towards_the_domain_that_an_image_is_from():
    net = trained()
    distances = torch.stack(
        [net.first.branch_distance(3 * batch(seed=5, dtype=torch.float32) + 6, d) for d in range(3)]
    )
    assert (distances.argmin(0) == 2).all()


def test_a_norm_without_branches_to_combine_says_that_it_needs_the_domain():
    with pytest.raises(ValueError, match="DomainSpecificBatchNorm: evaluation needs the domain"):
        predict(trained("dsbn"), batch(dtype=torch.float32))


# --- recalibration (AdaBN) --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_recalibration_on_one_domain_pools_its_moments_and_keeps_the_others(name, slices):
    layer = layer_of(name)
    with situation(layer, domain=MIXED):
        layer(batch(seed=1))
    before = {key: b.clone() for key, b in layer.named_buffers()}
    batches = [batch(seed=s) + s for s in (2, 3)]
    recalibrate(layer, batches, slices, domain=1)
    values = torch.cat(batches).movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean[1], values.mean(1))
    torch.testing.assert_close(layer.running_var[1], values.var(1))
    for key, buffer in layer.named_buffers():
        assert torch.equal(buffer[0], before[key][0])
    assert layer.num_batches_tracked[1] == 2 * slices


def test_recalibration_looks_at_the_other_domains_statistics_as_they_are():
    """transnorm amplifies channels by both domains: re-estimating the target's statistics from the batches that they
    came from changes no output, where the source's are kept, and of two layers not those of the second."""
    first, second = layer_of("transnorm", momentum=1.0), layer_of("transnorm", momentum=1.0)
    net = nn.Sequential(first, second)
    x = 3 * batch(seed=1) + 2
    with situation(net, domain=MIXED):
        net(x)
    before = second.running_mean.clone()
    recalibrate(net, [x[MIXED == 1]], domain=1)
    torch.testing.assert_close(second.running_mean, before)


def test_a_domain_that_only_later_batches_hold_is_pooled_from_those():
    layer = layer_of("dsbn")
    domains = iter([0, 0, MIXED])
    batches = [batch(seed=s) for s in range(3)]

    def forward(x):
        with situation(layer, domain=next(domains)):
            return layer(x)

    recalibrate(layer, batches, forward=forward)
    values = batches[2][MIXED == 1].movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean[1], values.mean(1))
    torch.testing.assert_close(layer.running_var[1], values.var(1))
    assert layer.num_batches_tracked.tolist() == [3, 1]


def test_a_recalibration_that_fails_leaves_everything_as_it_was():
    layer = layer_of("transnorm")
    with situation(layer, domain=MIXED):
        layer(batch(seed=1))
    before = copy.deepcopy(layer.state_dict())

    def batches():
        yield batch(seed=2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        recalibrate(layer, batches(), domain=1)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
    assert layer.momentum == 0.1
    assert "track" not in layer.__dict__


def test_recalibration_on_mixed_batches_pools_each_domain():
    layer = layer_of("dsbn")
    batches = [batch(seed=s) + s for s in (2, 3)]

    def forward(x):
        with situation(layer, domain=MIXED):
            return layer(x)

    recalibrate(layer, batches, forward=forward)
    for d in (0, 1):
        values = torch.cat([x[d == MIXED] for x in batches]).movedim(1, 0).flatten(1)
        torch.testing.assert_close(layer.running_mean[d], values.mean(1))
        torch.testing.assert_close(layer.running_var[d], values.var(1))


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_one", [True, False])
@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_nothing_is_made_on_another_device(name, of_one):
    """A forward on a pretended accelerator, whose domains no one may wait to look at."""
    with torch._subclasses.FakeTensorMode():
        layer = make_norm(name, num_domains=2)(6, device="cuda")
        domain = 1 if of_one else torch.empty(12, dtype=torch.long, device="cuda")
        for mode in (True, False):
            with situation(layer.train(mode), domain=domain):
                assert layer(torch.empty(12, 6, 3, 3, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("name", DOMAIN_NORMS)
def test_a_training_step_runs_on_the_meta_device(name):
    layer = make_norm(name, num_domains=2)(6, device="meta")
    x = torch.empty(12, 6, 3, 3, device="meta", requires_grad=True)
    for domain in (0, torch.arange(12) // 6, torch.arange(12) % 2):
        with situation(layer, domain=domain):
            layer(x).sum().backward()
    assert x.grad.is_meta

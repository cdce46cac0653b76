"""Losses and steps of domain adaptation against literal versions on a tiny network, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from norms.registry import make_norm
from norms.situation import situation
from tasks.base import Diverged
from tasks.domain_adaptation.dann import adversarial_step
from tasks.domain_adaptation.forward import forward_domains, forward_target
from tasks.domain_adaptation.losses import (
    certainty_weights,
    conditioned,
    discrepancy,
    domain_loss,
    entropy,
    information,
    reversal_strength,
    reverse_gradient,
)
from tasks.domain_adaptation.mcd import mcd_step
from tasks.domain_adaptation.networks import AdaptationNet, build
from tasks.domain_adaptation.options import DomainAdaptationOptions
from tasks.nets.models import without_head

CHANNELS, FEATURES, CLASSES, IMAGES, RATE = 3, 4, 3, 6, 0.1

pytestmark = pytest.mark.usefixtures("one_thread")


class Backbone(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, FEATURES, 3, bias=False)
        self.norm = norm(FEATURES, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.norm(self.conv(x))).mean((2, 3))


def tiny(options, norm="bn", **facts):
    torch.manual_seed(0)
    net = AdaptationNet(Backbone(make_norm(norm, **facts)), FEATURES, CLASSES, options, "cpu").double()
    return net.train()


def images(seed, n=IMAGES):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, CHANNELS, 6, 6, generator=draw, dtype=torch.float64) * (1 + seed) + seed


LABELS = torch.arange(IMAGES) % CLASSES
SOURCE, TARGET = images(0), images(1)


def options(method, **given):
    return DomainAdaptationOptions(method=method, batch_size=IMAGES, discriminator_width=5, **given)


def bce(judged, truth):
    return -(math.log(judged) if truth else math.log(1 - judged))


# --- losses -----------------------------------------------------------------------------------------------------------


def test_gradient_reversal_is_the_identity_with_a_negated_gradient():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    pull = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(torch.autograd.grad(y, x, pull)[0], -0.3 * pull)


def test_reversal_grows_from_zero_to_one():
    assert reversal_strength(0) == 0
    assert reversal_strength(0.5) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    assert 0.999 < reversal_strength(1) < 1


def test_domain_loss_is_the_mean_cross_entropy_with_the_target_as_one():
    judged = torch.tensor([0.3, -1.0, 0.8, 2.0, -0.5], dtype=torch.float64)
    p = judged.sigmoid().tolist()
    expected = sum(bce(value, i >= 2) for i, value in enumerate(p)) / 5
    assert domain_loss(judged, 2).item() == pytest.approx(expected)


def test_weighted_domain_loss_averages_within_each_domain():
    judged = torch.tensor([0.3, -1.0, 0.8, 2.0, -0.5], dtype=torch.float64)
    weights = torch.tensor([1.2, 1.9, 1.1, 1.5, 2.0], dtype=torch.float64)
    losses = [bce(value, i >= 2) for i, value in enumerate(judged.sigmoid().tolist())]
    source = (1.2 * losses[0] + 1.9 * losses[1]) / 3.1
    target = (1.1 * losses[2] + 1.5 * losses[3] + 2.0 * losses[4]) / 4.6
    assert domain_loss(judged, 2, weights).item() == pytest.approx((source + target) / 2)


def test_cdan_conditions_each_feature_on_each_class_without_gradient_to_the_prediction():
    features = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    product = conditioned(features, probabilities)
    for n in range(2):
        expected = [probabilities[n, k] * features[n, f] for k in range(4) for f in range(3)]
        torch.testing.assert_close(product[n], torch.stack(expected))
    assert torch.autograd.grad(product.sum(), [features, probabilities], allow_unused=True)[1] is None


def test_the_randomized_map_is_the_product_of_two_random_projections():
    features, probabilities = torch.randn(2, 3).double(), torch.rand(2, 4).double()
    maps = torch.randn(3, 5).double(), torch.randn(4, 5).double()
    product = conditioned(features, probabilities, maps)
    for n, d in ((0, 0), (1, 4)):
        of_features = sum(features[n, f] * maps[0][f, d] for f in range(3))
        of_classes = sum(probabilities[n, k] * maps[1][k, d] for k in range(4))
        assert product[n, d].item() == pytest.approx((of_features * of_classes / math.sqrt(5)).item())


def test_certain_images_count_more_and_the_weights_gradient_is_reversed():
    logits = torch.tensor([[9.0, -9.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    weights = certainty_weights(logits, 0.5)
    assert weights.tolist() == pytest.approx([2.0, 1.5], abs=1e-5)  # entropies 0 and log 2
    plain = 1 + torch.exp(-entropy(logits))
    one, two = (torch.autograd.grad((w * torch.tensor([1.0, 3.0])).sum(), logits)[0] for w in (weights, plain))
    torch.testing.assert_close(one, -0.5 * two)


def test_discrepancy_is_the_mean_absolute_difference_of_probabilities():
    one, two = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    assert discrepancy(one, two).item() == pytest.approx((0.25 + 0.25) / 2)


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_information_lies_between_zero_and_log_k(classes, n, seed):
    logits = torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 5
    assert -1e-9 <= information(logits) <= math.log(classes) + 1e-9


def test_information_knows_its_extremes():
    certain = 1000 * F.one_hot(torch.arange(4)).float()
    assert information(certain) == pytest.approx(math.log(4))
    assert information(certain[:1].repeat(4, 1)) == pytest.approx(0)  # one class only
    assert information(torch.zeros(4, 4)) == pytest.approx(0)  # no certainty


# --- steps ------------------------------------------------------------------------------------------------------------


def literal_features(net, kind):
    """Both domains' features as the option says, without our own forward; running statistics move as they do."""
    if kind == "joint":
        both = net.backbone(torch.cat([SOURCE, TARGET]))
        return both[:IMAGES], both[IMAGES:]
    return net.backbone(SOURCE), net.backbone(TARGET)


def descend(loss, parameters):
    parameters = list(parameters)
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= RATE * gradient


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=RATE)


def same_state(one, two):
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("forward", ["joint", "separate"])
@pytest.mark.parametrize("method", ["dann", "cdan_e"])
def test_the_adversarial_step_is_descent_for_the_discriminator_and_ascent_for_the_rest(method, forward):
    spec = options(method, forward=forward, trade_off=0.7)
    ours, literal = tiny(spec), tiny(spec)
    progress = 0.4
    loss, correct = adversarial_step(ours, sgd(ours), SOURCE, LABELS, TARGET, spec, progress=progress)

    of_source, of_target = literal_features(literal, forward)
    features = torch.cat([of_source, of_target])
    logits = literal.heads[0](features)
    supervised = F.cross_entropy(logits[:IMAGES], LABELS)
    truth = torch.tensor([0.0] * IMAGES + [1.0] * IMAGES, dtype=torch.float64)
    if method == "dann":
        judged = literal.discriminator(features)[:, 0].sigmoid()
        of_domain = F.binary_cross_entropy(judged, truth)
    else:
        p = logits.softmax(1)
        given = torch.stack(
            [
                torch.stack([p[n, k].detach() * features[n, f] for k in range(CLASSES) for f in range(FEATURES)])
                for n in range(2 * IMAGES)
            ]
        )
        losses = F.binary_cross_entropy(literal.discriminator(given)[:, 0].sigmoid(), truth, reduction="none")
        weights = 1 + torch.exp((p * p.log()).sum(1))
        halves = [
            (weights[part] * losses[part]).sum() / weights[part].sum().detach()
            for part in (slice(IMAGES), slice(IMAGES, None))
        ]
        of_domain = (halves[0] + halves[1]) / 2
    strength = 2 / (1 + math.exp(-10 * progress)) - 1
    rest = [*literal.backbone.parameters(), *literal.heads.parameters()]
    of_rest = torch.autograd.grad(supervised, rest, retain_graph=True)
    reversed_ = torch.autograd.grad(of_domain, rest, retain_graph=True, allow_unused=True)
    discriminating = list(literal.discriminator.parameters())
    of_discriminator = torch.autograd.grad(of_domain, discriminating)
    for p, g, r in zip(rest, of_rest, reversed_, strict=True):
        p.data -= RATE * (g - 0.7 * strength * (0 if r is None else r))
    for p, g in zip(discriminating, of_discriminator, strict=True):
        p.data -= RATE * 0.7 * g
    assert loss.item() == pytest.approx((supervised + 0.7 * of_domain).item())
    assert int(correct) == int((logits[:IMAGES].argmax(1) == LABELS).sum())
    same_state(ours, literal)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_the_mcd_step_is_its_three_steps(forward, steps):
    spec = options("mcd", forward=forward, mcd_steps=steps)
    ours, literal = tiny(spec), tiny(spec)
    loss, _ = mcd_step(ours, sgd(ours.backbone), sgd(ours.heads), SOURCE, LABELS, TARGET, spec)

    one, two = literal.heads

    def supervised(features):
        return F.cross_entropy(one(features), LABELS) + F.cross_entropy(two(features), LABELS)

    def apart(features):
        return (one(features).softmax(1) - two(features).softmax(1)).abs().mean()

    of_source, _ = literal_features(literal, forward)
    first = supervised(of_source)
    descend(first, literal.parameters())
    kept = {name: buffer.clone() for name, buffer in literal.named_buffers()}  # A alone counts the images
    of_source, of_target = literal_features(literal, forward)
    descend(supervised(of_source) - apart(of_target), literal.heads.parameters())
    for _ in range(steps):
        descend(apart(literal_features(literal, forward)[1]), literal.backbone.parameters())
    for name, buffer in literal.named_buffers():
        buffer.copy_(kept[name])
    assert loss.item() == pytest.approx(first.item())
    same_state(ours, literal)


def test_the_two_heads_of_mcd_begin_apart_and_their_mean_predicts():
    spec = options("mcd")
    net = build(
        make_norm("bn"),
        spec,
        channels=3,
        classes=5,
        device="cpu",
        generator=lambda p: torch.Generator().manual_seed(sum(map(ord, p))),
    )
    one, two = net.heads
    assert not torch.equal(one[0].weight, two[0].weight)
    x = torch.randn(2, 3, 32, 32)
    features = net.eval().backbone(x)
    torch.testing.assert_close(net(x), (one(features) + two(features)) / 2)


@pytest.mark.parametrize("norm", ["dsbn", "bne"])
def test_a_joint_forward_is_two_separate_ones_where_domains_share_no_statistics(norm):
    nets = [tiny(options("dann", forward=forward), norm, num_domains=2) for forward in ("joint", "separate")]
    for net, forward in zip(nets, ("joint", "separate"), strict=True):
        net.found = forward_domains(net, SOURCE, TARGET, options("dann", forward=forward))
    torch.testing.assert_close(nets[0].found, nets[1].found)
    same_state(*nets)


def test_a_joint_forward_shares_statistics_over_both_domains_with_bn():
    net = tiny(options("dann"))
    twin = copy.deepcopy(net)
    found = torch.cat(forward_domains(net, SOURCE, TARGET, options("dann")))
    torch.testing.assert_close(found, twin.backbone(torch.cat([SOURCE, TARGET])))
    apart = torch.cat(forward_domains(twin, SOURCE, TARGET, options("dann", forward="separate")))
    assert (found - apart).abs().max() > 0.01


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_norm_batches_hold_equally_many_images_of_both_domains(forward):
    """Slices of a joint batch are those of its halves, put together."""
    spec = options("dann", forward=forward, norm_batch_size=2)
    net = tiny(spec)
    twin = copy.deepcopy(net)
    found = forward_domains(net, SOURCE, TARGET, spec)
    for k in range(3):
        halves = SOURCE[k::3], TARGET[k::3]
        if forward == "joint":
            expected = twin.backbone(torch.cat(halves)).split(2)
        else:
            expected = tuple(twin.backbone(half) for half in halves)
        for one, two in zip((part[k::3] for part in found), expected, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_the_target_alone_is_what_both_together_give_it(forward):
    spec = options("mcd", forward=forward)
    net = tiny(spec)
    torch.testing.assert_close(forward_target(net, SOURCE, TARGET, spec), forward_domains(net, SOURCE, TARGET, spec)[1])


def test_norms_are_told_the_domain_of_every_image():
    told = []

    class Listening(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            told.append(self.inner.situation.domain)
            return self.inner(x)

    for forward in ("joint", "separate"):
        spec = options("dann", forward=forward)
        net = tiny(spec)
        net.backbone.norm = Listening(net.backbone.norm)
        forward_domains(net, SOURCE, TARGET, spec)
    assert told[0].tolist() == [0] * IMAGES + [1] * IMAGES
    assert told[1:] == [0, 1]


@pytest.mark.parametrize("method", ["dann", "mcd"])
def test_a_loss_that_is_not_finite_names_the_step_for_norms_that_need_the_domain(method):
    spec = options(method)
    net = tiny(spec, "dsbn", num_domains=2)
    with torch.no_grad():
        net.heads[0][0].weight[0, 0] = math.nan
    optimizers = [sgd(net.backbone), sgd(net.heads)] if method == "mcd" else [sgd(net)]
    take = mcd_step if method == "mcd" else adversarial_step
    with pytest.raises(Diverged, match=r"step 7: the loss is nan.*heads\.0\.0\.weight"):
        take(net, *optimizers, SOURCE, LABELS, TARGET, spec, step=7)


# --- the network ------------------------------------------------------------------------------------------------------


def test_heads_and_discriminator_hold_no_norm_and_are_the_same_for_every_method():
    draws = {}
    for method in ("source_only", "dann", "cdan_e", "mcd"):
        net = build(
            make_norm("gn", num_groups=4),
            DomainAdaptationOptions(method=method),
            channels=3,
            classes=10,
            device="cpu",
            generator=lambda purpose: torch.Generator().manual_seed(sum(map(ord, purpose))),
        )
        draws[method] = {k: v for k, v in net.state_dict().items() if k.startswith(("backbone", "heads.0"))}
        assert not [n for n, m in net.named_modules() if hasattr(m, "norm_info") and not n.startswith("backbone")]
    for method in ("dann", "cdan_e", "mcd"):
        torch.testing.assert_close(draws[method], draws["source_only"], rtol=0, atol=0)


def test_many_features_times_classes_are_mapped_at_random_and_by_name():
    spec = DomainAdaptationOptions(method="cdan_e", width=32)  # 128 features * 40 classes

    def built(seed):
        return build(
            make_norm("none"),
            spec,
            channels=3,
            classes=40,
            device="cpu",
            generator=lambda purpose: torch.Generator().manual_seed(seed + sum(map(ord, purpose))),
        )

    one, two, other = built(0), built(0), built(1)
    assert one.discriminator[0].in_features == 1024
    assert all(torch.equal(a, b) for a, b in zip(one.maps, two.maps, strict=True))
    assert not torch.equal(one.maps[0], other.maps[0])


@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow", "resnet18", "mobilenet_v3_small"])
def test_a_backbone_without_its_head_gives_features(model):
    from tasks.nets.models import build_net

    net = build_net(model, make_norm("bn"), num_classes=7, in_channels=3, device="meta")
    features = without_head(net)
    with situation(net):
        assert net.eval()(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, features)

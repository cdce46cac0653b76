"""Attacks: closed forms, the ball, whose mode it is, and that a network comes back as it was."""

import contextlib
import math

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

import tasks.adversarial.evaluation as evaluation
from norms.registry import make_norm, norm_names, norm_option_defaults, register
from tasks.adversarial.crafting import check_examples, crafting
from tasks.adversarial.ensemble import PARTS, Scale, attack
from tasks.adversarial.evaluation import Attacks, Robustness, evaluate_robustness, pgd_only
from tasks.adversarial.pgd import cross_entropy, input_gradient, pgd, uniform_start
from tasks.adversarial.trades import divergence
from tasks.nets.models import build_net

EPSILON = 0.1
SMALL = Scale(apgd_steps=10, fab_steps=10, targets=3, square_queries=60)
OPTIONS = {n: {"num_groups": 4} for n in norm_names() if "num_groups" in norm_option_defaults(n)}


def generator(purpose):
    return torch.Generator().manual_seed(sum(purpose.encode()))


def picture(n=12, seed=0, channels=1, side=8):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def network(name="bn", classes=4):
    return build_net(
        "resnet8",
        make_norm(name, **OPTIONS.get(name, {})),
        num_classes=classes,
        in_channels=1,
        width=4,
        generator=generator,
    )


class Linear(nn.Module):
    """Logits (0, w.x + b, -9, -9): two classes, and two more that never win, for the attacks that ask for four."""

    def __init__(self, weight, bias, classes=2):
        super().__init__()
        self.weight, self.bias, self.classes = nn.Parameter(weight), nn.Parameter(torch.tensor(bias)), classes

    def forward(self, x):
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        rest = torch.full((len(x), self.classes - 2), -1e3, dtype=x.dtype) + 0 * score[:, None]
        return torch.cat([torch.zeros_like(score)[:, None], score[:, None], rest], dim=1)


def worst_score(net, images, labels, epsilon):
    """The closed form: every pixel goes to the end of its own interval [max(x - e, 0), min(x + e, 1)]."""
    low, high = (images - epsilon).clamp(min=0), (images + epsilon).clamp(max=1)
    w = net.weight.detach()
    against_one = torch.where(w > 0, low, high)  # class 1 is right: the score falls
    against_zero = torch.where(w > 0, high, low)
    worst = torch.where(labels.view(-1, 1, 1, 1) == 1, against_one, against_zero)
    return (worst * w).flatten(1).sum(1) + net.bias.detach()


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.7])
@pytest.mark.parametrize("start", [False, True], ids=["from the image", "random start"])
def test_pgd_reaches_the_closed_form_worst_case_of_a_linear_model(epsilon, start):
    images = picture(32)
    net = Linear(torch.randn(1, 8, 8, generator=generator("w")), 0.3)
    labels = torch.arange(32) % 2
    begin = uniform_start(images, epsilon, generator("start")) if start else None
    with crafting(net, "eval"):
        made = pgd(net, images, cross_entropy(labels), epsilon=epsilon, step_size=epsilon / 4, steps=20, start=begin)
    found = net(made)[:, 1]
    torch.testing.assert_close(found, worst_score(net, images, labels, epsilon), rtol=0, atol=1e-4)


def test_fgsm_is_already_the_worst_case_of_a_linear_model_where_the_box_does_not_cut():
    images = 0.3 + 0.4 * picture(8)
    net, labels = Linear(torch.randn(1, 8, 8, generator=generator("w")), 0.0), torch.arange(8) % 2
    with crafting(net, "eval"):
        made = pgd(net, images, cross_entropy(labels), epsilon=EPSILON, step_size=EPSILON, steps=1)
    score = net(images)[:, 1] + EPSILON * net.weight.abs().sum() * torch.where(labels == 1, -1.0, 1.0)
    torch.testing.assert_close(net(made)[:, 1], score, rtol=0, atol=1e-4)


def test_robust_accuracy_of_a_linear_model_is_the_closed_form_for_every_gradient_attack():
    """Two classes that win and two that never do: whoever finds the worst case finds the same images."""
    images = picture(64)
    weight = torch.randn(1, 8, 8, generator=generator("w"))
    net = Linear(weight, -float((images * weight).flatten(1).sum(1).mean()), classes=4)
    labels = net(images).argmax(1)
    epsilon = 0.05
    worst = worst_score(net, images, labels, epsilon)
    robust = torch.where(labels == 1, worst > 0, worst < 0)
    assert 0.1 < robust.float().mean() < 0.9
    attacks = Attacks(epsilon, epsilon / 4, 20, 1, ("apgd_ce", "fab_t"), Scale(apgd_steps=20, fab_steps=20, targets=3))
    found = evaluate_robustness(net, images, labels, attacks, generator)
    for name in ("fgsm", "pgd", "apgd_ce", "fab_t"):
        assert torch.equal(found.attacks[name], robust), name


@pytest.mark.parametrize("name", norm_names(without=["domain", "context"]))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_crafting_leaves_the_network_as_it_was_for_every_norm(name, mode):
    """The same class of module can hold any norm: none is recognized by its class name."""
    net, images, labels = network(name), picture(8), torch.arange(8) % 4
    net(images).sum().backward()
    net.blocks[0].eval()  # a mode that is neither all training nor all evaluation comes back, too
    modes = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    gradients = [p.grad.clone() for p in net.parameters()]
    random = torch.random.get_rng_state()
    seen = []
    handles = [m.register_forward_hook(lambda m, *_: seen.append(m.training)) for m in net.modules()]
    with crafting(net, mode, slices=4 if mode == "train" else 1):
        pgd(net, images, cross_entropy(labels), epsilon=EPSILON, step_size=EPSILON / 2, steps=2)
        torch.rand(3)
    for handle in handles:
        handle.remove()
    assert set(seen) == {mode == "train"}
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(p.requires_grad for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_no_parameter_needs_or_gets_a_gradient_while_images_are_crafted(mode, fails):
    """Afterwards each one needs one, or none, as before, and those without a gradient still have none."""
    net, images, labels = network("bn"), picture(8), torch.arange(8) % 4
    learned = [index % 3 > 0 for index, _ in enumerate(net.parameters())]
    for parameter, needs in zip(net.parameters(), learned, strict=True):
        parameter.requires_grad_(needs)
    needed, climbed = [], []

    def objective(logits):
        needed.extend(p.requires_grad for p in net.parameters())
        climbed.append(logits)
        if fails and len(climbed) == 2:
            raise ZeroDivisionError
        return cross_entropy(labels)(logits)

    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(), crafting(net, mode):
        pgd(net, images, objective, epsilon=EPSILON, step_size=EPSILON / 2, steps=2)
    assert len(climbed) == 2
    assert not any(needed)
    assert [p.requires_grad for p in net.parameters()] == learned
    assert all(p.grad is None for p in net.parameters())


@pytest.fixture
def renamed():
    """bn under a class name that no library knows."""
    base = type(make_norm("bn")(4))

    @register(name="mine", source="test", mixes_samples=True, keeps_stats=True, slices_at_once=True)
    class Peculiar(base):
        pass

    return "mine"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_norm_whose_class_name_holds_no_batchnorm_is_crafted_against_as_bn_is(renamed, mode):
    images, labels = picture(8), torch.arange(8) % 4
    made = []
    for name in ("bn", renamed):
        net = network(name)
        assert not any("BatchNorm2d" in type(m).__name__ for m in net.modules())
        with crafting(net, mode, slices=2):
            made.append(pgd(net, images, cross_entropy(labels), epsilon=EPSILON, step_size=EPSILON / 2, steps=3))
    assert torch.equal(*made)


@pytest.mark.parametrize("part", PARTS)
def test_torchattacks_changes_neither_mode_nor_statistics_of_such_a_norm(renamed, part):
    images = picture(12)
    net = network(renamed).train()
    net(images)  # statistics that are not the initial ones
    state = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.random.get_rng_state()
    labels = net.eval()(images).argmax(1)
    net.train()
    seen = []
    handle = net.stem.norm.register_forward_hook(lambda m, *_: seen.append(m.training))
    with crafting(net, "eval", what=part):
        made = attack(part, net, images, labels, epsilon=EPSILON, seed=3, scale=SMALL)
    handle.remove()
    assert set(seen) == {False}
    assert all(m.training for m in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert check_examples(made, images, EPSILON) is made


@pytest.mark.parametrize("kind", ["weight", "buffer", "data", "mode", "replaced"])
def test_an_attack_that_changes_the_network_is_found_out(kind):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), make_norm("bn")(2), nn.BatchNorm2d(2))

    def spoil():
        if kind == "weight":
            net[0].weight.add_(1)
        elif kind == "data":
            net[0].weight.data[0] = 7
        elif kind == "buffer":
            net[2].running_mean.add_(1)  # not one of ours: `hold` does not know it
        elif kind == "mode":
            net[2].train()
        else:
            net[0].weight = nn.Parameter(net[0].weight.detach().clone())

    found = pytest.raises(RuntimeError, match=r"the culprit changed .*(0\.weight|2\.running_mean|2)")
    with found, torch.no_grad(), crafting(net, "eval", what="the culprit"):
        spoil()


def test_a_weight_that_is_not_a_number_counts_as_unchanged():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight[0, 0] = math.nan
    with crafting(net, "eval"):
        pass


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (lambda x: x + 0.2, "distance 51/255 of 25.5/255 allowed"),
        (lambda x: x - 0.08, "values from -0.03"),
        (lambda x: x + 0.08, r"to 1\.0"),
        (lambda x: x * math.nan, "outside"),
        (lambda x: x[:1], "returned"),
    ],
)
def test_an_example_outside_of_the_ball_or_the_box_is_refused(example, message):
    images = torch.full((4, 1, 2, 2), 0.5)
    images[2, 0, 0, 0], images[3, 0, 1, 1] = 0.05, 0.95
    with pytest.raises(RuntimeError, match=message):
        check_examples(example(images), images, EPSILON)


def test_one_bad_value_among_all_examples_is_found():
    images = picture(64)
    made = images.clone()
    made[63, 0, 7, 7] = images[63, 0, 7, 7] + (EPSILON + 1e-4) * (1 if images[63, 0, 7, 7] < 0.5 else -1)
    with pytest.raises(RuntimeError, match="outside"):
        check_examples(made, images, EPSILON)


@given(
    epsilon=st.floats(1e-4, 1.0),
    step=st.floats(1e-4, 2.0),
    steps=st.integers(1, 4),
    seed=st.integers(0, 99),
    started=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_pgd_never_leaves_the_ball_or_the_box(epsilon, step, steps, seed, started):
    images = picture(5, seed).round(decimals=1)  # with zeros and ones
    net = Linear(torch.randn(1, 8, 8, generator=generator("w")), 0.1)
    start = uniform_start(images, epsilon, torch.Generator().manual_seed(seed)) if started else None
    with crafting(net, "eval"):
        made = pgd(
            net, images, cross_entropy(torch.arange(5) % 2), epsilon=epsilon, step_size=step, steps=steps, start=start
        )
    check_examples(made, images, epsilon)


def evaluated(parts=PARTS, seed=0, name="bn"):
    images = picture(60, seed)
    net = network(name)
    labels = net.eval()(images).argmax(1)
    labels[::7] = (labels[::7] + 1) % 4  # some are wrong from the start
    attacks = Attacks(0.03, 0.01, 5, 2, parts, SMALL)
    return evaluate_robustness(net.train(), images, labels, attacks, generator)


def test_autoattack_is_never_above_a_part_and_the_worst_case_never_above_anything():
    found = evaluated()
    whole = found.top1(*PARTS)
    assert set(found.attacks) == {"fgsm", "pgd", *PARTS}
    assert all(whole <= found.top1(part) for part in PARTS)
    assert all(found.robust_top1 <= found.top1(name) <= found.top1() for name in found.attacks)
    assert 0 < found.robust_top1 < found.top1() < 1


def test_the_same_spec_attacks_bit_identically_whatever_was_drawn_before():
    first = evaluated()
    torch.rand(17)
    second = evaluated()
    assert torch.equal(first.clean, second.clean)
    assert all(torch.equal(first.attacks[name], second.attacks[name]) for name in first.attacks)


def test_an_image_has_the_same_start_whichever_others_are_still_right(monkeypatch):
    begun = []

    def noting(net, images, objective, *, start=None, **options):
        begun.append((images.clone(), start))
        return images

    monkeypatch.setattr(evaluation, "pgd", noting)
    images, net = picture(20), network()
    labels = net.eval()(images).argmax(1)
    for wrong in ([], [0, 3]):
        y = labels.clone()
        y[wrong] = (y[wrong] + 1) % 4
        evaluate_robustness(net, images, y, Attacks(0.1, 0.1, 1, 1), generator)
    (all_images, all_starts), (some_images, some_starts) = (begun[i] for i in (1, 3))
    kept = [i for i in range(20) if i not in (0, 3)]
    assert torch.equal(all_images[kept], some_images)
    assert torch.equal(all_starts[kept], some_starts)


def robustness(clean, zero=None, **attacks):
    tensors = {name: torch.tensor(value, dtype=torch.bool) for name, value in attacks.items()}
    zero = torch.zeros(len(clean), dtype=torch.bool) if zero is None else torch.tensor(zero, dtype=torch.bool)
    return Robustness(torch.tensor(clean, dtype=torch.bool), tensors, zero)


def test_the_worst_case_is_taken_per_image():
    found = robustness([1, 1, 1, 0], fgsm=[1, 0, 1, 1], pgd=[0, 1, 1, 1])
    assert (found.top1(), found.top1("fgsm"), found.top1("pgd"), found.robust_top1) == (0.75, 0.5, 0.5, 0.25)


def test_the_interval_is_wilsons():
    found = robustness([1] * 30 + [0] * 10, fgsm=[1] * 25 + [0] * 15)
    z, n, p = 1.959963984540054, 40, 25 / 40
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert found.interval() == pytest.approx(expected, abs=1e-9)
    nothing = robustness([0] * 40).interval()
    assert nothing == pytest.approx(tuple(binomtest(0, 40).proportion_ci(method="wilson")), abs=1e-12)
    assert nothing[1] > 0.05  # zero of forty is no proof of zero


@pytest.mark.parametrize(
    ("attacks", "zero", "sign"),
    [
        ({"fgsm": [1, 1, 0], "pgd": [1, 0, 0], "square": [1, 1, 0]}, None, None),
        ({"fgsm": [1, 1, 0], "pgd": [1, 1, 0], "square": [1, 0, 0]}, None, "black-box"),
        ({"fgsm": [0, 0, 0], "pgd": [1, 1, 1]}, None, "one step"),
        ({"fgsm": [1, 1, 1], "pgd": [1, 1, 1]}, [1, 0, 0], "zero or non-finite gradients at 1 of 3"),
    ],
)
def test_signs_of_gradient_masking(attacks, zero, sign):
    signs = robustness([1, 1, 1], zero, **attacks).signs_of_masking()
    assert signs == [] if sign is None else (len(signs) == 1 and sign in signs[0])


class Staircase(nn.Module):
    """Rounds its input: right, and without a gradient, as masked defences are."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        # the value of a rounded x, attached to the graph by a term whose gradient is exactly zero
        return self.net((x.mul(4).round() / 4).detach() + 0 * x)


def test_a_planted_masked_network_is_flagged():
    images = picture(40)
    net = Staircase(Linear(torch.randn(1, 8, 8, generator=generator("w")), 0.0, classes=4))
    labels = net(images).argmax(1)
    found = evaluate_robustness(
        net, images, labels, Attacks(0.2, 0.05, 5, 1, ("square",), Scale(square_queries=300)), generator
    )
    signs = " ".join(found.signs_of_masking())
    assert "zero or non-finite gradients at 40 of 40" in signs
    assert "a black-box attack leaves" in signs


class Undefined(nn.Module):
    """The forward is exact, the backward is not a number: sign ascent stays where it is, which is no robustness."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(torch.where(x >= 0, x, torch.sqrt(x * 0)))


def test_gradients_that_are_not_finite_are_a_sign_too():
    images = picture(20)
    net = Undefined(Linear(torch.randn(1, 8, 8, generator=generator("w")), 0.0, classes=4))
    found = evaluate_robustness(net, images, net(images).argmax(1), Attacks(0.2, 0.05, 2, 1), generator)
    assert found.signs_of_masking() == ["zero or non-finite gradients at 20 of 20 correctly classified images"]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_attacks_colour_images_in_either_memory_format(part):
    made = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = build_net("resnet8", make_norm("bn"), num_classes=4, in_channels=3, width=4, generator=generator).eval()
        images = picture(6, channels=3).contiguous(memory_format=memory_format)
        labels = net(images).argmax(1)
        with crafting(net, "eval"):
            made.append(attack(part, net, images, labels, epsilon=EPSILON, seed=3, scale=SMALL))
        check_examples(made[-1], images, EPSILON)
        assert made[-1].is_contiguous(memory_format=memory_format)
    assert torch.equal(*made)


def test_the_parts_use_the_seed_that_is_recorded():
    images, net = picture(12), network().eval()
    labels = net(images).argmax(1)
    made = []
    for seed in (1, 1, 2):
        with crafting(net, "eval"):
            made.append(attack("square", net, images, labels, epsilon=0.05, seed=seed, scale=SMALL))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


HALVINGS = [(0, 1), (10, 1), (11, 2), (50, 2), (51, 4), (200, 4), (201, 8), (500, 8), (501, 16), (1000, 16), (1001, 32),
            (2000, 32), (2001, 64), (4000, 64), (4001, 128), (4999, 128), (6000, 128), (6001, 256), (8000, 256),
            (8001, 512)]  # fmt: skip
"""(query, what Square's first share of 0.8 is divided by): Andriushchenko et al. 2020 (arXiv:1912.00049)."""


@pytest.mark.parametrize("queries", [100, 5000, 10_000])
def test_squares_schedule_is_the_published_one_whatever_the_number_of_queries(queries, monkeypatch):
    """AutoAttack does not stretch the schedule of 10,000 queries to its own 5,000."""
    made = []
    monkeypatch.setattr(torchattacks.Square, "forward", lambda self, images, labels: made.append(self) or images)
    images, net = picture(2), network().eval()
    with crafting(net, "eval"):
        attack("square", net, images, torch.zeros(2), epsilon=0.02, seed=0, scale=Scale(square_queries=queries))
    (square,) = made
    assert square.n_queries == queries
    assert [square.p_selection(query) for query, _ in HALVINGS] == [0.8 / divisor for _, divisor in HALVINGS]


def test_validation_is_attacked_without_autoattack_and_restarts():
    light = pgd_only(Attacks(0.1, 0.05, 7, 5, PARTS))
    assert (light.parts, light.pgd_restarts, light.pgd_steps, light.epsilon) == ((), 1, 7, 0.1)


def test_a_network_without_a_gradient_is_a_clear_error():
    class Deaf(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 4)

    with pytest.raises(ValueError, match="no gradient reaches the images"):
        input_gradient(Deaf(), picture(2).requires_grad_(), cross_entropy(torch.zeros(2, dtype=torch.long)))


def test_the_divergence_is_kl_of_the_clean_prediction_from_the_attacked_one():
    clean, attacked = (torch.randn(5, 3, dtype=torch.float64, generator=generator(p)) for p in "ab")
    p, q = clean.softmax(1), attacked.softmax(1)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(divergence(clean)(attacked), expected)


def test_attacks_run_on_the_device_of_the_images():
    """A whole attack on the meta device fails on any tensor that is made elsewhere."""
    net = build_net("resnet8", make_norm("bn"), num_classes=4, in_channels=1, width=4, device="meta")
    images = torch.zeros(4, 1, 8, 8, device="meta")
    labels = torch.zeros(4, dtype=torch.long, device="meta")
    with crafting(net, "train"):
        made = pgd(
            net,
            images,
            cross_entropy(labels),
            epsilon=EPSILON,
            step_size=EPSILON,
            steps=2,
            start=uniform_start(images, EPSILON, generator("start")),
        )
    assert made.device.type == "meta"

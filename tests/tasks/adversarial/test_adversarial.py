"""The adversarial task: what is trained on, equal terms for every norm, planning, options, bad input."""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from parts import adversarial as attacked
from parts.adversarial import TINY, batch, built, context, norm, options
from parts.norm_choices import TIER1
from pydantic import ValidationError

from norms import registry
from norms.factory import factory_info
from norms.layers.dual_bn import DualBatchNorm
from norms.registry import make_norm, norm_info, norm_names, register
from norms.situation import after_update, hold, predict
from results.metrics import METRICS
from tasks import get_task
from tasks.adversarial import task as adversarial
from tasks.adversarial import training
from tasks.adversarial.crafting import crafting
from tasks.adversarial.ensemble import PARTS
from tasks.adversarial.networks import build
from tasks.adversarial.task import TASK, AdversarialOptions
from tasks.adversarial.training import adversarial_step, craft, draw_start
from tasks.base import Diverged
from tasks.inputs import facts_of
from tasks.options import newer_options
from tasks.schedule import learning_rate_at, sgd

pytestmark = pytest.mark.usefixtures("one_thread")
data = attacked.data


def test_a_run_returns_the_declared_metrics_which_tables_know(tmp_path):
    outcome = TASK.run(norm("bn"), options(), context(tmp_path))
    assert get_task("adversarial") is TASK
    assert tuple(outcome.metrics) == TASK.metrics
    assert set(TASK.metrics) <= METRICS.keys()
    assert {TASK.headline, TASK.validation} <= set(TASK.metrics)
    m = outcome.metrics
    assert m["robust_top1"] <= min(m["fgsm_top1"], m["pgd_top1"], m["autoattack_top1"]) <= m["clean_top1"]
    evidence = outcome.evidence
    assert m["autoattack_top1"] <= min(evidence["attack_top1"][part] for part in TINY["autoattack"])
    low, high = evidence["robust_interval"]
    assert low <= m["robust_top1"] <= high
    assert m["robust_ci95"] == pytest.approx((high - low) / 2)
    assert evidence["crafting_mode"] == "eval"
    assert ("many steps" in evidence["masking"]) == (m["pgd_top1"] > m["fgsm_top1"])
    assert evidence["attacks"] == ["fgsm", "pgd: 3 steps, 2 restarts", "apgd_ce: 3 steps", "square: 5 queries"]
    assert evidence["attack_seeds"].keys() == {"apgd_ce", "square"}
    assert len(outcome.history) == 2
    assert m["val_top1"] == outcome.history[-1]["val_top1"]


def test_the_same_spec_twice_is_bit_identical(tmp_path):
    def numbers(outcome):
        cost = ("step_seconds", "peak_memory_mb")
        return {k: v for k, v in outcome.metrics.items() if k not in cost}, outcome.evidence

    spec = options(epochs=1, autoattack=PARTS, fab_steps=2)
    first = numbers(TASK.run(norm("bgn"), spec, context(tmp_path)))
    torch.rand(5)
    assert numbers(TASK.run(norm("bgn"), spec, context(tmp_path))) == first


def test_adversarial_training_buys_robustness_on_a_planted_problem(tmp_path):
    """Bars of contrast 150 and a ball of 60/255: learnable, and lost without crafting."""
    hard = {"epsilon": 60, "epochs": 6, "autoattack": (), "pgd_steps": 5, "attack_images": 80}
    trained = TASK.run(norm("bn"), options(**hard, method="pgd"), context(tmp_path)).metrics
    control = TASK.run(norm("bn"), options(**hard, method="standard"), context(tmp_path)).metrics
    assert trained["robust_top1"] > control["robust_top1"] + 0.3
    assert trained["autoattack_top1"] is None


@pytest.mark.parametrize("name", TIER1)
def test_every_norm_gets_the_same_images_weights_and_starts(name, data, tmp_path, monkeypatch):
    seen = []

    def noting(net, optimizer, images, labels, start, opts, **facts):
        seen.append((images.clone(), labels.clone(), start.clone()))
        return adversarial_step(net, optimizer, images, labels, start, opts, **facts)

    monkeypatch.setattr(training, "adversarial_step", noting)
    spec = options(epochs=1, max_steps=3, autoattack=(), pgd_steps=1)
    runs = []
    for each in ("gn", name):
        seen.clear()
        net = built(each, data, spec, tmp_path)
        first = {k: v for k, v in net.named_parameters() if "norm" not in k}
        TASK.run(norm(each), spec, context(tmp_path))
        runs.append((first, list(seen)))
    (weights, steps), (others, other_steps) = runs
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    assert len(steps) == 3
    assert all(torch.equal(a, b) for x, y in zip(steps, other_steps, strict=True) for a, b in zip(x, y, strict=True))


def test_the_attacked_images_are_the_same_for_every_seed_and_in_order(data):
    chosen = adversarial._chosen(data.test, "test", options())
    assert len(chosen) == 40
    again = adversarial._chosen(data.test, "test", options(epochs=1))
    assert torch.equal(chosen.images, again.images)
    where = [int((data.test.images == image).flatten(1).all(1).nonzero()[0]) for image in chosen.images]
    assert where == sorted(where)
    assert where != list(range(40))


@pytest.mark.parametrize("method", ["pgd", "trades", "fgsm_rs"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_crafting_moves_no_statistics_and_training_moves_them_once_per_forward(method, mode, data, tmp_path):
    spec = options(method=method, crafting_mode=mode, norm_batch_size=8)
    net = built("bn", data, spec, tmp_path)
    images, labels = batch(data, spec, 32)
    start = draw_start(images, spec, torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    examples = craft(net, images, labels, start, spec)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert float((examples - images).abs().max()) <= spec.radius + 1e-6
    assert not torch.equal(examples, images)
    optimizer = sgd(net, learning_rate=0.01, momentum=0.9, weight_decay=0.0)
    adversarial_step(net, optimizer, images, labels, start, spec)
    forwards = 2 if method == "trades" else 1
    assert int(net.net.stem.norm.num_batches_tracked) == 4 * forwards  # four norm batches in each


def test_the_mode_of_crafting_changes_the_examples_of_bn_alone(data, tmp_path):
    for name, differs in (("bn", True), ("gn", False)):
        made = []
        for mode in ("eval", "train"):
            spec = options(crafting_mode=mode)
            net = built(name, data, spec, tmp_path)
            images, labels = batch(data, spec, 32)
            start = draw_start(images, spec, torch.Generator().manual_seed(0))
            made.append(craft(net, images, labels, start, spec))
        assert torch.equal(*made) is not differs


def test_a_trades_step_is_the_papers_loss(data, tmp_path):
    """Equation 5 of Zhang et al. 2019: CE of the images + beta * KL(images || examples), both in training mode."""
    spec = options(method="trades", trades_beta=3.0)
    net = built("bn", data, spec, tmp_path).double()
    images, labels = batch(data, spec, 32)
    images = images.double()
    start = draw_start(images, spec, torch.Generator().manual_seed(0)).double()
    examples = craft(net, images, labels, start, spec)
    with hold(net):
        p, q = net(images).softmax(1), net(examples).softmax(1)
    expected = F.cross_entropy(p.log(), labels) + 3.0 * (p * (p.log() - q.log())).sum(1).mean()
    gradients = torch.autograd.grad(expected, list(net.parameters()))
    optimizer = sgd(net, learning_rate=0.0, momentum=0.0, weight_decay=0.0)
    loss, _ = adversarial_step(net, optimizer, images, labels, start, spec)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for p, g in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)


def test_fgsm_with_random_start_is_one_step_of_five_quarters_epsilon(data, tmp_path):
    spec = options(method="fgsm_rs", steps=7)
    assert (spec.steps, spec.training_step_size) == (None, pytest.approx(10 / 255))
    net = built("ln", data, spec, tmp_path)
    images, labels = batch(data, spec)
    start = draw_start(images, spec, torch.Generator().manual_seed(0))
    x = (images + start).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)
    moved = (x + 10 / 255 * gradient.sign()).detach()
    expected = torch.minimum(torch.maximum(moved, images - 8 / 255), images + 8 / 255).clamp(0, 1)
    torch.testing.assert_close(craft(net, images, labels, start, spec), expected, rtol=0, atol=1e-6)


def test_trades_starts_a_little_off_the_image_where_its_objective_has_a_gradient(data):
    spec = options(method="trades")
    images, _ = batch(data, spec)
    start = draw_start(images, spec, torch.Generator().manual_seed(0))
    assert float(start.std()) == pytest.approx(0.001, rel=0.1)


def test_a_failed_measurement_keeps_the_history(tmp_path, monkeypatch):
    def fail(*arguments, **facts):
        raise Diverged("test: the loss is nan")

    monkeypatch.setattr(adversarial, "evaluate_robustness", fail)
    run = context(tmp_path)
    with pytest.raises(Diverged):
        TASK.run(norm("bn"), options(epochs=1), run)
    assert len(run.journal.rows) == 1


def test_input_normalization_is_inside_the_network(data, tmp_path):
    spec = options()
    net = built("ln", data, spec, tmp_path)
    images, _ = batch(data, spec)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(net(images), net.net((images - mean) / std))
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_options_that_nothing_uses_are_null_so_that_a_grid_over_them_repeats_no_run():
    assert options(method="standard", steps=3, crafting_mode="train") == options(method="standard")
    assert options(method="standard").crafting_mode is None
    assert options(method="pgd", trades_beta=2.0) == options(method="pgd")
    assert options(method="fgsm_rs", steps=9) == options(method="fgsm_rs")
    assert options(method="trades", trades_beta=2.0) != options(method="trades")
    assert options(method="trades").trades_beta == 6.0
    assert (options(autoattack=()).apgd_steps, options(autoattack=()).square_queries) == (None, None)
    assert AdversarialOptions(autoattack=("fab_t",), apgd_steps=7).fab_steps == 100
    assert options(milestones=(0.1,)) == options()
    assert options(autoattack=("square", "apgd_ce")) == options(autoattack=("apgd_ce", "square"))
    assert options(schedule="steps").milestones == (0.5, 0.75)


@pytest.mark.parametrize("method", ["pgd", "trades", "fgsm_rs", "standard"])
@pytest.mark.parametrize("parts", [PARTS, ("square",), ()])
def test_a_stored_record_resolves_to_itself(method, parts):
    resolved = options(method=method, autoattack=parts)
    assert AdversarialOptions.model_validate(resolved.model_dump(mode="json")) == resolved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 0}, "epsilon"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": 300}, "epsilon"),
        ({"step_size": 0}, "step_size"),
        ({"steps": 0}, "steps"),
        ({"method": "pdg"}, "method"),
        ({"crafting_mode": "test"}, "crafting_mode"),
        ({"norm_batch_size": 5}, "norm_batch_size 5 does not divide batch_size 32"),
        ({"autoattack": ["apgd"]}, "autoattack"),
        ({"autoattack": ["square", "square"]}, "names a part twice"),
        ({"schedule": "steps", "milestones": [0.9, 0.5]}, "rising fractions"),
        ({"model": "resnet9"}, 'did you mean "resnet8"'),
        ({"attack_image": 3}, "attack_image"),
        ({"attack_images": 1}, "attack_images"),
        ({"trades_beta": -3}, "trades_beta"),
        ({"milestones": [0.9, 0.2]}, "rising fractions"),
        ({"autoattack": [["apgd_ce"], "square"]}, "autoattack"),
    ],
)
def test_a_wrong_option_is_named(given, message):
    with pytest.raises(ValidationError, match=message):
        options(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_classes": 3}, "apgd_t needs at least 4 classes, here are 3"),
        ({"num_classes": 5, "targets": 7}, "targets 7: a network of 5 classes has 4 wrong ones"),
        ({"attack_images": 3000}, "attack_images 3000 exceeds the 2000 test images"),
        ({"batch_size": 9000}, "batch_size 9000 exceeds the"),
        ({"dataset": "digits", "attack_images": 601}, 'exceeds the 600 test images of "digits"'),
        ({"dataset": "omniglot"}, "data prepare omniglot"),
    ],
)
def test_what_the_data_can_not_serve_is_said_while_planning(given, message, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real data
    spec = AdversarialOptions(**{"dataset": "fashion_mnist_mini", "autoattack": PARTS, **given})
    with pytest.raises(ValueError, match=message):
        TASK.data_checksum(spec, tmp_path)


def test_without_torchattacks_planning_names_the_command_unless_nothing_needs_it(data, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchattacks" else real(name, *a)
    )
    with pytest.raises(ValueError, match=r"needs torchattacks.*pip install --no-deps -r requirements-legacy\.txt"):
        TASK.data_checksum(options(), tmp_path)
    assert TASK.data_checksum(options(autoattack=()), tmp_path) == str(id(data))


def why_not(name, **given):
    factory = norm(name)
    return TASK.why_not(factory, factory_info(factory), options(**given))


@pytest.mark.parametrize("name", norm_names(without=["domain", "context"]))
def test_every_registered_norm_can_be_planned(name):
    assert why_not(name, norm_batch_size=None if norm_info(name).across_iterations else 8) is None


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_norms_that_can_not_serve_are_skipped_with_the_reason(method):
    absent = {"context"} if method == "trades" else {"context", "domain"}
    for name in norm_names():
        reason, info = why_not(name, method=method, norm_batch_size=8), norm_info(name)
        if info.needs & absent:
            assert reason == f"needs {min(info.needs & absent)}, which adversarial ({method}) has not"
        elif info.across_iterations:
            assert reason.startswith("takes statistics from earlier iterations")
            assert "each of the 4 norm batches" in reason
        else:
            assert reason is None


def test_a_norm_that_lets_no_gradient_through_is_skipped_with_the_reason():

    @register(name="deaf", source="test", mixes_samples=False, keeps_stats=False)
    class Deaf(torch.nn.Module):
        def __init__(self, num_channels: int, *, affine: bool = True):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(num_channels, 1, 1))

        def forward(self, x):
            return x.detach() * self.weight

    factory = make_norm("deaf")
    reason = TASK.why_not(factory, factory_info(factory), options())
    assert reason is not None
    assert reason.startswith("in training mode no gradient reaches the images")


def test_a_norm_that_needs_a_domain_is_skipped_with_the_reason():
    info = registry.NormInfo("dom", "test", 1, False, False, needs=frozenset({"domain"}))
    assert TASK.why_not(make_norm("ln"), info, options()) == "needs domain, which adversarial (pgd) has not"


def test_divergence_is_a_result_that_names_the_step(tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        TASK.run(norm("none"), options(learning_rate=1e30, warmup=0.0), context(tmp_path))


def test_the_schedule_of_steps_divides_by_ten_at_each_milestone():
    rates = [learning_rate_at(p, 0.1, "steps", 0.0, (0.5, 0.75)) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert learning_rate_at(0.05, 0.1, "steps", 0.1) == pytest.approx(0.05)


# --- norms that tell clean from adversarial images -------------------------------------------------------------------


def test_a_norm_that_needs_domains_serves_where_both_kinds_are_trained_on():
    factory = make_norm("dual_bn", num_domains=2)
    assert TASK.why_not(factory, factory_info(factory), options(method="trades", norm_batch_size=8)) is None
    reason = TASK.why_not(factory, factory_info(factory), options(method="pgd", norm_batch_size=8))
    assert reason == "needs domain, which adversarial (pgd) has not"
    assert TASK.setting(options(method="trades")).num_domains == 2


def test_trades_tells_dual_bn_which_images_are_clean_and_attacks_the_adversarial_branch(tmp_path, monkeypatch):
    spec = options(method="trades", autoattack=())
    seen = []
    real = DualBatchNorm.forward

    def watched(self, x):
        seen.append((self.training, self.situation.domain))
        return real(self, x)

    monkeypatch.setattr(DualBatchNorm, "forward", watched)
    outcome = TASK.run(make_norm("dual_bn", num_domains=2), spec, context(tmp_path))
    assert set(seen) == {(True, 0), (True, 1), (False, 0), (False, 1)}
    assert outcome.evidence["equals"] == "dsbn"
    assert 0 <= outcome.evidence["clean_branch_top1"] <= 1
    assert "clean_branch_top1" not in TASK.run(make_norm("bn"), spec, context(tmp_path)).evidence


# --- what every training is told -------------------------------------------------------------------------------------

METHODS = ["standard", "pgd", "fgsm_rs", "trades"]
STORED = {
    "dataset": "fashion_mnist_mini", "num_classes": None, "model": "resnet8", "width": None, "epochs": 10,
    "max_steps": None, "batch_size": 128, "norm_batch_size": None, "learning_rate": 0.1, "scale_learning_rate": True,
    "momentum": 0.9, "weight_decay": 0.0005, "norm_weight_decay": False, "schedule": "cosine", "warmup": 0.1,
    "augmentation": "crop", "channels_last": True, "method": "pgd", "epsilon": 8.0, "step_size": None, "steps": 10,
    "crafting_mode": "eval", "trades_beta": None, "milestones": None, "attack_images": 1000, "pgd_steps": 20,
    "pgd_step_size": None, "pgd_restarts": 5, "autoattack": ["apgd_ce", "apgd_t", "fab_t", "square"],
    "apgd_steps": 100, "fab_steps": 100, "targets": None, "square_queries": 5000,
}  # fmt: skip
"""A record's options before there were others: its key is made of them."""


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, {}),
        ({"milestones": [0.9]}, {}),
        ({"schedule": "steps"}, {"schedule": "steps", "milestones": [0.5, 0.75]}),
        ({"schedule": "steps", "milestones": [0.5, 0.75]}, {"schedule": "steps", "milestones": [0.5, 0.75]}),
        ({"schedule": "steps", "milestones": []}, {"schedule": "steps", "milestones": []}),
        ({"schedule": "steps", "milestones": [0.9, 0.95]}, {"schedule": "steps", "milestones": [0.9, 0.95]}),
        ({"method": "standard"}, {"method": "standard", "steps": None, "crafting_mode": None}),
        ({"method": "trades"}, {"method": "trades", "trades_beta": 6.0}),
    ],
)
def test_the_options_of_records_that_exist_are_what_they_were(given, stored):
    newer = newer_options(AdversarialOptions)
    assert AdversarialOptions(**given).model_dump(mode="json") == {**STORED, **newer, **stored}
    assert newer.keys().isdisjoint(STORED)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_crafting_and_attacks_compute_in_the_precision_that_is_asked_for(
    method, precision, tmp_path, monkeypatch
):
    seen = set()
    real = adversarial.build

    def watching(*arguments, **facts):
        net = real(*arguments, **facts)
        net.net.stem.conv.register_forward_hook(
            lambda m, i, out: seen.add((net.training, torch.is_grad_enabled(), out.dtype))
        )
        return net

    monkeypatch.setattr(adversarial, "build", watching)
    spec = options(method=method, precision=precision, epochs=1, max_steps=2, autoattack=PARTS, fab_steps=1)
    outcome = TASK.run(norm("bn"), spec, context(tmp_path))
    assert {dtype for *_, dtype in seen} == {getattr(torch, precision)}
    assert {(True, True), (False, False), (False, True)} <= {where[:2] for where in seen}
    assert outcome.history[0]["train_loss"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_clipped_and_the_optimizer_is_the_one_asked_for(method, data, tmp_path):
    spec = options(method=method, gradient_clip=1e-3, optimizer="adamw", betas=[0.8, 0.9])
    net = built("bn", data, spec, tmp_path)
    optimizer = spec.trained_by(net)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    images, labels = batch(data, spec, 32)
    start = None if method == "standard" else draw_start(images, spec, torch.Generator().manual_seed(0))
    adversarial_step(net, optimizer, images, labels, start, spec)
    size = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
    assert float(size) == pytest.approx(1e-3, rel=1e-3)


def test_the_trained_network_is_built_again_from_its_facts_alone(data, tmp_path):
    for name, method in (("bn", "pgd"), ("dual_bn", "trades")):
        spec = options(method=method, autoattack=(), epochs=1, attack_images=80)
        outcome = TASK.run(norm(name), spec, context(tmp_path))
        facts = json.loads(json.dumps(outcome.trained.facts))
        net, prepare = TASK.network(norm(name), spec, facts)
        net.load_state_dict(outcome.trained.weights)
        right = predict(net.eval(), prepare(data.test.images)).argmax(1) == data.test.labels
        assert float(right.float().mean()) == pytest.approx(outcome.metrics["clean_top1"])


def test_the_steps_of_a_run_are_known_before_it(tmp_path):
    for given, steps in (({}, 16), ({"max_steps": 11}, 11), ({"batch_size": 64}, 8)):
        assert TASK.steps(options(**given), tmp_path) == steps


@pytest.mark.slow
def test_a_compiled_network_is_crafted_against_and_trained_as_it_is(data, tmp_path):
    """brn's training forward reads what it keeps, once two batches have settled it; crafting leaves that alone."""
    trained = []
    for compiled in (True, False):
        spec = options(compile=compiled, crafting_mode="train", steps=3)
        net = build(make_norm("brn", momentum=0.9), spec, facts_of(data), generator=context(tmp_path).generator)
        after_update(net, lambda: None, 1.0)  # beyond the first steps, in which brn is bn
        trained.append((spec, net, sgd(net, learning_rate=0.01, momentum=0.0, weight_decay=0.0)))
    for number in range(4):
        trained[1][1].load_state_dict(trained[0][1].state_dict())  # signs of gradients near zero add up
        found = []
        for spec, net, optimizer in trained:
            images, labels = (each[-32:] for each in batch(data, spec, 32 * (number + 1)))
            start = draw_start(images, spec, torch.Generator().manual_seed(number))
            examples = craft(net, images, labels, start, spec)
            with crafting(net, "train"):
                first, second = (net(images.clone().requires_grad_()).detach() for _ in range(2))
            assert torch.equal(first, second)
            loss, _ = adversarial_step(net, optimizer, images, labels, start, spec, progress=1.0)
            found.append((examples, first, loss))
        (examples, logits, loss), others = found
        assert float((examples != others[0]).float().mean()) < 0.01
        torch.testing.assert_close(others[1], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(others[2], loss, rtol=1e-3, atol=1e-3)

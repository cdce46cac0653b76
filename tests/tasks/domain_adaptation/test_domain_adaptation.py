"""The task domain_adaptation: label hygiene, AdaBN on planted shifts, selection, equal terms, planning, bad input."""

import math
from dataclasses import replace

import pytest
import torch
from parts import domain_adaptation as adapted
from parts.domain_adaptation import CLASSES, METHODS, TINY, WITH_TARGET_LABELS, context, norm, options, planted
from parts.norm_choices import one_of_each_kind
from pydantic import ValidationError

from norms.factory import factory_info
from norms.layers.bn import BatchNorm
from norms.registry import make_norm, norm_info, norm_names
from results.metrics import METRICS
from tasks import admission, get_task
from tasks import data as datasets
from tasks.base import Diverged
from tasks.data import reading
from tasks.data.batches import normalize
from tasks.data.images import shrink
from tasks.data.reading import UNLABELLED, without_labels
from tasks.domain_adaptation import selection, training
from tasks.domain_adaptation import task as domain_adaptation
from tasks.domain_adaptation.networks import build
from tasks.domain_adaptation.options import DomainAdaptationOptions
from tasks.domain_adaptation.selection import RULES, choose, measure
from tasks.domain_adaptation.task import TASK, adabn
from tasks.schedule import learning_rate_at

pytestmark = pytest.mark.usefixtures("one_thread")
domains = adapted.domains


def run(name, spec, tmp_path, seed=0):
    """The outcome, and the weights and statistics that training ended with."""
    outcome = TASK.run(norm(name, spec), spec, context(tmp_path, seed))
    return outcome, outcome.trained.weights


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def shuffled_labels(data):
    draw = torch.Generator().manual_seed(5)
    parts = {}
    for name in ("train", "val", "test"):
        part = getattr(data, name)
        parts[name] = replace(part, labels=part.labels[torch.randperm(len(part), generator=draw)])
    return replace(data, **parts)


# --- label hygiene ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), [*((m, "bn") for m in METHODS), ("dann", "dsbn"), ("mcd", "transnorm")])
def test_target_labels_touch_the_final_scores_and_the_oracle_and_nothing_else(
    method,
    name,
    domains,
    tmp_path,
):
    spec = options(method, epochs=4, width=8)
    true, weights = run(name, spec, tmp_path)
    domains["blend"] = shuffled_labels(domains["blend"])
    false, same_weights = run(name, spec, tmp_path)
    assert equal(weights, same_weights)
    measured = ("step_seconds", "peak_memory_mb")
    for key, value in true.metrics.items():
        if not key.startswith("target_top1") and key not in measured:
            assert false.metrics[key] == value, key
    for one, two in zip(true.history, false.history, strict=True):
        for key in one.keys() - WITH_TARGET_LABELS - {"seconds"}:
            assert one[key] == two[key], key
    chosen = true.evidence["chosen_epochs"], false.evidence["chosen_epochs"]
    assert {r: e for r, e in chosen[0].items() if r != "oracle"} == {
        r: e for r, e in chosen[1].items() if r != "oracle"
    }
    assert true.metrics["target_top1"] != false.metrics["target_top1"]  # the labels are really others


def test_source_only_reads_no_target_image_in_training(domains, tmp_path):
    spec = options("source_only")
    _, weights = run("bn", spec, tmp_path)
    domains["blend"] = planted(0.1, 7)
    _, same_weights = run("bn", spec, tmp_path)
    assert equal(weights, same_weights)
    spec = options("dann")
    _, weights = run("bn", spec, tmp_path)
    domains["blend"] = planted(0.8, 1)
    _, other = run("bn", spec, tmp_path)
    assert not equal(weights, other)  # the planted change would be seen


def test_the_training_loop_is_given_target_images_without_labels(domains, tmp_path, monkeypatch):
    given = []
    real = training.train

    def watched(net, source, target, *rest):
        given.append(target)
        return real(net, source, target, *rest)

    monkeypatch.setattr(domain_adaptation, "train", watched)
    run("bn", options(), tmp_path)
    (target,) = given
    assert torch.equal(target.images, domains["blend"].train.images)
    assert (target.labels == UNLABELLED).all()


def test_only_the_rules_columns_choose_and_the_earliest_of_equal_ones():
    history = [
        {"val_top1": 0.5, "im_score": 1.0, "target_val_top1": 0.2, "target_top1": 0.1},
        {"val_top1": 0.9, "im_score": 1.5, "target_val_top1": 0.4, "target_top1": 0.2},
        {"val_top1": 0.9, "im_score": 1.2, "target_val_top1": 0.6, "target_top1": 0.3},
    ]
    assert dict(choose(history)) == {"source_val": 1, "im": 1, "oracle": 2}
    assert set(RULES) == {"source_val", "im", "oracle"}


def test_each_rules_metric_is_the_accuracy_of_its_epoch(domains, tmp_path):
    outcome, _ = run("bn", options(epochs=4), tmp_path)
    for rule, epoch in outcome.evidence["chosen_epochs"].items():
        assert outcome.metrics[f"target_top1_{rule}"] == outcome.history[epoch - 1]["target_top1"]
    assert outcome.metrics["target_top1"] == outcome.history[-1]["target_top1"]
    assert outcome.evidence["selection"] == "last epoch"


# --- AdaBN ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """mnist at 16x16, and per norm a network trained on it alone."""
    data = shrink(datasets.load("digits", tmp_path_factory.mktemp("data"), domain="mnist"), 16)
    folder, trained = tmp_path_factory.mktemp("run"), {}

    def network(name, epochs):
        spec = DomainAdaptationOptions(method="source_only", width=8, epochs=epochs, batch_size=64, augmentation="none")
        if name not in trained:
            net = build(
                norm(name, spec), spec, channels=3, classes=10, device="cpu", generator=context(folder).generator
            )
            training.train(net, data.train, without_labels(data.train), spec, context(folder), prepare)
            trained[name] = net
        return trained[name], spec

    def prepare(images):
        return normalize(images, data.mean, data.std)

    def accuracies(name, change, epochs=1):
        """Accuracy on the changed test images, before and after AdaBN on changed training images."""
        net, spec = network(name, epochs)
        shifted = replace(data.test, images=change(data.test.images))
        adapted, _ = adabn(net, replace(data.train, images=change(data.train.images)), prepare, spec, context(folder))
        return tuple(measure(n, shifted, prepare, 0, "test").top1 for n in (net, adapted))

    return accuracies


def affine(scale, offset):
    return lambda images: (images.float() * scale + 255 * offset).round().clamp(0, 255).to(torch.uint8)


def test_adabn_without_a_shift_changes_no_more_than_noise(digits):
    before, after = digits("bn", lambda images: images, epochs=12)
    assert before > 0.9
    assert abs(after - before) < 0.02  # twelve of 600 images; their standard error is 0.01


@pytest.mark.parametrize(("scale", "offset"), [(0.3, 0.0), (0.3, 0.5)])
def test_adabn_recovers_most_of_what_a_shift_of_contrast_and_brightness_cost_bn(digits, scale, offset):
    clean, _ = digits("bn", lambda images: images, epochs=12)
    before, after = digits("bn", affine(scale, offset), epochs=12)
    assert before < clean - 0.1
    assert after > clean - 0.5 * (clean - before)  # 0.67 to more than 0.7 of it come back, by the machine


def test_adabn_can_not_repair_inverted_contrast(digits):
    clean, _ = digits("bn", lambda images: images, epochs=12)
    _, after = digits("bn", affine(-1, 1), epochs=12)
    assert after < clean - 0.3


@pytest.mark.parametrize("name", ["gn", "ln", "pn"])
def test_adabn_changes_nothing_for_norms_without_statistics(digits, name):
    before, after = digits(name, affine(0.3, 0.5))
    assert before == after


def test_adabn_takes_unlabelled_target_training_images_drawn_by_name_and_augmented(domains, tmp_path, monkeypatch):
    """What is re-estimated on: the target's training part, not its first images, in the run's augmentation, norm
    batches and domain."""
    given = []
    spec = options(adabn_images=96, norm_batch_size=8)
    monkeypatch.setattr(reading, "augment", lambda images, draws, kind: (given.append((images, kind)), images)[1])
    told = []

    def recalibrated(net, batches, slices, precision, domain):
        told.append((len(list(batches)), slices, domain))
        return net

    monkeypatch.setattr(domain_adaptation, "recalibrated", recalibrated)
    outcome, _ = run("bn", spec, tmp_path)
    assert told == [(1, 12, 1)]  # one forward of twelve norm batches
    assert outcome.evidence["adabn_images"] == 96
    images, kind = given[0]
    assert kind == "crop"
    pool = {image.numpy().tobytes() for image in domains["blend"].train.images}
    assert all(image.numpy().tobytes() in pool for image in images)
    assert not torch.equal(images, domains["blend"].train.images[:96])


@pytest.mark.parametrize(("method", "target"), [("dann", 1), ("source_only", 0)])
def test_source_images_are_evaluated_as_of_the_source_and_target_images_as_of_the_target(
    method, target, domains, tmp_path, monkeypatch
):
    told = []

    def noting(real):
        def measure(net, part, prepare, domain, what, precision, workers):
            told.append((what.partition(" after")[0], domain))
            return real(net, part, prepare, domain, what, precision, workers)

        return measure

    for module in (domain_adaptation, selection):
        monkeypatch.setattr(module, "measure", noting(module.measure))
    run("dsbn", options(method, epochs=1), tmp_path)
    assert told == [
        ("source validation", 0),
        ("target validation", target),
        ("target test", target),
        ("source test", 0),
        ("target test, AdaBN", target),
    ]


def test_the_label_free_score_and_the_composition_shift_see_target_images_as_of_the_target(
    domains,
    tmp_path,
):
    """With statistics of the target apart from the source's, the other domain would give other numbers."""
    spec = options(epochs=3)
    outcome, _ = run("dsbn", spec, tmp_path)
    net = build(
        norm("dsbn", spec), spec, channels=3, classes=CLASSES, device="cpu", generator=context(tmp_path).generator
    )
    source, target = domains["mnist"], domains["blend"]

    def prepare(images):
        return normalize(images, source.mean, source.std).contiguous(memory_format=torch.channels_last)

    training.train(net, source.train, without_labels(target.train), spec, context(tmp_path), prepare)
    scores = [
        selection.observe(net, source.val, without_labels(target.val), prepare, domain, "")["im_score"]
        for domain in (0, 1)
    ]
    assert outcome.metrics["im_score"] == scores[1] != scores[0]


# --- training ---------------------------------------------------------------------------------------------------------


def test_both_optimizers_of_mcd_follow_the_schedule_and_progress_ends_at_one(domains, tmp_path, monkeypatch):
    seen = []
    real = training.mcd_step

    def noting(net, of_features, of_heads, *rest, progress, step, workers):
        seen.append((of_features.param_groups[0]["lr"], of_heads.param_groups[0]["lr"], progress))
        return real(net, of_features, of_heads, *rest, progress=progress, step=step, workers=workers)

    monkeypatch.setattr(training, "mcd_step", noting)
    spec = options("mcd")
    run("bn", spec, tmp_path)
    rates = [learning_rate_at((i + 0.5) / 8, spec.peak_learning_rate, "cosine", 0.1) for i in range(8)]
    assert [a for a, _, _ in seen] == [b for _, b, _ in seen] == pytest.approx(rates)
    assert [p for _, _, p in seen] == [i / 8 for i in range(1, 9)]


@pytest.mark.parametrize("method", METHODS)
def test_every_update_is_told_to_norms_once(method, domains, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(BatchNorm, "after_update", lambda self, progress: told.append(progress), raising=False)
    _, weights = run("bn", options(method), tmp_path)
    layers = len([key for key in weights if key.endswith("running_mean")])
    assert told == [i / 8 for i in range(1, 9) for _ in range(layers)]


@pytest.mark.parametrize("method", METHODS)
def test_the_norm_batch_changes_what_bn_learns_and_not_what_gn_does(method, domains, tmp_path):
    spec, sliced = options(method, epochs=1), options(method, epochs=1, norm_batch_size=8)
    for name, same in (("bn", False), ("gn", True)):
        one, two = (run(name, each, tmp_path)[1] for each in (spec, sliced))
        assert equal(one, two) is same


ONE_RATE = {"learning_rate": 0.04, "schedule": "steps"}


@pytest.mark.parametrize("method", METHODS)
def test_precision_optimizer_clip_and_milestones_reach_the_training_of_every_method(
    method,
    domains,
    tmp_path,
):
    def losses(**given):
        outcome, weights = run("bn", options(method, **ONE_RATE, **given), tmp_path)
        assert all(math.isfinite(value) for row in outcome.history for value in row.values())
        assert all(weight.dtype == torch.float32 for weight in weights.values() if weight.is_floating_point())
        return tuple(row["train_loss"] for row in outcome.history)

    told = [{}, {"precision": "bfloat16"}, {"optimizer": "adamw"}, {"gradient_clip": 0.1}, {"milestones": (0.3,)}]
    assert len({losses(**given) for given in told}) == len(told)


@pytest.mark.parametrize("method", METHODS)
def test_no_update_of_any_method_escapes_the_clip(method, domains, tmp_path):
    spec = options(method, gradient_clip=1e-9, weight_decay=0.0)
    _, weights = run("gn", spec, tmp_path)
    draws = context(tmp_path).generator
    start = build(norm("gn", spec), spec, channels=3, classes=CLASSES, generator=draws).state_dict()
    assert max((weights[name] - start[name]).abs().max() for name in start) < 1e-6


@pytest.mark.parametrize("method", ["source_only", "mcd"])
def test_bfloat16_reaches_every_forward_that_is_measured(method, domains, tmp_path, monkeypatch):
    seen = []

    def look(module, inputs, output):
        seen.append((module.training, output.dtype))

    def watched(*args, **kwargs):
        net = build(*args, **kwargs)
        net.heads[0].register_forward_hook(look)  # copies, as AdaBN's, have it, too
        return net

    monkeypatch.setattr(domain_adaptation, "build", watched)
    spec = options(method, precision="bfloat16", epochs=1)
    TASK.run(norm("bn", spec), spec, context(tmp_path))
    assert set(seen) == {(True, torch.bfloat16), (False, torch.bfloat16)}


@pytest.mark.slow
def test_a_compiled_run_is_the_run_but_for_rounding(domains, tmp_path):
    """Its weights have their names, and AdaBN's copy of the network works."""
    from torch._dynamo.utils import counters  # two seconds, for nobody else

    plain, weights = run("bn", options(epochs=1, max_steps=2), tmp_path)
    compiled, others = run("bn", options(epochs=1, max_steps=2, compile=True), tmp_path)
    assert counters["stats"]["unique_graphs"] > 0
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], rtol=1e-3, atol=1e-3) for name in weights)
    assert compiled.metrics["target_top1_adabn"] == pytest.approx(plain.metrics["target_top1_adabn"], abs=0.05)


def test_target_images_are_augmented_by_draws_of_their_own(domains, tmp_path, monkeypatch):
    """Else the target would change what the source's images look like, from method to method."""
    seen = []
    real = training.augment

    def noting(images, draws, kind, share):
        seen.append((id(draws), kind))
        return real(images, draws, kind, share)

    monkeypatch.setattr(training, "augment", noting)
    run("bn", options(epochs=1), tmp_path)
    assert len(seen) == 8
    assert {kind for _, kind in seen} == {"crop"}
    assert len({draws for draws, _ in seen}) == 2


# --- equal terms ------------------------------------------------------------------------------------------------------


def test_every_method_and_norm_meets_the_same_images_in_the_same_order(domains, tmp_path, monkeypatch):
    """Sources for all, targets for the methods that see them."""
    seen = {}

    def noting(kind, real):
        def step(net, *args, **kwargs):
            tensors = [a.clone() for a in args if isinstance(a, torch.Tensor) and a.dim() == 4]
            seen.setdefault(key, []).append(tensors)
            return real(net, *args, **kwargs)

        return step

    for name in ("adversarial_step", "mcd_step", "train_step"):
        monkeypatch.setattr(training, name, noting(name, getattr(training, name)))
    for key in [("dann", "bn"), ("dann", "gn"), ("mcd", "bn"), ("cdan_e", "dsbn"), ("source_only", "ln")]:
        run(key[1], options(key[0]), tmp_path)
    first = seen["dann", "bn"]
    assert len(first) == 8
    for other in seen.values():
        for one, two in zip(first, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=False))


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("dann", n) for n in one_of_each_kind(norm_names(without=["context"]))),
        ("source_only", "dsbn"),
        ("mcd", "dsbn"),
        ("cdan_e", "bne"),
    ],
)
def test_every_declared_metric_is_returned_finite_and_nothing_else(method, name, domains, tmp_path):
    outcome, _ = run(name, options(method, epochs=1), tmp_path)
    assert tuple(outcome.metrics) == TASK.metrics
    assert all(isinstance(v, float) and v == v and abs(v) != float("inf") for v in outcome.metrics.values())
    assert set(TASK.metrics) <= set(METRICS)
    if not factory_info(norm(name, options())).keeps_stats:
        assert outcome.metrics["target_top1_adabn"] == outcome.metrics["target_top1"]


def test_its_headline_and_validation_metrics_are_its_own():
    assert TASK.headline in TASK.metrics
    assert TASK.validation == "val_top1"
    assert get_task("domain_adaptation") is TASK


def test_source_only_is_the_same_run_for_bn_and_for_norms_that_are_bn_in_one_domain(domains, tmp_path):
    spec = options("source_only")
    found = {name: run(name, spec, tmp_path)[0] for name in ("bn", "dsbn", "bne")}
    for name in ("dsbn", "bne"):
        assert found[name].evidence["equals"] == "bn"
        for key in ("target_top1", "target_top1_adabn", "source_top1", "im_score"):
            assert found[name].metrics[key] == found["bn"].metrics[key]


def test_divergence_names_the_step(domains, tmp_path):
    with pytest.raises(Diverged, match=r"step \d+: the loss is"):
        TASK.run(make_norm("none"), options(learning_rate=1e6), context(tmp_path))


def test_divergence_keeps_the_history_of_the_epochs_before(domains, tmp_path, monkeypatch):
    real = domain_adaptation.score

    def score(net, val, test, prepare, domain, what, *others):
        if what == "after epoch 2":
            net.heads[0][0].weight.data[0] = float("nan")
        return real(net, val, test, prepare, domain, what, *others)

    monkeypatch.setattr(domain_adaptation, "score", score)
    surroundings = context(tmp_path)
    with pytest.raises(Diverged, match="target validation after epoch 2: the loss is nan"):
        TASK.run(make_norm("bn"), options(epochs=3), surroundings)
    assert [row["epoch"] for row in surroundings.journal.rows] == [1]


# --- planning and bad input -------------------------------------------------------------------------------------------


def why_not(name, spec):
    factory = norm(name, spec)
    return TASK.why_not(factory, factory_info(factory), spec)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", norm_names(without=["context"]))
def test_every_norm_can_be_planned(name, method):
    assert why_not(name, options(method, width=8, norm_batch_size=None if across(name) else 8)) is None


def across(name):
    return norm_info(name).across_iterations


@pytest.mark.parametrize("method", METHODS)
def test_planning_compiles_nothing_and_asks_in_float32(method, monkeypatch):
    monkeypatch.setattr(admission, "_ANSWERS", {})
    monkeypatch.setattr(admission, "FEW_VALUES", 0)  # the meta device, which has no autocast
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: pytest.fail("planning compiles"))
    asked = []
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x: (asked.append((x.device.type, x.dtype)), x)[1])
    assert why_not("bn", options(method, compile=True, precision="bfloat16")) is None
    assert set(asked) == {("meta", torch.float32)}


@pytest.mark.parametrize("method", METHODS)
def test_norms_that_can_not_serve_are_skipped_with_the_reason(method):
    for name in [n for n in norm_names() if across(n)]:
        reason = why_not(name, options(method, width=8, norm_batch_size=8))
        assert reason.startswith("takes statistics from earlier iterations")
        assert "each of the 4 norm batches" in reason
    for name in set(norm_names()) - set(norm_names(without=["context"])):
        assert why_not(name, options(method)) == "needs context, which domain_adaptation has not"


def test_a_norm_that_needs_a_context_or_refuses_the_shape_is_skipped_with_the_reason():
    from norms.protocol import NormInfo

    info = NormInfo("ctx", "test", 1, False, False, needs=frozenset({"context"}))
    assert TASK.why_not(make_norm("ln"), info, options()) == "needs context, which domain_adaptation has not"
    factory = make_norm("gn", num_groups=3)
    reason = TASK.why_not(factory, factory_info(factory), options())
    assert reason.startswith("num_groups=3 does not divide")


def test_unused_options_are_null_and_checked_all_the_same():
    spec = DomainAdaptationOptions(method="source_only", trade_off=2.0, mcd_steps=3, forward="separate")
    assert (spec.forward, spec.trade_off, spec.mcd_steps, spec.discriminator_width) == (None, None, None, None)
    spec = DomainAdaptationOptions(method="mcd")
    assert (spec.forward, spec.trade_off, spec.mcd_steps) == ("joint", None, 4)
    assert DomainAdaptationOptions(**spec.model_dump()) == spec
    with pytest.raises(ValidationError, match="forward"):
        DomainAdaptationOptions(method="source_only", forward="together")


def test_source_only_is_one_domain_and_the_others_two():
    for method in METHODS:
        spec = options(method)
        assert TASK.setting(spec).num_domains == (1 if method == "source_only" else 2)
        assert spec.target_domain == TASK.setting(spec).num_domains - 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": "mnist", "target": "mnist"}, 'source and target are both "mnist"'),
        ({"method": "dan"}, "source_only"),
        ({"trade_off": 0}, "greater than 0"),
        ({"adabn_images": 8}, "below the norm batch of 32"),
        ({"norm_batch_size": 5}, "does not divide batch_size 32"),
    ],
)
def test_wrong_options_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        DomainAdaptationOptions(**{**TINY, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": "blends"}, 'unknown domain "blends".*did you mean "blend"'),
        ({"dataset": "fashion_mnist_mini"}, "has no domains"),
        ({"batch_size": 1200, "source": "uci"}, 'batch_size 1200 exceeds the .* training images of domain "uci"'),
        ({"num_classes": 11}, "num_classes=11 is not in 2..10"),
        ({"dataset": "mnist_usps_svhn", "target": "svhn"}, "data prepare mnist_usps_svhn"),
    ],
)
def test_data_that_can_not_serve_is_named_before_anything_runs(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        TASK.data_checksum(options(**given), tmp_path)


@pytest.mark.parametrize("source", ["mnist", "uci", "fonts", "blend"])
@pytest.mark.parametrize("target", ["mnist", "uci", "fonts", "blend"])
def test_the_built_in_digits_serve_in_every_direction(source, target, tmp_path):
    if source != target:
        assert TASK.data_checksum(options(source=source, target=target), tmp_path)

"""The classification task: known answers, equal terms for every norm, planning, options, divergence."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import classification as classified
from parts.classification import CLASSES, SHAPE, TINY, factory, planted, results, run, why_not
from parts.norm_choices import TIER1
from PIL import Image
from pydantic import ValidationError

from norms import registry
from norms.factory import factory_info
from norms.registry import make_norm
from results.metrics import METRICS
from tasks import admission, get_task
from tasks.base import Diverged, RunContext, Setting
from tasks.classification import task as classification
from tasks.classification.task import TASK, recalibration_batches
from tasks.data import lazy
from tasks.data.images import Split, make_data
from tasks.data.lazy import FolderData, FolderImages

pytestmark = pytest.mark.usefixtures("one_thread")
data = classified.data
own_norms = classified.own_norms


# What comes out


@pytest.mark.parametrize("name", TIER1)
def test_every_declared_metric_is_returned_finite_and_nothing_else(name):
    outcome = run(name)
    assert tuple(outcome.metrics) == TASK.metrics
    assert all(type(value) is float and math.isfinite(value) for value in outcome.metrics.values())
    assert [row["epoch"] for row in outcome.history] == [1, 2]
    assert outcome.history[-1]["val_top1"] == outcome.metrics["val_top1"]
    assert outcome.metrics["composition_shift"] < 1e-4
    assert outcome.metrics["step_seconds"] > 0
    assert outcome.evidence["data"] == "synthetic"
    assert outcome.evidence["selection"] == "last epoch"
    if not factory_info(factory(name)).keeps_stats:
        assert outcome.metrics["top1"] == outcome.metrics["top1_recalibrated"]
        assert outcome.metrics["norm_buffers"] == 0


def test_every_metric_is_in_the_vocabulary():
    assert set(TASK.metrics) <= set(METRICS)


def test_the_task_is_registered_under_its_name():
    assert get_task("classification") is TASK
    assert TASK.name == "classification"


@pytest.mark.parametrize(("name", "norm_batch"), [("bn", None), ("bn", 4), ("bgn", 8), ("gn", None)])
def test_a_planted_problem_is_solved(name, norm_batch):
    metrics = run(name, epochs=5, norm_batch_size=norm_batch).metrics
    for accuracy in ("top1", "top1_recalibrated", "top1_recalibrated_plain", "val_top1", "train_top1"):
        assert metrics[accuracy] > 0.95, accuracy
    assert metrics["test_loss"] < 0.5


def test_labels_that_say_nothing_give_chance(data):
    data.value = planted((256, 512, 512), shuffled=True)
    metrics = run(epochs=4).metrics
    # chance is 0.25; 512 draws have a standard deviation of 0.019
    assert 0.15 < metrics["top1"] < 0.35
    assert 0.15 < metrics["val_top1"] < 0.35


def test_a_constant_output_is_reported(own_norms):
    assert run("blank", epochs=1).evidence["constant_output"] is True
    assert run("bn", epochs=1).evidence["constant_output"] is False


def test_mixing_in_evaluation_shows_as_composition_shift(own_norms):
    assert run("mixer").metrics["composition_shift"] > 0.01


# Equal terms


@pytest.mark.parametrize(("name", "norm_batch"), [("bn", 4), ("bgn", 8), ("gn", None)])
def test_the_same_spec_twice_is_bit_identical(name, norm_batch):
    options = {"norm_batch_size": norm_batch, "augmentation": "affine", "epochs": 1}
    first = results(run(name, **options))
    torch.rand(7)  # the global stream must not matter
    assert results(run(name, **options)) == first


def test_a_norm_under_two_names_ties_exactly(own_norms):
    assert results(run("copycat", norm_batch_size=8)) == results(run("bn", norm_batch_size=8))


def test_every_norm_sees_the_same_images_in_the_same_order(monkeypatch, own_norms):
    def seen(name, norm_batch):
        images = []
        step = classification.train_step

        def spy(net, optimizer, x, y, *rest, **named):
            images.append((x.clone(), y.clone()))
            return step(net, optimizer, x, y, *rest, **named)

        monkeypatch.setattr(classification, "train_step", spy)
        run(name, norm_batch_size=norm_batch, augmentation="affine", epochs=1)
        monkeypatch.setattr(classification, "train_step", step)
        return images

    reference = seen("bn", None)
    assert len(reference) == 256 // 32
    assert len(torch.cat([y for _, y in reference])) == 256
    for name, norm_batch in (("bn", 4), ("gn", None), ("mixer", 8)):
        for (x, y), (x_reference, y_reference) in zip(seen(name, norm_batch), reference, strict=True):
            assert torch.equal(x, x_reference)
            assert torch.equal(y, y_reference)


def test_dropout_of_a_torchvision_model_does_not_follow_the_global_stream():
    options = {"model": "mobilenet_v3_small", "width": None, "epochs": 1, "max_steps": 2, "batch_size": 8}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = results(run(**options))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert results(run(**options)) == first


def test_the_norm_batch_changes_training_and_not_the_evaluation():
    whole, sliced = run(epochs=1), run(epochs=1, norm_batch_size=2)
    assert whole.history[0]["train_loss"] != sliced.history[0]["train_loss"]
    assert whole.evidence["design"] == "norm batch = SGD batch"
    assert sliced.evidence["design"] == "norm batch < SGD batch"
    assert sliced.metrics["composition_shift"] < 1e-4


def test_bgn_with_one_group_per_channel_says_that_it_equals_bn():
    context = RunContext(torch.device("cpu"), 0, None, None)
    options = TASK.options(**(TINY | {"epochs": 1}))
    same = TASK.run(make_norm("bgn", num_groups="auto", norm_batch_size=128), options, context)
    assert same.evidence["equals"] == "bn"
    assert same.metrics["top1"] == pytest.approx(run(epochs=1).metrics["top1"], abs=0.03)
    assert run("bgn", epochs=1).evidence["equals"] is None


# The course of a run


def test_max_steps_ends_the_run_and_its_schedule():
    full = run(epochs=2)
    short = run(epochs=5, max_steps=11)
    assert len(full.history) == 2
    assert len(short.history) == 2
    # 16 steps; the last is at 15.5 / 16 of a cosine that begins at 0.1
    expected = 0.2 * 32 / 128 * (1 - math.cos(math.pi * (1 - 15.5 / 16) / 0.9)) / 2
    assert full.history[-1]["learning_rate"] == pytest.approx(expected)
    expected = 0.2 * 32 / 128 * (1 - math.cos(math.pi * (1 - 10.5 / 11) / 0.9)) / 2
    assert short.history[-1]["learning_rate"] == pytest.approx(expected)


def test_progress_is_reported_up_to_one():
    fractions = []
    run(epochs=2, report=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_the_last_partial_batch_is_left_out(data):
    data.value = planted((70, 16, 16))
    outcome = run(epochs=1, batch_size=32, recalibration_images=32)
    assert outcome.evidence["train_images"] == 70
    assert outcome.history[0]["train_top1"] * 64 == pytest.approx(round(outcome.history[0]["train_top1"] * 64))


def test_too_few_training_images_for_a_batch_are_an_error(data):
    data.value = planted((30, 16, 16))
    with pytest.raises(ValueError, match="batch_size 32 exceeds the 30"):
        run()


def test_divergence_carries_step_layers_and_the_epochs_before():
    with pytest.raises(Diverged, match=r"step \d+: the loss is (nan|inf).*not finite: ") as caught:
        run("none", epochs=30, learning_rate=1e7, warmup=0.0)
    assert len(caught.value.history) < 30
    assert all(math.isfinite(v) for row in caught.value.history for v in row.values())


def test_divergence_keeps_the_epochs_that_were_finite(monkeypatch):
    step = classification.train_step

    def breaks_in_epoch_2(*arguments, **named):
        if named["step"] == 12:
            raise Diverged("step 12: the loss is nan; here")
        return step(*arguments, **named)

    monkeypatch.setattr(classification, "train_step", breaks_in_epoch_2)
    context = RunContext(torch.device("cpu"), 0, None, None)
    with pytest.raises(Diverged, match="step 12"):
        TASK.run(factory("bn"), TASK.options(**TINY), context)
    assert [row["epoch"] for row in context.journal.rows] == [1]


@pytest.mark.parametrize(
    ("available", "norm_batch", "used", "per_forward"),
    [
        (2000, 64, 1984, 64),
        (2000, 2, 2000, 100),
        (2000, 1, 2000, 125),
        (2000, 128, 1920, 128),
        (2000, 1000, 2000, 1000),
    ],
)
def test_recalibration_uses_whole_norm_batches(available, norm_batch, used, per_forward):
    assert recalibration_batches(available, norm_batch) == (used, per_forward)


def test_bfloat16_runs():
    metrics = run("bn", precision="bfloat16", epochs=1).metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_images_that_are_decoded_while_read_give_the_run_of_those_in_memory(data, monkeypatch, tmp_path):
    """The same pictures in files and in memory, the same numbers."""
    held = planted((40, 12, 12))
    colour = {part: getattr(held, part).images.expand(-1, 3, -1, -1) for part in ("train", "val", "test")}
    parts = {part: Split(colour[part], getattr(held, part).labels) for part in colour}
    data.value = make_data("planted", "planted bars", parts, kind="synthetic", checksum="0", num_classes=CLASSES)
    files = {}
    for part, split in parts.items():
        entries = []
        for i, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
            path = tmp_path / f"{part}-{i}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            entries.append((path.name, label, path.stat().st_size))
        files[part] = FolderImages(tmp_path, entries, 16, workers=0)
    held = data.value
    folder = FolderData(
        "planted", "", **files, num_classes=CLASSES, image_shape=(3, 16, 16), mean=held.mean, std=held.std,
        kind="synthetic", checksum="0", class_names=(),
    )  # fmt: skip
    options = {"batch_size": 16, "recalibration_images": 32, "augmentation": "crop"}
    expected = results(run(**options))
    grouped = results(run(**options, single_class_groups=2, final_pass="class_sorted"))
    monkeypatch.setattr(lazy, "SHORTER", 1)  # as sets in memory are decoded
    monkeypatch.setattr(classification.datasets, "in_memory", lambda name, data_dir: False)
    monkeypatch.setattr(classification.datasets, "open_folder", lambda name, data_dir, **given: folder)
    assert results(run(**options)) == expected
    assert results(run(**options, single_class_groups=2, final_pass="class_sorted")) == grouped


# Planning


@pytest.mark.parametrize("name", TIER1)
@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow", "resnet18"])
def test_tier_1_can_serve_at_32_pixels(name, model):
    options = {"dataset": "fashion_mnist_mini", "model": model, "width": None, "norm_batch_size": 2}
    # torchvision's last maps are 1x1 at this size, where a single image has no spatial statistics
    assert (why_not(name, **options) is None) == ((name, model) != ("in", "resnet18"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("in", {"model": "resnet18_narrow"}, "more than one value per statistic"),  # 1x1 maps at 16 pixels
        ("bn", {"model": "resnet18_narrow", "norm_batch_size": 1}, "more than 1 value per channel"),
        ("domains", {}, "needs domain, which classification has not"),
        ("peeker", {}, "32 channels are more than 16"),
        ("crowd", {"batch_size": 16, "norm_batch_size": 4}, "8 images are needed, given 4"),
    ],
)
def test_refusals_are_reasons(name, options, reason, own_norms):
    text = why_not(name, **options)
    assert text is not None
    assert reason in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("gn", "gn: 5 groups do not divide", "5 groups do not divide"),
        ("dsbn", "DomainSpecificBatchNorm: the domain is needed", "the domain is needed"),
        ("cbn", 'norm "cbn" needs conv_weight', "needs conv_weight"),
        ("ln", "norm: of a weight", "norm: of a weight"),
        ("in", "in training mode no gradient flows", "in training mode no gradient flows"),  # a word, not the norm
        ("bn", "gn: of a norm inside", "gn: of a norm inside"),
    ],
)
def test_a_reason_leaves_out_the_name_that_stands_beside_it(name, error, reason):
    def build(norm, device):
        raise ValueError(error)

    norm = make_norm(name)
    host = admission.Host("a task", build, {}, (1, 8, 8), 1, absent=())
    assert admission.refusal(norm, norm.info, host) == reason


def test_a_norm_that_is_no_class_has_a_reason_too(own_norms):
    registry.register(name="halved", source="t", mixes_samples=False, keeps_stats=False)(
        functools.partial(registry._entry("gn").build, num_groups=5)
    )
    assert why_not("halved").startswith("num_groups=5 does not divide")


def test_groups_that_do_not_divide_are_a_reason():
    assert "5" in why_not(make_norm("gn", num_groups=5))
    assert why_not(make_norm("gn", num_groups=4)) is None


def test_a_layer_that_looks_at_values_is_decided_with_real_zeros(own_norms):
    assert why_not(make_norm("peeker", most=32)) is None


def test_a_refusal_of_fewer_images_than_a_run_has_decides_nothing(own_norms):
    assert why_not("crowd", batch_size=16, norm_batch_size=8) is None
    assert why_not("crowd", batch_size=16) is None


@pytest.mark.parametrize("name", TIER1)
@pytest.mark.parametrize("model", ["resnet8", "resnet18_narrow"])
@pytest.mark.parametrize("norm_batch_size", [1, 2, 8])
def test_planning_with_few_images_decides_as_with_all(name, model, norm_batch_size, monkeypatch):
    answers = []
    for most in (0, admission.FEW_VALUES):
        monkeypatch.setattr(admission, "_ANSWERS", {})
        monkeypatch.setattr(admission, "FEW_VALUES", most)
        answers.append(why_not(name, model=model, batch_size=8, norm_batch_size=norm_batch_size))
    assert answers[0] == answers[1]


def test_planning_leaves_torchs_compiler_alone():
    code = (
        "import sys; from norms.factory import factory_info; from norms.registry import make_norm\n"
        "from tasks.classification.task import TASK\n"
        "norm = make_norm('bgn', num_groups=8)\n"
        "assert TASK.why_not(norm, factory_info(norm), TASK.options()) is None\n"
        "assert 'torch._dynamo' not in sys.modules, 'planning has become two seconds slower'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_defect_is_planned_and_shows_in_its_run(own_norms):
    assert why_not("broken") is None
    with pytest.raises(RuntimeError, match="a defect of this layer"):
        run("broken")


def test_planning_asks_each_question_once(monkeypatch):
    asked = []
    monkeypatch.setattr(admission, "_ANSWERS", {})
    monkeypatch.setattr(admission, "_decide", lambda norm, *rest: asked.append(norm))
    for rate in (0.1, 0.2, 0.3):
        why_not("bn", learning_rate=rate)
        why_not("gn", learning_rate=rate)
        why_not(make_norm("gn", num_groups=2), learning_rate=rate)
        why_not("bn", norm_batch_size=2, learning_rate=rate)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 32), ({"norm_batch_size": 4}, 4)],
)
def test_the_setting_names_norm_batch_and_image_shape(options, expected):
    assert TASK.setting(TASK.options(**(TINY | options))) == Setting(expected, 1, SHAPE)


# Wrong on purpose


def test_a_final_pass_over_sorted_images_moves_running_averages_and_nothing_else():
    plain, moved = (run("bn", norm_batch_size=8, final_pass=kind) for kind in ("none", "class_sorted"))
    assert [row["train_loss"] for row in plain.history] == [row["train_loss"] for row in moved.history]
    assert moved.metrics["test_loss"] != plain.metrics["test_loss"]
    # recalibration forgets it, so that what is left is the same network
    assert moved.metrics["top1_recalibrated"] == plain.metrics["top1_recalibrated"]
    assert results(run("gn", final_pass="class_sorted"))[0] == results(run("gn"))[0]


def test_a_final_pass_takes_whole_norm_batches_sorted_by_class(monkeypatch, data):
    seen = []
    net = make_norm("bn")(1).train()
    monkeypatch.setattr(net, "forward", seen.append)
    options = TASK.options(**(TINY | {"norm_batch_size": 16, "batch_size": 32}))
    context = RunContext(torch.device("cpu"), 0, None, None)
    classification._sorted_pass(net, data.value.train, options, context, lambda images: images)
    expected = data.value.train.images[data.value.train.labels.argsort(stable=True)]
    assert torch.equal(torch.cat(seen), expected)
    assert {len(x) for x in seen} == {16}


def test_groups_of_one_class_reach_the_norm_as_its_norm_batches(monkeypatch):
    batches = []
    train_step = classification.train_step

    def watch(net, optimizer, images, labels, *args, **kwargs):
        batches.append((images, labels))
        return train_step(net, optimizer, images, labels, *args, **kwargs)

    monkeypatch.setattr(classification, "train_step", watch)
    for name in ("bn", "gn"):
        run(name, norm_batch_size=8 if name == "bn" else None, single_class_groups=4, epochs=1)
    half = len(batches) // 2
    for (images, labels), (others, other_labels) in zip(batches[:half], batches[half:], strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
        for k in range(4):
            assert len(labels[k::4].unique()) == 1


def test_norms_that_need_a_domain_or_a_context_are_skipped_with_the_reason():
    for name in set(registry.norm_names()) - set(registry.norm_names(without=["domain", "context"])):
        (need,) = registry.norm_info(name).needs
        assert why_not(name) == f"needs {need}, which classification has not"


@pytest.mark.parametrize("name", [n for n in registry.norm_names() if registry.norm_info(n).across_iterations])
def test_a_norm_with_a_memory_over_iterations_needs_one_norm_batch_per_update(name):
    assert why_not(name, norm_batch_size=32) is None
    reason = why_not(name, norm_batch_size=8)
    assert "earlier iterations" in reason
    assert "each of the 4 norm batches" in reason


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_batch_size": 3}, "norm_batch_size 3 does not divide batch_size 128; allowed: 1, 2, 4, 8"),
        ({"model": "resnet9"}, 'unknown model "resnet9".*did you mean "resnet'),
        ({"model": "resnet18", "width": 8}, "no width option"),
        ({"single_class_groups": 3}, "single_class_groups 3 does not divide batch_size 128; allowed: 1, 2, 4, 8"),
        ({"final_pass": "sorted"}, "final_pass"),
        ({"recalibration_images": 50}, "recalibration_images 50 is below the norm batch of 128"),
        ({"augmentation": "flip"}, "augmentation"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"warmup": 1.0}, "less than 1"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"lr": 0.1}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValidationError, match=message):
        TASK.options(**options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"learning_rate": 1e-1}, 0.1),
        ({"batch_size": 32}, 0.025),
        ({"batch_size": 32, "scale_learning_rate": False}, 0.1),
        ({"batch_size": 32, "norm_batch_size": 2}, 0.025),
    ],
)
def test_the_rate_scales_with_the_sgd_batch_and_not_with_the_norm_batch(options, expected):
    assert TASK.options(**options).peak_learning_rate == pytest.approx(expected)

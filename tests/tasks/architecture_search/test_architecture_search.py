"""The task architecture_search: equal terms for every norm, disjoint halves, the control, planning, interruption."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parts import architecture_search as searched
from parts.architecture_search import CLASSES, GROUPS, SERVED, SHAPE, TIMED, TINY, planted, results, run, why_not
from parts.norm_choices import one_of_each_kind
from pydantic import ValidationError
from torch import nn

from norms.factory import factory_info
from norms.registry import norm_info, norm_names
from results.frame import from_records
from results.metrics import METRICS
from results.record import RunRecord
from results.store import read_record, record_files
from results.tables.pivot import Pivot
from suite.planning import plan_config
from suite.runner import Runner, run_one
from tasks import get_task
from tasks.architecture_search import drawing, training
from tasks.architecture_search import task as architecture_search
from tasks.architecture_search.genotype import PUBLISHED, read_genotype
from tasks.architecture_search.task import TASK
from tasks.base import Diverged, Setting
from tasks.journal import Journal
from tasks.options import NormChoice, newer_options

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")
data = searched.data
own_norms = searched.own_norms
DRAW = drawing.draw


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawings are text: to draw takes a quarter of a tiny run."""
    monkeypatch.setattr(drawing, "draw", lambda genotype, files: [file.write_text(genotype.text) for file in files])


@pytest.fixture
def drawn(undrawn, monkeypatch):
    """But those of a test that looks at them."""
    monkeypatch.setattr(drawing, "draw", DRAW)


KINDS = one_of_each_kind(SERVED)


@pytest.mark.parametrize("name", [*KINDS[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[3:])])
def test_every_declared_metric_is_returned_finite_and_nothing_else(name, tmp_path):
    outcome = run(tmp_path, name)
    assert tuple(outcome.metrics) == TASK.metrics
    assert all(type(value) is float and math.isfinite(value) for value in outcome.metrics.values())
    assert set(TASK.metrics) <= set(METRICS)
    m = outcome.metrics
    assert m["gain_over_random"] == m["top1"] - m["random_top1"]
    assert outcome.evidence["budget"] == "machinery-only"
    assert outcome.evidence["data"] == "synthetic"


def test_the_task_is_registered_and_ranked_by_retrained_accuracy():
    assert get_task("architecture_search") is TASK
    assert TASK.headline == "top1"


def test_the_artifacts_are_the_genotype_its_drawings_and_the_controls(drawn, tmp_path):
    outcome = run(tmp_path, retrain_runs=2)
    assert outcome.artifacts == ["genotype.json", "genotype.png", "genotype.svg", "random_genotypes.json"]
    assert all((tmp_path / name).stat().st_size for name in outcome.artifacts)
    found = read_genotype(tmp_path / "genotype.json")
    assert outcome.metrics["skip_connections"] == found.skip_connections
    controls = json.loads((tmp_path / "random_genotypes.json").read_text())
    assert len(controls) == 2
    assert controls[0] != controls[1]


def test_the_trajectory_holds_every_mixing_weight_of_every_epoch(tmp_path):
    outcome = run(tmp_path, search_epochs=2, search_max_steps=None)
    search = [row for row in outcome.history if row["retraining"] == 0]
    assert [row["epoch"] for row in search] == [1, 2]
    for row in search:
        edges = {}
        for key, weight in row.items():
            if key.count(".") == 3:
                edges.setdefault(key.rpartition(".")[0], []).append(weight)
        assert len(edges) == 28
        assert all(len(w) == 8 and sum(w) == pytest.approx(1, abs=1e-6) for w in edges.values())
    assert search[0]["normal.2.0.sep_conv_3x3"] != search[1]["normal.2.0.sep_conv_3x3"]
    # the genotype is what the last row says
    node = {s: {k: v for k, v in search[-1].items() if k.startswith(f"normal.5.{s}.")} for s in range(5)}
    strength = {s: max(v for k, v in row.items() if not k.endswith(".none")) for s, row in node.items()}
    best = sorted(strength, key=lambda s: -strength[s])[:2]
    assert [state for _, state in read_genotype(tmp_path / "genotype.json").normal[6:]] == best
    assert outcome.metrics["search_val_top1"] == search[-1]["val_top1"]
    retrained = [row for row in outcome.history if row["retraining"] > 0]
    assert [(row["retraining"], row["random"]) for row in retrained] == [(1, 0), (1, 1)]


def test_a_planted_problem_is_solved_by_the_search_network_and_the_found_one(tmp_path):
    options = {"search_epochs": 6, "search_max_steps": None, "retrain_epochs": 6, "retrain_max_steps": None}
    rates = {"search_learning_rate": 0.1, "retrain_learning_rate": 0.1, "drop_path": 0, "retrain_cutout": 0}
    metrics = run(tmp_path, **options, **rates).metrics
    assert metrics["search_val_top1"] > 0.9
    assert metrics["top1"] > 0.9
    assert metrics["random_top1"] > 0.9
    assert metrics["top1_recalibrated"] > 0.9


@pytest.mark.slow
def test_instance_norm_can_not_search_and_the_table_says_so(tmp_path):
    """Without affine its output has mean zero over the positions, which is what global average pooling takes."""
    alone = {"random_architectures": 0}
    outcome = run(tmp_path / "in", "in", search_epochs=2, search_max_steps=None, **alone)
    assert outcome.metrics["search_val_top1"] == 1 / CLASSES
    assert outcome.evidence["constant_output"] is True
    options = {"search_epochs": 3, "search_max_steps": None, "search_learning_rate": 0.1, **alone}
    assert run(tmp_path / "ln", "ln", **options).evidence["constant_output"] is False


def test_long_enough_searches_keep_the_configs_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(architecture_search, "FEW_STEPS", 3)
    assert "budget" not in run(tmp_path).evidence


# Equal terms


@pytest.mark.parametrize("order", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_the_same_spec_twice_is_bit_identical(drawn, order, tmp_path):
    options = {"order": order, "augmentation": "affine", "norm_batch_size": 4, "search_cutout": 2}
    first = results(run(tmp_path / "a", **options))
    torch.rand(7)  # the global stream must not matter
    assert results(run(tmp_path / "b", **options)) == first
    for name in ("genotype.json", "genotype.svg", "genotype.png", "random_genotypes.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_does_not_move_the_global_generator(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_norm_under_two_names_ties_exactly(own_norms, tmp_path):
    assert results(run(tmp_path / "0", "copycat")) == results(run(tmp_path / "1", "bn"))


def test_every_norm_sees_the_same_batches_and_the_same_random_architectures(monkeypatch, tmp_path):
    seen = {}
    for name in ("bn", "gn", "none"):
        with monkeypatch.context() as patch:
            seen[name] = seen_in(patch, name, tmp_path)
    reference, controls = seen["bn"]
    # two halves of a search step, two retrainings and two controls of two steps each; images and labels
    assert len(reference) == (3 * 2 + 4 * 2) * 2
    for batches, text in seen.values():
        assert text == controls
        assert all(torch.equal(one, two) for one, two in zip(batches, reference, strict=True))


def seen_in(patch, name, tmp_path):
    """Every batch that reaches a step, in order, and the random architectures."""
    batches = []
    search_step, retrain_step = training.architecture_step, training._retrain_step

    def spy(net, weights, adam, own, held_out, *rest):
        batches.extend((*own, *held_out))
        return search_step(net, weights, adam, own, held_out, *rest)

    def spy_retrain(net, optimizer, batch, *rest):
        batches.extend(batch)
        return retrain_step(net, optimizer, batch, *rest)

    patch.setattr(training, "architecture_step", spy)
    patch.setattr(training, "_retrain_step", spy_retrain)
    run(tmp_path / name, name, augmentation="affine", search_cutout=2, retrain_runs=2)
    return batches, (tmp_path / name / "random_genotypes.json").read_text()


def test_the_halves_are_disjoint_and_weights_never_see_the_architectures_half(monkeypatch, data, tmp_path):
    images = data.value.train.images
    images[:, 0, 0, 0] = torch.arange(len(images), dtype=torch.uint8)  # every image carries its number
    numbers = {"own": set(), "held out": set()}
    step = training.architecture_step

    def spy(net, weights, adam, own, held_out, *rest):
        for which, (x, _) in (("own", own), ("held out", held_out)):
            raw = (x[:, 0, 0, 0] * data.value.std[0] + data.value.mean[0]) * 255
            numbers[which] |= set(raw.round().int().tolist())
        return step(net, weights, adam, own, held_out, *rest)

    monkeypatch.setattr(training, "architecture_step", spy)
    run(tmp_path, search_epochs=3, search_max_steps=None, random_architectures=0)
    assert len(numbers["own"]) > 60
    assert len(numbers["held out"]) > 60
    assert not numbers["own"] & numbers["held out"]


def test_the_control_is_retrained_from_the_same_seeds(monkeypatch, tmp_path):
    """Where the random architecture is the found one, both retrainings are one and the same."""
    monkeypatch.setattr(architecture_search, "random_genotype", lambda generator: PUBLISHED["DARTS_V2"])
    outcome = run(tmp_path, genotype="DARTS_V2", retrain_runs=2)
    assert outcome.metrics["gain_over_random"] == 0
    assert outcome.evidence["retrained_top1"] == outcome.evidence["random_retrained_top1"]
    losses = [row["train_loss"] for row in outcome.history]
    assert losses[0] != losses[1]  # each retraining has a seed of its own


# Options


def test_a_given_genotype_is_retrained_without_a_search(tmp_path):
    run(tmp_path / "search")
    file = tmp_path / "search" / "genotype.json"
    outcome = run(tmp_path / "again", genotype=str(file))
    nothing = {name for name, value in outcome.metrics.items() if value is None}
    assert nothing == {
        *("search_val_top1", "search_seconds", "step_seconds", "peak_memory_mb", "norm_parameters", "norm_buffers"),
    }
    assert (tmp_path / "again" / "genotype.json").read_text() == file.read_text()
    assert {row["retraining"] for row in outcome.history} == {1}
    assert "budget" not in outcome.evidence
    # its content and not its path decides
    file.rename(tmp_path / "elsewhere.json")
    one, two = TASK.options(**TINY, genotype=str(tmp_path / "elsewhere.json")), TASK.options(**TINY)
    assert one.genotype == read_genotype(tmp_path / "again" / "genotype.json")
    assert one.model_dump(mode="json") != two.model_dump(mode="json")
    assert TASK.options.model_validate(one.model_dump(mode="json")) == one


def test_no_control_leaves_no_gain(tmp_path):
    outcome = run(tmp_path, random_architectures=0)
    assert outcome.metrics["random_top1"] is None
    assert outcome.metrics["gain_over_random"] is None
    assert "random_genotypes.json" not in outcome.artifacts


def test_the_norm_of_retraining_is_its_own_option(monkeypatch, tmp_path):
    used = []
    real = training.DerivedNetwork

    def spy(*args, norm, **options):
        used.append((factory_info(norm).name, norm.options["num_groups"]))
        return real(*args, norm=norm, **options)

    monkeypatch.setattr(training, "DerivedNetwork", spy)
    run(tmp_path, "bn", retrain_norm={"gn": {"num_groups": 1}})
    assert used == [("gn", 1)] * 2


def test_the_norm_of_retraining_is_resolved_at_its_own_norm_batch():
    for given, expected in (({}, 16), ({"norm_batch_size": 8}, 8), ({"retrain_batch_size": 32}, 32)):
        choice = TASK.options(**(TINY | {"retrain_norm": "bgn"} | given)).retrain_norm
        assert choice.options["norm_batch_size"] == expected
        assert (choice.version, choice.label) == ("1", "bgn")
    options = TASK.options(**TINY, retrain_norm={"gn": {"num_groups": 2}})
    assert options.retrain_norm.label == "gn(num_groups=2)"
    assert TASK.options.model_validate(options.model_dump(mode="json")) == options


def test_a_norm_of_retraining_that_changed_after_planning_is_refused(tmp_path):
    spec = spec_of(retrain_norm="ln")
    assert spec.further_norms == {"retrain_norm": ("ln", "1")}
    older = {**spec.task_options["retrain_norm"], "version": "0"}
    spec = spec.model_copy(update={"task_options": {**spec.task_options, "retrain_norm": older}})
    record = run_one(spec, tmp_path, lambda f: None, Runner())
    assert record.status == "failed"
    assert 'norm "ln" changed after planning: version 0 was planned, 1 is here' in record.reason


def test_the_label_of_a_norm_can_not_be_chosen():
    dumped = TASK.options(**TINY, retrain_norm="bn").model_dump(mode="json")
    dumped["retrain_norm"]["label"] = "gn"
    assert TASK.options.model_validate(dumped).retrain_norm.label == "bn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_cells": 2}, "2 cells: at least 3 are needed"),
        ({"retrain_cells": 0}, "0 cells"),
        ({"search_channels": 0}, "greater than or equal to 1"),
        ({"genotype": "nowhere.json"}, "nowhere.json.*No such file"),
        ({"genotype": {"normal": []}}, "normal: |0 entries"),
        ({"retrain_norm": "bm"}, 'unknown norm "bm".*did you mean "bn"'),
        ({"retrain_norm": {"gn": {"groups": 2}}}, 'unknown option "groups"'),
        ({"retrain_norm": 3}, "a norm's name or"),
        ({"retrain_norm": {"gn": {}, "bn": {}}}, "a norm's name or"),
        ({"retrain_norm": "gn", "genotype": "DARTS_V1"}, "nothing is searched then, so name the norms"),
        ({"norm_batch_size": 3}, "does not divide search_batch_size 16; allowed: 1, 2, 4, 8, 16"),
        ({"norm_batch_size": 16, "retrain_batch_size": 24}, "does not divide retrain_batch_size 24"),
        ({"order": "third"}, "'first' or 'second'"),
        ({"search_learning_rate_min": 1}, "search_learning_rate_min 1 is above"),
        ({"auxiliary_weight": 0.4}, "auxiliary head needs sides of 32 or more"),
        ({"recalibration_images": 8}, "below the norm batch of 16"),
        ({"image_size": 6}, "two reduction cells need sides that 4 divides"),
        ({"drop_path": 1}, "less than 1"),
        ({"epochs": 3}, "Extra inputs"),
        ({"search_schedule": "linear"}, "(?s)search_schedule.*'cosine', 'onecycle'"),
        ({"search_milestones": [0.7, 0.2]}, r"search_milestones \[0.7, 0.2\]: rising fractions between 0 and 1"),
        ({"retrain_schedule": "steps", "retrain_milestones": [1.5]}, "retrain_milestones .*rising fractions"),
        ({"search_optimizer": "adamw", "order": "second"}, 'order "second": the unrolled step is one of SGD; allowed'),
        ({"retrain_optimizer": "adam"}, "'sgd' or 'adamw'"),
        ({"betas": [0.9]}, "betas"),
        ({"precision": "float16"}, "'float32' or 'bfloat16'"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValidationError, match=message):
        TASK.options(**(TINY | options))


def test_the_defaults_are_the_published_settings():
    o = TASK.options()
    assert (o.search_epochs, o.search_batch_size, o.search_channels, o.search_cells) == (50, 64, 16, 8)
    assert (o.search_learning_rate, o.search_learning_rate_min, o.momentum, o.weight_decay) == (0.025, 0.001, 0.9, 3e-4)
    assert (o.architecture_learning_rate, o.architecture_weight_decay, o.gradient_clip) == (3e-4, 1e-3, 5)
    assert (o.retrain_epochs, o.retrain_batch_size, o.retrain_channels, o.retrain_cells) == (600, 96, 36, 20)
    assert (o.auxiliary_weight, o.retrain_cutout, o.drop_path) == (0.4, 16, 0.2)
    assert not o.architecture_steps_move_statistics


def test_what_is_newer_means_at_its_default_what_runs_did_before():
    newer = {"betas", "precision", "compile"}
    newer |= {f"{phase}_{what}" for phase in ("search", "retrain") for what in ("optimizer", "schedule", "warmup")}
    newer |= {"search_milestones", "retrain_milestones"}
    assert set(newer_options(TASK.options)) == newer
    options = TASK.options()
    assert options.rate("search", 0.25) == 0.001 + 0.024 * (1 + math.cos(math.pi / 4)) / 2
    assert options.rate("retrain", 0.5) == 0.025 * (1 - math.cos(math.pi / 2)) / 2


def test_every_schedule_of_a_search_ends_above_its_minimum():
    def rates(**options):
        made = TASK.options(**(TINY | options | {"search_learning_rate": 0.1, "search_learning_rate_min": 0.01}))
        return [made.rate("search", progress) for progress in (0.0, 0.3, 0.6, 1.0)]

    assert rates(search_warmup=0.3) == pytest.approx(
        [0.01, 0.1, 0.01 + 0.09 * (1 + math.cos(math.pi * 3 / 7)) / 2, 0.01]
    )
    assert rates(search_schedule="steps", search_milestones=[0.5]) == pytest.approx([0.1, 0.1, 0.019, 0.019])
    assert rates(search_schedule="constant") == [0.1] * 4
    assert rates(search_schedule="constant", search_warmup=0.3) == pytest.approx([0.01, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "unused",
    [
        {"betas": [0.5, 0.9]},
        {"search_milestones": [0.2]},
        {"retrain_milestones": [0.2]},
        {"search_optimizer": "adamw", "retrain_optimizer": "adamw", "momentum": 0.5},
        {"search_schedule": "constant", "search_learning_rate_min": 0.02},
        {"genotype": "DARTS_V1", "retrain_optimizer": "adamw", "momentum": 0.5, "search_schedule": "steps"},
        {"retrain_schedule": "steps", "retrain_milestones": [0.5, 0.75]},
        {"retrain_optimizer": "adamw", "betas": [0.9, 0.999]},
    ],
)
def test_what_no_optimizer_and_no_schedule_uses_makes_no_further_run(unused):
    used = {"search_optimizer", "retrain_optimizer", "search_schedule", "retrain_schedule", "genotype"}
    plain = {key: value for key, value in unused.items() if key in used}
    assert TASK.options(**(TINY | unused)) == TASK.options(**(TINY | plain))
    made = TASK.options(**(TINY | unused))
    assert TASK.options.model_validate(made.model_dump(mode="json")) == made


def test_momentum_counts_where_one_phase_has_sgd():
    assert TASK.options(**TINY, retrain_optimizer="adamw", momentum=0.5).momentum == 0.5


def test_a_grid_leaves_the_unrolled_step_of_adamw_out():
    plan = plan_config(config(order=["first", "second"], search_optimizer=["sgd", "adamw"]))
    assert len(plan.runs) == 2 * 3
    assert "the unrolled step is one of SGD" in plan.left_out[0]


@pytest.mark.parametrize("order", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_precision_reaches_every_forward(order, monkeypatch, tmp_path):
    seen = set()
    real = torch.nn.functional.conv2d

    def watched(x, *rest, **named):
        seen.add(torch.is_autocast_enabled("cpu"))
        return real(x, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    outcome = run(tmp_path, order=order, precision="bfloat16")
    assert seen == {True}
    assert all(math.isfinite(value) for value in outcome.metrics.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, of the mixing weights
@pytest.mark.parametrize("order", ["first", "second"])
def test_a_compiled_run_is_the_same_up_to_rounding(order, monkeypatch, tmp_path):
    """Through torch's tracing and its derived backward; the code that it generates takes minutes to build."""
    compiled = nn.Module.compile
    made = []

    def watched(net):
        made.append(type(net).__name__)
        compiled(net, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", watched)
    options = {"order": order, "architecture_learning_rate": 1e-3, "random_architectures": 0, "search_max_steps": 2}
    one, two = (run(tmp_path / str(c), compile=c, **options) for c in (False, True))
    assert made == ["SearchBody", "DerivedNetwork"]
    for plain, other in zip(one.history, two.history, strict=True):
        assert other["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)


# Planning


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in SERVED]
)
def test_every_norm_can_be_planned(name):
    assert why_not(name) is None


@pytest.mark.parametrize("name", [n for n in norm_names() if n not in SERVED])
def test_every_other_norm_is_skipped_with_the_reason(name):
    reason, needs = why_not(name), norm_info(name).needs
    if needs & {"domain", "context"}:
        assert reason == f"needs {min(needs)}, which architecture_search has not"
    elif "conv_weight" in needs:
        assert reason == "needs conv_weight, which a search network has not"
        assert why_not(name, genotype="DARTS_V1") is None
    else:
        assert reason.startswith("in search: no activation follows any norm here")


@pytest.mark.parametrize("name", [n for n in SERVED if norm_info(n).across_iterations])
def test_a_norm_with_a_memory_over_iterations_needs_one_norm_batch_per_update(name):
    assert why_not(name, norm_batch_size=16) is None
    reason = why_not(name, norm_batch_size=4)
    assert reason.startswith("in search: takes statistics from earlier iterations")
    assert "each of the 4 norm batches" in reason


def test_norms_that_can_not_serve_are_skipped_with_the_reason(own_norms):
    assert "there is no form without an activation" in why_not("fused")
    assert why_not("needs_affine") == "in search: it has no form without affine"
    assert why_not("needs_affine", genotype="DARTS_V1") is None
    assert why_not("domains") == "needs domain, which architecture_search has not"
    assert why_not("sees_weight") == "needs conv_weight, which a search network has not"
    assert why_not("sees_weight", genotype="DARTS_V1") is None
    assert why_not("gn", search_channels=3).startswith("in search: num_groups=2 does not divide")
    assert why_not("gn", retrain_channels=3).startswith("in retraining: num_groups=2 does not divide")


def test_a_reason_about_the_norm_of_retraining_names_it(own_norms):
    assert why_not("bn", retrain_norm="domains") == (
        'retrain_norm "domains": needs domain, which architecture_search has not'
    )
    reason = why_not("bn", retrain_norm={"gn": {"num_groups": 5}})
    assert reason.startswith('retrain_norm "gn(num_groups=5)": num_groups=5 does not divide')
    reason = why_not("bn", retrain_norm="mbn", retrain_batch_size=16, norm_batch_size=4)
    assert reason.startswith('retrain_norm "mbn": takes statistics from earlier iterations')
    assert why_not("domains", retrain_norm="bn") == "needs domain, which architecture_search has not"


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((31, 32, 32), {}, r"31 training images are too few for two halves: search_batch_size 16 exceeds the 15"),
        (
            (40, 32, 32),
            {"retrain_batch_size": 48, "recalibration_images": 48},
            "retrain_batch_size 48 exceeds its 40 training images",
        ),
        ((130, 32, 32), {"image_size": 4, "dataset": "fashion_mnist_mini", "search_batch_size": 4000}, "6000 training"),
    ],
)
def test_too_little_data_is_known_before_a_run(data, sizes, options, message):
    data.value = planted(sizes)
    with pytest.raises(ValueError, match=message):
        TASK.data_checksum(TASK.options(**(TINY | options)), Path("data"))


def test_a_given_genotype_needs_no_halves(data):
    data.value = planted((31, 32, 32))
    TASK.data_checksum(TASK.options(**TINY, genotype="DARTS_V1"), Path("data"))


def test_images_are_not_shrunk_to_any_size():
    options = TASK.options(**(TINY | {"image_size": 12, "dataset": "fashion_mnist_mini"}))
    with pytest.raises(ValueError, match=r"image_size 12 of 32x32; allowed: 4, 8, 16, 32"):
        TASK.data_checksum(options, Path("data"))


def test_the_setting_names_norm_batch_and_image_shape():
    assert TASK.setting(TASK.options(**TINY)) == Setting(16, 1, SHAPE)
    assert TASK.setting(TASK.options(**TINY, norm_batch_size=4)) == Setting(4, 1, SHAPE)
    shrunk = TASK.options(**(TINY | {"dataset": "fashion_mnist_mini", "image_size": 16}))
    assert TASK.setting(shrunk).image_shape == (1, 16, 16)


def config(**options):
    tasks = {"architecture_search": TINY | {"dataset": "fashion_mnist_mini", "image_size": 8} | options}
    return {"norms": ["bn", {"gn": GROUPS["gn"]}], "seeds": [0], "tasks": tasks}


def test_both_norms_of_a_run_decide_its_norm_batch_and_its_key():
    runs = plan_config(config(norm_batch_size=[4, 16], retrain_norm=[None, "bn"])).runs
    batches = {
        (s.norm, (s.task_options["retrain_norm"] or {}).get("name"), s.task_options["norm_batch_size"]) for s in runs
    }
    # gn alone does not mix samples, gn retrained with bn does
    assert batches == {
        *(("bn", other, n) for other in (None, "bn") for n in (4, 16)),
        *(("gn", "bn", n) for n in (4, 16)),
        ("gn", None, None),
    }
    assert len({s.key for s in runs}) == len(runs) == 7


def test_mistakes_of_a_config_are_reported_together(tmp_path):
    bad = tmp_path / "g.json"
    bad.write_text('{"normal": [], "reduce": []}')
    with pytest.raises(ValueError, match="retrain_norm") as caught:
        plan_config(config(order="third", retrain_norm="nb", search_cells=1))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    with pytest.raises(ValueError, match="normal: ") as caught:
        plan_config(config(genotype=str(bad)))
    assert len(str(caught.value).splitlines()) == 2
    lines += str(caught.value).splitlines()
    assert all(line.startswith('task "architecture_search": option') for line in lines)


# Through the suite


def spec_of(**options):
    (spec,) = [s for s in plan_config(config(**options)).runs if s.norm == "bn"]
    return spec


def test_what_was_not_measured_is_left_out_of_the_record(tmp_path):
    record = run_one(spec_of(genotype="DARTS_V1"), tmp_path, lambda f: None, Runner())
    assert record.status == "ok", record.reason
    assert set(TASK.metrics) - set(record.metrics) == {
        *("search_val_top1", "search_seconds", "step_seconds", "peak_memory_mb", "norm_parameters", "norm_buffers"),
    }
    assert record.evidence["budget"] == "reduced"
    assert run_one(spec_of(), tmp_path, lambda f: None, Runner()).evidence["budget"] == "machinery-only"


def test_divergence_keeps_the_history_and_names_the_phase(tmp_path):
    journal = Journal()
    with pytest.raises(Diverged, match=r"step \d+.*: the loss is (nan|inf)"):
        run(tmp_path, "none", journal=journal, search_learning_rate=1e9, search_epochs=9, search_max_steps=None)
    assert all(row["retraining"] == 0 for row in journal.rows)
    journal = Journal()
    with pytest.raises(Diverged, match=r"retraining 1 of the found architecture, (step|validation)"):
        run(tmp_path, "none", journal=journal, retrain_learning_rate=1e12, retrain_epochs=9, retrain_max_steps=None)
    assert journal.rows[0]["retraining"] == 0


def test_a_short_search_that_diverges_is_machinery_only_too(tmp_path):
    spec = spec_of(search_learning_rate=1e9, search_learning_rate_min=1e9, search_max_steps=20, search_epochs=2)
    options = {**spec.task_options, "momentum": 0.99}
    record = run_one(spec.model_copy(update={"norm": "none", "norm_options": {}, "task_options": options}),
                     tmp_path, lambda f: None, Runner())  # fmt: skip
    assert record.status == "diverged", record.reason
    assert record.evidence["budget"] == "machinery-only"


def test_a_control_that_diverges_leaves_the_found_networks_numbers(monkeypatch, tmp_path):
    expected = run(tmp_path / "a", retrain_runs=2)
    real = training.retrain

    def breaks(*arguments):
        if arguments[-1] and arguments[-2] == 2:
            raise Diverged("retraining 2 of a random architecture, step 1: the loss is nan")
        return real(*arguments)

    monkeypatch.setattr(architecture_search, "retrain", breaks)
    outcome = run(tmp_path / "b", retrain_runs=2)
    assert outcome.metrics["top1"] == expected.metrics["top1"]
    assert outcome.metrics["random_top1"] is None
    assert outcome.metrics["gain_over_random"] is None
    assert outcome.evidence["random_diverged"] == ["retraining 2 of a random architecture, step 1: the loss is nan"]


@pytest.mark.slow  # three searches of real size; test_resume_search stops small ones, tests/suite kills other tasks
def test_a_search_that_is_killed_in_the_middle_gives_the_whole_record_when_run_again(tmp_path):
    options = {"search_epochs": 2, "search_max_steps": 16, "augmentation": "crop", "random_architectures": 0}
    file, out = tmp_path / "c.yaml", tmp_path / "out"
    file.write_text(json.dumps(config(**options) | {"norms": ["bn"]}))
    command = [sys.executable, str(ROOT / "run_suite.py"), "run", str(file), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    spec = spec_of(**options)
    folder = out / "runs" / "architecture_search" / "bn" / spec.key
    deadline = time.monotonic() + 120
    while not (folder / "output.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)  # 16 steps take longer, on any machine that this runs on
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (folder / "output.txt").exists()
    assert list(record_files(out)) == []
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    (stored,) = map(read_record, record_files(out))
    assert stored.status == "ok"
    (tmp_path / "alone").mkdir()
    alone = run_one(spec, tmp_path / "alone", lambda f: None, Runner())
    assert stored.spec.key == alone.spec.key == spec.key
    for name, value in alone.metrics.items():
        assert name in TIMED or stored.metrics[name] == value
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.history] for r in (stored, alone)]
    assert strip[0] == strip[1]
    assert (folder / "genotype.json").read_bytes() == (tmp_path / "alone" / "genotype.json").read_bytes()
    assert sorted(stored.artifacts) == sorted(alone.artifacts)
    assert all((folder / name).exists() for name in stored.artifacts)


def test_norm_choices_are_read_in_every_form():
    forms = ["gn", {"gn": None}, {"gn": {}}]
    assert len({NormChoice.model_validate(form).model_dump_json() for form in forms}) == 1
    for wrong in ({"gn": 3}, ["gn"], {"gn": {}, "bn": {}}, {"name": "gn", "label": "bn"}):
        with pytest.raises(ValidationError):
            NormChoice.model_validate(wrong)


def test_no_axis_is_hidden_in_the_types():
    """A list of norms or genotypes is a grid axis."""
    runs = plan_config(config(genotype=["DARTS_V1", "DARTS_V2"])).runs
    assert {s.task_options["genotype"]["label"] for s in runs} == {"DARTS_V1", "DARTS_V2"}
    runs = plan_config(config(retrain_norm=["bn", {"gn": GROUPS["gn"]}])).runs
    assert {s.task_options["retrain_norm"]["label"] for s in runs} == {"bn", "gn(num_groups=2)"}


def test_options_of_a_search_make_no_further_runs_where_nothing_is_searched():
    axes = {"order": ["first", "second"], "search_cells": [3, 4], "architecture_learning_rate": [0.1, 0.2]}
    assert len(plan_config(config(genotype="DARTS_V1", **axes)).runs) == 2
    assert len(plan_config(config(**axes)).runs) == 16


def test_one_norm_batch_has_one_key_however_it_is_named():
    assert len({s.key for s in plan_config(config(norm_batch_size=[None, 16])).runs}) == 2
    other = {"retrain_batch_size": 32, "recalibration_images": 64}
    runs = plan_config(config(norm_batch_size=[None, 16], **other)).runs
    assert {(s.norm, s.task_options["norm_batch_size"]) for s in runs} == {("bn", None), ("bn", 16), ("gn", None)}


def test_tables_hold_no_hole_where_the_two_norms_mix_differently():
    runs = plan_config(config(norm_batch_size=[4, 16], retrain_norm=[None, "bn"])).runs
    df = from_records(
        RunRecord(
            spec=spec,
            status="ok",
            metrics={"top1": 0.5},
            evidence={"mixes_samples": spec.task_options["norm_batch_size"] is not None},
        )
        for spec in runs
    )
    grid = Pivot(df, "bn")
    assert len(grid.blocks) == 4
    assert grid.holes() == ({"ok": 7, "diverged": 0, "failed": 0, "skipped": 0, "missing": 0}, 7)
    cells = {(row, block): grid.cell(row, block, METRICS["top1"]) for row in grid.rows for block in grid.blocks}
    assert sum(cell.repeated for cell in cells.values()) == 2

"""The vocabulary: what a value prints as, and what an unknown name is answered with."""

import pytest

from results import metrics
from results.declared import Declaration
from results.facts import Facts
from results.metrics import METRICS, Metric, add_metric, domain_of, metric, metric_or_plain
from tasks import get_task, task_names


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("top1", 0.91249, "91.2"),
        ("top1", 1.0, "100.0"),
        ("val_top1", -0.0001, "0.0"),
        ("test_loss", 1.23456, "1.235"),
        ("step_seconds", 0.01234, "12.3"),
        ("peak_memory_mb", 1234.5678, "1235"),
        ("norm_parameters", 4800.0, "4800"),
        ("gain", -0.0625, "-6.2"),
        ("im_score", 1.23456, "1.235"),
        ("target_top1/photo", 0.5, "50.0"),
        ("composition_shift", 1.234e-7, "1.2e-07"),
        ("composition_shift", 0.0, "0"),
        ("top1", float("inf"), "inf"),
        ("top1", 1e308, "1.0e+310"),
        ("top1", -1.7e308, "-1.7e+310"),
        ("top1", 1e-320, "0.0"),
        ("test_loss", 1e308, "1.000e+308"),
        ("norm_parameters", 123456789012.0, "123456789012"),
        ("norm_parameters", 1234567890123.0, "1.2e+12"),
        ("composition_shift", 1e308, "1e+308"),
    ],
)
def test_a_value_is_scaled_and_rounded_when_printed(name, value, text):
    assert metric(name).text(value) == text


def test_a_heading_says_unit_and_direction():
    assert metric("top1").heading == "top-1 (%) ↑"
    assert metric("step_seconds").heading == "step (ms) ↓"
    assert metric("norm_parameters").heading == "norm params"


def test_every_metric_is_described_under_its_own_name():
    assert all(name == m.name and m.title and m.description for name, m in METRICS.items())
    assert {"top1", "top1_recalibrated", "top1_recalibrated_plain", "val_top1", "train_top1"} < set(METRICS)
    assert {*metrics.VALIDATION, metrics.TARGET, metrics.GAIN, metrics.WORST} <= set(METRICS)


def test_an_unknown_metric_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r'unknown metric "top_1"; metrics: top1, .*; did you mean "top1"\?'):
        metric("top_1")


def test_a_plugin_adds_a_metric_once(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(METRICS))
    monkeypatch.setitem(metrics.RANKS, "segmentation", "top1")
    new = Metric("miou", "mIoU", "%", True, 1, 100.0)
    assert add_metric(new, primary_of="segmentation") is add_metric(new)
    assert metrics.metric("miou").text(0.5) == "50.0"
    assert facts("segmentation", "miou", "top1").headline == "miou"
    with pytest.raises(ValueError, match='metric "top1" is already defined'):
        add_metric(Metric("top1", "another"))


def test_a_cell_that_is_executed_again_replaces_its_own_metric_and_no_other():
    add_metric(Metric("of_a_cell", "first"))
    with pytest.raises(ValueError, match="replace=True"):
        add_metric(Metric("of_a_cell", "second"))
    add_metric(Metric("of_a_cell", "second"), replace=True)
    assert metrics.metric("of_a_cell").title == "second"
    with pytest.raises(ValueError, match='metric "top1" is already defined'):
        add_metric(Metric("top1", "another"), replace=True)


def test_a_name_from_a_record_gives_no_endless_heading():
    for name in ("m" * 200, "target_top1/" + "d" * 200):
        assert len(metric_or_plain(name).heading) < 100
        assert metric_or_plain(name).name == name


def test_a_metric_of_a_plugin_that_is_not_loaded_is_printed_without_direction():
    assert metric_or_plain("my_score").heading == "my score"
    assert metric_or_plain("my_score").higher_is_better is None
    assert metric_or_plain("top1") is METRICS["top1"]


def facts(task, *present, **declared):
    return Facts(task, Declaration(**declared), frozenset(present))


def test_norms_are_ranked_by_the_declared_metric_or_the_first_with_a_direction():
    assert facts("t", "test_loss", "top1").headline == "top1"
    assert facts("t", "norm_buffers", "test_loss", "val_top1").headline == "val_top1"
    assert facts("t", "norm_buffers").headline is None
    assert facts("t", "source_top1", "target_top1", "gain").headline == "target_top1"
    assert facts("t", "source_top1", "top1", headline="source_top1").headline == "source_top1"
    assert facts("t", "top1", headline="source_top1").headline == "top1", "not measured here"
    assert facts("t", "top1", "norm_buffers", headline="norm_buffers").headline == "top1", "neither direction is better"


def test_what_may_choose_comes_from_validation_data():
    assert facts("t", "val_top1", "val_pgd_top1").validation == "val_pgd_top1"
    assert facts("t", "val_acc", "top1").validation == "val_acc"
    assert facts("t", "top1").validation == "val_top1"
    assert facts("t", "val_top1", "val_pgd_top1", validation="val_top1").validation == "val_top1"


@pytest.mark.parametrize("task", task_names())
def test_old_folders_have_the_headline_and_validation_that_the_task_declares(task):
    value = get_task(task)
    old = facts(task, *value.metrics)
    assert (old.headline, old.validation) == (value.headline, value.validation)


def test_a_single_domain_has_a_metric_of_its_own():
    found = metric("target_top1/art & co")
    assert found.heading == "art & co (%) ↑"
    assert found == metric_or_plain("target_top1/art & co")
    assert "art & co" in found.description
    assert [domain_of(n) for n in ("target_top1/a/b", "target_top1", "top1")] == ["a/b", "", ""]
    with pytest.raises(ValueError, match='unknown metric "target_top1/"'):
        metric("target_top1/")


def test_what_the_targets_labels_chose_has_no_better_direction():
    assert metric("target_top1_oracle").higher_is_better is None
    assert metric("target_top1_oracle").text(0.5) == "50.0"

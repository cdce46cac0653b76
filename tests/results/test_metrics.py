"""The vocabulary: what a value prints as, and what an unknown name is answered with."""

import pytest

from results import metrics
from results.metrics import METRICS, Metric, add_metric, domain_of, metric, metric_or_plain, primary_metric


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
    assert set(metrics.PRIMARY.values()) | set(metrics.VALIDATION.values()) <= set(METRICS)


def test_an_unknown_metric_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r'unknown metric "top_1"; metrics: top1, .*; did you mean "top1"\?'):
        metric("top_1")


def test_a_plugin_adds_a_metric_once(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(METRICS))
    monkeypatch.setattr(metrics, "PRIMARY", dict(metrics.PRIMARY))
    new = Metric("miou", "mIoU", "%", True, 1, 100.0)
    assert add_metric(new, primary_of="segmentation") is add_metric(new)
    assert metrics.metric("miou").text(0.5) == "50.0"
    assert primary_metric("segmentation", ["miou", "top1"]) == "miou"
    with pytest.raises(ValueError, match='metric "top1" is already defined'):
        add_metric(Metric("top1", "another"))


def test_a_name_from_a_record_gives_no_endless_heading():
    for name in ("m" * 200, "target_top1/" + "d" * 200):
        assert len(metric_or_plain(name).heading) < 100
        assert metric_or_plain(name).name == name


def test_a_metric_of_a_plugin_that_is_not_loaded_is_printed_without_direction():
    assert metric_or_plain("my_score").heading == "my score"
    assert metric_or_plain("my_score").higher_is_better is None
    assert metric_or_plain("top1") is METRICS["top1"]


def test_norms_are_ranked_by_the_tasks_metric_or_the_first_with_a_direction():
    assert primary_metric("classification", ["test_loss", "top1"]) == "top1"
    assert primary_metric("classification", ["norm_buffers", "test_loss", "val_top1"]) == "val_top1"
    assert primary_metric("classification", ["norm_buffers"]) is None
    for task in ("domain_adaptation", "domain_generalization"):
        assert primary_metric(task, ["top1", "source_top1", "target_top1", "gain"]) == "target_top1"
        assert metrics.VALIDATION[task] == "val_top1"


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

"""configs/known_answers.yaml gives the signs that it promises. Minutes of training: `make slow`, not `make test`."""

import subprocess
import sys
from pathlib import Path

import pytest

import results

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("known_answers")
    command = [sys.executable, str(ROOT / "run_suite.py"), "run", str(ROOT / "configs" / "known_answers.yaml")]
    subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT)
    return out


@pytest.fixture(scope="module")
def runs(folder):
    """One row per run; an option of another task is missing in a row."""
    df = results.load(folder)
    assert set(df["status"]) == {"ok"}
    return df


def where(df, **options):
    """The rows of one norm and these options, by seed."""
    for name, value in options.items():
        column = name if name in ("norm", "task") else f"option.{name}"
        held = df[column].isna() if value is None else df[column] == value
        df = df[held]
    assert sorted(df["seed"]) == [0, 1]
    return df.set_index("seed").sort_index()


def of_classification(df, norm, **options):
    return where(df[df["task"] == "classification"], norm=norm, **options)


def test_with_one_image_per_norm_batch_bn_trains_and_does_not_evaluate(runs, folder):
    bn, gn, bgn = (of_classification(runs, norm, dataset="glyphs") for norm in ("bn", "gn", "bgn"))
    history = results.load_history(folder)
    losses = history[history["key"].isin(bn["key"])].sort_values("epoch").groupby("key")["train_loss"]
    assert (losses.last() < losses.first() - 1.5).all()  # nats; chance is 4.6
    assert (bn["top1"] < gn["top1"] - 0.2).all()
    assert (bn["top1"] < bgn["top1"] - 0.2).all()
    # other statistics do not help: those of single images are what the weights were trained on
    assert (bn["top1_recalibrated"] < gn["top1"] - 0.2).all()


def test_a_running_average_over_sorted_images_costs_bn_and_recalibration_brings_it_back(runs):
    settings = {"dataset": "fashion_mnist_mini", "single_class_groups": None, "norm_batch_size": 16}
    plain, moved = (of_classification(runs, "bn", final_pass=kind, **settings) for kind in ("none", "class_sorted"))
    assert (moved["top1"] < plain["top1"] - 0.1).all()
    assert ((moved["top1_recalibrated"] - plain["top1"]).abs() < 0.03).all()
    # gn has no running average; its norm batch is null, since it has none
    gn = runs[(runs["norm"] == "gn") & runs["option.single_class_groups"].isna() & (runs["option.epochs"] == 3)]
    assert len(gn) == 4
    assert (gn.groupby("seed")["top1"].nunique() == 1).all()


def test_norm_batches_of_one_class_break_bn_and_not_gn(runs):
    mixed, pure = (
        where(runs[runs["option.epochs"] == 4], task="classification", norm="bn", single_class_groups=groups)
        for groups in (None, 16)
    )
    assert (pure["top1"] < mixed["top1"] - 0.3).all()
    assert (pure["top1_recalibrated"] < mixed["top1"] - 0.3).all()
    gn_mixed, gn_pure = (
        where(runs[runs["option.epochs"] == 4], task="classification", norm="gn", single_class_groups=groups)
        for groups in (None, 16)
    )
    assert (gn_pure["top1"] > gn_mixed["top1"] - 0.1).all()
    assert (gn_pure["top1"] > pure["top1"] + 0.3).all()


def test_statistics_of_the_target_undo_a_shift(runs):
    source_only, dsbn = (
        where(runs, task="domain_adaptation", norm=norm, method=method)
        for norm, method in (("bn", "source_only"), ("dsbn", "dann"))
    )
    assert (source_only["target_top1"] < source_only["source_top1"] - 0.3).all()
    assert (source_only["target_top1_adabn"] > source_only["source_top1"] - 0.1).all()
    assert (dsbn["target_top1"] > dsbn["source_top1"] - 0.1).all()

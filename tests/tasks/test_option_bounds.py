"""What numbers the tasks' options take: published ones, and none that no machine could plan, print or store."""

import math
import types
import typing

import pytest
from PIL import Image
from pydantic import ValidationError

from tasks import get_task, task_names
from tasks.adversarial import task as adversarial
from tasks.architecture_search import task as architecture_search
from tasks.classification import task as classification
from tasks.data import prepare
from tasks.domain_adaptation import task as domain_adaptation
from tasks.few_shot import task as few_shot
from tasks.options import divisors

TASKS = task_names()
NUMBERS = [
    (task, name, kind)
    for task in TASKS
    for name, field in get_task(task).options.model_fields.items()
    for kind in (int, float)
    if kind in (typing.get_args(field.annotation) or (field.annotation,))
    and typing.get_origin(field.annotation) is not tuple
]


def wrong(task, **given):
    """The errors of options that are refused: (option, message)."""
    with pytest.raises(ValidationError) as caught:
        get_task(task).options(**given)
    return [(error["loc"][0] if error["loc"] else "", error["msg"]) for error in caught.value.errors()]


def test_every_kind_of_option_is_looked_at():
    """A field of a form that the list above does not know would be passed over."""
    known = {(task, name) for task, name, _ in NUMBERS}
    for task in TASKS:
        for name, field in get_task(task).options.model_fields.items():
            parts = set(typing.get_args(field.annotation) or (field.annotation,)) - {types.NoneType}
            assert (task, name) in known or not parts & {int, float}, (task, name)
    assert len(NUMBERS) > 100


@pytest.mark.parametrize(("task", "name", "kind"), NUMBERS)
def test_every_number_has_an_upper_bound(task, name, kind):
    for value in (10**30, int("9" * 309)) if kind is int else (1e308, math.inf, -math.inf, math.nan, 10**309):
        assert name in [option for option, _ in wrong(task, **{name: value})], value


@pytest.mark.parametrize(
    ("task", "given"),
    [
        # ResNet-18 four times as wide; batches of 65,536 (You et al. 2020); ImageNet-21k; MAML++; DARTS on ImageNet
        ("classification", {"width": 256, "model": "resnet18_cifar", "epochs": 1000}),
        ("classification", {"batch_size": 65536, "recalibration_images": 1_281_167, "num_classes": 21841}),
        ("few_shot", {"way": 20, "train_way": 60, "shot": 5, "test_episodes": 10_000, "width": 512}),
        ("few_shot", {"method": "maml", "inner_steps": 10, "test_inner_steps": 50, "steps": 60_000}),
        ("architecture_search", {"retrain_channels": 128, "retrain_cells": 20, "gradient_clip": 1e10}),
        ("adversarial", {"epsilon": 0.5, "pgd_step_size": 0.0625, "pgd_steps": 20}),
        ("adversarial", {"epsilon": 1, "step_size": 0.1, "steps": 40}),
        ("adversarial", {"epsilon": 76.5, "step_size": 2.55, "steps": 40, "pgd_steps": 1000, "square_queries": 10_000}),
        ("adversarial", {"epsilon": 255}),
        ("domain_adaptation", {"discriminator_width": 1024, "trade_off": 1e-3}),
    ],
)
def test_published_settings_are_within_bounds(task, given):
    options = get_task(task).options(**given)
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("classification", {"width": 2048}),
        ("few_shot", {"width": 2048}),
        ("architecture_search", {"search_cells": 100}),
        ("architecture_search", {"retrain_cells": 1000}),
        ("classification", {"batch_size": 10**9}),
        ("few_shot", {"test_episodes": 10**9}),
        ("architecture_search", {"random_architectures": 10**9}),
    ],
)
def test_what_no_plan_can_try_is_refused_with_what_is_allowed(task, given):
    (name, value), *_ = given.items()
    ((option, message),) = wrong(task, **given)
    assert option == name
    assert int(message.rpartition(" ")[2]) < value


def test_an_episode_is_no_larger_than_a_batch():
    ((_, message),) = wrong("few_shot", way=1000, shot=100, queries=100)
    assert "1000 classes of 100 support and 100 query images make an episode of 200000; at most 131072" in message
    assert wrong("few_shot", train_way=90_000, queries=1)


def test_divisors_in_messages_are_few_and_near():
    assert divisors(12, 5) == "1, 2, 3, 4, 6, 12"
    assert divisors(65536, 100) == "1, 2, 4, 8, 16, 32, 64, 128 and others"
    assert divisors(98280, 97) == "78, 84, 90, 91, 104, 105, 108, 117 and others"
    assert divisors(7, 10**30) == "1, 7"
    for task, given in (
        ("classification", {"norm_batch_size": 97}),
        ("classification", {"single_class_groups": 97, "recalibration_images": 98280}),
        ("domain_generalization", {"norm_batch_size": 97}),
        ("architecture_search", {"norm_batch_size": 97, "retrain_batch_size": 98280, "search_batch_size": 97}),
    ):
        ((_, message),) = wrong(task, **({"batch_size": 98280} if task != "architecture_search" else {}), **given)
        assert "allowed: 78, 84, 90, 91, 104, 105, 108, 117 and others" in message
        assert len(message) < 200


# units


@pytest.mark.parametrize(
    ("given", "option", "meant"),
    [
        ({"epsilon": 0.031}, "epsilon", "epsilon: 7.91"),
        ({"epsilon": 0.3}, "epsilon", "epsilon: 76.5"),
        ({"epsilon": 8 / 255}, "epsilon", "epsilon: 8"),
        ({"epsilon": 1e-300}, "epsilon", "epsilon: 2.55e-298"),
        ({"step_size": 2 / 255}, "", "step_size: 2"),
        ({"step_size": 2 / 255, "method": "trades"}, "", "step_size: 2"),
        ({"step_size": 10 / 255, "method": "fgsm_rs"}, "", "step_size: 10"),
        ({"pgd_step_size": 0.00784, "method": "standard"}, "", "pgd_step_size: 2"),
        ({"pgd_step_size": 0.01, "epsilon": 76.5, "pgd_steps": 100}, "", "pgd_step_size: 2.55"),
    ],
)
def test_distances_of_unit_images_are_told_from_levels(given, option, meant):
    ((where, message),) = wrong("adversarial", **given)
    assert where == option
    assert "in units of 1/255" in message
    assert message.endswith(f"of a [0, 1] image is {meant}")


def test_a_step_size_that_the_method_does_not_use_is_not_judged():
    assert get_task("adversarial").options(method="standard", step_size=0.001).step_size is None


# what the data can fill


def pictures(root, tops, classes, count):
    for number, top in enumerate(tops):
        for label, name in enumerate(classes):
            (root / top / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (number, label, i)).save(root / top / name / f"{i}.png")
    return f"folder:{root}"


def test_a_batch_larger_than_the_training_part_is_known_while_planning(tmp_path):
    """As long as it was not, the run failed."""
    name = pictures(tmp_path / "set", ("train", "test"), "abc", 10)
    prepare(name, tmp_path / "data", size=4)
    for task in (classification.TASK, adversarial.TASK):
        few = {"dataset": name, "batch_size": 28, "norm_batch_size": 14}
        few |= {"autoattack": (), "attack_images": 8} if task is adversarial.TASK else {}
        with pytest.raises(ValueError, match=r'batch_size 28 exceeds the 27 training images of "folder:'):
            task.data_checksum(task.options(**few), tmp_path / "data")
        fits = task.options(**few | {"batch_size": 27, "norm_batch_size": 27})
        assert task.data_checksum(fits, tmp_path / "data")
        two = task.options(**few | {"batch_size": 20, "norm_batch_size": 20, "num_classes": 2})
        with pytest.raises(ValueError, match=r"batch_size 20 exceeds the 18 training images"):
            task.data_checksum(two, tmp_path / "data")


def test_a_batch_larger_than_a_built_in_or_an_indexed_training_part_is_known_while_planning(tmp_path, monkeypatch):
    from tasks.data import folders

    task = classification.TASK
    with pytest.raises(ValueError, match="batch_size 8192 exceeds the 6000 training images"):
        task.data_checksum(task.options(batch_size=8192, recalibration_images=8192), tmp_path)
    with pytest.raises(ValueError, match="batch_size 2048 exceeds the 1950 training images"):
        task.data_checksum(task.options(dataset="digits", batch_size=2048, recalibration_images=2048), tmp_path)
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 1)
    pictures(tmp_path / "set", ("train", "val"), "ab", 5)
    prepare("imagenet", tmp_path / "data", source=tmp_path / "set", size=4)
    with pytest.raises(ValueError, match="batch_size 9 exceeds the 8 training images"):
        task.data_checksum(task.options(dataset="imagenet", batch_size=9), tmp_path / "data")
    assert task.data_checksum(task.options(dataset="imagenet", batch_size=8), tmp_path / "data")


def test_single_class_groups_that_the_classes_can_not_fill_are_known_while_planning(tmp_path):
    name = pictures(tmp_path / "set", ("train", "test"), "abc", 10)
    prepare(name, tmp_path / "data", size=4)
    task = classification.TASK
    for groups, filled in ((1, 0), (2, 0), (4, 3), (5, None), (20, None)):
        options = task.options(dataset=name, batch_size=20, single_class_groups=groups)
        if filled is None:
            assert task.data_checksum(options, tmp_path / "data")
            continue
        with pytest.raises(ValueError, match=rf"single_class_groups {groups}: the classes .* fill {filled} groups of"):
            task.data_checksum(options, tmp_path / "data")


def test_other_tasks_know_while_planning_what_their_data_can_fill(tmp_path):
    for task, given, message in (
        (domain_adaptation, {"batch_size": 2048, "adabn_images": 2048}, "batch_size 2048 exceeds the 1950 training"),
        (architecture_search, {"search_batch_size": 3001}, "search_batch_size 3001 exceeds the 3000 images of a half"),
        (architecture_search, {"retrain_batch_size": 6001, "recalibration_images": 6001}, "retrain_batch_size 6001"),
        (few_shot, {"shot": 150}, "shot 150 leaves no query"),
        (few_shot, {"method": "imprinting", "imprinting_batch_size": 100_000}, "imprinting_batch_size 100000 exceeds"),
    ):
        with pytest.raises(ValueError, match=message):
            task.TASK.data_checksum(task.TASK.options(**given), tmp_path)

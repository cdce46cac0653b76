"""The project as a whole: packages, configs and what the README tells a reader to type."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from parts.tiny_sets import known
from PIL import Image

from norms.conformance import check_norm
from norms.registry import load_plugin, make_norm, norm_info, norm_names
from suite.planning import Overrides, plan
from tasks import task_names
from tasks.data import prepare

ROOT = Path(__file__).resolve().parent.parent
# read at collection: other tests of the same process load plugins
NORMS, TASKS = frozenset(norm_names()), frozenset(task_names())
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_four_packages_are_imported_from_one_checkout(tmp_path):
    """Their names are generic: another project's `tasks` on the path must not be taken for ours."""
    code = (
        "import suite, norms, tasks, results as r; print(*[m.__path__[0] for m in (suite, norms, tasks, r)], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {Path(line).parent for line in done.stdout.split("\n") if line} == {ROOT}


class FakeCifar10:
    """Stands for the download: 120 images a class and part, of noise."""

    classes = tuple("abcdefghij")

    def __init__(self, root, train=True, download=False):
        self.data = np.random.default_rng(train).integers(0, 256, (1200, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(1200)]


FOLDERS_OF_DOMAINS = {
    "office31": ("amazon", "dslr", "webcam"),
    "pacs": ("art_painting", "cartoon", "photo", "sketch"),
}


def fake_mini_imagenet(root):
    """Noise in the layout of mini-ImageNet, as few classes and images as its configs can draw episodes from."""
    draw = np.random.default_rng(0)
    for part, classes in (("train", 30), ("val", 5), ("test", 5)):
        for label in range(classes):
            folder = root / part / f"{part}{label}"
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def fake_domains(root, domains):
    """Noise in the layout of Office-31 and PACS, enough for one batch of each domain."""
    draw = np.random.default_rng(0)
    for domain in domains:
        for label in ("a", "b"):
            folder = root / domain / label
            folder.mkdir(parents=True)
            for i in range(25):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def fake_imagenet(root):
    """Noise in the layout of ImageNet, enough for the largest batch of its configs."""
    draw = np.random.default_rng(0)
    for part, label in itertools.product(("train", "val"), ("a", "b")):
        folder = root / part / label
        folder.mkdir(parents=True)
        for i in range(600 if part == "train" else 4):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def planned_once(name):
    """A fixture: the plan of a config that several tests read."""

    def made(tmp_path_factory):
        return plan(ROOT / "configs" / f"{name}.yaml", Overrides(), tmp_path_factory.mktemp("data"))

    return pytest.fixture(made, scope="module", name=name)


all_norms, quick = planned_once("all_norms"), planned_once("quick")


LARGE = ("imagenet_resnet50_batch", "office31_dann", "cifar10_darts")


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LARGE else (), id=path.stem) for path in CONFIGS],
)
def test_every_config_plans_without_a_mistake_and_skips_what_it_says(config, tmp_path, monkeypatch, request):
    if "cifar10" in config.stem:
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar10)
        known(monkeypatch, "cifar10", sizes={"train": 1200, "test": 1200})
        prepare("cifar10", tmp_path)
    if "miniimagenet" in config.stem:
        monkeypatch.chdir(tmp_path)
        fake_mini_imagenet(tmp_path / "mini-imagenet")
        prepare("folder:mini-imagenet", tmp_path, size=84)
    for name, domains in FOLDERS_OF_DOMAINS.items():
        if name in config.stem:
            monkeypatch.chdir(tmp_path)
            fake_domains(tmp_path / name, domains)
            prepare(f"folder:{name}", tmp_path, size=32)
    if "imagenet_resnet" in config.stem:
        fake_imagenet(tmp_path / "source")
        prepare("imagenet", tmp_path, source=tmp_path / "source")
    if config.stem in ("all_norms", "quick"):
        planned = request.getfixturevalue(config.stem)
    else:
        planned = plan(config, Overrides(), tmp_path)
    assert planned.runs
    # only the grid over all norms holds norms that a task can not serve
    assert bool(planned.skipped) is (config.stem == "all_norms")
    assert planned.budget in ("reduced", "full")


def test_quick_holds_every_norm_of_tier_one(quick):
    assert {spec.norm for spec in quick.runs} >= {"none", "bn", "in", "ln", "gn", "pn", "bgn"}


def test_norms_that_are_skipped_for_one_reason_have_it_in_the_same_words(all_norms):
    """It stands beside the norm's name, and under a table once for all of them."""
    reasons = {(spec.task, spec.norm): reason for spec, reason in all_norms.skipped}
    for (_, name), reason in reasons.items():
        assert not re.search(rf"\b({name}|{make_norm(name).build.__name__})\b", reason)
    for task in ("classification", "architecture_search", "few_shot"):
        lack = [n for n in sorted(NORMS) if "domain" in norm_info(n).needs]
        assert len(lack) > 1
        assert len({reasons[task, n] for n in lack}) == 1
    past = [n for n in sorted(NORMS) if norm_info(n).across_iterations]
    assert len(past) > 1
    assert len({reasons["classification", n] for n in past}) == 1


def test_all_norms_holds_every_registered_norm_and_every_task(all_norms):
    planned = all_norms
    planned_norms = {spec.norm for spec in planned.runs}
    assert planned_norms == NORMS
    assert {spec.task for spec in planned.runs} == TASKS
    for task in TASKS:
        held = {spec.norm for spec in [*planned.runs, *(spec for spec, _ in planned.skipped)] if spec.task == task}
        assert held == NORMS, task


def test_the_norm_in_the_readme_is_twenty_lines_and_keeps_what_it_declares(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "@register(" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    from norms import registry

    norm_names()  # the built-in ones first, so that the copy holds them
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    file = tmp_path / "my_norm.py"
    file.write_text(example, encoding="utf-8")
    (name,) = load_plugin(file)
    assert [check for check in check_norm(name) if check.false] == []


def test_the_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make demo", "make test", "run_suite.py run", "run_suite.py check", "run_suite.py tables"):
        assert command in text

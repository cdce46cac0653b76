"""suite.describing: what a plan tells the results folder, and tables of a plugin's task without the plugin."""

import json
import subprocess
import sys

import pytest

import results
import tasks
from norms.protocol import SETTING_FIELDS
from results.metrics import METRICS
from suite.config import PlanError
from suite.describing import declaration, headline
from suite.environment import ROOT
from suite.planning import plan_config
from tasks import get_task, task_names
from tasks.base import Setting
from tasks.options import Options

DECLARED = {
    "classification": ("top1", "val_top1", (), ""),
    "architecture_search": ("top1", "val_top1", (), ""),
    "adversarial": ("robust_top1", "val_pgd_top1", ("crafting_mode",), ""),
    "few_shot": ("acc_inductive", "val_acc", (), ""),
    "domain_adaptation": ("target_top1", "val_top1", ("forward",), ""),
    "domain_generalization": ("target_top1", "val_top1", (), "held_out"),
}


class FakeOptions(Options):
    method: str = "plain"
    strength: float | None = None


class Fake:
    """A task whose declarations a test sets."""

    name, version, options, metrics = "describing_fake", 1, FakeOptions, ("test_loss", "top1", "own")

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None


def fake(monkeypatch, **declared):
    task = type("Declared", (Fake,), declared)()
    monkeypatch.setitem(tasks._TASKS, task.name, task)
    return task


def planned(norms=("bn",), seeds=(0, 1), **options):
    config = {"norms": list(norms), "seeds": list(seeds), "tasks": {Fake.name: options}}
    return plan_config(config, tried=False)


@pytest.mark.parametrize("name", task_names())
def test_every_task_of_the_suite_declares_what_its_tables_need(name):
    found = declaration(get_task(name))
    assert (found.headline, found.validation, found.always_shown, found.folds_over) == DECLARED[name]
    assert set(found.metrics) == set(get_task(name).metrics)
    assert all(metric == METRICS[metric.name] for metric in found.metrics.values())


def test_results_names_no_task():
    names = "|".join(task_names())
    found = subprocess.run(["git", "grep", "-nE", names, "--", "results/"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""


def test_what_is_not_declared_is_left_to_the_rules_of_tables(monkeypatch):
    task = fake(monkeypatch)
    assert headline(task) == "test_loss", "the first with a direction"
    found = declaration(task)
    assert (found.validation, found.always_shown, found.deciding, found.folds_over) == (None, None, None, None)
    assert planned().told.baselines == {}


def test_a_gain_is_over_the_run_with_the_key_that_the_plan_notes():
    config = {
        "norms": ["bn", {"gn": {"num_groups": 4}}, "ln"],
        "seeds": [0, 3],
        "tasks": {
            "domain_adaptation": {
                "method": ["source_only", "dann", "mcd"],
                "learning_rate": [0.1, 0.2],
                "norm_batch_size": [2, 64],
            }
        },
    }
    plan = plan_config(config, tried=False)
    by_key = {spec.key: spec for spec in plan.runs}
    assert plan.told.baselines.keys() == by_key.keys()
    agree = ("learning_rate", "norm_batch_size", "source", "target", "epochs")
    for key, baseline in plan.told.baselines.items():
        spec = by_key[key]
        if spec.task_options["method"] == "source_only":
            assert baseline is None
            continue
        other = by_key[baseline]
        assert other.task_options["method"] == "source_only"
        assert (other.norm_label, other.seed) == (spec.norm_label, spec.seed)
        assert all(other.task_options[name] == spec.task_options[name] for name in agree)


def test_keys_of_many_seeds_are_the_keys_of_each():
    specs = [
        s for s in planned_tasks() for s in (s, s.model_copy(update={"task_options": {'a","seed":0': {"seed": 1}}}))
    ]
    for spec in specs:
        seeds = [0, 7, 2**40]
        assert spec.keys(seeds) == [spec.model_copy(update={"seed": seed}).key for seed in seeds]


def planned_tasks():
    config = {"norms": ["bn", "bgn"], "seeds": [0], "tasks": {"domain_adaptation": {"method": ["source_only", "mcd"]}}}
    return plan_config(config, tried=False).runs


def test_nothing_that_a_task_declares_takes_part_in_a_key(monkeypatch):
    fake(monkeypatch)
    before = [spec.key for spec in planned().runs]
    fake(
        monkeypatch,
        headline="top1",
        validation="top1",
        always_shown=("strength",),
        deciding=(),
        folds_over="method",
        baseline=lambda self, options: FakeOptions(),
    )
    after = planned()
    assert [spec.key for spec in after.runs] == before
    assert set(after.told.baselines.values()) == {None}, "its own options are no baseline"


def test_a_plan_notes_the_setting_fields_that_a_config_gave(monkeypatch):
    fake(monkeypatch)
    plan = planned(norms=["bgn", {"bgn": {"norm_batch_size": 8, "num_groups": 2}}], seeds=[0])
    assert plan.told.setting_fields == SETTING_FIELDS
    (given,) = (spec for spec in plan.runs if spec.norm_options["norm_batch_size"] == 8)
    assert plan.told.given == {given.key: ("norm_batch_size",)}


@pytest.mark.parametrize(
    ("declared", "line"),
    [
        ({"headline": "top_1"}, """headline 'top_1': it has test_loss, top1, own; did you mean "top1"?"""),
        ({"validation": 3}, "validation 3: it has test_loss, top1, own"),
        (
            {"always_shown": ("strenth",)},
            """always_shown 'strenth': it has method, strength; did you mean "strength"?""",
        ),
        ({"always_shown": "method"}, "always_shown: a tuple of options is needed; given 'method'"),
        ({"deciding": {"method": 1}}, "deciding: a tuple of options is needed; given {'method': 1}"),
        ({"folds_over": "held_out"}, "folds_over 'held_out': it has method, strength"),
        ({"baseline": lambda self, options: 1 / 0}, "baseline(options) raised ZeroDivisionError: division by zero"),
        ({"baseline": "plain"}, "baseline: a method is needed; given 'plain'"),
        ({"baseline": lambda self, options: {}}, "baseline(options) gives FakeOptions or None; given dict"),
    ],
)
def test_a_wrong_declaration_is_answered_in_one_line_before_anything_runs(monkeypatch, declared, line):
    fake(monkeypatch, **declared)
    with pytest.raises(PlanError) as caught:
        planned()
    assert caught.value.lines == [f'task "{Fake.name}": {line}']


PLUGIN = """
from results.metrics import Metric, add_metric
from tasks import register_task
from tasks.base import Options, Outcome, Setting

add_metric(Metric("describing_dice", "Dice", "%", True, 1, 100.0, description="Overlap."))

class DiceOptions(Options):
    method: str = "plain"
    boost: float | None = None

class Dice:
    name, version, options = "describing_dice_task", 1, DiceOptions
    metrics = ("test_loss", "describing_dice")
    headline = "describing_dice"

    def setting(self, options):
        return Setting()

    def data_checksum(self, options, data_dir):
        return "none"

    def why_not(self, norm, info, options):
        return None

    def baseline(self, options):
        return DiceOptions()

    def run(self, norm, options, context):
        mixes = norm(4).norm_info.mixes_samples
        dice = 0.25 + 0.25 * mixes + (options.boost or 0)
        return Outcome({"test_loss": 1.0 + mixes, "describing_dice": dice}, evidence={"data": "synthetic"})

register_task(Dice())
"""


def test_tables_of_a_plugins_task_keep_units_and_bold_without_the_plugin(tmp_path):
    (tmp_path / "dice.py").write_text(PLUGIN)
    axes = "[{method: plain}, {method: boosted, boost: 0.125}]"
    (tmp_path / "c.yaml").write_text(f"norms: [bn, ln]\nseeds: [0]\ntasks: {{describing_dice_task: {axes}}}\n")

    def command(*arguments):
        made = [sys.executable, str(ROOT / "run_suite.py"), *arguments]
        done = subprocess.run(made, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    command("run", "c.yaml", "--plugin", "dice.py", "--out", "r", "--jobs", "1")
    written = {file.name: file.read_text() for file in (tmp_path / "r/tables").iterdir()}
    command("tables", "r", "--format", "csv,latex,markdown")
    assert {file.name: file.read_text() for file in (tmp_path / "r/tables").iterdir()} == written
    assert r"Dice (\%) $\uparrow$" in written["describing_dice_task.tex"]
    assert r"\textbf{62.5}" in written["describing_dice_task.tex"]
    df = results.load(tmp_path / "r")
    table = results.render_all(df)[0]
    assert [c.metric.name for c in table.columns] == ["test_loss", "describing_dice", "gain"]
    assert {row.label: row.cells[2].mean for row in table.rows if row.cells[2]} == {"bn": 0.125, "ln": 0.125}
    (tmp_path / "r/tasks.json").write_text(json.dumps({"schema": 2}))
    done = command("tables", "r", "--format", "latex")
    assert "tasks.json: not what a plan says of its tasks (" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert r"\%" not in (tmp_path / "r/tables/describing_dice_task.tex").read_text()

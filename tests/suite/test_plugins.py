"""suite.plugins: files of a config and of installed packages; what of them is in a key; grids that run a snapshot."""

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from parts.fake_task import TASK
from pydantic import create_model

import tasks
from norms import plugins
from norms.registry import norm_names
from results import metrics
from results.metrics import METRICS, metric
from results.record import RunRecord, RunSpec
from results.store import read_versions, record_files, write_versions
from results.versions import mark_stale
from suite import cli
from suite.config import PlanError
from suite.planning import plan, plan_config
from suite.plugins import load_configured, load_files, load_installed
from suite.runner import Runner, run_one
from tasks.options import plugin_parts

NORM = """
import torch
from norms import register

@register(name="own_norm", source="test", mixes_samples=False, keeps_stats=False)
class Own(torch.nn.Module):
    def __init__(self, num_channels, *, affine: bool = True):
        super().__init__()

    def forward(self, x):
        return x
"""
MODEL = """
from torch import nn
from tasks import register_model

@register_model("own_model")
def build(norm, num_classes, in_channels):
    return nn.Sequential(norm(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
"""
OPTIMIZER = """
import torch
from tasks import register_optimizer

@register_optimizer("own_optimizer")
def build(groups, learning_rate):
    return torch.optim.SGD(groups, learning_rate, momentum=0.0)
"""
METRIC = """
from results.metrics import Metric, add_metric
add_metric(Metric("own_metric", "own", "points"), primary_of="classification")
"""
SMALL = {"dataset": "fashion_mnist_mini", "model": "own_model", "max_steps": 2}


@pytest.fixture
def write(tmp_path):
    def to(text, name="own.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return to


def classification(**options):
    return {"norms": ["bn"], "seeds": [0], "tasks": {"classification": {**SMALL, **options}}}


def key(tried=False, **options):
    (spec,) = plan_config(classification(**options), tried=tried).runs
    return spec.key


# --- of a config ------------------------------------------------------------------------------------------------------


def test_a_configs_plugins_lie_beside_it_and_join_no_list_of_norms(write, monkeypatch, tmp_path):
    write(NORM, "there/own.py"), write(MODEL, "there/deeper/model.py")
    text = json.dumps({"plugins": ["own.py", "deeper/model.py"], **classification()})
    config = write(text, "there/grid.yaml")
    monkeypatch.chdir(tmp_path)
    planned = plan(config, tried=False)
    assert [(spec.norm, spec.task_options["model"]) for spec in planned.runs] == [("bn", "own_model")]
    assert [plugin.file.name for plugin in planned.plugins] == ["own.py", "model.py"]
    assert Runner(plugins=(tmp_path / "there/own.py", *planned.plugins)).plugins == planned.plugins
    config.write_text(text.replace('["bn"]', '["bn", "own_norm"]'))
    assert [spec.norm for spec in plan(config, tried=False).runs] == ["bn", "own_norm"]


def test_a_configs_plugins_that_can_not_be_loaded_are_named_with_its_other_mistakes(write, tmp_path):
    write(NORM, "norms.py"), write("raise KeyError('a\\nb')", "broken.py")
    given = {"plugins": ["norm.py", "broken.py"], "budget": "ful", **classification(model="resnet8")}
    with pytest.raises(PlanError) as caught:
        plan_config(given, folder=tmp_path)
    one, two, three = caught.value.lines
    assert one == f'plugin "{tmp_path / "norm.py"}": no such file; did you mean "norms.py"?'
    assert two.startswith(f'plugin "{tmp_path / "broken.py"}": KeyError: ')
    assert three.startswith("budget 'ful': allowed")


@pytest.mark.parametrize(("given", "said"), [(3, "not 3"), ([None], "not nothing"), ({"a": 1}, "not a mapping")])
def test_plugins_of_a_config_are_a_list_of_files(given, said, tmp_path):
    (line,) = load_configured({"plugins": given}, tmp_path).mistakes
    assert line.startswith("plugins: a list of files is needed, relative to the config, ")
    assert line.endswith(said)


def test_what_a_plugin_does_while_it_is_loaded_is_undone_or_said(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write(
        "import os, sys, torch\nos.chdir('/')\nsys.path.insert(0, '/x')\ntorch.set_default_dtype(torch.float64)"
    )
    two = write("import os\nos._exit(3)", "ends.py")
    before = list(sys.path)
    loaded = load_files([one, two])
    assert loaded.mistakes == (f'plugin "{two}": the process ended with exit code 3 while it was imported',)
    assert (Path.cwd(), sys.path, torch.get_default_dtype()) == (tmp_path, before, torch.float32)


def test_two_plugins_with_one_name_of_any_kind_are_one_line(write, tmp_path):
    kinds = {"norm": NORM, "model": MODEL, "optimizer": OPTIMIZER, "task": TASK.partition("\nif ")[0]}
    kinds["task"] += "\nregister_task(Fake())\n"
    for kind, text in kinds.items():
        other = write("import math\n" + text, f"{kind}_2.py")
        (line,) = load_files([write(text, f"{kind}_1.py"), other]).mistakes
        assert line.startswith(f'plugin "{other}": ValueError: {kind} "')
        assert f'" is already registered by {other.with_name(f"{kind}_1.py")}' in line
        assert "replace=True" not in line, "a plugin's is not replaced"
    (line,) = load_files([write(METRIC), write(METRIC.replace('"own"', '"other"'), "metric_2.py")]).mistakes
    assert 'ValueError: metric "own_metric" is already defined' in line
    (line,) = load_files(
        [write(METRIC), write(METRIC.replace('"own_metric"', '"their_metric"'), "metric_3.py")]
    ).mistakes
    assert f'the primary metric of "classification" is that of {tmp_path / "own.py"} already' in line
    assert "their_metric" not in METRICS


# --- of installed packages --------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(text, entry) -> the folder of an installed distribution `own-things` with a package own_things."""
    folder = tmp_path / "installed"
    (folder / "own_things-1.5.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(folder))

    def install(text, entry="own_things.all", version="1.5"):
        (folder / "own_things").mkdir(exist_ok=True)
        (folder / "own_things/__init__.py").touch()
        (folder / "own_things/all.py").write_text(text)
        info = folder / "own_things-1.5.dist-info"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: own-things\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[normsuite.plugins]\nmine = {entry}\n")
        return folder

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_things"]:
        del sys.modules[name]


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_things"]:
        del sys.modules[name]
    for kind, name in [each for each, plugin in plugins._OF.items() if plugin.module]:
        del plugins._OF[kind, name], plugins._REGISTRIES[kind]()[name]


def test_an_installed_package_offers_plugins_whose_version_is_its_releases_too(package):
    package("from . import more\n" + NORM + MODEL)
    (Path(sys.path[0]) / "own_things/more.py").write_text("RATE = 1\n")
    versions = []
    for more, release in (("RATE = 1  # a comment\n", "1.5"), ("RATE = 2\n", "1.5"), ("RATE = 1\n", "1.6")):
        package("from . import more\n" + NORM + MODEL, version=release)
        (Path(sys.path[0]) / "own_things/more.py").write_text(more)
        planned = plan_config({**classification(), "norms": ["own_norm"]}, tried=False)
        (plugin,) = planned.plugins
        assert plugin.release == f"own-things=={release}"
        assert planned.runs[0].norm_version == plugin.version
        assert planned.runs[0].parts == {"model": f"own_model@{plugin.version}"}
        assert load_installed().plugins == (plugin,), "it is loaded once"
        versions.append(plugin.version)
        forget()
    assert len(set(versions)) == 3


def test_a_package_that_a_program_has_imported_before_is_a_plugin_all_the_same(package):
    package(NORM)
    import own_things.all  # noqa: F401

    (plugin,) = load_installed().plugins
    assert plugin.names == (("norm", "own_norm"),)


BROKEN = {
    "raises": ({"text": "raise KeyError('a')"}, "own_things.all of own-things==1.5\": KeyError: 'a'"),
    "no module": ({"text": NORM, "entry": "own_things.al"}, 'own_things.al of own-things==1.5": no such module'),
    "no package": ({"text": NORM, "entry": "nothing.there"}, 'nothing.there of own-things==1.5": no such module'),
    "a function": ({"text": NORM, "entry": "own_things.all:Own"}, 'names a module, without ":"'),
    "a taken name": ({"text": NORM.replace("own_norm", "bn")}, 'norm "bn" is already registered'),
    "ends": ({"text": "import os; os._exit(4)"}, "the process ended with exit code 4 while it was imported"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_entry_point_is_one_line_that_names_its_distribution(package, monkeypatch, capsys, kind):
    given, said = BROKEN[kind]
    package(**given)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run_suite.py", "run", "configs/quick.yaml", "--dry-run", "--tasks", "few_shot"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: plugin "')
    assert "own-things==1.5" in line
    assert said in line
    assert "own_norm" not in norm_names()


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_models_or_an_optimizers_plugin_is_in_the_keys_of_its_runs_and_of_no_others(write):
    model, optimizer = write(MODEL, "model.py"), write(OPTIMIZER, "optimizer.py")
    load_files([model, optimizer])
    both = {"optimizer": "own_optimizer"}
    ours, of_model, of_both = key(model="resnet8"), key(), key(**both)
    model.write_text(MODEL + "# a comment\n")
    load_files([model])
    assert (key(model="resnet8"), key(), key(**both)) == (ours, of_model, of_both)
    optimizer.write_text(OPTIMIZER.replace("momentum=0.0", "momentum=0.5"))
    load_files([optimizer])
    assert (key(model="resnet8"), key(), key(**both) == of_both) == (ours, of_model, False)
    of_both = key(**both)
    model.write_text(MODEL.replace("norm(in_channels)", "norm(in_channels), nn.ReLU()"))
    load_files([model])
    assert (key(model="resnet8"), key() == of_model, key(**both) == of_both) == (ours, False, False)


def test_a_spec_without_plugins_parts_is_written_and_keyed_as_before(write):
    (spec,) = plan_config(classification(model="resnet8"), tried=False).runs
    assert "parts" not in spec.model_dump()
    assert "parts" not in json.loads(spec.model_dump_json())
    assert (
        spec.key == spec.model_copy(update={"parts": {}}).key != spec.model_copy(update={"parts": {"model": "a@1"}}).key
    )


def test_tables_show_the_parts_that_were_planned_last(tmp_path):
    def spec(version):
        parts = {"model": f"own@{version}"} if version else {}
        facts = {"norm_version": "1", "task_version": "1", "data_checksum": "d", "parts": parts}
        return RunSpec(task="t", norm="bn", norm_options={}, task_options={}, seed=0, **facts)

    def stale(specs):
        times = [datetime(2026, 1, day + 1) for day in range(len(specs))]
        rows = [{"stale": False, "finished": time, "task": "t"} for time in times]
        mark_stale(rows, specs, read_versions(tmp_path))
        return [row["stale"] for row in rows]

    specs = [spec("a"), spec("b"), spec("")]
    assert stale(specs) == [True, False, False], "the newest"
    write_versions(tmp_path, specs[:1])
    assert stale(specs) == [False, True, False]


def test_a_run_whose_models_code_is_another_than_planned_fails_with_the_reason(write, tmp_path):
    file = write(MODEL)
    (plugin,) = load_files([file]).plugins
    (spec,) = plan_config(classification(), tried=False).runs
    file.write_text(MODEL.replace("norm(in_channels)", "norm(in_channels), nn.ReLU()"))
    load_files([file])
    record = run_one(spec, tmp_path, lambda done: None, Runner(plugins=(file,)))
    assert record.status == "failed"
    assert record.reason.startswith(
        f"RuntimeError: model changed after planning: version own_model@{plugin.version} was"
    )


def test_models_and_optimizers_of_a_plugin_are_loaded_where_a_run_asks_for_them(write):
    file, other = write(MODEL, "model.py"), write(OPTIMIZER, "optimizer.py")
    offered = load_files([file, other]).plugins
    for name in [name for name in sys.modules if name.startswith("normsuite_plugin_")]:
        del sys.modules[name]
    for kind, name in (("model", "own_model"), ("optimizer", "own_optimizer")):
        del plugins._REGISTRIES[kind]()[name]
    plugins._OF.clear()
    file.unlink()
    plugins.offer(offered)
    options = tasks.get_task("classification").options
    assert plugin_parts(options(model="own_model")) == {"model": f"own_model@{offered[0].version}"}
    assert plugins.loaded_here() == {"model": offered[0].version}
    assert options(optimizer="own_optimizer").optimizer == "own_optimizer"


def test_a_model_that_a_plugins_task_names_is_loaded_with_the_run(write):
    file = write(MODEL, "model.py")
    offered = load_files([file]).plugins
    del plugins._REGISTRIES["model"]()["own_model"]
    for name in [name for name in sys.modules if name.startswith("normsuite_plugin_")]:
        del sys.modules[name]
    plugins._OF.clear()
    plugins.offer(offered)
    plain = create_model("Plain", __base__=tasks.Options, model=(str, "own_model"))  # does not look for the name
    assert plugin_parts(plain()) == {"model": f"own_model@{offered[0].version}"}


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_a_plugins_metric_is_replaced_by_an_edit_and_gone_with_the_plugin(write):
    file = write(METRIC)
    load_files([file])
    assert (metric("own_metric").unit, metrics.RANKS["classification"]) == ("points", "own_metric")
    file.write_text(METRIC.replace("points", "%"))
    assert load_files([file]).mistakes == ()
    assert metric("own_metric").unit == "%"
    file.write_text(METRIC.replace("points", "s") + "raise RuntimeError('late')")
    (line,) = load_files([file]).mistakes
    assert line.endswith("RuntimeError: late")
    assert (metric("own_metric").unit, metrics.RANKS["classification"]) == ("%", "own_metric")
    new = write(METRIC.replace("own_metric", "half") + "raise RuntimeError('late')", "half.py")
    load_files([new])
    assert "half" not in METRICS
    file.write_text("")
    load_files([file])
    assert "own_metric" not in METRICS
    assert "classification" not in metrics.RANKS


# --- a grid runs a snapshot -------------------------------------------------------------------------------------------

CHANGES = """
import shutil
from pathlib import Path
from tasks import register_task
from tasks.base import Options, Outcome, Setting
from beside_changes import VALUE

class Changes:
    name, version, options, metrics = "changes", 1, Options, ("top1",)
    def setting(self, options): return Setting()
    def data_checksum(self, options, data_dir): return "none"
    def why_not(self, norm, info, options): return None
    def run(self, norm, options, context):
        here = context.data_dir
        for file in ("changes.py", "own.py"):
            (here / file).unlink(missing_ok=True)
        (here / "beside_changes.py").write_text("VALUE = 0.75\\n")
        shutil.rmtree(here / "o/plugins")
        (here / "o/plugins").mkdir()
        return Outcome({"top1": VALUE}, evidence={"data": "synthetic"})

register_task(Changes())
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> exit code, lines of stdout, lines of stderr, records by norm of `run grid.yaml --out o`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)

    def call(*more):
        given = ("run", "grid.yaml", "--out", "o", "--data-dir", str(tmp_path), "--jobs", "1", *more)
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *given])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        records = [RunRecord.model_validate_json(file.read_bytes()) for file in record_files(tmp_path / "o")]
        return caught.value.code, said.out.splitlines(), said.err.splitlines(), records

    return call


def test_a_grid_outlives_its_files_their_neighbours_and_its_own_copies(write, run, tmp_path):
    write(CHANGES, "changes.py"), write("VALUE = 0.25\n", "beside_changes.py"), write(NORM, "own.py")
    write("plugins: [changes.py, own.py]\nnorms: [bn, own_norm]\nseeds: 0\ntasks: [changes]\n", "grid.yaml")
    code, out, err, records = run()
    assert (code, err, out[-1]) == (0, [], "2 ok, 0 skipped, 0 already done")
    assert {record.metrics["top1"] for record in records} == {0.25}
    assert list((tmp_path / "o/plugins").iterdir()) == []
    write(CHANGES + "# a comment\n", "changes.py"), write("VALUE = 0.25  # as it was\n", "beside_changes.py")
    write(NORM, "own.py")
    assert run("--seeds", "0-1")[1][-1] == "2 ok, 0 skipped, 2 already done", "an interrupted grid goes on"
    write(CHANGES, "changes.py"), write(NORM, "own.py")
    assert run("--dry-run")[1][-1] == "2 runs: 0 done, 2 to do -> o", "a neighbour's edit is one"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise KeyError('only there')", "KeyError: 'only there'"),
        ("os._exit(3)", "exit code 3"),
        ("sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_a_plugin_that_fails_only_in_the_worker_is_a_recorded_failure(write, run, end, said):
    write(TASK, "task.py")
    there = f"import multiprocessing, os, sys\nif multiprocessing.parent_process() is not None:\n    {end}\n"
    write(there + NORM, "own.py")
    write("plugins: [task.py, own.py]\nnorms: [bn, own_norm]\nseeds: 0\ntasks: [cli_fake]\n", "grid.yaml")
    code, _, _, records = run()
    assert code == 1
    status = {record.spec.norm: (record.status, record.reason) for record in records}
    assert status["bn"][0] == "ok"
    assert status["own_norm"][0] == "failed"
    assert said in status["own_norm"][1]


TINY = "{dataset: fashion_mnist_mini, num_classes: 2, max_steps: 1, batch_size: 16, recalibration_images: 16, "


def test_a_grid_runs_a_packages_task(write, run, package):
    package(TASK)
    write("norms: [bn]\nseeds: 0\ntasks: [cli_fake]\n", "grid.yaml")
    code, _, err, (record,) = run()
    assert (code, err, record.status) == (0, [], "ok")
    assert record.environment["plugins"] == {"all": record.spec.task_version}


@pytest.mark.slow  # timm is imported three times
def test_a_grid_trains_a_model_of_timm_and_records_its_conversion(write, run):
    of_timm = f"classification: {TINY}model: 'timm:test_efficientnet'}}"
    write(f"norms: [bn]\nseeds: 0\ntasks: {{{of_timm}}}\n", "grid.yaml")
    code, _, err, (record,) = run()
    assert (code, err, record.status) == (0, [], "ok")
    counts = {"swapped": 13, "left": 0, "changed": 0}
    assert record.evidence["conversion"] == {"timm": __import__("timm").__version__, **counts}


def test_a_model_that_no_norm_can_serve_is_a_mistake_of_the_plan(write, run):
    write(MODEL.replace("nn.Flatten(), ", ""), "model.py")
    small = "{dataset: fashion_mnist_mini, num_classes: 2, max_steps: 1, batch_size: 16, model: own_model}"
    write(f"plugins: [model.py]\nnorms: [bn]\nseeds: 0\ntasks: {{classification: {small}}}\n", "grid.yaml")
    code, _, (line,), _ = run("--dry-run")
    assert code == 2
    assert line.startswith('error: task "classification": nothing to run: norm "bn": ')
    assert "own_model" in line

"""Weights that stay: the network of a run, from its folder, is the one that was measured."""

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from parts import classification as classified

import tasks
from norms.registry import load_plugin, norm_info, resolve_norm_options
from results.record import RunSpec
from results.store import write_record
from suite.checkpoints import Kept, write
from suite.runner import Runner, run_one
from tasks.base import Outcome
from tasks.data.reading import in_order
from tasks.evaluate import EVALUATION_BATCH, evaluate
from tasks.options import plugin_parts
from tasks.weights import LARGEST_NOTE, MEMBER, WEIGHTS

pytestmark = pytest.mark.usefixtures("one_thread", "data")
data = classified.data


def spec(norm="bn", task="classification", **options):
    values = tasks.get_task(task).options(**({**classified.TINY, "epochs": 1, **options}))
    return RunSpec(
        task=task,
        norm=norm,
        norm_options=resolve_norm_options(norm, classified.OPTIONS.get(norm, {}), {"norm_batch_size": 32}),
        task_options=values.model_dump(mode="json"),
        seed=0,
        norm_version=str(norm_info(norm).version),
        task_version=tasks.task_version(task),
        data_checksum="",
    )


def kept(folder, asked, keep=True, **runner):
    folder.mkdir(exist_ok=True)
    return run_one(asked, folder, lambda fraction: None, Runner(keep_weights=keep, **runner))


_MADE = {}


@pytest.fixture
def one(tmp_path_factory):
    """The folder of one run of bn with its weights, for tests that damage a copy."""
    if "folder" not in _MADE:
        folder = tmp_path_factory.mktemp("one")
        assert kept(folder, spec()).status == "ok"
        _MADE["folder"] = folder
    return _MADE["folder"]


@pytest.mark.parametrize("norm", ["bn", "bgn", "gn", "mbn", "cbn"])
def test_the_network_is_the_one_that_was_measured(norm, tmp_path):
    record = kept(tmp_path, spec(norm))
    assert (record.status, record.artifacts) == ("ok", [WEIGHTS])
    before = torch.random.get_rng_state()
    net, prepare = tasks.load_network(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state()), "building it draws nothing from the caller's generator"
    assert not any(module.training for module in net.modules())
    test = classified.planted().test
    batches = ((prepare(images), labels) for images, labels in in_order(test, EVALUATION_BATCH))
    found = evaluate(net, batches, "float32", "test")
    assert (found.top1, found.loss) == (record.metrics["top1"], record.metrics["test_loss"])
    plain = torch.load(tmp_path / WEIGHTS, weights_only=True)
    assert plain.keys() == net.state_dict().keys(), "the file is a plain state_dict"


def test_without_the_option_nothing_is_kept_and_the_record_is_the_same(tmp_path):
    asked = spec()
    with_, without = kept(tmp_path / "a", asked), kept(tmp_path / "b", asked, keep=False)
    assert with_.spec.key == without.spec.key
    timed = set(classified.TIMED)
    assert {k: v for k, v in with_.metrics.items() if k not in timed} == {
        k: v for k, v in without.metrics.items() if k not in timed
    }
    assert (without.artifacts, list((tmp_path / "b").iterdir())) == ([], [])
    kept(tmp_path / "a", asked, keep=False)
    assert not (tmp_path / "a" / WEIGHTS).exists(), "those of an earlier run do not pass for this one's"


def test_a_failed_run_leaves_no_weights(tmp_path, monkeypatch):
    def run(norm, options, context):
        outcome = classified.TASK.run(norm, options, context)
        return Outcome({**outcome.metrics, "top1": float("nan")}, trained=outcome.trained)

    monkeypatch.setattr(tasks.get_task("classification"), "run", run)
    assert kept(tmp_path, spec()).status == "failed"
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize("what", ["none", "no state", "the disk"])
def test_a_run_is_ok_where_its_weights_can_not_be_kept(what, tmp_path, monkeypatch, capsys):
    real = classified.TASK.run

    def run(norm, options, context):
        outcome = real(norm, options, context)
        trained = {"none": None, "no state": type(outcome.trained)({"weight": object()}, {})}.get(what, outcome.trained)
        return Outcome(outcome.metrics, outcome.history, trained=trained)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tasks.get_task("classification"), "run", run)
    if what == "the disk":
        monkeypatch.setattr(torch, "save", full)
    record = kept(tmp_path, spec())
    assert (record.status, record.artifacts, list(tmp_path.iterdir())) == ("ok", [], [])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "weights" in line]
    assert {"none": "gives none", "no state": "holds a builtins.object", "the disk": "No space left"}[what] in line


def test_folders_without_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="is not there; the folder of a run is needed"):
        tasks.load_network(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the folder of a run is needed, OUT/runs/TASK/NORM/KEY"):
        tasks.load_network(tmp_path)
    record = kept(tmp_path, spec(), keep=False)
    folder = write_record(tmp_path, record).parent
    with pytest.raises(ValueError, match=r"--keep-weights, once it is ok.*another --out"):
        tasks.load_network(folder)


def rewritten(one, folder, **changes):
    """A copy of the weights with another spec or other facts."""
    from tasks.weights import note_in

    note = note_in(one / WEIGHTS)
    changed = {**note["spec"], **{k: v for k, v in changes.items() if k != "facts"}}
    facts = changes.get("facts", note["facts"])
    state = torch.load(one / WEIGHTS, weights_only=True)
    write(folder / WEIGHTS, state, Kept(note["key"], changed, facts))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_version": "0"}, 'version 0 of norm "bn", here is .*make the run again'),
        ({"task_version": "0"}, 'version 0 of task "classification", here is'),
        ({"norm": "mine"}, 'norm "mine" of the run is not here.*norms.load_plugin'),
        ({"task": "mine"}, 'task "mine" of the run is not here.*norms.load_plugin'),
        ({"facts": {}}, "does not fit what is built here for it: KeyError: 'num_classes'"),
        ({"facts": {"num_classes": 3, "in_channels": 1, "mean": [0.0], "std": [1.0]}}, "size mismatch"),
        ({"norm_options": {"nonsense": 1}}, "nonsense"),
        ({"task_options": {"nonsense": 1}}, "nonsense"),
    ],
)
def test_what_does_not_fit_is_one_line_that_says_why(one, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        tasks.load_network(rewritten(one, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_task_that_does_not_say_how_its_network_is_built_is_named(one, tmp_path, monkeypatch):
    monkeypatch.delattr(type(tasks.get_task("classification")), "network")
    with pytest.raises(ValueError, match='task "classification" does not say how its network is built'):
        tasks.load_network(one)


PLUGIN = """
from torch import nn
from norms import register

@register(name="kept_mine", source="test", mixes_samples=False, keeps_stats=False)
class Mine(nn.Module):
    def __init__(self, num_channels, *, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return x * self.weight[:, None, None] + self.bias[:, None, None]
""".replace("from torch", "import torch\nfrom torch", 1)


def test_a_plugins_norm_is_asked_for_and_found_once_it_is_loaded(tmp_path):
    from norms import registry

    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    record = kept(tmp_path / "run", spec("kept_mine"), plugins=(file,))
    assert record.status == "ok", record.reason
    tasks.load_network(tmp_path / "run")
    del registry._REGISTRY["kept_mine"]
    with pytest.raises(ValueError, match=r'"kept_mine" of the run is not here: .*norms.load_plugin\(FILE\)'):
        tasks.load_network(tmp_path / "run")


MODEL = """
from torch import nn
from tasks import register_model

@register_model("kept_model")
def build(norm, num_classes, in_channels):
    return nn.Sequential(norm(in_channels), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, num_classes))
"""


def test_a_plugins_model_is_asked_for_in_the_version_of_the_run(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    load_plugin(file)
    of_model = spec(model="kept_model", width=None)
    parts = plugin_parts(tasks.get_task("classification").options(**of_model.task_options))
    record = kept(tmp_path / "run", of_model.model_copy(update={"parts": parts}), plugins=(file,))
    assert record.status == "ok", record.reason
    tasks.load_network(tmp_path / "run")
    file.write_text(MODEL.replace("norm(in_channels), ", "norm(in_channels), nn.ReLU(), "))
    load_plugin(file)
    with pytest.raises(ValueError, match=r'made with version .* of model "kept_model", here is .*: make the run again'):
        tasks.load_network(tmp_path / "run")
    file.write_text("")
    load_plugin(file)
    with pytest.raises(ValueError, match=r'model "kept_model" of the run is not here: .*norms.load_plugin\(FILE\)'):
        tasks.load_network(tmp_path / "run")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def _without_note(file):
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(file.with_suffix(".new"), "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(MEMBER):
                new.writestr(info, old.read(info))
    return file.with_suffix(".new").replace(file)


def _with(file, name, content, compression=zipfile.ZIP_STORED):
    """The same archive with other content in one member."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(file.with_suffix(".new"), "w") as new:
        for info in old.infolist():
            given = content if info.filename.endswith(name) else old.read(info)
            new.writestr(zipfile.ZipInfo(info.filename), given, compression)
    return file.with_suffix(".new").replace(file)


def _flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


DAMAGES = {
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "not a zip"),
    "one byte": (_flip, "is damaged|Bad CRC|bad"),
    "empty": (lambda f: f.write_bytes(b""), "not a zip"),
    "a record": (lambda f: f.write_text("{}"), "not a zip"),
    "a checkpoint of others": (_without_note, "no item named"),
    "code": (lambda f: _with(f, "data.pkl", pickle.dumps(Evil())), "[Uu]nsupported|weights_only|Weights only"),
    "a note of no mapping": (lambda f: _with(f, MEMBER, b"[]"), "list"),
    "a note of another format": (lambda f: _with(f, MEMBER, json.dumps({"format": 9})), "of format 9; 1 is read"),
    "a long note": (lambda f: _with(f, MEMBER, b" " * (LARGEST_NOTE + 1)), "its note has"),
    "compressed": (lambda f: _with(f, "nothing", b"", zipfile.ZIP_DEFLATED), "it is compressed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_or_foreign_is_one_line_and_executes_nothing(damage, one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes((one / WEIGHTS).read_bytes())
    change, said = DAMAGES[damage]
    change(file)
    with pytest.raises(ValueError, match=f"not the weights of a run.*({said})") as caught:
        tasks.load_network(tmp_path)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_a_link_is_not_followed(one, tmp_path):
    (tmp_path / WEIGHTS).symlink_to(one / WEIGHTS)
    with pytest.raises(ValueError, match="is not a regular file"):
        tasks.load_network(tmp_path)

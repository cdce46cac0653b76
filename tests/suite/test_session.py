"""suite.session: what `run` does, from Python: plans, runs, a frame of exactly the runs that were asked for."""

import sys
from types import SimpleNamespace

import pytest
from parts.fake_task import TASK

import norms
import results
import suite
from suite.planning import plan_config
from suite.plugins import refuse_what_workers_lack
from suite.session import Session
from tasks import register_model

NORM = """
import torch
from torch import nn

from norms import register

@register(name="session_norm", source="a test", mixes_samples=False, keeps_stats=False)
class SessionNorm(nn.Module):
    def __init__(self, num_channels, *, affine=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))

    def forward(self, x):
        return x * self.weight[:, None, None]
"""
CONFIG = {"norms": ["bn", "ln"], "seeds": [0], "tasks": {"cli_fake": {}}}


@pytest.fixture
def plugins(tmp_path):
    files = [tmp_path / "fake_task.py", tmp_path / "session_norm.py"]
    for file, text in zip(files, (TASK, NORM), strict=True):
        file.write_text(text)
    return files


def made(folder):
    """One line per run that was really made."""
    return (folder / "made").read_text().split("\n")[:-1]


def test_run_returns_the_runs_of_its_config_alone_and_repeats_none(plugins, tmp_path, capfd):
    out = tmp_path / "out"
    first = suite.run(CONFIG, out=out, plugins=plugins, data_dir=tmp_path, jobs=2, seeds=[0, 1])
    assert sorted(zip(first["norm"], first["seed"], strict=True)) == [
        (name, seed) for name in ("bn", "ln", "session_norm") for seed in (0, 1)
    ]
    assert len([line for line in capfd.readouterr().out.splitlines() if " ok " in line]) == 6
    second = suite.run(CONFIG, out=out, plugins=plugins, data_dir=tmp_path, norms=["ln"])
    assert list(zip(second["norm"], second["seed"], second["top1"], strict=True)) == [("ln", 0, 0.5)]
    assert len(results.load(out)) == len(made(tmp_path)) == 6


def test_settings_are_values_and_events_reach_who_asked_for_them(plugins, tmp_path, capfd):
    events = []
    df = suite.run(
        CONFIG,
        out=tmp_path / "out",
        plugins=plugins[:1],
        data_dir=tmp_path,
        settings={"cli_fake.learning_rate": [0.5, 1e-3], "cli_fake.fails": True},
        norms=["bn"],
        on_event=events.append,
    )
    assert sorted(df["option.learning_rate"]) == [1e-3, 0.5]
    assert set(df["status"]) == {"failed"}
    assert set(df["reason"]) == {"RuntimeError: it fails"}
    assert {event.kind for event in events} >= {"started", "finished"}
    assert capfd.readouterr().out == ""


def test_plan_makes_nothing_and_says_every_mistake_at_once(plugins, tmp_path):
    planned = suite.plan(CONFIG, plugins=plugins[:1], norms=["bn", "in"], seeds="0-2", data_dir=tmp_path)
    assert (len(planned.runs), [reason for _, reason in planned.skipped]) == (3, ["needs more positions"] * 3)
    assert not (tmp_path / "made").exists()
    with pytest.raises(suite.PlanError) as caught:
        suite.plan(CONFIG, plugins=plugins[:1], settings={"cli_fake.rate": 1}, norms=["bnn"], data_dir=tmp_path)
    assert [line.partition(":")[0] for line in caught.value.lines] == ['--norms "bnn"', 'task "cli_fake"']


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"jobs": 0}, "jobs 0: 1 or more"),
        ({"device": "gpu"}, 'device "gpu": not a device'),
        ({"trackers": ["tensorbord"]}, 'did you mean "tensorboard"'),
        ({"timeout": "soon"}, 'timeout "?soon'),
        ({"checkpoint_every": "often"}, 'checkpoint-every "?often'),
        ({"out": "file"}, 'out ".*file": is a file'),
        ({"plugins": ["missing.py"]}, "missing.py.*no such file"),
    ],
)
def test_what_can_not_be_is_said_before_anything_runs(plugins, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        suite.run(**{"config": CONFIG, "out": "out", "plugins": plugins[:1], "data_dir": tmp_path} | given)
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


OWN = """
import torch
from tasks import register_model, register_optimizer
from tasks.data import InMemory, register_dataset

@register_model("cell_model", replace=True)
def model(norm, num_classes, in_channels):
    return torch.nn.Sequential(norm(in_channels), torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))

@register_optimizer("cell_optimizer", replace=True)
def optimizer(groups, learning_rate):
    return torch.optim.SGD(groups, learning_rate)

def parts():
    numbers = torch.Generator().manual_seed(0)
    return {
        part: (torch.randint(0, 256, (20, 1, 8, 8), generator=numbers).to(torch.uint8), torch.arange(20) % 2)
        for part in ("train", "val", "test")
    }

register_dataset("cell_data", InMemory(parts, num_classes=2, title="Cells", image_shape=(1, 8, 8)), replace=True)
"""


def test_what_a_notebook_s_cells_define_is_refused_with_the_way_out(plugins, tmp_path, monkeypatch):
    for text in (NORM, OWN):
        exec(compile(text, "<cell>", "exec"), {"__name__": "__main__"})
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())  # a notebook's has no file
    assert "session_norm" in norms.norm_names()
    with pytest.raises(ValueError, match=r'norm "session_norm": defined in this session.*plugins=\["FILE"\]'):
        suite.plan(CONFIG, plugins=plugins[:1], norms=["session_norm"], data_dir=tmp_path)
    small = {"dataset": "cell_data", "model": "cell_model", "optimizer": "cell_optimizer", "batch_size": 4}
    with pytest.raises(ValueError, match=r'^dataset "cell_data", model "cell_model", optimizer "cell_optimizer": def'):
        suite.plan({"norms": ["bn"], "seeds": [0], "tasks": {"classification": small}})
    suite.plan({"norms": ["bn"], "seeds": [0], "tasks": {"classification": {"max_steps": 1}}})


def test_a_plugin_that_was_loaded_before_reaches_the_runs_that_ask_for_it(plugins, tmp_path):
    for file in plugins:
        norms.load_plugin(file)
    planned = suite.plan(CONFIG, norms=["session_norm"], data_dir=tmp_path)
    assert {key for plugin in planned.plugins for key in plugin.names} == {
        ("norm", "session_norm"),
        ("task", "cli_fake"),
    }
    assert [plugin.file for plugin in suite.plan(CONFIG, data_dir=tmp_path).plugins] == [plugins[0]]


def test_one_name_is_a_list_of_one_and_python_s_own_sequences_are_lists(plugins, tmp_path):
    config = {"norms": ("bn", "ln"), "seeds": range(2), "tasks": {"cli_fake": {"learning_rate": (0.1, 0.2)}}}
    assert len(suite.plan(config, plugins=plugins[0], data_dir=tmp_path).runs) == 8
    few = {"norms": "bn", "seeds": 1, "tasks": "cli_fake", "settings": "cli_fake.learning_rate=0.5"}
    assert len(suite.plan(config, plugins=str(plugins[0]), data_dir=tmp_path, **few).runs) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"norms": [{"gn": {}}]}, "norms: names are needed, not {'gn': {}}"),
        ({"settings": {"cli_fake.learning_rate": object}}, "settings: Object of type type"),
        ({"config": None}, "config: a file or a mapping is needed, not a NoneType"),
    ],
)
def test_what_no_file_can_say_is_a_mistake_too(plugins, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        suite.plan(**{"config": CONFIG, "plugins": plugins[:1], "data_dir": tmp_path} | given)


def test_a_session_says_what_is_done_and_what_is_to_do(plugins, tmp_path):
    planned = suite.plan(CONFIG, plugins=plugins[:1], data_dir=tmp_path)
    session = Session(planned, tmp_path / "out", plugins=plugins[:1], data_dir=tmp_path)
    assert (len(session.status.todo), session.status.done, session.folder.exists()) == (2, 0, False)
    assert session.begin() == []
    assert dict(session.make()) == {"ok": 2}
    again = Session(planned, tmp_path / "out", plugins=plugins[:1], data_dir=tmp_path)
    assert (len(again.status.todo), again.status.done, dict(again.make())) == (0, 2, {})


def test_a_model_of_a_script_has_no_version_and_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__="script.py"))
    register_model("of_a_script")(lambda norm, num_classes, in_channels: norm(num_classes))
    config = {"norms": ["bn"], "seeds": [0], "tasks": {"classification": {"model": "of_a_script"}}}
    specs = plan_config(config, data_dir=tmp_path, tried=False).runs
    with pytest.raises(ValueError, match=r'model "of_a_script": defined in a script.*plugins=\["FILE"\]'):
        refuse_what_workers_lack(specs)

"""suite.cli: what a person types, sees and gets as an exit code; and suite.progress, which words it."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from parts.fake_task import TASK
from pydantic import create_model

from norms.convert import Audit, Changed, Swapped
from results.record import RunRecord, RunSpec
from results.store import RECORD, find_record, record_files, run_folder, run_lock, write_record
from suite import cli, console
from suite.engine import Event
from suite.environment import ROOT
from suite.foreign import audit_lines
from suite.forked import _Stream
from suite.planning import Plan
from suite.progress import Names, Progress, Remaining, duration, seed_text
from suite.status import Status, restate_budget
from tasks import Options, register_task, task_names

NORM = """
import torch
from norms.registry import register

@register(name="{name}", source="mine", mixes_samples=False, keeps_stats=False{facts})
class Mine(torch.nn.Module):
    def __init__(self, num_channels, *, scale: float = 1.0, affine: bool = True):
        super().__init__()
        self.scale = scale
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(num_channels))
            self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        {formula}
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    file = tmp_path_factory.mktemp("task") / "task.py"
    file.write_text(TASK)
    return file


@pytest.fixture
def suite(task, tmp_path, monkeypatch, capsys):
    """suite("run", ...) -> (exit code, lines of stdout, lines of stderr), in tmp_path, with the fake task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)  # this process is the tests', not a command's

    def call(*arguments):
        if arguments[0] == "run":
            arguments = (*arguments, "--plugin", str(task), "--data-dir", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out.splitlines(), captured.err.splitlines()

    return call


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("norms: [bn, ln, in]\nseeds: 0-1\ntasks: {cli_fake: {}}\n")
    return file


def made(folder):
    file = folder / "made"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def test_run_makes_what_is_missing_prints_tables_and_says_where_they_lie(suite, config, tmp_path):
    code, out, err = suite("run", config, "--jobs", 2)
    assert (code, err) == (0, [])
    assert made(tmp_path) == ["bn 0", "bn 1", "ln 0", "ln 1"]
    assert sum(" ok " in line and "top1" in line for line in out) == 4
    text = "\n".join(out)
    assert "needs more positions" in text
    assert str(Path("runs/grid/tables")) in text
    assert out[-1] == "4 ok, 2 skipped, 0 already done"
    assert {"all_tables.tex", "all_tables.md"} <= {f.name for f in (tmp_path / "runs/grid/tables").iterdir()}

    code, out, _ = suite("run", config)
    assert (code, out[-1]) == (0, "nothing left to do: 2 skipped, 4 already done")
    code, out, _ = suite("run", config, "--seeds", "0-2", "--norms", "ln,none")
    assert (code, out[-1]) == (0, "4 ok, 0 skipped, 2 already done")
    assert len(made(tmp_path)) == 8


def test_runs_of_no_config_are_counted_and_can_be_left_out(suite, task, config, tmp_path):
    suite("run", config)
    config.write_text(config.read_text().replace("{}", "{learning_rate: 0.2}"))
    code, out, _ = suite("run", config, "--norms", "bn")
    assert code == 0
    assert not [line for line in out if "are not of" in line], "this plan is smaller on purpose"
    code, out, _ = suite("run", config)
    assert code == 0
    (line,) = [line for line in out if "are not of" in line]
    options = f"--plugin {task} --data-dir {tmp_path}"
    command = f"tables runs/grid --config {config} {options}"
    assert line == f"6 records in runs/grid are not of {config}: `python run_suite.py {command}` leaves them out"

    code, out, err = suite(*command.split(), "--metrics", "top1")
    assert (code, err) == (0, [])
    text = "\n".join(out)
    assert "Common: fails=False, learning_rate=0.2." in text
    assert "Left out, not asked for by the config: 6 records." in text
    assert "learning_rate=0.1" not in text
    assert out[-1] == f"6 records of {config}; 6 others in runs/grid are left out"
    assert "learning_rate=0.1" in "\n".join(suite("tables", "runs/grid")[1])

    first = tmp_path / "first.yaml"
    first.write_text(config.read_text().replace("0.2", "0.1"))
    code, out, _ = suite("tables", "runs/grid", "--config", config, "--config", first, *options.split())
    assert (code, out[-1]) == (0, f"12 records of {config}, {first}; 0 others in runs/grid are left out")

    config.write_text(config.read_text().replace("0.2", "0.3"))
    code, _, err = suite("tables", "runs/grid", "--config", config, *options.split())
    assert (code, len(err)) == (2, 1)
    assert "none of the 12 records in runs/grid is what the config asks for now" in err[0]
    code, _, err = suite("tables", "runs/grid", "--config", "none.yaml", "--config", "neither.yaml")
    assert (code, ["none.yaml" in err[0], "neither.yaml" in err[1]]) == (2, [True, True])


def test_two_configs_of_one_name_do_not_share_a_folder_without_a_word(suite, config, tmp_path):
    assert suite("run", config, "--norms", "bn")[2] == []
    other = tmp_path / "other" / "grid.yaml"
    other.parent.mkdir()
    other.write_text(config.read_text().replace("0-1", "5"))
    note = f"note: runs/grid holds the runs of {config}, another config; --out FOLDER keeps these apart"
    assert suite("run", other, "--norms", "bn", "--dry-run")[2] == [note]
    assert suite("run", other, "--norms", "bn", "--out", "apart")[2] == []
    assert suite("run", other, "--norms", "bn")[2] == [note]
    assert suite("run", other, "--norms", "bn")[2] == []
    other.rename(tmp_path / "moved.yaml")  # a checkout that moved, or another machine: no second config is here
    assert suite("run", config, "--norms", "bn")[2] == []
    other.write_text(config.read_text())  # a copy asks for the same
    assert suite("run", other, "--norms", "bn")[2] == []


def test_a_pipe_is_another_config_each_time(suite, config, tmp_path):
    """As of `run <(sed ...)`: it can be read once, and its name says nothing."""

    def run(*options):
        reads, writes = os.pipe()
        try:
            with os.fdopen(writes, "w") as file:
                file.write(config.read_text())
            return suite("run", f"/dev/fd/{reads}", "--norms", "bn", *options)
        finally:
            os.close(reads)

    code, _, err = run("--out", "runs/piped")
    assert (code, err) == (0, [])
    assert json.loads((tmp_path / "runs/piped/versions.json").read_text())["config"] == ""
    folder = Path(run("--dry-run")[1][-1].rpartition(" ")[2])
    folder.mkdir()
    note = f"note: {folder} holds the runs of an earlier pipe; --out FOLDER keeps these apart"
    assert run("--dry-run")[2] == [note]


def test_a_budget_that_is_corrected_reaches_the_runs_that_are_done(suite, config, tmp_path):
    command = ("run", config, "--norms", "bn,ln")
    suite(*command)
    folder = tmp_path / "runs/grid"
    before = {file: file.read_text() for file in record_files(folder)}
    config.write_text("budget: full\n" + config.read_text())
    code, out, _ = suite(*command)
    assert (code, out[-1]) == (0, "nothing left to do: 0 skipped, 4 already done")
    assert "budget: restated as full in 4 records that were made before" in out
    assert "Evidence: synthetic data, full budget" in "\n".join(out)
    for file, text in before.items():
        assert json.loads(file.read_text()) == {
            **json.loads(text),
            "evidence": {"budget": "full", "data": "synthetic"},
        }
    assert not [line for line in suite(*command)[1] if "restated" in line]
    assert len(made(tmp_path)) == 4


def test_a_task_s_own_word_for_its_budget_and_runs_of_other_plans_stay(tmp_path):
    own, other, held = (fake_spec("bn", seed) for seed in range(3))
    for spec, budget in ((own, "machinery-only"), (other, "reduced"), (held, "reduced")):
        record = RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}, evidence={"budget": budget})
        write_record(tmp_path, record)
    with run_lock(tmp_path, held):
        assert restate_budget(Status(Plan([own, held], [], "full", 1), tmp_path, retry=False)) == 0
    assert [json.loads(f.read_text())["evidence"]["budget"] for f in record_files(tmp_path)].count("reduced") == 2
    assert restate_budget(Status(Plan([own, held], [], "full", 1), tmp_path, retry=False)) == 1
    assert find_record(tmp_path, own).evidence["budget"] == "machinery-only"
    assert find_record(tmp_path, other).evidence["budget"] == "reduced"


def test_a_dry_run_shows_the_grid_and_changes_nothing(suite, config, tmp_path):
    code, out, err = suite("run", config, "--set", "cli_fake.learning_rate=[0.1, 0.2]", "--dry-run", "--out", "o")
    assert (code, err) == (0, [])
    assert out[-1] == "8 runs: 0 done, 8 to do, 4 skipped -> o"
    assert sum("2 to do" in line for line in out) == 4
    assert any("learning_rate=0.2" in line and "skipped: needs more positions" in line for line in out)
    assert not (tmp_path / "o").exists()
    assert not made(tmp_path)


def test_a_dry_run_names_the_data_that_is_missing_once_and_a_run_refuses(suite, tmp_path):
    (tmp_path / "far.yaml").write_text(
        "norms: [bn, ln]\nseeds: 0\ntasks: {classification: {dataset: [cifar10, cifar100], epochs: [1, 2]}}\n"
    )
    code, out, err = suite("run", "far.yaml", "--dry-run")
    assert (code, err) == (0, [])
    missing = [line for line in out if line.startswith("missing")]
    assert len(missing) == 2
    commands = [f"data prepare {name} --data-dir " for name in ("cifar10", "cifar100")]
    assert all(command in line for command, line in zip(commands, missing, strict=True))
    assert any("8 to do" in line for line in out)
    code, out, err = suite("run", "far.yaml")
    assert (code, out, len(err)) == (2, [], 2)
    assert not (tmp_path / "runs").exists()


def test_what_a_grid_leaves_out_is_counted(suite, tmp_path):
    (tmp_path / "pairs.yaml").write_text(
        "norms: [bn]\nseeds: 0\n"
        "tasks: {domain_adaptation: {source: [mnist, uci], target: [mnist, uci], model: resnet8}}\n"
    )
    code, out, err = suite("run", "pairs.yaml", "--dry-run")
    assert (code, err) == (0, [])
    assert out[-1].startswith('combinations left out: 2, such as task "domain_adaptation": source and target are both')


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 2)])
def test_on_a_terminal_many_runs_are_a_question(suite, config, monkeypatch, answer, code):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("suite.planning.MOST_RUNS", 3)
    assert suite("run", config, "--dry-run")[0] == 2
    assert suite("run", config, "--dry-run", "--yes")[0] == 0
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    found, _, err = suite("run", config, "--dry-run")
    assert found == code
    assert "6 runs, which is more than 3. Make them?" in err[0]


def test_a_failed_run_gives_exit_code_1_and_is_made_again_with_retry_only(suite, config, tmp_path):
    command = ("run", config, "--set", "cli_fake.fails=true", "--seeds", 0, "--norms", "bn")
    code, out, _ = suite(*command)
    assert (code, len(made(tmp_path))) == (1, 1)
    assert any("failed" in line and "RuntimeError: it fails" in line for line in out)
    place = next(out[i + 1] for i, line in enumerate(out) if "it fails" in line)
    file = Path(place.removeprefix("    see "))
    assert file.name == "traceback.txt"
    assert not file.is_absolute()
    assert "RuntimeError: it fails" in (tmp_path / file).read_text()
    assert "[a] failed 1/1 (RuntimeError: it fails)" in out, "a table of nothing but failures has their reasons"
    code, out, _ = suite(*command)
    assert (code, len(made(tmp_path))) == (1, 1)
    assert "1 failed before" in "\n".join(out)
    again = "failed before  cli_fake bn seed 0  RuntimeError: it fails"
    assert out[out.index(again) + 1] == place, "the reasons stand above, as the last line says"
    assert again in suite(*command, "--dry-run")[1]
    code, out, _ = suite(*command, "--retry")
    assert (code, len(made(tmp_path)), again in out) == (1, 2, False)


def test_what_of_many_failed_runs_is_shown_again_is_bounded(suite, config, monkeypatch):
    monkeypatch.setattr("suite.status.MOST_FAILED", 1)
    command = ("run", config, "--set", "cli_fake.fails=true", "--norms", "bn")
    suite(*command)
    out = suite(*command)[1]
    assert sum(line.startswith("failed before") for line in out) == 1
    assert "1 more failed before" in out


def test_weights_that_are_not_there_are_noted(suite, task, config):
    command = ("run", config, "--norms", "bn")
    code, _, err = suite(*command, "--keep-weights")
    none = 'note: task "cli_fake" does not say how its network is built: its runs keep no weights'
    assert (code, err) == (0, [none])
    file = task.parent / "network.py"
    file.write_text(TASK.replace("cli_fake", "cli_net").replace("    def run", "    network = None\n\n    def run"))
    config.write_text(config.read_text().replace("cli_fake", "cli_net"))
    command = (*command, "--plugin", file)
    code, _, (note,) = suite(*command, "--keep-weights")
    before, _, path = note.partition(" stands in ")
    assert (code, before) == (0, "note: made now, without weights.pt: 2 runs; why")
    assert 'weights are not kept: task "cli_net" gives none' in Path(path).read_text()
    _, _, (note,) = suite(*command, "--keep-weights")
    assert note.startswith("note: done before, without --keep-weights, so that they have no weights.pt: 2 runs")
    assert suite(*command)[2] == [], "who does not ask for weights hears nothing"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_where_output_lacks_characters_a_grid_ends_with_its_tables(suite, config, tmp_path, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    code, _, err = suite("run", config)
    assert (code, err) == (0, [])
    lines = raw.getvalue().decode(encoding).splitlines()
    head, rule, first, second = lines[lines.index("cli_fake") + 2 :][:4]
    assert "top-1 (%) ^" in head
    assert {len(line) for line in (head, rule, first, second)} == {len(rule)}
    assert (tmp_path / "runs/grid/tables/cli_fake.csv").exists()


def test_a_grid_goes_on_when_nobody_reads_any_more(suite, config, tmp_path, monkeypatch):
    """| head ends after its lines, which is no reason to end the runs."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert suite("run", config)[::2] == (0, [])
        assert suite("run", config, "--set", "cli_fake.fails=true", "--out", tmp_path / "failing")[0] == 1
    assert made(tmp_path)[:4] == ["bn 0", "bn 0", "bn 1", "bn 1"]
    assert (tmp_path / "runs/grid/tables/cli_fake.csv").exists()


def test_tables_that_can_not_be_written_are_printed_and_the_runs_decide(suite, config, tmp_path):
    folder = tmp_path / "runs/my grid"
    folder.mkdir(parents=True)
    (folder / "tables").touch()
    said = f"error: tables are not written to '{folder}/tables': a file has this name"
    code, out, err = suite("run", config, "--out", folder)
    assert (code, err) == (0, [said])
    assert "cli_fake" in out
    assert out[-1] == "4 ok, 2 skipped, 0 already done"
    failed, _, err = suite("run", config, "--out", folder, "--set", "cli_fake.fails=true")
    assert (failed, err) == (1, [said])
    code, out, err = suite("tables", folder, "--format", "csv")  # what was asked for is not done
    assert (code, err) == (2, [said])
    assert "cli_fake" in out


def test_a_mistake_in_making_the_tables_does_not_hide_how_the_runs_ended(suite, config, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("column")

    monkeypatch.setattr("results.tables.build.render_all", broken)
    folder = tmp_path / "my grid"
    code, out, err = suite("run", config, "--out", folder)
    assert code == 0
    assert out[-1] == "4 ok, 2 skipped, 0 already done"
    assert err == [
        "error: no tables: KeyError: 'column'",
        f"error: `python run_suite.py tables '{folder}'` shows where; the records are complete",
    ]


HOSTILE = "\x1bc\u202e\u200b\u2028"
"""Resets the terminal, turns what follows around, hides, breaks the line."""


def test_what_users_and_plugins_wrote_reaches_no_terminal(suite, config, tmp_path, task):
    for arguments in (
        ("run", f"{HOSTILE}.yaml"),
        ("run", config, "--norms", HOSTILE),
        ("run", config, "--set", f"{HOSTILE}=1"),
        ("run", config, "--set", f"cli_fake.learning_rate={HOSTILE}"),
        ("tables", HOSTILE),
        ("check", HOSTILE),
    ):
        code, out, err = suite(*arguments)
        assert (code, out) == (2, [])
        assert "U+001Bc" in "".join(err)
        assert all(line.isprintable() for line in err)
    plugin = tmp_path / "hostile.py"
    plugin.write_text(
        task.read_text()
        .replace("cli_fake", "cli_hostile")
        .replace('"it fails"', repr(f"it {HOSTILE} fails"))
        .replace('"needs more positions"', repr(f"needs {HOSTILE}"))
    )
    grid = tmp_path / "hostile.yaml"
    grid.write_text("norms: [bn, in]\nseeds: 0\ntasks: {cli_hostile: {fails: true}}\n")
    for more in (("--dry-run",), ()):
        code, out, err = suite("run", grid, "--plugin", plugin, *more)
        assert code == (not more)
        assert all(line.isprintable() for line in (*out, *err))
        assert "U+001Bc" in "".join(out)


def test_a_live_display_shows_control_characters_as_numbers(monkeypatch, capsys):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    spec = fake_spec("bn", 0, rate=HOSTILE)
    other = fake_spec("bn", 0, rate=0.1)
    progress = Progress([spec, other], Names([spec, other]), {}, Remaining(1))
    with console.display(progress) as tell:
        tell(Event("started", spec))
        tell(Event("finished", spec, record=RunRecord(spec=spec, status="failed", reason=f"x\n{HOSTILE}" * 1000)))
    out = capsys.readouterr().out
    assert "\x1b[?25l" in out  # rich moved the cursor
    assert "U+001Bc" in out
    assert not any(c in out for c in ("\x1bc", "\u202e", "\u200b", "\u2028"))
    assert len(next(line for line in out.split("\n") if "failed" in line)) < 2300


def test_a_thousand_mistakes_are_fifty_short_lines(capsys):
    assert console.fail("\n".join(["x" * 10_000] * 1000)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 50
    assert max(map(len, lines)) < 2100
    assert lines[-1] == "error: 951 more"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": None, "setting": 3}, "has no method setting, run; tasks.base.Task says"),
        ({"options": dict}, "options are a class derived from tasks.Options; given <class 'dict'>"),
        (
            {"options": create_model("Sized", __base__=Options, norm_batch_size=(int, 2))},
            r"norm_batch_size must allow None \(int \| None\)",
        ),
    ],
)
def test_a_task_without_what_every_plan_asks_for_is_refused_in_one_line(change, words):
    methods = dict.fromkeys(("setting", "data_checksum", "why_not", "run"), print)
    task = SimpleNamespace(**{"name": "mine", "metrics": ("top1",), "options": Options, **methods, **change})
    with pytest.raises(ValueError, match=words) as caught:
        register_task(task)
    assert "\n" not in str(caught.value)
    assert task.name not in task_names()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Mine"}, 'task name "Mine": lower case letters, digits and underscores'),
        ({"name": "a\x1b[2J"}, "starting with a letter, 100 characters at most"),
        ({"name": "a/../b"}, "task name"),
        ({"name": "a" * 101}, "task name"),
        ({"metrics": ("top1", "=1+1")}, 'metric name "=1\\+1"'),
        ({"metrics": ("top 1",)}, 'metric name "top 1"'),
        ({"metrics": "top1"}, "metrics are a tuple of names, one or more; given 'top1'"),
        ({"metrics": ()}, "one or more"),
    ],
)
def test_names_of_tasks_and_metrics_are_checked_as_norms_are(change, words):
    task = SimpleNamespace(**{"name": "mine", "metrics": ("top1",), **change})
    with pytest.raises(ValueError, match=words) as caught:
        register_task(task)
    assert len(str(caught.value)) < 300
    assert task.name not in task_names()


def test_an_edited_plugin_repeats_exactly_its_runs(suite, config, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(NORM.format(name="cli_own", facts="", formula="return x * self.scale"))
    assert suite("run", config, "--plugin", own)[0] == 0
    assert made(tmp_path) == ["bn 0", "bn 1", "cli_own 0", "cli_own 1", "ln 0", "ln 1"]
    own.write_text(NORM.format(name="cli_own", facts="", formula="return x * self.scale * 2"))
    code, out, _ = suite("run", config, "--plugin", own)
    assert (code, out[-1]) == (0, "2 ok, 2 skipped, 4 already done")
    assert made(tmp_path)[2:6] == ["cli_own 0", "cli_own 0", "cli_own 1", "cli_own 1"]


def test_a_damaged_record_is_named_set_aside_and_made_again(suite, config, tmp_path):
    suite("run", config)
    files = record_files(tmp_path / "runs/grid")
    file = next(f for f in files if json.loads(f.read_text())["status"] == "ok")
    file.write_text("{")
    assert "1 damaged" in "\n".join(suite("run", config, "--dry-run")[1])
    assert file.read_text() == "{"
    code, out, _ = suite("run", config)
    assert (code, out[-1]) == (0, "1 ok, 2 skipped, 3 already done")
    assert any("damaged record of" in line and "damaged-1" in line for line in out)
    assert file.with_name(f"{RECORD}.damaged-1").read_text() == "{"
    assert len(made(tmp_path)) == 5


BAD = [
    (["run", "CONFIG", "--norms", "bm"], ['--norms "bm"', 'did you mean "bn"']),
    (["run", "CONFIG", "--tasks", "cli_fak"], ['did you mean "cli_fake"']),
    (["run", "CONFIG", "--seeds", "3-1"], ['"3-1"', 'did you mean "1-3"']),
    (["run", "CONFIG", "--set", "cli_fake.learning_rat=1"], ['did you mean "learning_rate"']),
    (["run", "CONFIG", "--norms", "bn("], ['--norms "bn("', "not closed"]),
    (["run", "CONFIG", "--norms", "bn]"], ['--norms "bn]"', "closes nothing"]),
    (["run", "CONFIG", "--norms", "gn(num_groups=[8)"], ['a ")" closes nothing']),
    (["run", "CONFIG", "--norms", ","], ['--norms ","', "a name is needed"]),
    (["run", "CONFIG", "--norms", ""], ["a name is needed"]),
    (["run", "CONFIG", "--tasks", " , "], ["a name is needed"]),
    (["run", "CONFIG", "--seeds", ","], ['seeds ","']),
    (["run", "CONFIG", "--seeds", ""], ['seeds ""']),
    (["run", "CONFIG", "--set", "cli_fake.fails=yes"], ["not text; write true"]),
    (["run", "CONFIG", "--set", "cli_fake.fails=true", "--set", "cli_fake.fails=false"], ["given twice"]),
    (["run", "CONFIG", "--seeds", "0-99999"], ["300,000 runs", "--yes"]),
    (["tables", "RESULTS", "--metrics", ","], ["a name is needed"]),
    (["tables", "RESULTS", "--format", ""], ["a name is needed"]),
    (["tables", "RESULTS", "--sweep", ","], ["a name is needed"]),
    (["check", "gn", "--option", "num_groups=yes"], ["\"num_groups\" given 'yes'", "not text"]),
    (["check", "gn", "--option", "eps=1e999"], ['--option "eps=1e999"', "no finite number"]),
    (["run", "CONFIG", "--device", "gpu"], ['--device "gpu"']),
    (["run", "CONFIG", "--device", "cuda:99"], ['--device "cuda:99"', "available"]),
    (["run", "CONFIG", "--device", "meta"], ['--device "meta"', "not available"]),
    (["run", "CONFIG", "--out", "/proc/none"], ['--out "/proc/none"']),
    (["run", "CONFIG", "--jobs", "0"], ["--jobs", "0"]),
    (["run", "CONFIG", "--threads", "0"], ["--threads", "0"]),
    (["run", "CONFIG", "--device", "cuda:256"], ['--device "cuda:256"', "available"]),  # torch takes it for cuda:0
    (["run", "CONFIG", "--device", "cpu:3"], ['--device "cpu:3"', "one cpu"]),
    (["run", "CONFIG", "--device", ""], ['--device ""', "not a device"]),
    *(
        (["run", "CONFIG", "--device", kind], [f'--device "{kind}"', "not available"])
        for kind in ("hpu", "privateuseone", "xla", "mkldnn", "vulkan", "maia", "ideep")  # no machine of ours has these
    ),
    (["run", "CONFIG", "--timeout", "-1"], ["--timeout", "-1", "5m"]),
    (["run", "CONFIG", "--timeout", "0"], ["--timeout", "5m"]),
    (["run", "CONFIG", "--timeout", "nan"], ["--timeout", "nan", "5m"]),
    (["run", "CONFIG", "--timeout", "soon"], ["--timeout", "soon", "5m"]),
    (["run", "CONFIG", "--out", "CONFIG"], ["--out", "is a file"]),
    (["run", "CONFIG", "--sed", "1"], ["--sed", "--seeds"]),
    (["run", "CONFIG", "--plugin", "none.py"], ['plugin "none.py"', "no such file"]),
    (["run", "CONFIG", "--plugin", "BROKEN"], ["SyntaxError"]),
    (["run", "CONFIG", "--plugin", "TAKEN"], ['"bn" is already registered']),
    (["run", "none.yaml"], ['"none.yaml"', "No such file"]),
    (["tables", "none"], ["none"]),
    (["tables", "RESULTS", "--metrics", "top2"], ["top2", 'did you mean "top1"']),
    (["tables", "RESULTS", "--format", "pdf"], ['unknown format "pdf"', "csv"]),
    (["tables", "RESULTS", "--sweep", "learning_rat"], ["learning_rat"]),
    (["tables", "RESULTS", "--select", "learning_rat"], ["learning_rat"]),
    (["check", "--plugin", "EMPTY"], ["empty.py", "registers no norm"]),
    (["check", "bm"], ['unknown norm "bm"', 'did you mean "bn"']),
    (["check", "gn", "bn", "--option", "num_groups=4"], ["--option is for one norm", "given gn, bn"]),
    (["check", "--option", "eps=1"], ["--option is for one norm", "norms"]),
    (["check", "gn", "--option", "groups=4"], ['unknown option "groups"', 'did you mean "num_groups"']),
    (["check", "gn", "--option", "num_groups=four", "--json"], ["\"num_groups\" given 'four'"]),
    (["check", "gn", "--option", "num_groups"], ['--option "num_groups"', "KEY=VALUE"]),
    (["check", "gn", "--option", "eps=1", "--option", "eps=2"], ['--option "eps=2"', "eps is given twice"]),
    (["check", "gn", "bn", "--like", "FORMULA"], ["--like is for one norm", "given gn, bn"]),
    (["check", "gn", "--like", "none.py"], ['formula "none.py": no such file']),
    (["check", "gn", "--like", "EMPTY"], ["empty.py", "no function reference(x, weight, bias, ...)"]),
    (
        ["check", "gn", "--like", "FORMULA", "--json"],
        ["reference(x, gamma)", '"gamma" is nothing that gn has', "num_groups"],
    ),
    (["bench", "layer"], ['unknown benchmark "layer"', 'did you mean "layers"']),
    (["data", "prepare", "cifar11"], ["cifar11", "cifar10"]),
    (["lst"], ["lst"]),
    (["convert-report", "resnt18", "bn"], ['unknown model "resnt18"', 'did you mean "resnet18"']),
    (["convert-report", "timm:resnt18", "bn"], ['unknown model "timm:resnt18"', 'did you mean "timm:resnet18"']),
    (["convert-report", "timm:resnet18.nowhere", "bn"], ['"timm:resnet18.nowhere"', "nowhere"]),
    (["convert-report", "resnet18", "bm"], ['unknown norm "bm"', 'did you mean "bn"']),
    (["convert-report", "resnet18", "gn", "--option", "groups=8"], ['unknown option "groups"', "num_groups"]),
    (["convert-report", "resnet18", "gn", "--option", "8"], ['--option "8"', "KEY=VALUE"]),
    (["convert-report", "resnet18", "gn", "--option", "num_groups=48"], ['"resnet18"', "bn1", "48 does not divide 64"]),
    (["convert-report", "alexnet", "bn"], ['"alexnet" has no norm']),
    (
        ["convert-report", "r3d18", "bn"],
        ['unknown model "r3d18"', "segmentation, detection and video", 'did you mean "r3d_18"'],
    ),
    (["convert-report", "swin3d_t", "bn"], ['"swin3d_t"', "channels-last"]),
    (["convert-report", "resnet18", "bn", "--keep", "layer1.0.bn"], ['has no norm "layer1.0.bn"', "did you mean"]),
    (["convert-report", "resnet18", "bn", "--keep", "fc"], ['"fc" is a Linear and no norm']),
    (
        ["convert-report", "deeplabv3_mobilenet_v3_large", "frn"],
        ["classifier.0.convs.4.2: ", "more than one value", "`--keep classifier.0.convs.4.2`"],
    ),
    (["convert-report", "vit_b_16", "bn"], ['"vit_b_16"', "channels-last", "encoder.ln (LayerNorm)"]),
    (["convert-report", "timm:vit_tiny_patch16_224", "bn"], ["channels-last", "blocks.11.norm2 (LayerNorm)"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD, ids=lambda v: " ".join(v)[:50])
def test_bad_input_is_one_line_exit_code_2_and_nothing_runs(suite, config, tmp_path, arguments, parts):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "formula.py").write_text("def reference(x, gamma): return x * gamma\n")
    (tmp_path / "taken.py").write_text(NORM.format(name="bn", facts="", formula="return x"))
    spec = fake_spec("bn", 0)
    write_record(tmp_path / "results", RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}))
    names = {"CONFIG": config, "BROKEN": "broken.py", "TAKEN": "taken.py", "EMPTY": "empty.py", "RESULTS": "results"}
    names["FORMULA"] = "formula.py"
    code, out, err = suite(*(names.get(a, a) for a in arguments))
    assert (code, out) == (2, [])
    (line,) = err
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not made(tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_conversion_is_reported_in_full(suite, tmp_path):
    code, out, err = suite("convert-report", "resnet18", "gn", "--option", "num_groups=8")
    assert (code, err) == (0, [])
    assert out[0] == "resnet18 -> gn(num_groups=8): 20 norms swapped, 0 left"
    assert [line.split() for line in out if line.startswith(("BatchNorm2d", "buffers"))] == [
        ["BatchNorm2d", "20", "weight,", "bias"],
        ["buffers", "9,620", "0"],
    ]

    own = tmp_path / "own.py"
    formula = "return x if self.activation is None else self.activation(x)"
    text = NORM.format(name="cli_fused", facts=", needs='activation'", formula=formula)
    own.write_text(
        text.replace("affine: bool = True", "affine: bool = True, activation=None").replace(
            "self.scale = scale", "self.activation = activation"
        )
    )
    code, out, err = suite("convert-report", "timm:test_efficientnet", "cli_fused", "--plugin", own)
    assert (code, err) == (0, [])
    assert "9 activations that the norm brings" in out
    assert not any("to be told" in line for line in out)
    assert any(line.split() == ["bn1.act", "(SiLU)", "after", "bn1"] for line in out)


def test_a_conversion_that_leaves_norms_names_them_and_exits_with_1(suite):
    code, out, err = suite("convert-report", "convnext_tiny", "ln")
    assert (code, err) == (1, [])
    assert sum(line.startswith("features.") and "channels-last" in line for line in out) == 18
    assert out[-1] == "incomplete: 18 norms of convnext_tiny are not ours"


def test_a_norm_that_is_kept_is_named_and_exits_with_1(suite):
    keep = ("--keep", "classifier.0.convs.4.2")
    code, out, err = suite("convert-report", "deeplabv3_mobilenet_v3_large", "frn", *keep)
    assert (code, err, out[0]) == (1, [], "deeplabv3_mobilenet_v3_large -> frn: 52 norms swapped, 1 left")
    assert ["classifier.0.convs.4.2", "BatchNorm2d", "the", "caller", "keeps", "it"] in [line.split() for line in out]
    assert out[-1] == "incomplete: 1 norms of deeplabv3_mobilenet_v3_large are not ours"


@pytest.mark.parametrize(("model", "norms"), [("r2plus1d_18", 37), ("s3d", 77), ("fcn_resnet50", 54)])
def test_models_of_segmentation_and_video_are_converted(model, norms, suite):
    code, out, err = suite("convert-report", model, "bn")
    assert (code, err, out[0]) == (0, [], f"{model} -> bn: {norms} norms swapped, 0 left")


def test_a_detector_is_converted_as_a_whole_or_in_the_parts_that_can_be_followed(suite):
    model = "fcos_resnet50_fpn"
    code, out, err = suite("convert-report", model, "ln")
    assert (code, err, out[0]) == (0, [], f"{model} -> ln: 61 norms swapped, 0 left")
    keep = "head.regression_head.conv.1"
    code, out, err = suite("convert-report", model, "frn", "--keep", keep)
    assert (code, err) == (1, [])
    heads = [f"head.{kind}_head.conv" for kind in ("classification", "regression")]
    assert out[0] == (
        f"{model} is converted in parts (backbone, {', '.join(heads)}), since torch.fx can not follow it as a whole: "
        "it takes lists of images, and targets in training"
    )
    assert [line for line in out if "->" in line] == [
        f"{model}.backbone -> frn: 53 norms swapped, 0 left",
        f"{model}.{heads[0]} -> frn: 4 norms swapped, 0 left",
        f"{model}.{heads[1]} -> frn: 3 norms swapped, 1 left",
    ]


def test_what_a_conversion_changes_beyond_the_norms_is_said_of_each(suite):
    code, out, _ = suite("convert-report", "resnet18", "bgn", "--option", "num_groups=8")
    assert code == 0
    starts = "starts without running statistics: train or recalibrate before evaluating"
    assert f"each of the 20 new norms {starts}" in out
    audit = Audit([Swapped(path, "BatchNorm2d", 4) for path in "abc"], changed=[Changed(p, "is new") for p in "ac"])
    assert list(audit_lines(audit, "net", "bn"))[-3:] == ["each of 2 new norms is new:", "a", "c"]


@pytest.mark.parametrize("norm", ["dsbn", "tasknorm"])
def test_convert_report_tells_a_norm_what_it_needs_to_know(norm, suite):
    code, out, err = suite("convert-report", "resnet18", norm)
    assert (code, err) == (0, [])
    assert out[0] == f"resnet18 -> {norm}: 20 norms swapped, 0 left"
    fact = {"dsbn": "domain=...", "tasknorm": "part=..."}[norm]
    assert [line for line in out if "norms.situation.situation" in line] == [
        f"to be told in every forward: `with norms.situation.situation(net, {fact}):`"
    ]


def test_a_norm_that_is_not_called_as_it_declares_is_one_line_with_model_and_norm(suite, tmp_path):
    own = tmp_path / "own.py"
    text = NORM.format(name="cli_undeclared", facts="", formula="return x")
    own.write_text(text.replace("def forward(self, x", "def forward(self, x, *, weight"))
    code, out, (line,) = suite("convert-report", "resnet18", "cli_undeclared", "--plugin", own)
    assert (code, out) == (2, [])
    assert line.startswith('error: "resnet18" with norm "cli_undeclared": ')
    assert "TypeError" in line
    assert "'weight'" in line


def test_what_a_conversion_unhooks_is_said():
    audit = Audit([Swapped("a", "BatchNorm2d", 4)], unhooked=["", "layer1"])
    assert list(audit_lines(audit, "net", "bn"))[-3:] == [
        "2 modules that lost their hooks:",
        "the network itself",
        "layer1",
    ]


def test_a_model_that_torch_can_not_build_without_values_is_converted_on_the_cpu(suite):
    code, out, _ = suite("convert-report", "regnet_x_400mf", "bn")
    assert (code, out[0]) == (0, "regnet_x_400mf -> bn: 71 norms swapped, 0 left")


def test_without_timm_the_command_that_installs_it_is_named(suite, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, out, (line,) = suite("convert-report", "timm:resnet18", "bn")
    assert (code, out) == (2, [])
    assert "pip install timm" in line


def test_five_mistakes_are_five_lines(suite, tmp_path):
    (tmp_path / "bad.yaml").write_text(
        "norm: [bn]\nnorms: [bn, bgnn, {gn: {groups: 8}}]\nseeds: 3-1\ntasks: {cli_fake: {learning_rate: fast}}\n"
    )
    code, out, err = suite("run", "bad.yaml")
    assert (code, out, len(err)) == (2, [], 5)
    assert all(line.startswith("error: ") for line in err)


def test_tables_are_printed_and_written_without_torch_or_plugins(suite, tmp_path):
    for norm, seed in [("bn", 0), ("bn", 1), ("ln", 0), ("ln", 1)]:
        record = RunRecord(spec=fake_spec(norm, seed), status="ok", metrics={"top1": 0.5 + seed / 4, "test_loss": 1.0})
        write_record(tmp_path / "r", record)
    code, out, _ = suite("tables", "r")
    assert code == 0
    assert not (tmp_path / "r/tables").exists()
    assert any(line.startswith("bn") and "62.5" in line for line in out)
    code, out, _ = suite("tables", "r", "--format", "csv,latex", "--metrics", "top1")
    assert code == 0
    assert [file.name for file in (tmp_path / "r/tables").iterdir()] == ["custom"]
    suffixes = {file.suffix for file in (tmp_path / "r/tables/custom").iterdir()}
    assert suffixes == {".csv", ".tex"}
    assert "test loss" not in "\n".join(out)


def test_check_exits_with_1_and_names_the_false_fact(suite, tmp_path):
    (tmp_path / "liar.py").write_text(NORM.format(name="cli_liar", facts="", formula="return x - x.mean(0)"))
    code, out, err = suite("check", "--plugin", tmp_path / "liar.py")
    assert code == 1
    assert any("cli_liar" in line and "mixes samples in train" in line for line in err)
    (false,) = (i for i, line in enumerate(out) if line.startswith("FALSE") and "mixes samples in train" in line)
    assert out[false + 1].startswith("       usually: statistics go over axis 0")
    assert sum(line.startswith(("FALSE", "note")) for line in out) == sum("usually: " in line for line in out)


def test_check_as_json_is_one_strict_document_whatever_a_users_file_prints(suite, tmp_path):
    text = NORM.format(name="cli_liar", facts="", formula="print('noise'); return self.scale * (x - x.mean(0))")
    (tmp_path / "liar.py").write_text(f"print('loud')\n{text}")
    (tmp_path / "formula.py").write_text("print('loud')\ndef reference(x, scale): return scale * (x - x.mean(0))\n")
    code, out, err = suite(
        "check", "--plugin", "liar.py", "--option", "scale=2", "--like", "formula.py", "--json", "--device", "cpu"
    )
    assert code == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads("\n".join(out), parse_constant=refuse)
    (norm,) = document["norms"]
    assert (norm["norm"], norm["options"], norm["source"]) == ("cli_liar", {"scale": 2.0}, "mine")
    facts = {fact["fact"]: fact for fact in norm["facts"]}
    assert len(facts) == len(norm["facts"])
    assert (facts["training like reference"]["measured"], facts["evaluation like reference"]["ok"]) == ("same", True)
    assert set(facts["axes"]) == {"fact", "declared", "measured", "ok", "detail", "hint", "note"}
    assert not facts["mixes samples in train"]["ok"]
    assert "axis 0" in facts["mixes samples in train"]["hint"]
    assert document["false"] == sum(not (fact["ok"] or fact["note"]) for fact in norm["facts"])
    assert sum(line.startswith("false: cli_liar(scale=2.0): ") for line in err) == document["false"]


def test_check_compares_a_norm_with_options_with_its_formula(suite, tmp_path):
    (tmp_path / "formula.py").write_text(
        "def reference(x, weight, bias, num_groups, eps):\n"
        "    g = x.reshape(len(x), num_groups, -1)\n"
        "    y = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + eps).sqrt()\n"
        "    return y.reshape(x.shape) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)\n"
    )
    _, out, _ = suite("check", "gn", "--option", "num_groups=4", "--like", "formula.py")
    assert out[0].startswith("gn(num_groups=4): Wu & He")
    assert out[2].split()[:6] == ["ok", "training", "like", "reference", "same", "same"]
    assert "largest difference" in out[2]
    assert out[3].split()[:7] == ["ok", "evaluation", "like", "reference", "-", "not", "tried"]


def test_tables_and_help_start_without_torch(tmp_path):
    write_record(tmp_path, RunRecord(spec=fake_spec("bn", 0), status="ok", metrics={"top1": 0.5}))
    code = "import sys; from suite.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for arguments in (["--help"], ["tables", str(tmp_path), "--format", "markdown"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("list", "norms"), ["bgn", "num_groups='auto'", "2012.02782"]),
        (("list", "tasks"), ["classification: top1", "learning_rate", "= 0.1"]),
        (("list", "datasets"), ["fashion_mnist_mini", "yes", "cifar10", "no"]),
        (("data", "list"), ["fashion_mnist_mini", "yes", "cifar10", "no"]),
        (("list", "metrics"), ["top1", "higher", "test_loss", "lower"]),
    ],
)
def test_lists_say_what_there_is(suite, arguments, parts):
    code, out, err = suite(*arguments)
    assert (code, err) == (0, [])
    for part in parts:
        assert any(part in line for line in out)


# ---------------------------------------------------------------------------------------------------- progress


def fake_spec(norm, seed, **options):
    return RunSpec(
        task="cli_fake",
        norm=norm,
        norm_options={},
        task_options={"epochs": 3, "norm_batch_size": None, **options},
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="none",
        norm_label=norm,
    )


def finished(spec, seconds=10.0, status="ok"):
    metrics = {"top1": 0.25} if status == "ok" else {}
    record = RunRecord(spec=spec, status=status, metrics=metrics, seconds=seconds, reason="" if metrics else "why")
    return Event("finished", spec, record=record)


def test_names_show_the_options_that_vary_and_no_others():
    specs = [fake_spec("bn", 0, norm_batch_size=n) for n in (2, 64)] + [fake_spec("gn", 0)]
    names = Names(specs)
    assert [names.run(s) for s in specs] == [
        "cli_fake bn norm_batch_size=2 seed 0",
        "cli_fake bn norm_batch_size=64 seed 0",
        "cli_fake gn seed 0",
    ]


def test_the_remaining_time_is_estimated_from_finished_runs_and_fractions():
    specs = [fake_spec("bn", seed) for seed in range(5)]
    progress = Progress(specs, Names(specs), {"cli_fake": "top1"}, Remaining(jobs=2))
    assert progress.left() is None
    assert progress.take(Event("started", specs[0])) is None
    line = progress.take(finished(specs[0]))
    assert line == "[1/5] ok          10.0 s  cli_fake bn seed 0  top1 0.25  [20 s left]"
    progress.take(finished(specs[0]))  # told twice, counted once
    progress.take(Event("progress", specs[1], fraction=0.5))
    assert progress.left().seconds == pytest.approx((40 - 5) / 2)
    assert "diverged" in progress.take(finished(specs[1], status="diverged"))
    assert "why" in progress.take(finished(specs[2], 0.1, status="failed"))
    assert progress.left().seconds == pytest.approx(10)  # a failed run says nothing about time
    assert (progress.finished, progress.running) == (3, {})


def test_a_failed_runs_line_names_what_it_left_behind_in_two_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = fake_spec("bn", 0)
    folder = Path("runs/x") / "runs" / "cli_fake" / "bn" / spec.key
    record = RunRecord(spec=spec, status="failed", reason="why " * 1000)

    def lines(root, record=record):
        progress = Progress([spec], Names([spec]), {}, Remaining(jobs=1), root)
        return progress.take(Event("finished", spec, record=record)).split("\n")

    assert len(lines(Path("runs/x"))) == 1
    folder.mkdir(parents=True)
    for name in ("traceback.txt", "output.txt"):
        (folder / name).write_text("it")
    for root in (Path("runs/x"), tmp_path / "runs/x"):
        first, second = lines(root)
        assert len(first) < 400
        assert second == f"    see {folder}/traceback.txt and output.txt beside it"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert lines(tmp_path / "runs/x")[1].startswith(f"    see {tmp_path}/runs/x/")
    (tmp_path / folder / "traceback.txt").unlink()
    assert lines(tmp_path / "runs/x")[1].endswith(f"/{spec.key}/output.txt")
    (tmp_path / folder / "output.txt").write_text("")
    assert len(lines(tmp_path / "runs/x")) == 1, "a killed process that had printed nothing"
    ended = record.model_copy(update={"status": "diverged", "reason": "loss nan"})
    assert len(lines(tmp_path / "runs/x", ended)) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (600, "10 min"), (5340, "89 min"), (11100, "3 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("seeds", "text"), [([0], "0"), ([2, 0, 1], "0-2"), ([5, 0, 1, 7, 8], "0-1,5,7-8")])
def test_seeds_are_shown_as_a_config_names_them(seeds, text):
    assert seed_text(seeds) == text
    assert run_folder("out", fake_spec("bn", seeds[0])).name == fake_spec("bn", seeds[0]).key


# --- plugins ----------------------------------------------------------------------------------------------------------

OWN = NORM.format(name="cli_own", facts="", formula="return x * self.scale")

EDITS = """
from pathlib import Path
from tasks import register_task
from tasks.base import Options, Outcome, Setting

class Edits:
    name, version, options, metrics = "cli_edits", 1, Options, ("top1", "test_loss")
    def setting(self, options): return Setting()
    def data_checksum(self, options, data_dir): return "none"
    def why_not(self, norm, info, options): return None
    def run(self, norm, options, context):
        import torch
        for file in ("own.py", "edits.py"):
            file = context.data_dir / file
            edit = "# edited while the grid runs\\n" + (context.data_dir / "more").read_text()
            file.write_text(file.read_text() + edit)
        return Outcome({"top1": norm(1)(torch.ones(2, 1)).sum().item(), "test_loss": 1.0})
register_task(Edits())
"""


@pytest.mark.parametrize(
    ("more", "again"),
    [
        ("", "nothing left to do: 0 skipped, 6 already done"),
        ("raise SystemError", None),
        ("made_up = 1\n", "6 ok, 0 skipped, 0 already done"),
    ],
)
def test_a_plugin_that_is_edited_while_its_grid_runs_is_edited_for_the_next(suite, tmp_path, more, again):
    own, edits, grid = tmp_path / "own.py", tmp_path / "edits.py", tmp_path / "edits.yaml"
    own.write_text(OWN)
    edits.write_text(EDITS)
    (tmp_path / "more").write_text(more)
    grid.write_text("norms: [bn, cli_own]\nseeds: 0-2\ntasks: [cli_edits]\n")
    command = ("run", grid, "--plugin", own, "--plugin", edits, "--jobs", 1, "--out", "o")
    code, out, _ = suite(*command)
    assert (code, out[-1]) == (0, "6 ok, 0 skipped, 0 already done")
    assert "edited while" in own.read_text()
    records = [RunRecord.model_validate_json(f.read_bytes()) for f in record_files(tmp_path / "o")]
    versions = {r.spec.norm: set() for r in records}
    for record in records:
        versions[record.spec.norm] |= {json.dumps(record.environment["plugins"], sort_keys=True)}
        assert record.spec.task_version == record.environment["plugins"]["edits"]
        assert record.environment["plugins"].get("own", "1") == record.spec.norm_version
    assert {norm: list(map(json.loads, texts)) for norm, texts in versions.items()} == {
        "bn": [{"edits": records[0].spec.task_version}],
        "cli_own": [{"edits": records[0].spec.task_version, "own": versions_of(records, "cli_own")}],
    }
    kept = tmp_path / "o/plugins" / f"own-{versions_of(records, 'cli_own')}" / "own.py"
    assert kept.read_text() == OWN
    if again:
        code, out, _ = suite(*command)
        assert (code, out[-1]) == (0, again)


def versions_of(records, norm):
    (version,) = {record.spec.norm_version for record in records if record.spec.norm == norm}
    return version


def test_an_edited_task_repeats_its_runs(suite, tmp_path):
    mine, grid = tmp_path / "mine.py", tmp_path / "mine.yaml"
    text = TASK.replace("cli_fake", "cli_mine")
    mine.write_text(text)
    grid.write_text("norms: [bn]\nseeds: 0\ntasks: [cli_mine]\n")
    assert suite("run", grid, "--plugin", mine)[1][-1] == "1 ok, 0 skipped, 0 already done"
    mine.write_text(text.replace('"top1": 0.5', '"top1": 0.25'))
    assert suite("run", grid, "--plugin", mine)[1][-1] == "1 ok, 0 skipped, 0 already done"
    mine.write_text(text.replace('"top1": 0.5', '"top1": (0.25)  # a comment\n'))
    assert suite("run", grid, "--plugin", mine)[1][-1] == "nothing left to do: 0 skipped, 1 already done"


REACHES = """
import os, sys, torch
os.chdir("/")
os.environ["CLI_REACHES"] = "1"
sys.path.insert(0, "/cli_reaches")
torch.set_default_dtype(torch.float64)
"""


def test_a_plugin_reaches_no_run_that_does_not_ask_for_it(suite, tmp_path):
    own, looks, grid = tmp_path / "own.py", tmp_path / "looks.py", tmp_path / "grid.yaml"
    own.write_text(REACHES + OWN)
    looks.write_text(
        TASK.replace("cli_fake", "cli_looks").replace(
            '"top1": 0.5 + context.seed / 10',
            '"top1": sum([__import__("torch").ones(1).double().dtype == __import__("torch").ones(1).dtype,'
            ' "CLI_REACHES" in __import__("os").environ, "/cli_reaches" in __import__("sys").path])',
        )
    )
    grid.write_text("norms: [bn, cli_own]\nseeds: 0\ntasks: [cli_looks]\n")
    before = dict(os.environ), list(sys.path), os.getcwd()
    code, _, err = suite("run", "grid.yaml", "--plugin", "own.py", "--plugin", "looks.py", "--out", "o")
    assert (code, err) == (0, [])
    assert (dict(os.environ), list(sys.path), os.getcwd()) == before
    files = list(record_files(tmp_path / "o"))
    found = {r.spec.norm: r for r in (RunRecord.model_validate_json(file.read_bytes()) for file in files)}
    assert {norm: record.metrics["top1"] for norm, record in found.items()} == {"bn": 0, "cli_own": 3}
    assert set(found["bn"].environment["plugins"]) == {"looks"}
    assert set(found["cli_own"].environment["plugins"]) == {"looks", "own"}


def test_a_plugin_that_no_run_asks_for_is_named(suite, config, tmp_path):
    (tmp_path / "idle.py").write_text("x = 1\n")
    code, _, err = suite("run", config, "--plugin", "idle.py", "--dry-run")
    assert (code, err) == (0, ['note: plugin "idle.py" registers nothing, so no run executes it'])


@pytest.mark.parametrize(("where", "end"), [("forward", "os._exit(0)"), ("constructor", "sys.exit(0)")])
def test_a_norm_that_ends_its_process_ends_its_runs_only(suite, tmp_path, end, where):
    own = tmp_path / "own.py"
    text = "import os, sys\n" + NORM.format(name="cli_own", facts="", formula=end if where == "forward" else "return x")
    own.write_text(text if where == "forward" else text.replace("self.scale = scale", end))
    grid = tmp_path / "real.yaml"
    small = "{dataset: fashion_mnist_mini, model: resnet8, width: 4}"
    grid.write_text(f"norms: [bn, cli_own]\nseeds: 0\ntasks: {{classification: {small}}}\n")
    code, out, err = suite("run", grid, "--plugin", own, "--dry-run")
    assert (code, out[-1]) == (0, "2 runs: 0 done, 2 to do -> runs/real")
    (line,) = err
    assert line.startswith('note: norm "cli_own" in classification: ')
    assert line.endswith(" while it was tried; its runs will say why")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("command", "end", "said"),
    [
        (["run", "CONFIG"], "os._exit(0)", "the process ended with exit code 0 while it was imported"),
        (["run", "CONFIG"], "os.kill(os.getpid(), 11)", "the process was killed by SIGSEGV while it was imported"),
        (["run", "CONFIG"], "sys.exit(0)", "SystemExit: 0"),
        (["check"], "os._exit(0)", "the process ended with exit code 0 while it was imported"),
        (["list", "norms"], "os._exit(0)", "the process ended with exit code 0 while it was imported"),
        (["convert-report", "resnet18", "bn"], "sys.exit(0)", "SystemExit: 0"),
    ],
)
def test_a_plugin_that_ends_its_process_is_a_mistake(suite, config, tmp_path, command, end, said):
    (tmp_path / "ends.py").write_text(f"import os, sys\n{end}\n")
    code, out, err = suite(*(config if part == "CONFIG" else part for part in command), "--plugin", "ends.py")
    assert (code, out, err) == (2, [], [f'error: plugin "ends.py": {said}'])


def test_a_plugin_that_leaves_a_thread_does_not_keep_a_command_from_its_end(tmp_path):
    own = tmp_path / "own.py"
    start = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
    own.write_text(start + NORM.format(name="cli_own", facts="", formula="return x"))
    done = subprocess.run(
        [sys.executable, "run_suite.py", "list", "norms", "--plugin", own],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "cli_own" in done.stdout


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("sys.exit(0)", 'sys.exit(0) was called in "{}", line 15; '),
        ("os._exit(0)", "the process ended with exit code 0, by a user's file or layer; "),
        ("os.kill(os.getpid(), 11)", "the process was killed by SIGSEGV, by a user's file or layer; "),
    ],
)
@pytest.mark.parametrize("command", [("check", "cli_own"), ("convert-report", "resnet18", "cli_own")])
def test_a_layer_that_ends_its_process_does_not_end_a_command_as_if_it_were_done(suite, tmp_path, command, end, said):
    own = tmp_path / "own.py"
    own.write_text(NORM.format(name="cli_own", facts="", formula=f"import os, sys; {end}"))
    code, _, err = suite(*command, "--plugin", own)
    assert (code, err) == (2, [f"error: {said.format(own)}the command is not finished"])


def test_a_plugin_whose_text_can_not_be_kept_runs_all_the_same(suite, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "o").mkdir()
    (tmp_path / "o/plugins").write_text("a file")
    (tmp_path / "grid.yaml").write_text("norms: [cli_own]\nseeds: 0\ntasks: [cli_fake]\n")
    code, out, err = suite("run", "grid.yaml", "--plugin", "own.py", "--out", "o")
    assert (code, out[-1]) == (0, "1 ok, 0 skipped, 0 already done")
    assert [line.split(" in ")[0] for line in err] == [
        f'note: no copy of plugin "{name}"' for name in ("own.py", "task.py")
    ]
    assert all(line.endswith(("Not a directory", "File exists")) for line in err)


def test_the_stream_of_a_watched_child_refuses_bytes():
    """click would take it for a binary one, and `check --help` end in a traceback."""
    with pytest.raises(TypeError, match="must be str, not bytes"):
        _Stream("stdout", None).write(b"")


def test_a_grid_whose_only_runs_were_told_to_leave_has_nothing_to_tabulate_and_no_error(suite, config, monkeypatch):
    monkeypatch.setattr("suite.engine.execute", lambda specs, *_, **__: Counter(stopped=len(specs)))
    code, out, err = suite("run", config, "--norms", "bn", "--seeds", "0")
    assert (code, err) == (130, ["stopped: 0 of 1 runs were finished and are kept"])
    assert out[-1] == "1 stopped, 0 skipped, 0 already done"


DATA_PLUGIN = """
import numpy as np
from tasks.data import InMemory, register_dataset

def parts():
    draw = np.random.default_rng(0)
    part = lambda: (draw.integers(0, 256, (8, 1, 4, 4), dtype=np.uint8), np.arange(8) % 2)
    return {"train": part(), "val": part(), "test": part()}

register_dataset("listed_own", InMemory(parts, num_classes=2, title="t"))
"""


def test_data_list_and_prepare_take_plugins(tmp_path, capsys, monkeypatch):
    (file := tmp_path / "own_set.py").write_text(DATA_PLUGIN)
    for words, expected in (
        (["data", "list"], r"listed_own +yes +t · real · 2 classes"),
        (["list", "datasets"], r"listed_own +yes"),
        (["data", "prepare", "listed_own"], "listed_own is prepared already"),
    ):
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *words, "--plugin", str(file)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        assert re.search(expected, capsys.readouterr().out)


def test_a_papers_table_and_other_tables_with_options_lie_where_run_does_not_write(suite, tmp_path):
    for norm, seed in itertools.product(("bn", "ln"), (0, 1)):
        record = RunRecord(spec=fake_spec(norm, seed), status="ok", metrics={"top1": 0.5 + seed / 4, "test_loss": 1.0})
        write_record(tmp_path / "r", record)
    code, out, _ = suite("tables", "r", "--paper", "--rows", "ln=Ours", "--digits", "2", "--format", "latex,html")
    assert code == 0
    assert out[-1] == "4 files of tables in r/tables/paper; `run` does not touch them"
    assert "62.50" in (tmp_path / "r/tables/paper/paper.tex").read_text()
    (tmp_path / "style.yaml").write_text("rows: {ln: Mine}\nenvironment: table*\nout: elsewhere\n")
    assert suite("tables", "r", "--style", "style.yaml", "--caption", "none")[0] == 0
    text = (tmp_path / "elsewhere/paper.tex").read_text()
    assert r"\begin{table*}" in text
    assert "Mine" in text
    assert r"\caption" not in text
    for option in (("--digits", "0"), ("--reference", "ln"), ("--caption", "full")):
        assert suite("tables", "r", *option, "--format", "csv")[0] == 0
    assert sorted(file.name for file in (tmp_path / "r/tables").iterdir()) == ["custom", "paper"]
    assert suite("tables", "r", "--format", "csv")[0] == 0
    assert (tmp_path / "r/tables/cli_fake.csv").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows", "ln=Ours"), "--rows: only with --paper"),
        (("--paper", "--sweep", "rate"), "--sweep: not with --paper"),
        (("--paper", "--rows", "ln"), '--rows "ln": NORM=TEXT is needed'),
        (("--paper", "--norms", "lm"), 'did you mean "ln"?'),
        (("--paper", "--format", "latx"), 'did you mean "latex"?'),
        (("--style", "stile.yaml"), 'did you mean "style.yaml"?'),
        (("--digits", "0", "--out", "r/tables", "--format", "csv"), "`run` writes its own tables there"),
        (("--reference", "lm"), 'did you mean "ln"?'),
    ],
)
def test_a_mistake_in_the_options_of_tables_is_one_line(suite, tmp_path, options, said):
    for norm in ("bn", "ln"):
        write_record(tmp_path / "r", RunRecord(spec=fake_spec(norm, 0), status="ok", metrics={"top1": 0.5}))
    (tmp_path / "style.yaml").write_text("rows: {}\n")
    code, _, (line,) = suite("tables", "r", *options)
    assert code == 2
    assert said in line
    assert not (tmp_path / "r/tables").exists()

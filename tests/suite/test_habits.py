"""Habits of a command line: version, help, quiet and verbose, completion, colours, JSON, norms with options."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from parts.fake_task import TASK

from norms.conformance import Check
from norms.registry import norm_label, norm_names
from results.record import RunRecord, RunSpec
from results.store import write_record
from suite import as_json, cli, console, session, terminal
from suite.cli import completing
from suite.config import PlanError
from suite.environment import ROOT
from suite.forked import watched
from suite.naming import both, named_norm

ENDS = """
import os, torch
from norms.registry import register

@register(name="habit_ends", source="mine", mixes_samples=False, keeps_stats=False)
class Ends(torch.nn.Module):
    def __init__(self, num_channels, *, affine: bool = True):
        super().__init__()

    def forward(self, x):
        os._exit(0)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    """suite("run", ...) -> (exit code, stdout, stderr), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


@pytest.fixture
def fake(tmp_path):
    """The options of a run of the fake task."""
    (tmp_path / "fake.py").write_text(TASK)
    (tmp_path / "grid.yaml").write_text("norms: [bn, gn, in]\nseeds: 0\ntasks: {cli_fake: {}}\n")
    return ("grid.yaml", "--plugin", "fake.py", "--data-dir", ".")


def commands(command, path=()):
    yield path
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


def python(code, *arguments, **environment):
    """What a fresh interpreter prints, and whether torch was imported in it."""
    head = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    around = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        cwd=ROOT,
        env=around | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout, done.stderr.splitlines()[-1] == "True"


def test_version_is_one_line_that_loads_nothing():
    out, torch = python("sys.argv = ['run-suite', '--version']\nfrom suite.cli import main; main()")
    assert re.fullmatch(r"NormSuite \d+\.\d+\.\d+( \(commit [0-9a-f]+(\+changes)?\))?, Python 3\S+, torch \S+\n", out)
    assert not torch


def test_every_command_has_short_help_quiet_and_verbose(suite):
    for path in commands(cli.whole_command()):
        code, out, err = suite(*path, "-h")
        assert (code, err) == (0, ""), path
        assert out == suite(*path, "--help")[1]
        assert "-q, --quiet" in out
        assert "-v, --verbose" in out
    for group in ((), ("runs",)):
        code, out, err = suite(*group)
        assert (code, out, err.splitlines()[0]) == (2, "", f"Usage: {err.split('[')[0][7:]}[OPTIONS] COMMAND [ARGS]...")


def test_quiet_leaves_results_failures_and_errors(suite, fake):
    """`run` without it is looked at by the tests of suite.cli."""
    command = ("run", *fake, "--norms", "bn", "--out", "o")
    code, out, err = suite("-q", *command)
    assert (code, err) == (0, "")
    assert out.startswith("cli_fake\n\n"), "nothing stands before the tables"
    assert "[1/1]" not in out
    assert "files of tables" not in out
    assert out.endswith("1 ok, 0 skipped, 0 already done\n")
    idle = ("--plugin", "idle.py")
    with open("idle.py", "w") as file:
        file.write("x = 1\n")
    assert "note: " in suite(*command, *idle, "--dry-run")[2]
    assert suite(*command, *idle, "--dry-run", "-q")[2] == ""
    code, out, _ = suite(*command, "-q", "--set", "cli_fake.fails=true")
    assert code == 1
    assert "[1/1] failed" in out
    code, _, err = suite("run", "-q", *fake, "--norms", "bnn")
    assert (code, err.count("\n"), err.startswith("error: ")) == (2, 1, True)


def test_verbose_says_where_time_goes_and_shows_the_traceback_of_a_mistake(suite, fake):
    code, out, err = suite("-v", "run", *fake, "--dry-run")
    assert (code, out) == (0, suite("run", *fake, "--dry-run")[1])
    assert re.search(r"verbose: planning: \d+\.\d\d s", err)
    assert "verbose: plugin" in err
    assert all(line.startswith("verbose: ") for line in err.splitlines())
    code, _, err = suite("run", "-v", *fake, "--norms", "bnn")
    assert code == 2
    assert "Traceback" in err
    assert "\nerror: --norms" in err
    assert "Traceback" not in suite("run", *fake, "--norms", "bnn")[2], "it does not stay for the next command"
    code, _, err = suite("-q", "-v", "list", "metrics")
    assert code == 2
    assert err.startswith("error: ")
    assert "--quiet and --verbose exclude each other" in err


def test_a_layer_that_ends_its_process_is_caught_whatever_stands_before_the_command(suite, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    for options in ((), ("-q",), ("--verbose",)):
        code, _, err = suite(*options, "check", "habit_ends", "--plugin", "ends.py")
        assert code == 2
        assert "the process ended with exit code 0, by a user's file or layer; the command is not finished" in err


COMPLETES = "sys.argv = ['run-suite']\nfrom suite.cli import main; main()"


def completed(words, cwd=ROOT):
    """What bash is offered for the last of these words."""
    out, torch = python(
        f"import os; os.chdir({str(cwd)!r})\n{COMPLETES}",
        COMP_WORDS="\n".join(["run-suite", *words]),
        COMP_CWORD=str(len(words)),
        _RUN_SUITE_COMPLETE="complete_bash",
    )
    assert not torch
    return out.split()


def test_a_shell_is_offered_names_and_files_without_torch():
    assert {"bn,gn", "bn,ghost"} == set(completed(["run", "--norms", "bn,g"]))
    assert completed(["check", "--task", "few"]) == ["few_shot"]
    assert "configs/quick.yaml" in completed(["run", "configs/q"])


def test_what_is_offered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [name for name, _ in completing.norms("")] == [n for n in norm_names() if n in dict(completing.norms(""))]
    assert "bn" in dict(completing.norms(""))
    assert completing.norm("bn,") == []
    assert completing.norms("bn,bn") == [("bn,bne", dict(completing.norms("bne"))["bne"])]
    (tmp_path / "runs/mine/runs").mkdir(parents=True)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.py").touch()
    assert completing.results("") == ["runs/mine"]
    assert completing.results(f"{tmp_path}/runs/") == [f"{tmp_path}/runs/mine"]
    assert completing.configs("m") == ["mine.yaml"]
    assert "configs/quick.yaml" in completing.configs("")
    assert completing.python_files("") == ["mine.py"]
    assert completing.results("nowhere/") == []


def test_every_argument_that_is_a_folder_of_results_is_completed():
    def arguments(command, name):
        for key, each in getattr(command, "commands", {}).items():
            yield from arguments(each, f"{name} {key}")
        for param in command.params:
            if param.name in ("folder", "folders", "a", "b"):
                yield name, param

    found = [*arguments(cli.whole_command(), "")]
    assert len(found) >= 9
    assert [name for name, param in found if param._custom_shell_complete is None] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell_is_printed(shell):
    code = f"sys.argv = ['./run_suite.py', '--show-completion', {shell!r}]\nfrom suite.cli import main; main()"
    out, torch = python(code, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"=complete_{shell}" in out
    assert "run_suite.py" in out
    assert not torch


def test_completion_of_a_module_is_refused(suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/suite/__main__.py", "--show-completion"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "run-suite --show-completion" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_makes_runs_as_the_script_does(fake, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "suite", "run", *fake, "--norms", "bn"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("1 ok, 0 skipped, 0 already done\n")


@pytest.mark.parametrize(
    ("environment", "tty", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "0"}, False, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
    ],
)
def test_colours_are_for_terminals_and_for_who_asks(monkeypatch, environment, tty, expected):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert terminal.wants_colours(SimpleNamespace(isatty=lambda: tty)) is expected


CODES = re.compile(r"\x1b\[\d+m")


def words(text):
    """The words of a text without marks of the best and the second, and the dashes of rules."""
    return re.sub(r"[*_]", " ", text).replace(" .", ".").replace(" ,", ",").split()


def planted(folder):
    for norm, value in (("bn", 0.5), ("gn", 0.625), ("ln", 0.25), ("in", None)):
        spec = RunSpec(
            task="classification",
            norm=norm,
            norm_options={},
            task_options={},
            seed=0,
            norm_version="1",
            task_version="1",
            data_checksum="d",
            norm_label=norm,
        )
        ended = {"status": "failed", "reason": "it fails"} if value is None else {"metrics": {"top1": value}}
        write_record(folder, RunRecord(spec=spec, **({"status": "ok"} | ended)))


def test_colours_change_nothing_but_marks(suite, tmp_path, monkeypatch):
    planted(tmp_path / "o")
    plain = suite("tables", "o")[1]
    assert "\x1b" not in plain
    assert "*62.5*" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    painted = suite("tables", "o")[1]
    assert " \x1b[1m62.5\x1b[0m " in painted
    assert " \x1b[4m50.0\x1b[0m " in painted
    assert words(CODES.sub("", painted)) == words(plain)
    code, _, err = suite("list", "norm")
    assert code == 2
    assert err.startswith("\x1b[31merror:\x1b[0m ")


def test_words_of_a_status_have_its_colour(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(colours=True))
    looks = {"ok": 32, "diverged": 33, "failed": 31, "failed before": 31, "FALSE": 31, "note": 33}
    for word, look in looks.items():
        assert (
            terminal.codes(console.painted(f"[ 3/92] {word}  bn ok ")) == f"[ 3/92] \x1b[{look}m{word}\x1b[0m  bn ok "
        )
        assert terminal.codes(console.painted(f"{word}  bn")) == f"\x1b[{look}m{word}\x1b[0m  bn"
    assert console.painted("bn ok ") == "bn ok "
    counts = terminal.codes(console.painted_counts("4 ok, 2 failed, 1 skipped, 3 already done"))
    assert counts == "\x1b[32m4 ok\x1b[0m, \x1b[31m2 failed\x1b[0m, 1 skipped, 3 already done"


def test_the_lines_of_a_watched_child_are_painted(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.steady():
        assert watched(lambda: print(terminal.paint("ok", "green")) or 0) == (0, "")
    assert capsys.readouterr().out == "\x1b[32mok\x1b[0m\n"


def test_names_can_not_forge_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.steady():
        print(terminal.paint("ok", "green"), "\x1b[31mred\x1b[0m", "\x1b0123[31m")
    assert capsys.readouterr().out == "\x1b[32mok\x1b[0m U+001B[31mredU+001B[0m U+001B0123[31m\n"


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("list", "norms"), "norms"),
        (("list", "tasks"), "tasks"),
        (("list", "metrics"), "metrics"),
        (("list", "datasets"), "datasets"),
        (("data", "list"), "datasets"),
    ],
)
def test_lists_as_json_name_what_the_lists_name(suite, tmp_path, command, key):
    (tmp_path / "prints.py").write_text("print('hello')\n")
    code, out, err = suite(*command, "--json", "--plugin", "prints.py")
    assert (code, err) == (0, "hello\n")
    (found,) = json.loads(out).values()
    assert list(json.loads(out)) == [key]
    text = suite(*command)[1]
    assert all(re.search(rf"^{re.escape(each['name'])}\b", text, re.MULTILINE) for each in found)
    assert out == suite(*command, "--json")[1]


def test_a_dry_run_as_json_holds_every_run_and_why_others_are_skipped(suite, fake):
    command = ("run", *fake, "--norms", "bn,in", "--seeds", "0-1", "--out", "o")
    code, out, err = suite(*command, "--dry-run", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["counts"] == {"runs": 2, "done": 0, "todo": 2, "failed": 0, "skipped": 2}
    assert {(run["norm"], run["state"]) for run in plan["runs"]} == {("bn", "todo"), ("in", "skipped")}
    assert all((run["reason"] is None) == (run["state"] == "todo") for run in plan["runs"])
    keys = {run["key"] for run in plan["runs"]}
    suite(*command)
    after = json.loads(suite(*command, "--dry-run", "--json")[1])
    assert {run["key"] for run in after["runs"]} == keys
    assert [run["state"] for run in after["runs"]] == ["ok", "ok", "skipped", "skipped"]
    code, out, err = suite(*command, "--json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--json is for --dry-run" in err


def test_a_task_s_facts_as_json(suite, monkeypatch):
    def check_task(name, options, *, norm, data_dir):
        print("a task may print")
        return [Check("bn", "ends", "yes", "no", False, json.dumps(norm), "it loops")]

    monkeypatch.setattr("tasks.conformance.check_task", check_task)
    code, out, err = suite("check", "--task", "classification", "--norm", "gn(num_groups=4)", "--json")
    found = json.loads(out)
    assert (code, found["task"], found["false"]) == (1, "classification", 1)
    assert (found["facts"][0]["fact"], found["facts"][0]["measured"]) == ("ends", "no")
    assert json.loads(found["facts"][0]["detail"]) == {"gn": {"num_groups": 4}}
    assert "a task may print" in err
    assert "false: classification: ends" in err


def test_documents_hold_no_number_that_json_has_not():
    text = as_json.as_text({"a": float("nan"), "b": [float("inf"), 1.5], "c": frozenset({"y", "x"}), "d": (True, None)})
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "c": ["x", "y"], "d": [True, None]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gn", ("gn", {})),
        ("gn()", ("gn", {})),
        (" gn ( num_groups = 4 , eps=1e-3 ) ", ("gn", {"num_groups": 4, "eps": 1e-3})),
        ('a(b="4",c=auto,d=true,e=True)', ("a", {"b": "4", "c": "auto", "d": True, "e": True})),
        ("a(b=[1, [2, x]],c=None)", ("a", {"b": [1, [2, "x"]], "c": None})),
    ],
)
def test_a_norm_with_options_is_read_as_a_config_reads_values(text, expected):
    assert named_norm(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gn(4)", 'not "4"'),
        ("gn(num_groups=)", "OPTION=VALUE is needed"),
        ("gn(a=1,a=2)", "a is given twice"),
        ("gn(a=1", "NAME(OPTION=VALUE, ...) is needed"),
        ("gn(a=[1)", "is needed|is not closed|closes nothing"),
        ("gn(a=.nan)", "no finite number"),
        ("(a=1)", "NAME(OPTION=VALUE, ...) is needed"),
    ],
)
def test_what_is_no_norm_with_options_is_one_line(text, said):
    with pytest.raises(ValueError, match="|".join(re.escape(part) for part in said.split("|"))) as caught:
        named_norm(text)
    assert "\n" not in str(caught.value)


def test_an_option_in_brackets_and_beside_them_is_a_mistake():
    assert both("gn", {"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="--option a"):
        both("gn", {"a": 1}, {"a": 1})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bgn", {"num_groups": 8}),
        ("bn", {"momentum": None}),
        ("cbn", {"eps_outside": True, "invalid": "clamp"}),
        ("bn", {}),
    ],
)
def test_a_label_can_be_typed_back(name, options):
    found, given = named_norm(norm_label(name, options))
    assert (found, norm_label(found, given)) == (name, norm_label(name, options))


def planned(*norms):
    small = {"dataset": "fashion_mnist_mini", "model": "resnet8", "width": 4}
    config = {"norms": ["bn", {"gn": {"num_groups": [2, 4]}}], "seeds": 0, "tasks": {"classification": small}}
    return [run.norm_label for run in session.plan(config, norms=norms).runs]


def test_norms_with_options_select_entries_or_are_added():
    assert planned("gn(num_groups=4)", "gn( num_groups = 2, eps=1e-5 )") == ["gn(num_groups=4)", "gn(num_groups=2)"]
    assert planned("gn(num_groups=1)", "bn") == ["gn(num_groups=1)", "bn"]
    assert planned("gn") == ["gn(num_groups=2)", "gn(num_groups=4)"]
    assert planned("gn(num_groups=[1,4])") == ["gn(num_groups=1)", "gn(num_groups=4)"]
    for text, said in (
        ("gn(num_group=4)", 'did you mean "num_groups"'),
        ("gnn(num_groups=4)", 'unknown norm "gnn"'),
        ('gn(num_groups="4")', "not text"),
        ("gn(num_groups=true)", "not true or false"),
    ):
        with pytest.raises(PlanError) as caught:
            planned(text)
        (line,) = caught.value.lines
        assert line.startswith("--norms ")
        assert said in line


def test_check_and_convert_report_take_options_in_brackets(suite, monkeypatch):
    monkeypatch.setattr("norms.conformance.check_norm", lambda name, **options: [Check(name, "fact", "", "", True)])
    code, out, err = suite("check", "gn(num_groups=4)", "--json")
    assert (code, err, json.loads(out)["norms"][0]["options"]) == (0, "", {"num_groups": 4})
    code, _, err = suite("check", "gn(num_groups=4)", "--option", "num_groups=2")
    assert (code, err) == (2, "error: --option num_groups: gn(...) gives it, too\n")
    assert "num_groups" in suite("convert-report", "resnet18", "gn(num_group=4)")[2]


def test_config_check_finds_every_mistake_and_makes_nothing(suite, fake, tmp_path):
    code, out, err = suite("config", "check", *fake)
    assert (code, err) == (0, "")
    total, task, skipped = out.splitlines()
    assert (total, task) == ("grid.yaml: 2 runs, 1 skipped, budget reduced", "  cli_fake: 2 runs")
    assert skipped.startswith("    skipped 1: in: needs more positions")
    (tmp_path / "far.yaml").write_text("norms: [bn]\nseeds: 0\ntasks: {classification: {dataset: cifar10}}\n")
    (tmp_path / "bad.yaml").write_text("norms: [bnn]\nseeds: -1\ntasks: {classification: {epoch: 1}}\n")
    code, out, err = suite("config", "check", "far.yaml", "bad.yaml", "none.yaml")
    assert code == 2
    assert "far.yaml: 1 runs" in out
    assert "data prepare cifar10" in out
    lines = err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(("error: bad.yaml: ", "error: none.yaml: ")) for line in lines)
    assert not (tmp_path / "runs").exists()
    code, out, err = suite("config", "check", "far.yaml", "--set", "classification.epochs=no")
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_config_schema_is_written_and_named_for_an_editor(suite, tmp_path):
    code, out, err = suite("config", "schema", "--out", "config.schema.json")
    assert (code, err) == (0, "")
    assert out.strip().endswith("# yaml-language-server: $schema=config.schema.json")
    assert json.loads((tmp_path / "config.schema.json").read_text()) == json.loads(suite("config", "schema")[1])

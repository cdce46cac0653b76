"""A stranger who copies the files of docs/your-norm.md and docs/your-task.md and types the commands gets tables; and
the commands of all pages do something, `run` as a dry run."""

import json
import re
import sys

import pytest
from parts.doc_pages import COMMANDS, words_of

from suite import cli
from suite.environment import ROOT

FILE = re.compile(r"^`(\w+\.(?:py|yaml))`:\n\n```(?:python|yaml)\n(.*?)```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"^    python run_suite\.py (.*)$", re.MULTILINE)
TINY = {
    "my_model.py": "--norms bn --seeds 0 --set classification.norm_batch_size=64 --set classification.max_steps=2",
    "my_optimizer.py": "--norms bn --seeds 0 --set classification.norm_batch_size=64 --set classification.max_steps=2",
    "my_task.yaml": "--norms bn,ln --seeds 0 --set first_steps.max_steps=2",
    "my_norm.py": "--norms rms_sample --seeds 0 --tasks classification --set classification.max_steps=2 "
    "--set classification.model=resnet8 --set classification.width=4",
}


def page(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return dict(FILE.findall(text)), COMMAND.findall(text)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "set_allocator", lambda: None)

    def call(command):
        monkeypatch.setattr(sys, "argv", ["run_suite.py", *(command.split() if isinstance(command, str) else command)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return call


@pytest.mark.parametrize("name", ["your-norm.md", "your-task.md"])
def test_every_plugin_of_the_docs_is_short_and_has_its_command(name):
    files, commands = page(name)
    for file, text in files.items():
        assert len([line for line in text.splitlines() if line.strip()]) <= 30, file
        assert any(file in asked for asked in (*commands, *files.values())), file
    assert {part for command in commands for part in command.split() if part.endswith(".py")} <= set(files)


CASES = [(name, command) for name in ("your-norm.md", "your-task.md") for command in page(name)[1]]


@pytest.mark.parametrize(
    ("name", "command"),
    # `check` of this norm is also that of README, which is checked as a function (tests/test_project.py)
    [pytest.param(*case, marks=[pytest.mark.slow] if case[1].startswith("check ") else []) for case in CASES],
)
def test_every_command_of_the_docs_does_what_it_says(call, tmp_path, name, command):
    files, _ = page(name)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    tiny = next((more for file, more in TINY.items() if file in command), "") if command.startswith("run ") else ""
    kept = re.sub(r"--norms \S+ ", "", command) if tiny else command
    code, out, err = call(f"{kept} {tiny}")
    assert (code, err) == (0, ""), out
    if tiny:
        assert re.search(r"^\d ok, 0 skipped, 0 already done$", out, re.MULTILINE)
        assert ("first loss (nats) ↓" in out) == ("my_metric.py" in command)


OWN_FILES = ("your-norm.md", "your-task.md")
GRIDS = sorted(
    {
        line
        for name, line in COMMANDS
        if words_of(line)[:1] == ["run"] and not name.endswith(OWN_FILES) and "--plugin" not in words_of(line)
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("line", GRIDS)
def test_every_grid_of_the_pages_plans(call, line):
    """Without data that are not here, and without the device."""
    words = [word for word in words_of(line) if word not in ("--dry-run", "--device", "cuda")]
    words = ["configs/quick.yaml" if word == "CONFIG" else word for word in words]
    words = [re.sub(r"genotype=.*", "genotype=DARTS_V2", word) for word in words]
    code, out, err = call([*words, "--dry-run", "--out", "elsewhere"])
    assert code == 0, err
    assert json.loads(out)["counts"]["runs"] if "--json" in words else "to do" in out


@pytest.mark.parametrize("words", ["list norms", "list tasks", "list metrics", "list datasets", "data list"])
def test_what_there_is_is_listed(call, words):
    code, out, err = call(words)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 6

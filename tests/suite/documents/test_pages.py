"""README.md and docs/ as a reader meets them: commands that are there, links that lead somewhere, code that runs."""

import re

import pytest
import typer.main
import yaml
from parts.doc_pages import COMMANDS, PAGES, command_lines, words_of

from results.pages import blocks
from results.record import RunRecord, RunSpec
from results.store import write_record
from suite.cli.app import app
from suite.config import find_config, read_config
from suite.console import voice
from suite.documents.made import COMMAND
from suite.environment import ROOT

PENDING_BLOCKS = tuple(
    f"python run_suite.py bench {name} " for name in ("checkpoints", "data", "engine", "jobs", "scale")
)
"""Beginnings of commands whose blocks on the pages are empty until they are measured."""


@pytest.fixture(autouse=True)
def neither_quiet_nor_verbose():
    yield
    voice.quiet = voice.verbose = False


NOT_COMMANDS = {"python run_suite.py": "the program itself, in a sentence about its names"}
"""What looks like a command and is not parsed -> why. All others are parsed; tests/suite/test_docs.py runs those of the
pages about plugins, and those of all pages that run in seconds (`run` as a dry run)."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

USAGE = tuple(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
"""What the parser raises for what it does not know."""


MADE_BY = sorted({(name, block.command) for name, text in PAGES.items() for block in blocks(text)})


def parse(words):
    """The names of the commands, and what their last one was given, without calling anything.

    Raises:
        Exception: of the parser, for an unknown command or option, or a value of a wrong kind.
    """
    voice.quiet = voice.verbose = False  # the parser sets them, as of a process of its own
    command, context, names = typer.main.get_command(app), None, []
    while True:
        context = command.make_context(names[-1] if names else "run_suite.py", list(words), parent=context)
        if not hasattr(command, "commands"):
            return names, context.params
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        name, command, words = command.resolve_command(context, rest)
        names.append(name)


def is_taken(words):
    try:
        parse(words)
    except typer.Exit:  # --version has done its work
        return True
    except (typer.BadParameter, *USAGE):
        return False
    return True


def test_every_page_has_commands_and_none_is_overlooked():
    """What looks like a command on a page is in the list above, but for the texts of --help."""
    for name, text in PAGES.items():
        shown = text.count("python run_suite.py") - text.count("<!-- made by: python run_suite.py")
        found = sum(line.count("python run_suite.py") for line in command_lines(text))
        fenced = "".join(body for kind, body in FENCE.findall(text) if not kind)
        assert shown - found <= fenced.count("python run_suite.py"), name
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(("page", "line"), [*COMMANDS, *MADE_BY])
def test_every_command_of_the_pages_is_one_that_the_program_takes(page, line):
    words = words_of(line)
    if line in NOT_COMMANDS:
        return
    if words[0] == "--version":
        assert is_taken(words)
        return
    names, given = parse(words)
    if names[0] in ("run", "debug") and "CONFIG" not in words:
        assert str(given["config"]).startswith(("configs/", "my_"))
        if str(given["config"]).startswith("configs/"):
            config = read_config(find_config(given["config"]))
            assert set((given.get("tasks") or "").split(",")) - {""} <= set(config["tasks"])
    for option in given.get("settings") or ():
        assert re.fullmatch(r"[a-z_]+\.[a-z_]+=.+", option)
    if given.get("plugin"):
        assert all(str(file).endswith(".py") for file in given["plugin"])


def test_the_targets_of_make_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for text in PAGES.values() for target in re.findall(r"(?:`|^    )make (\w+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named
    assert [target for target in named if f"\n{target}:" not in makefile] == []


# --- links -----------------------------------------------------------------------------------------------------------


def prose(text):
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in links(text):
        assert "://" not in link, link
        path, _, anchor = link.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.is_relative_to(ROOT), link
        assert file.exists(), link
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), link


def test_every_page_is_reached_from_readme():
    seen, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or page not in PAGES:
            continue
        seen.add(page)
        ahead += [
            str(((ROOT / page).parent / link.partition("#")[0]).resolve().relative_to(ROOT))
            for link in links(PAGES[page])
            if not link.startswith("#")
        ]
    assert set(PAGES) - seen == set()


def test_a_broken_link_and_a_missing_heading_are_seen():
    assert anchors("# A `b`: c, d\n\n```\n# no\n```\n## E") == {"a-b-c-d", "e"}
    assert links("[a](b.md#c) `[d](e)`\n```\n[f](g)\n```\n![h\ni](j.png)") == ["b.md#c", "j.png"]


# --- what is on the pages --------------------------------------------------------------------------------------------


def test_readme_is_short_and_a_norm_of_one_s_own_comes_first():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:60])
    for part in ("make demo", "make test", "```python", "--plugin my_norm.py"):
        assert part in first
    assert PAGES["README.md"].count("](docs/pictures/") == 2


def test_the_norm_of_readme_is_that_of_its_page():
    readme, page = (
        next(body for kind, body in FENCE.findall(PAGES[name]) if kind == "python" and "@register(" in body)
        for name in ("README.md", "docs/your-norm.md")
    )
    assert readme == page


def test_nothing_measured_is_typed():
    """Numbers with their spread stand in blocks that a command made, and nowhere else; so do no places of a machine."""
    for name, text in PAGES.items():
        lines = text.split("\n")
        for block in reversed(blocks(text)):
            assert block.content or block.command.startswith(PENDING_BLOCKS), (name, block.command)
            del lines[block.first : block.last + 1]
        assert re.findall(r"\d ± \d.*", "\n".join(lines)) == [], name
        assert re.findall(r"(?:/home|/work|/Users|/tmp)/\S+", text) == [], name


def test_every_page_of_findings_is_made_from_a_folder():
    for name, text in PAGES.items():
        if name.startswith("docs/findings/"):
            made = [block.command for block in blocks(text)]
            assert made, name
            for command in made:
                assert words_of(command)[0] == "tables"
                assert f"--page {name}" in command
            for fact in ("Made by `python run_suite.py run", "Commit: ", "Machine: ", "Finished: ", "Runs: "):
                assert fact in text, name


def test_blocks_of_the_pages_name_commands_that_are_there():
    for _, command in MADE_BY:
        assert command.startswith((COMMAND, "python run_suite.py tables ", "python run_suite.py bench "))


PYTHON = [
    pytest.param(name, body, id=f"{name}:{number}")
    for name, text in PAGES.items()
    for number, (kind, body) in enumerate(FENCE.findall(text))
    if kind == "python"
]
NEEDS = {
    "suite.run(": "makes runs (tests/suite/test_session.py)",
    "load_network": "needs a run's weights (tests/tasks/test_weights.py)",
    "register": "a file of a plugin, run by tests/suite/test_docs.py and tests/test_project.py",
    "add_metric": "likewise",
}
"""What a block of Python has in it that is not run here -> why."""


def plant(folder):
    for norm in ("bn", "gn"):
        for seed in range(2):
            options = {"norm_batch_size": 2 if norm == "bn" else None}
            spec = RunSpec(
                task="classification",
                norm=norm,
                norm_options={},
                task_options=options,
                seed=seed,
                norm_version="1",
                task_version="1",
                data_checksum="d",
                norm_label=norm,
            )
            history = [{"epoch": 1.0, "train_loss": 1.0}]
            write_record(folder, RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}, history=history))


@pytest.mark.parametrize(("page", "body"), PYTHON)
def test_every_block_of_python_compiles_and_runs_where_it_is_fast(page, body, tmp_path, monkeypatch, capsys):
    code = compile(body, page, "exec")
    if any(part in body for part in NEEDS):
        return
    plant(tmp_path / "runs" / "quick")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "page"})


def test_every_block_of_yaml_is_read():
    found = [body for text in PAGES.values() for kind, body in FENCE.findall(text) if kind == "yaml"]
    assert len(found) > 3
    assert all(isinstance(yaml.safe_load(body), dict) for body in found)

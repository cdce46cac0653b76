"""results.folders: the runs of a folder listed, chosen and removed; results.asked: what made it."""

import json
import os

import pytest
from parts.folders import content, plant, record, spec

import results
from results.asked import MOST_PLANS, AskedNotes, asked, without_secrets
from results.folders import choose, list_runs, remove
from results.record import RECORD
from results.store import ASKED, asked_notes, read_asked, run_folder, run_lock, write_asked


@pytest.fixture
def out(tmp_path):
    runs = [record(spec(norm, seed), top1=0.25 + seed / 4) for norm in ("bn", "gn") for seed in (0, 1)]
    return plant(tmp_path / "out", *runs, record(spec("in"), "failed"), record(spec("bn", 0, learning_rate=0.01)))


def by(runs, *names):
    return [tuple(getattr(run, name) for name in names) for run in runs]


def test_a_list_says_of_each_run_what_it_is_and_sorts_by_setting(out):
    runs, lines = list_runs(out)
    assert lines == []
    assert by(runs, "norm", "setting", "seed", "status", "metric", "value") == [
        ("bn", "learning_rate=0.01", 0, "ok", "top1", 0.5),
        ("bn", "learning_rate=0.1", 0, "ok", "top1", 0.25),
        ("bn", "learning_rate=0.1", 1, "ok", "top1", 0.5),
        ("gn", "learning_rate=0.1", 0, "ok", "top1", 0.25),
        ("gn", "learning_rate=0.1", 1, "ok", "top1", 0.5),
        ("in", "learning_rate=0.1", 0, "failed", "", None),
    ]
    assert all(run.size >= (run.folder / RECORD).stat().st_size for run in runs)
    json.dumps([run.plain() for run in runs], allow_nan=False)


def test_damaged_records_runs_without_one_and_runs_that_are_made_are_in_the_list(out):
    (run_folder(out, spec("gn")) / RECORD).write_text("{")
    run_folder(out, spec("ln")).mkdir(parents=True)
    with run_lock(out, spec("pn")):
        runs, _ = list_runs(out)
    states = dict(by(runs, "norm", "status"))
    assert states["pn"] == "busy"
    assert states["ln"] == "unfinished"
    (damaged,) = choose(runs, statuses=["damaged"])
    assert damaged.key == spec("gn").key
    assert "not a run record" in damaged.reason
    assert dict(by(list_runs(out)[0], "norm", "status"))["pn"] == "unfinished"


def test_what_to_look_for_is_chosen_by_names_seeds_and_beginnings_of_keys(out):
    runs, _ = list_runs(out)
    assert len(choose(runs, norms=["bn"], seeds=[0])) == 2
    (run,) = choose(runs, keys=[spec("gn").key[:8]])
    assert (run.norm, run.seed) == ("gn", 0)
    with pytest.raises(ValueError, match="too short; give its first 6 characters"):
        choose(runs, keys=[spec("gn").key[:5]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tasks": ["mino"]}, 'task "mino": no run has it; there are: mine; did you mean "mine"?'),
        ({"norms": ["gm\x1b[31m"]}, 'norm "gmU+001B[31m": no run has it'),
        ({"statuses": ["faild"]}, 'did you mean "failed"?'),
        ({"seeds": [7]}, 'seed "7": no run has it; there are: 0, 1'),
        ({"keys": ["abc"]}, 'key "abc": no run has it'),
    ],
)
def test_a_name_that_no_run_has_is_one_line_with_the_nearest(out, given, message):
    with pytest.raises(ValueError, match="no run has it") as caught:
        choose(list_runs(out)[0], **given)
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_removed_runs_are_gone_with_their_files_and_nothing_else_is(out):
    before = content(out)
    gone = choose(list_runs(out)[0], norms=["gn"])
    assert [remove(out, run) for run in gone] == ["", ""]
    after = content(out)
    assert {*before} - {*after} == {f"runs/mine/gn/{run.key}/{RECORD}" for run in gone}
    assert after.items() <= before.items()
    assert not any(run.folder.exists() for run in gone)


def test_a_run_that_is_made_stays(out):
    (run,) = choose(list_runs(out)[0], norms=["gn"], seeds=[0])
    with run_lock(out, spec("gn")):
        assert remove(out, run) == "another process makes it now"
    assert (run.folder / RECORD).is_file()


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_nothing_is_removed_through_a_link(out, tmp_path, level):
    (run,) = choose(list_runs(out)[0], norms=["gn"], seeds=[0])
    link = [out / "runs", run.folder.parent.parent, run.folder.parent, run.folder][level]
    moved = tmp_path / "elsewhere"
    link.rename(moved)
    link.symlink_to(moved)
    there = content(moved)
    (run,) = choose(list_runs(out)[0], norms=["gn"], seeds=[0])
    assert "is a link" in remove(out, run)
    assert content(moved) == there


def test_a_link_inside_a_run_is_removed_and_its_target_stays(out, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years")
    (run,) = choose(list_runs(out)[0], norms=["gn"], seeds=[0])
    (run.folder / "link").symlink_to(tmp_path / "mine")
    (run.folder / RECORD).unlink()
    (run.folder / RECORD).symlink_to(tmp_path / "mine" / "thesis")
    assert remove(out, run) == ""
    assert (tmp_path / "mine" / "thesis").read_text() == "years"


# --- asked.json ----------------------------------------------------------------------------------------------------


def test_plans_are_kept_newest_last_and_equal_neighbours_are_one(out):
    for time, command in ((1, ["run"]), (2, ["run"]), (3, ["run", "b"]), (4, ["run"])):
        assert write_asked(out, asked(f"2026-01-0{time}", command, "c.yaml", "norms: [bn]\n", "1", "c")) == []
    assert [(plan["time"][-1], plan["command"]) for plan in read_asked(out)] == [
        ("2", ["run"]),
        ("3", ["run", "b"]),
        ("4", ["run"]),
    ]
    assert results.load(out).attrs["asked"] == read_asked(out)
    assert json.loads((out / ASKED).read_text())["schema"] == 1


def test_only_the_last_plans_are_kept():
    notes = AskedNotes()
    for number in range(MOST_PLANS + 5):
        notes = notes.followed_by(asked(f"{number:04}", ["run", str(number)], text="x" * 9))
    assert len(notes.plans) == MOST_PLANS
    assert notes.plans[-1].command == ("run", str(MOST_PLANS + 4))
    assert len(asked("2026", text="x" * 2_000_000).plans[0].text) == 1_000_000
    assert AskedNotes.model_validate_json(notes.model_dump_json(by_alias=True)) == notes


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 2}', '{"plans": 3}', '{"plans": [{"time": []}]}'])
def test_a_damaged_note_is_one_line_and_set_aside_by_the_next_plan(out, text):
    (out / ASKED).write_text(text)
    assert read_asked(out) == []
    df = results.load(out)
    assert "asked" not in df.attrs
    assert df.attrs["unread"].startswith(f"{out / ASKED}: ")
    (note,) = write_asked(out, asked("2026", ["run"]))
    assert note.endswith(f"; set aside as {ASKED}.damaged-1")
    assert (out / f"{ASKED}.damaged-1").read_text() == text
    assert asked_notes(out)[1] == ""
    assert len(read_asked(out)) == 1


def test_secrets_are_no_part_of_a_command():
    words = [
        "run",
        "--token",
        "abc",
        "--api-key=abc",
        "--set",
        "a.password=abc",
        "https://me:abc@host/x",
        "--jobs",
        "2",
    ]
    kept = without_secrets(words)
    assert "abc" not in " ".join(kept)
    assert kept == [
        "run",
        "--token",
        "***",
        "--api-key=***",
        "--set",
        "a.password=***",
        "https://***@host/x",
        *words[-2:],
    ]
    assert without_secrets(["run", "c.yaml", "--seeds", "0-4"]) == ["run", "c.yaml", "--seeds", "0-4"]


def test_a_folder_that_is_none_is_said_with_what_may_have_been_meant(out):
    with pytest.raises(ValueError, match="did you mean"):
        list_runs(out.with_name("oot"))
    assert os.listdir(out.parent) == ["out"]

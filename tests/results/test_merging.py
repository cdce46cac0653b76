"""results.merging: folders made into one, run by run, whatever interrupts it."""

import itertools
import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.folders import content, plant, record, spec

import results
from results.asked import asked
from results.record import RECORD
from results.store import read_asked, read_record, read_versions, record_files, run_folder, run_lock, write_asked


def top1(out, of=None):
    return read_record(run_folder(out, of or spec()) / RECORD).metrics.get("top1")


def test_runs_files_and_notes_of_all_folders_are_in_the_new_one(tmp_path):
    a = plant(tmp_path / "a", record(spec(), files=["curve.svg"]), record(spec(seed=1)))
    b = plant(tmp_path / "b", record(spec("gn")), record(spec(seed=1)))
    write_asked(a, asked("2026-01-01", ["run", "a"]))
    write_asked(b, asked("2026-01-02", ["run", "b"]))
    before = content(a), content(b)
    merged = results.merge([a, b], tmp_path / "c")
    assert (merged.copied, merged.same, merged.there, merged.differing) == (3, 1, 0, [])
    assert (content(a), content(b)) == before
    new = content(tmp_path / "c")
    runs = {k: v for side in before for k, v in side.items() if k.startswith("runs/")}
    assert {k: v for k, v in new.items() if k.startswith("runs/")} == runs
    assert [plan["command"][-1] for plan in read_asked(tmp_path / "c")] == ["a", "b"]
    assert results.load(tmp_path / "c")["status"].tolist() == ["ok"] * 3


@pytest.mark.parametrize(
    ("statuses", "kept"),
    [
        (["failed", "ok"], "ok"),
        (["diverged", "failed"], "diverged"),
        (["ok", "diverged"], "ok"),
        (["skipped", "failed"], "failed"),
    ],
)
def test_a_finished_record_is_taken_before_others_whatever_their_age(tmp_path, statuses, kept):
    folders = [plant(tmp_path / s, record(spec(), s, at=1 if s == kept else 9)) for s in statuses]
    merged = results.merge(folders, tmp_path / "c")
    assert read_record(run_folder(tmp_path / "c", spec()) / RECORD).status == kept
    assert len(merged.differing) == (set(statuses) == {"ok", "diverged"})


def test_of_different_numbers_the_newest_are_kept_and_how_many_differ_is_said(tmp_path):
    old = plant(tmp_path / "old", record(spec(), at=1, top1=0.25, files=["a.txt"]))
    new = plant(tmp_path / "new", record(spec(), at=2, top1=0.75, step_seconds=9.0))
    merged = results.merge([old, new], tmp_path / "c")
    (line,) = merged.differing
    assert "top1 0.75 and 0.25" in line
    assert f"{new} is kept" in line
    assert top1(tmp_path / "c") == 0.75
    merged = results.merge([old, new], tmp_path / "c", prefer=old)
    assert (merged.copied, merged.replaced) == (1, 1)
    assert top1(tmp_path / "c") == 0.25
    assert (run_folder(tmp_path / "c", spec()) / "a.txt").read_text() == "a.txt of old"
    results.merge([new], tmp_path / "c")  # what is there is one more folder: the newer one wins, its files with it
    assert top1(tmp_path / "c") == 0.75
    assert not (run_folder(tmp_path / "c", spec()) / "a.txt").exists()


def test_times_and_memory_make_no_difference_of_numbers(tmp_path):
    folders = [plant(tmp_path / n, record(spec(), at=i, step_seconds=1.0 + i)) for i, n in enumerate("ab")]
    merged = results.merge(folders, tmp_path / "c")
    assert (merged.same, merged.differing) == (1, [])


def test_versions_planned_later_are_shown_and_the_others_are_named(tmp_path):
    a, b = plant(tmp_path / "a", record(spec(version="1"))), plant(tmp_path / "b", record(spec(version="2")))
    write_asked(a, asked("2026-01-02", ["run"]))
    write_asked(b, asked("2026-01-01", ["run"]))
    merged = results.merge([a, b], tmp_path / "c")
    (line,) = merged.versions
    assert line.startswith("norm bn: planned as 2")
    assert line.endswith("tables show 1, planned last")
    df = results.load(tmp_path / "c")
    assert df["norm_version"].tolist() == ["1"]
    assert df.attrs["stale"] == {"mine / bn": 1}
    results.merge([a, b], tmp_path / "d", prefer=b)
    assert read_versions(tmp_path / "d")["norm"] == {"bn": "2"}


def test_runs_that_are_made_or_damaged_are_left_out_and_named(tmp_path):
    a = plant(tmp_path / "a", record(spec()), record(spec("gn")), record(spec("ln")))
    (run_folder(a, spec("gn")) / RECORD).write_text("{")
    run_folder(a, spec("pn")).mkdir(parents=True)
    with run_lock(a, spec("ln")):
        merged = results.merge([a], tmp_path / "c")
    assert [p.parent.name for p in merged.busy] == ["ln"]
    assert [p.parent.name for p in merged.unfinished] == ["pn"]
    (line,) = merged.damaged
    assert "not a run record" in line
    assert [f.parts[-3] for f in record_files(tmp_path / "c")] == ["bn"]
    merged = results.merge([a], tmp_path / "c")  # it goes on
    assert (merged.copied, merged.there) == (1, 1)


def test_a_run_that_the_new_folder_makes_is_left_to_it(tmp_path):
    a = plant(tmp_path / "a", record(spec()))
    with run_lock(tmp_path / "c", spec()):
        assert len(results.merge([a], tmp_path / "c").busy) == 1
    assert list(record_files(tmp_path / "c")) == []


def test_a_damaged_record_of_the_new_folder_is_set_aside(tmp_path):
    a, c = plant(tmp_path / "a", record(spec())), plant(tmp_path / "c", record(spec()))
    file = run_folder(c, spec()) / RECORD
    file.write_text("{")
    assert results.merge([a], c).copied == 1
    assert file.with_name(f"{RECORD}.damaged-1").read_text() == "{"
    assert top1(c) == 0.5


def test_a_link_beside_a_record_is_not_followed(tmp_path):
    a = plant(tmp_path / "a", record(spec()))
    (tmp_path / "secret").write_text("top secret")
    (run_folder(a, spec()) / "notes.txt").symlink_to(tmp_path / "secret")
    (line,) = results.merge([a], tmp_path / "c").damaged
    assert "notes.txt: is a link or no file" in line
    assert "top secret" not in str(content(tmp_path / "c"))


@pytest.mark.parametrize(
    ("sources", "out", "message"),
    [
        (["a", "b"], "a", "is one of the folders to merge"),
        (["a", "a"], "c", "is given twice"),
        (["a", "b"], "a/runs/c", "lies in"),
        (["a", "b"], ".", "is around"),
        (["a", "bb"], "c", 'is not a folder; the --out folder of a run is needed; did you mean "'),
        (["a"], "file", "is a file"),
        ([], "c", "no folder to merge"),
    ],
)
def test_a_merge_that_would_harm_a_folder_is_refused_and_nothing_is_made(tmp_path, sources, out, message):
    plant(tmp_path / "a", record(spec()))
    plant(tmp_path / "b", record(spec("gn")))
    (tmp_path / "file").touch()
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"folder|twice|file") as caught:
        results.merge([tmp_path / s for s in sources], tmp_path / out)
    assert message in str(caught.value)
    assert content(tmp_path) == before
    assert not (tmp_path / "c").exists()


def test_prefer_names_one_of_the_folders(tmp_path):
    a = plant(tmp_path / "a", record(spec()))
    with pytest.raises(ValueError, match="is none of"):
        results.merge([a], tmp_path / "c", prefer=tmp_path / "b")


RUNS = st.lists(
    st.tuples(
        st.sampled_from(["bn", "gn"]),
        st.integers(0, 1),
        st.sampled_from(["ok", "diverged", "failed", "skipped"]),
        st.integers(0, 3),
        st.sampled_from([0.25, 0.5]),
    ),
    max_size=4,
    unique_by=lambda run: run[:2],
)


@settings(max_examples=8, deadline=None)
@given(st.tuples(RUNS, RUNS))
def test_a_merge_twice_is_a_merge_once_and_the_order_of_folders_does_not_matter(sides):
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        folders = []
        for letter, runs in zip("ab", sides, strict=True):
            (top / letter / "runs").mkdir(parents=True)
            made = [record(spec(n, s), status, at=at, top1=v) for n, s, status, at, v in runs]
            folders.append(plant(top / letter, *made, planned=False))
        results.merge(folders, top / "c")
        once = content(top / "c")
        merged = results.merge(folders, top / "c")
        assert merged.copied == 0
        assert content(top / "c") == once
        keys = {(n, s) for runs in sides for n, s, *_ in runs}
        assert len(list(record_files(top / "c"))) == len(keys)
        results.merge(folders[::-1], top / "d")
        said = [[read_record(f).status for f in record_files(top / x)] for x in "cd"]
        assert said[0] == said[1]


def merge_and_die(a, c, after):
    """A merge in a child that is killed in the place of its (after + 1)th renaming; whether that came."""
    child = os.fork()
    if child == 0:
        real, left = os.replace, itertools.count(after, -1)
        os.replace = lambda *names: real(*names) if next(left) > 0 else os.kill(os.getpid(), signal.SIGKILL)
        try:
            results.merge([a], c)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_merge_that_is_killed_leaves_no_half_run_and_the_next_one_finishes_it(tmp_path):
    a = plant(tmp_path / "a", *(record(spec(seed=s), at=5, files=["one.txt", "two.txt"]) for s in range(2)))
    for step in itertools.count():
        c = plant(tmp_path / f"c{step}", record(spec(seed=0), at=1, top1=0.25, files=["one.txt"]))
        killed = merge_and_die(a, c, step)
        for file in record_files(c):
            found = read_record(file)
            whose = "a" if found.metrics["top1"] == 0.5 else c.name
            assert [(file.parent / n).read_text() for n in found.artifacts] == [
                f"{n} of {whose}" for n in found.artifacts
            ]
        if not killed:
            break
        results.merge([a], c)
        runs = [{k: v for k, v in content(x).items() if k.startswith("runs/")} for x in (a, c)]
        assert runs[0] == runs[1]
    assert step > 8  # notes, staged files, files that take their place, records

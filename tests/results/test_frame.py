"""Run files -> frame: one tidy row per run, nothing mixed, nothing lost without a word, nothing moved on the disk."""

import datetime
import os

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import results
from results.frame import from_records, metric_columns
from results.record import RunRecord, RunSpec
from results.rows import distinct, natural
from results.store import RECORD, VERSIONS, record_files, run_folder, write_record, write_versions


def run(
    norm="bn",
    seed=0,
    status="ok",
    top1=0.5,
    norm_options=None,
    task="classification",
    label="",
    versions=("1", "1", "data"),
    environment=None,
    evidence=None,
    history=(),
    **options,
):
    return RunRecord(
        spec=RunSpec(
            task=task,
            norm=norm,
            norm_options=norm_options or {},
            task_options={"dataset": "made_up", "norm_batch_size": 2, **options},
            seed=seed,
            norm_version=versions[0],
            task_version=versions[1],
            data_checksum=versions[2],
            norm_label=label,
        ),
        status=status,
        reason="" if status == "ok" else "why",
        metrics={"top1": top1} if status == "ok" else {},
        history=list(history),
        seconds=2.5,
        environment=environment or {},
        evidence=evidence or {},
    )


def test_a_frame_counts_the_parts_of_a_run_and_says_what_they_differ_in(tmp_path):
    parts = [{"torch": "2", "threads": 1, "seconds": 3.0}, {"torch": "3", "threads": 1}]
    for seed, around in enumerate(({"parts": parts}, {"parts": parts[:1] * 3}, {}, {"parts": "damaged"})):
        write_record(tmp_path, run(seed=seed, environment=around))
    df = results.load(tmp_path)
    assert df["environment.parts"].tolist() == [2, 3, None, None]
    assert df["environment.parts_differ"].tolist() == ["torch", "", None, None]


def test_a_row_holds_everything_that_a_record_says(tmp_path):
    entry = run(
        norm="bgn",
        norm_options={"num_groups": 8, "eps": 1e-5},
        label="bgn(num_groups=8)",
        channels=[16, 32],
        environment={"commit": "c0ffee", "torch": "2.14.1", "device": "cpu", "threads": 1, "cpu": "fast"}
        | {"finished": "2026-01-02T03:04:05+00:00"},
        evidence={
            "data": "real",
            "budget": "reduced",
            "selection": "last epoch",
            "equals": None,
            "constant_output": False,
        },
    )
    file = write_record(tmp_path, entry)
    df = results.load(tmp_path)
    assert len(df) == 1
    row = df.iloc[0].to_dict()
    expected = {
        "task": "classification",
        "norm": "bgn",
        "norm_label": "bgn(num_groups=8)",
        "row": "bgn(eps=1e-05, num_groups=8)",
        "seed": 0,
        "status": "ok",
        "reason": "",
        "key": entry.spec.key,
        "option.dataset": "made_up",
        "option.norm_batch_size": 2,
        "option.channels": "[16, 32]",
        "norm.num_groups": 8,
        "norm.eps": 1e-5,
        "top1": 0.5,
        "seconds": 2.5,
        "data": "real",
        "budget": "reduced",
        "selection": "last epoch",
        "equals": "",
        "evidence.constant_output": False,
        "commit": "c0ffee",
        "torch": "2.14.1",
        "device": "cpu",
        "threads": 1,
        "environment.cpu": "fast",
        "norm_version": "1",
        "task_version": "1",
        "data_checksum": "data",
        "repeats": False,
        "stale": False,
        "file": str(file),
    }
    assert {name: row[name] for name in expected} == expected
    assert row["finished"] == pd.Timestamp("2026-01-02T03:04:05")
    assert metric_columns(df) == ["top1"]
    assert df.attrs == {
        "folder": str(tmp_path),
        "damaged": [],
        "doubles": [],
        "stale": {},
        "other_data": {},
        "not_asked": {},
        "records": 1,
    }


def test_only_runs_that_ended_well_have_metrics_and_integers_stay_integers():
    df = from_records(
        [run(), run(norm="gn", norm_batch_size=None), run(norm="ln", status="diverged"), run(task="few_shot", shots=5)]
    )
    assert df["top1"].isna().tolist() == (df["status"] != "ok").tolist()
    assert df["top1"].dtype == "float64"
    by_norm = df[df["task"] == "classification"].set_index("norm")
    assert by_norm.loc["bn", "option.norm_batch_size"] == 2
    assert isinstance(by_norm.loc["bn", "option.norm_batch_size"], int)
    assert by_norm.loc["gn", "option.norm_batch_size"] is None
    assert by_norm["repeats"].to_dict() == {"bn": False, "gn": True, "ln": False}
    assert by_norm["option.shots"].tolist() == [None] * 3


def test_rows_come_in_one_order_whatever_the_order_of_records():
    entries = [run(norm=n, seed=s, norm_batch_size=b) for n in ("bn", "gn") for s in (0, 10, 2) for b in (64, 2)]
    one, other = from_records(entries), from_records(entries[::-1])
    columns = ["norm", "option.norm_batch_size", "seed"]
    assert one[columns].equals(other[columns])
    assert one[columns].values.tolist() == [[n, b, s] for n in ("bn", "gn") for b in (2, 64) for s in (0, 2, 10)]


def test_what_a_setting_fills_in_makes_no_other_row_unless_a_person_gave_it():
    df = from_records(
        [
            run(norm="mine", norm_options={"k": 1, "norm_batch_size": b}, norm_batch_size=b, label="mine")
            for b in (2, 64)
        ]
        + [run(norm="mine", norm_options={"k": 1, "norm_batch_size": 7}, label="mine(norm_batch_size=7)")]
    )
    assert sorted(set(df["row"])) == ["mine(k=1)", "mine(k=1, norm_batch_size=7)"]


@pytest.mark.parametrize("stored", ["", "[", '{"spec": 1}'])
def test_damaged_records_are_named_and_stay_where_they_are(tmp_path, stored):
    write_record(tmp_path, run())
    bad = write_record(tmp_path, run(seed=1))
    bad.write_text(stored)
    df = results.load(tmp_path)
    assert df["seed"].tolist() == [0]
    assert [line.partition(": ")[0] for line in df.attrs["damaged"]] == [str(bad)]
    assert bad.read_text() == stored
    with pytest.raises(ValueError, match="not a run record"):
        results.load(tmp_path, strict=True)


def test_a_record_in_another_runs_folder_counts_as_damaged(tmp_path):
    file = write_record(tmp_path, run())
    wrong = run_folder(tmp_path, run(seed=9).spec)
    wrong.mkdir(parents=True)
    (wrong / RECORD).write_bytes(file.read_bytes())
    df = results.load(tmp_path)
    assert len(df) == 1
    assert "holds the record of another run" in df.attrs["damaged"][0]


@pytest.mark.parametrize("copied", ["norm/KEY", "norm/KEY copy", "other/KEY"])
def test_a_copied_folder_is_a_double_that_counts_once_and_is_named(tmp_path, copied):
    file = write_record(tmp_path, run())
    home = file.parent.parent.parent / copied.replace("norm", file.parts[-3]).replace("KEY", file.parts[-2])
    home.mkdir(parents=True, exist_ok=True)
    (home / RECORD).write_bytes(file.read_bytes())
    df = results.load(tmp_path)
    assert len(df) == 1
    doubled = copied != "norm/KEY"
    assert [line.partition(": ")[0] for line in df.attrs["doubles"]] == [str(home / RECORD)] * doubled
    assert df.attrs["damaged"] == []
    (home / RECORD).unlink() if doubled else None
    file.rename(home / RECORD)  # without the one in its place it is a record in a wrong place, and none takes part
    assert len(results.load(tmp_path)) == (not doubled)


def test_of_several_records_of_one_run_in_memory_the_newest_counts():
    older, newer = (run(environment={"finished": f"2026-01-0{day}T00:00:00+00:00"}, top1=day / 10) for day in (1, 2))
    for records in ([older, newer], [newer, older]):
        df = from_records([*records, run(seed=1)])
        assert sorted(df["top1"]) == sorted([0.2, run(seed=1).metrics["top1"]])
        assert len(df.attrs["doubles"]) == 1


def test_captions_say_how_many_doubles_are_left_out():
    df = from_records([run(), run(), run(), run(seed=1)])
    text = results.tables_text(results.render_all(df))
    assert "Left out, doubles: 2 more records of runs that have one." in " ".join(text.split())


@pytest.mark.parametrize("name", ["seed", "status.gain"])
def test_a_metric_with_a_columns_name_is_reported(tmp_path, name):
    entry = run().model_copy(update={"metrics": {name: 1.0}})
    write_record(tmp_path, entry)
    assert f"a metric can not be named {name}" in results.load(tmp_path).attrs["damaged"][0]


def test_a_foreign_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        results.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no runs; give the --out folder"):
        results.load(tmp_path)
    write_record(tmp_path, run())
    with pytest.raises(ValueError, match=f'holds no runs; did you mean "{tmp_path}"'):
        results.load(tmp_path / "runs" / "classification")


def test_folders_of_results_that_may_be_meant_are_named(tmp_path, monkeypatch):
    """`tables runs`, where runs/ is the default folder of every run's --out and no folder of results itself."""
    monkeypatch.chdir(tmp_path)
    for name in ("quick", "standard", "b10", "b9"):
        write_record(tmp_path / "runs" / name, run())
    (tmp_path / "runs" / "notes").mkdir()
    below = '"runs/b9", "runs/b10", "runs/quick", "runs/standard"'
    for typed, hint in (
        ("runs", f'"runs" holds no runs; folders of results below it: {below}'),
        (".", f'"." holds no runs; folders of results below it: {below}'),
        ("runs/notes", '"runs/notes" holds no runs; give the --out folder of a run'),
        ("runs/qick", '"runs/qick" is not a folder; did you mean "runs/quick"?'),
        ("standard", '"standard" is not a folder; did you mean "runs/standard"?'),
        ("nothing_like_it", '"nothing_like_it" is not a folder; give the --out folder of a run'),
        ("runs/quick/runs/classification", f'holds no runs; did you mean "{tmp_path}/runs/quick"?'),
    ):
        with pytest.raises(ValueError, match=r"holds no runs|is not a folder") as caught:
            results.load(typed)
        assert str(caught.value).endswith(hint)
    for number in range(20):
        write_record(tmp_path / "runs" / f"c{number}", run())
    with pytest.raises(ValueError, match=r'"runs/c0", "runs/c1", "runs/c2" and 19 more$'):
        results.load("runs")


def test_only_the_runs_with_given_keys_whatever_was_planned_last(tmp_path):
    wanted, older, other = data("d", 1), data("old", 3), run("gn", versions=("2", "1", "d"), environment=at(2))
    history = [{"loss": 1.0}]
    for record in (wanted, older, other):
        write_record(tmp_path, record.model_copy(update={"history": history}))
    write_versions(tmp_path, [older.spec])
    df = results.load(tmp_path, keys={wanted.spec.key, "of no run"})
    assert df["key"].tolist() == [wanted.spec.key]
    assert df.attrs["not_asked"] == {"classification": 2}
    assert "Left out, not asked for by the config: 2 records." in results.task_table(df).caption
    assert results.load_history(tmp_path, keys=[other.spec.key])["norm"].tolist() == ["gn"]
    assert results.load(tmp_path, keys=[]).empty


def test_no_column_has_what_excel_can_not_hold(tmp_path):
    """Excel knows no time zones: pandas raises for a column that has one."""
    write_record(tmp_path, run(environment={"finished": "2026-01-02T03:04:05+02:00"}))
    write_record(tmp_path, run(seed=1, environment={"finished": "0001-01-01T00:00:00"}))
    df = results.load(tmp_path)
    assert df["finished"].dt.tz is None
    assert df["finished"][0] == datetime.datetime(2026, 1, 2, 1, 4, 5)
    assert not [name for name in df.columns if getattr(df[name].dtype, "tz", None) is not None]
    values = [v for name in df.columns for v in df[name] if v is not None]
    assert not [v for v in values if getattr(v, "tzinfo", None) is not None]


def test_a_folder_without_any_run_gives_an_empty_frame(tmp_path):
    (tmp_path / "runs").mkdir()
    df = results.load(tmp_path)
    assert df.empty
    assert {"task", "norm", "seed", "status", "finished", "stale"} <= set(df.columns)
    assert results.load_history(tmp_path).empty


def at(hour):
    return {"finished": f"2026-01-01T{hour:02}:00:00+00:00"}


STALE = {
    "a norm's older version goes, for every seed and option": (
        [
            run(versions=("a", "1", "d"), seed=0, environment=at(1)),
            run(versions=("a", "1", "d"), seed=1, environment=at(2)),
            run(versions=("b", "1", "d"), seed=0, environment=at(3), norm_batch_size=64),
            run("gn", versions=("a", "1", "d"), environment=at(1)),
        ],
        [("bn", "b", "1", "d"), ("gn", "a", "1", "d")],
        {"classification / bn": 2},
    ),
    "newest is what finished last, not what sorts last": (
        [run(versions=("z", "1", "d"), environment=at(1)), run(versions=("a", "1", "d"), environment=at(2))],
        [("bn", "a", "1", "d")],
        {"classification / bn": 1},
    ),
    "a task's older version goes for every norm": (
        [
            run(environment=at(1)),
            run(versions=("1", "2", "d"), environment=at(2)),
            run("gn", environment=at(3), task="few_shot"),
        ],
        [("bn", "1", "2", "d"), ("gn", "1", "1", "data")],
        {"classification / bn": 1},
    ),
    "older data of one name go for every norm, in every setting": (
        [
            run(environment=at(1)),
            run("gn", environment=at(1)),
            run("gn", environment=at(1), epochs=3),
            run(versions=("1", "1", "new"), environment=at(2)),
            run(dataset="other", environment=at(1)),
            run(task="few_shot", environment=at(1)),
        ],
        [("bn", "1", "1", "data"), ("bn", "1", "1", "data"), ("bn", "1", "1", "new")],
        {"classification / bn": 1, "classification / gn": 2},
    ),
    "without an option that names the data each setting has its own": (
        [
            run(dataset=None, versions=("1", "1", "a"), source="a", environment=at(1)),
            run(dataset=None, versions=("1", "1", "b"), source="b", environment=at(2)),
            run("gn", dataset=None, versions=("1", "1", "c"), source="b", environment=at(3)),
        ],
        [("bn", "1", "1", "a"), ("gn", "1", "1", "c")],
        {"classification / bn": 1},
    ),
}


@pytest.mark.parametrize(("entries", "left", "stale"), STALE.values(), ids=STALE)
def test_versions_are_never_mixed(entries, left, stale):
    df = from_records(entries)
    versions = df[["norm", "norm_version", "task_version", "data_checksum"]]
    assert sorted(versions.itertuples(index=False, name=None)) == left
    assert df.attrs["stale"] == stale
    assert not df["stale"].any()
    everything = from_records(entries, stale=True)
    assert len(everything) == len(entries)
    assert everything["stale"].sum() == sum(stale.values())


def test_an_edit_that_was_taken_back_shows_the_numbers_from_before_it(tmp_path):
    before, edited = (run(versions=(version, "1", "d"), environment=at(n)) for n, version in enumerate("ab"))
    for record in (before, edited):
        write_record(tmp_path, record)
    assert list(results.load(tmp_path)["norm_version"]) == ["b"]
    write_versions(tmp_path, [before.spec])
    assert list(results.load(tmp_path)["norm_version"]) == ["a"]
    write_versions(tmp_path, [run("gn", versions=("1", "1", "d")).spec])
    assert list(results.load(tmp_path)["norm_version"]) == ["a"], "planning another norm leaves this one"
    (tmp_path / VERSIONS).write_text("{not JSON")
    assert list(results.load(tmp_path)["norm_version"]) == ["b"]


def data(checksum, when, norm="bn", **options):
    return run(norm, versions=("1", "1", checksum), environment=at(when), **options)


def shown(folder):
    df = results.load(folder)
    return sorted(zip(df["norm"], df["data_checksum"], strict=True))


def test_data_that_were_changed_back_show_the_numbers_from_before(tmp_path):
    before, changed = data("old", 1), data("new", 2)
    for record in (before, data("old", 1, "gn", epochs=3), changed):
        write_record(tmp_path, record)
    for planned, expected in (
        ([before.spec], [("bn", "old"), ("gn", "old")]),
        ([changed.spec], [("bn", "new")]),
        ([before.spec], [("bn", "old"), ("gn", "old")]),
        ([data("d", 1, task="few_shot").spec], [("bn", "old"), ("gn", "old")]),
    ):
        write_versions(tmp_path, planned)
        assert shown(tmp_path) == expected
    assert results.load(tmp_path).attrs["stale"] == {"classification / bn": 1}
    assert results.load(tmp_path).attrs["other_data"] == {"classification / bn": 1}
    caption = results.task_table(results.load(tmp_path)).caption
    assert "Left out, of other data: 1 records (classification / bn 1)." in caption
    assert not [line for line in caption if "of other versions" in line]


@pytest.mark.parametrize("noted", [None, "a", "b"])
def test_one_table_never_holds_the_data_of_two_machines(tmp_path, noted):
    """Each machine made another setting, so that nothing but the name of the set connects their records."""
    for record in (data("a", 1), data("a", 1, "gn"), data("b", 2, epochs=3), data("b", 1, dataset="other")):
        write_record(tmp_path, record)
    if noted:
        write_versions(tmp_path, [data(noted, 1).spec])
    kept = {None: [("bn", "b")], "a": [("bn", "a"), ("gn", "a")], "b": [("bn", "b")]}[noted]
    assert shown(tmp_path) == sorted([*kept, ("bn", "b")])


def test_data_that_other_options_decide_are_all_noted(tmp_path):
    records = [data("a", 1, part=1), data("b", 2, part=2), data("c", 3, part=2)]
    for record in records:
        write_record(tmp_path, record)
    write_versions(tmp_path, [record.spec for record in records[:2]])
    assert shown(tmp_path) == [("bn", "a"), ("bn", "b")]


def test_without_a_data_sets_name_the_data_planned_last_count_where_they_were_run(tmp_path):
    first, second, changed = (data(c, n, dataset=None, source=s) for n, (c, s) in enumerate(("aa", "bb", "cb")))
    for record in (first, second, changed):
        write_record(tmp_path, record)
    assert shown(tmp_path) == [("bn", "a"), ("bn", "c")]
    write_versions(tmp_path, [second.spec])
    assert shown(tmp_path) == [("bn", "a"), ("bn", "b")]


def test_a_note_of_before_data_were_noted_still_counts_for_versions(tmp_path):
    for record in (data("old", 1), data("new", 2), run(versions=("2", "1", "new"), environment=at(3))):
        write_record(tmp_path, record)
    (tmp_path / VERSIONS).write_text('{"norm": {"bn": "1"}, "task": {"classification": "1"}}')
    assert shown(tmp_path) == [("bn", "new")]
    assert list(results.load(tmp_path)["norm_version"]) == ["1"]


def test_one_setting_never_holds_two_data_that_were_planned_in_different_settings(tmp_path):
    """The contents of two places were swapped: both checksums are noted, each for one of two settings."""
    for record in (
        data("a", 1, dataset=None, source="p"),
        data("b", 2, dataset=None, source="p", seed=1),
        data("a", 3, dataset=None, source="q"),
    ):
        write_record(tmp_path, record)
    write_versions(tmp_path, [data("b", 2, dataset=None, source="p").spec, data("a", 3, dataset=None, source="q").spec])
    assert shown(tmp_path) == [("bn", "a"), ("bn", "b")]
    assert list(results.load(tmp_path)["option.source"]) == ["p", "q"]


def test_where_no_record_has_the_planned_data_the_error_says_so(tmp_path):
    write_record(tmp_path, data("old", 1))
    write_versions(tmp_path, [data("new", 2).spec])
    with pytest.raises(ValueError, match="left out, of other versions or data than were planned last: 1 records"):
        results.render_all(results.load(tmp_path))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["bn", "gn"]),
            st.sampled_from("abc"),
            st.sampled_from("de"),
            st.integers(0, 3),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_what_takes_part_does_not_depend_on_the_order_of_records_nor_on_doubles(made, random):
    records = [data(c, when, norm, dataset=d, epochs=3 if more else 5) for norm, c, d, when, more in made]
    shuffled = random.sample([*records, *records[:2]], len(records) + len(records[:2]))
    one, other = (from_records(each, stale=True) for each in (records, shuffled))
    assert one[~one["stale"]].groupby("option.dataset")["data_checksum"].nunique().le(1).all()
    kept = [set(df["key"][~df["stale"]]) for df in (one, other)]
    assert kept[0] == kept[1]
    assert kept[0]


def choice(name, version):
    return {"name": name, "options": {"eps": 1e-5}, "version": version, "label": f"{name}(eps=1)"}


def run_with(choices, when=1):
    record = run(environment=at(when))
    spec = record.spec.model_copy(update={"task_options": {**record.spec.task_options, **choices}})
    return record.model_copy(update={"spec": spec})


def test_norms_and_genotypes_that_options_name_are_shown_by_their_label():
    df = from_records([run_with({"retrain_norm": choice("gn", "1"), "genotype": None, "other": {"a": [1]}})])
    assert df["option.retrain_norm"].tolist() == ["gn(eps=1)"]
    assert df["option.other"].tolist() == ['{"a": [1]}']


def test_versions_of_a_norm_that_options_name_are_never_mixed(tmp_path):
    records = [
        run_with({"retrain_norm": choice("mine", "old")}, 1),
        run_with({"retrain_norm": choice("mine", "new")}, 2),
        run_with({"retrain_norm": choice("gn", "1")}, 1),
        run_with({"retrain_norm": None}, 1),
    ]
    for record in records:
        write_record(tmp_path, record)
    keys = {record.spec.key: name for record, name in zip(records, ("old", "new", "gn", "none"), strict=True)}
    assert len(keys) == 4

    def kept():
        return {keys[key] for key in results.load(tmp_path)["key"]}

    assert kept() == {"new", "gn", "none"}
    write_versions(tmp_path, [records[0].spec])  # the edit was taken back
    assert kept() == {"old", "gn", "none"}
    assert results.load(tmp_path).attrs["stale"] == {"classification / bn": 1}


def test_a_record_without_its_own_time_has_its_files(tmp_path):
    for number, version in enumerate(("b", "a")):
        file = write_record(tmp_path, run(versions=(version, "1", "d"), environment={"finished": "not a time"}))
        os.utime(file, (1000.0 + number, 1000.0 + number))
    df = results.load(tmp_path)
    assert df["norm_version"].tolist() == ["a"]
    assert df["finished"][0] == datetime.datetime.fromtimestamp(1001, datetime.UTC).replace(tzinfo=None)


def test_history_has_a_row_per_epoch_and_joins_by_key(tmp_path):
    """Tasks record epochs from 1, so those that are only numbered begin there, too."""
    history = [{"loss": 2.0, "val_top1": 0.1}, {"loss": float("nan"), "val_top1": 0.2}]
    write_record(tmp_path, run(history=history))
    write_record(tmp_path, run("gn", status="diverged", history=[{"epoch": 5, "loss": 1.0}]))
    write_record(tmp_path, run("ln"))
    df = results.load_history(tmp_path)
    assert df[["norm", "status", "epoch"]].values.tolist() == [["bn", "ok", 1], ["bn", "ok", 2], ["gn", "diverged", 5]]
    assert df["epoch"].dtype == "int64"
    assert df["loss"].isna().tolist() == [False, True, False]
    assert len(df.merge(results.load(tmp_path), on="key")) == 3


def test_reading_writes_nothing(tmp_path):
    write_record(tmp_path, run()).with_name("x").write_text("")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    results.load(tmp_path)
    results.load_history(tmp_path)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
    assert len(list(record_files(tmp_path))) == 1


def test_values_sort_as_people_count():
    given = ["g10", None, 64, "g9", 2, 16.0, "b", float("nan")]
    assert distinct(given) == [2, 16.0, 64, "b", "g9", "g10", None]
    assert natural("bgn(num_groups=2)") < natural("bgn(num_groups=16)") < natural(None)

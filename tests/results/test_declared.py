"""Results folders that describe their tasks: tables of tasks that this process does not know."""

import itertools
import json

import pytest

import results
from results import derived
from results.declared import MOST_VERSIONS, Declaration, TaskNotes
from results.frame import BASELINE, from_records
from results.metrics import Metric
from results.record import RunRecord, RunSpec
from results.store import TASKS, read_tasks, write_record, write_tasks
from results.tables.build import render_all, sweep_table, task_table

SCORE = Metric("my_score", "score", "%", True, 1, 100.0, description="Mine.")
LOSS = Metric("my_loss", "loss", "nats", False, 2)


def run(options, value=0.5, norm="bn", seed=0, metrics=None, norm_options=None, label="", version="1"):
    """A run of a task that no process here knows; a text as value is a status."""
    spec = RunSpec(
        task="mine",
        norm=norm,
        norm_options=norm_options or {},
        task_options=options,
        seed=seed,
        norm_version="1",
        task_version=version,
        data_checksum="d",
        norm_label=label or norm,
    )
    if isinstance(value, str):
        return RunRecord(spec=spec, status=value, reason="it did")
    return RunRecord(spec=spec, status="ok", metrics={"my_score": value} | (metrics or {}))


def notes(baselines=(), given=(), version="1", **declared):
    """What a plan would say of the task. baselines: (record, its baseline's record or None)."""
    metrics = {metric.name: metric for metric in (SCORE, LOSS)}
    return TaskNotes(
        tasks={"mine": {version: Declaration(metrics=metrics, **{"headline": "my_score", **declared})}},
        setting_fields=("norm_batch_size",),
        given=dict(given),
        baselines={r.spec.key: None if b is None else b.spec.key for r, b in baselines},
    )


def column(table, name):
    """(group, label) -> cell of a metric's column."""
    i = next(i for i, c in enumerate(table.columns) if c.metric.name == name)
    return {(row.group, row.label): row.cells[i] for row in table.rows}


# --- metrics -------------------------------------------------------------------------------------------------------


def test_a_metric_keeps_unit_direction_and_place_where_nobody_defines_it_but_the_folder():
    records = [run({}, v, n, metrics={"my_loss": 1 - v, "aaa": v}) for n, v in (("bn", 0.25), ("gn", 0.5))]
    table = task_table(from_records(records, told=notes()))
    assert [c.title for c in table.columns] == ["score (%) ↑", "loss (nats) ↓", "aaa"]
    assert results.to_latex(table).count(r"\textbf{") == 2
    assert r"\textbf{50.0}" in results.to_latex(table)
    plain = task_table(from_records(records))
    assert [c.title for c in plain.columns] == ["aaa", "my loss", "my score"]
    assert r"\textbf{" not in results.to_latex(plain)


def test_the_declared_headline_ranks_and_is_swept():
    records = [run({"learning_rate": r}, v, n) for n, v in (("bn", 0.25), ("gn", 0.5)) for r in (0.1, 0.2)]
    tables = render_all(from_records(records, told=notes()))
    assert [t.name for t in tables] == ["mine", "mine_by_learning_rate_my_score", "overall"]
    assert [row.cells[0].mean for row in tables[-1].rows] == [2.0, 1.0]
    assert [t.name for t in render_all(from_records(records))] == ["mine", "overall"]


def test_the_declared_metric_chooses():
    records = [
        run({"learning_rate": r}, 0.5, seed=s, metrics={"my_loss": r, "val_top1": r})
        for r, s in itertools.product((0.1, 0.2), (0, 1))
    ]
    df = results.select(from_records(records, told=notes(validation="my_loss")), "learning_rate")
    assert df["selected.learning_rate"].tolist() == [0.1]
    assert results.select(from_records(records, told=notes()), "learning_rate")["selected.learning_rate"].tolist() == [
        0.2
    ]


def test_declared_options_stand_in_headings_and_undeclared_ones_do_not():
    records = [run({"forward": "joint", "mode": "eval"}, v, n) for n, v in (("bn", 0.25), ("gn", 0.5))]
    told = notes(always_shown=("mode",))
    assert {row.group for row in task_table(from_records(records, told=told)).rows} == {"mode=eval"}
    assert {row.group for row in task_table(from_records(records)).rows} == {"forward=joint"}


def test_what_a_declared_option_decides_stands_in_the_caption():
    records = [run({"kind": k, "width": w}, 0.5, n) for n in ("bn", "gn") for k, w in (("a", 1), ("b", 2))]
    table = task_table(from_records(records, told=notes(deciding=("kind",))))
    assert {row.group for row in table.rows} == {"kind=a", "kind=b"}
    assert "With kind=a: width=1." in table.caption
    assert {row.group for row in task_table(from_records(records)).rows} == {"kind=a, width=1", "kind=b, width=2"}


# --- gains ---------------------------------------------------------------------------------------------------------


def gains(df):
    df = derived.with_gain(df)
    if "gain" not in df.columns:
        return None
    values = [None if v != v else round(v, 9) for v in df["gain"]]
    return dict(zip(df["option.method"] + " " + df["norm"], zip(values, df["status.gain"], strict=True), strict=True))


def test_a_method_with_a_new_option_keeps_its_gain():
    records = {}
    for norm in ("bn", "gn"):
        records["source_only", norm] = run({"method": "source_only", "strength": None}, 0.25, norm)
        records["new", norm] = run({"method": "new", "strength": 3.0}, 0.75 if norm == "bn" else "diverged", norm)
    pairs = [(r, None if m == "source_only" else records["source_only", n]) for (m, n), r in records.items()]
    df = from_records(records.values(), told=notes(pairs))
    assert gains(df) == {
        "new bn": (0.5, "ok"),
        "new gn": (None, "diverged"),
        "source_only bn": (None, None),
        "source_only gn": (None, None),
    }
    # by the names of options, as of older folders, the option that nobody listed loses it
    old = [
        r.model_copy(update={"metrics": dict(zip(["target_top1"], r.metrics.values(), strict=False))})
        for r in records.values()
    ]
    assert gains(from_records(old))["new bn"] == (None, "missing")


def test_a_gain_is_of_the_headline_and_over_whatever_run_the_plan_names():
    plain, other = run({"method": "plain"}, 0.25), run({"method": "clever"}, 0.75)
    told = notes([(plain, None), (other, plain)])
    table = task_table(from_records([plain, other], told=told))
    assert [c.title for c in table.columns] == ["score (%) ↑", "gain (points) ↑"]
    assert column(table, "gain")["method=clever", "bn"].mean == 0.5
    assert column(table, "gain")["method=plain", "bn"] is None
    assert (
        "gain: score less that of the plain run of the same norm, seed and options; a hole where that run is one."
        in (table.caption)
    )
    assert gains(from_records([plain, other])) is None


def test_a_gain_of_a_loss_is_better_where_it_is_lower():
    plain, other = run({"method": "plain"}, metrics={"my_loss": 1.0}), run({"method": "b"}, metrics={"my_loss": 0.5})
    told = notes([(plain, None), (other, plain)], headline="my_loss")
    gain = next(
        c.metric for c in task_table(from_records([plain, other], told=told)).columns if c.metric.name == "gain"
    )
    assert gain.heading == "gain (nats) ↓"
    assert gains(from_records([plain, other], told=told))["b bn"] == (-0.5, "ok")


def test_a_baseline_without_a_record_is_a_missing_run_and_one_that_failed_a_failure():
    plain, broken, other = run({"method": "a"}), run({"method": "b"}, "failed"), run({"method": "c"})
    df = from_records([plain, broken, other], told=notes([(plain, None), (broken, plain), (other, broken)]))
    assert gains(df)["c bn"] == (None, "failed")
    third = run({"method": "d"})
    df = from_records([plain, third, other], told=notes([(plain, None), (third, plain), (other, broken)]))
    assert gains(df) == {"a bn": (None, None), "c bn": (None, "missing"), "d bn": (0.0, "ok")}


def test_runs_that_no_plan_named_are_compared_by_the_names_of_their_options():
    records = [run({"method": m}, v, n) for n in ("bn", "gn") for m, v in (("source_only", 0.25), ("dann", 0.5))]
    records = [r.model_copy(update={"metrics": {"target_top1": r.metrics["my_score"]}}) for r in records]
    named = notes([(records[0], None), (records[1], records[0])], headline="target_top1")  # a smaller, later plan
    expected = {"dann bn": (0.25, "ok"), "dann gn": (0.25, "ok"), "source_only bn": (None, None)}
    assert gains(from_records(records, told=named)) == expected | {"source_only gn": (None, None)}


def test_after_a_selection_the_gain_is_over_the_baseline_at_its_own_choice():
    best = {"source_only": 0.1, "dann": 0.3}
    records = {
        (m, r, s): run(
            {"method": m, "learning_rate": r},
            (0.5 if m == "dann" else 0.25) + (0.125 if r == 0.3 else 0),
            seed=s,
            metrics={"val_top1": 0.9 if r == best[m] else 0.1},
        )
        for m, r, s in itertools.product(best, (0.1, 0.3), (0, 1))
    }
    told = notes((r, None if m == "source_only" else records["source_only", *at]) for (m, *at), r in records.items())
    df = from_records(records.values(), told=told)
    assert {value for value, _ in gains(df).values()} == {None, 0.25}
    table = render_all(df, select="learning_rate")[0]
    assert column(table, "gain")["method=dann", "bn"].mean == 0.625 - 0.25


# --- folding -------------------------------------------------------------------------------------------------------


def test_a_task_folds_over_the_option_that_it_declares():
    records = [
        run({"subject": s}, v, n) for n, at in (("bn", 0.0), ("gn", 0.25)) for s, v in (("a", at), ("b", at + 0.5))
    ]
    df = from_records(records, told=notes(folds_over="subject"))
    table, overall = render_all(df)
    assert [c.title for c in table.columns] == ["score (%) ↑", "worst score (%) ↑", "a (%) ↑", "b (%) ↑"]
    assert [[c.mean for c in row.cells] for row in table.rows] == [[0.25, 0.0, 0.0, 0.5], [0.5, 0.25, 0.25, 0.75]]
    assert any(
        "the mean over the values of subject (a, b: 2 runs), worst score is their lowest" in s for s in table.caption
    )
    assert "Ranked by score (mean over values of subject) in mine, each norm by its mean over seeds." in overall.caption
    single = sweep_table(df, "subject")
    assert [[c.mean for c in row.cells] for row in single.rows] == [[0.0, 0.5], [0.25, 0.75]]
    with pytest.raises(ValueError, match="subject can not be selected"):
        results.select(df, "subject")


def test_the_worst_of_a_loss_is_the_highest_and_a_task_may_fold_over_nothing():
    records = [run({"held_out": d}, 0.5, metrics={"my_loss": v}) for d, v in (("a", 1.0), ("b", 3.0))]
    told = notes(folds_over="held_out", headline="my_loss")
    (row,) = task_table(from_records(records, told=told), ["worst_my_loss"]).rows
    assert row.cells[0].mean == 3.0
    table = task_table(from_records(records, told=notes(folds_over="")))
    assert [row.group for row in table.rows] == ["held_out=a", "held_out=b"]


def test_a_domain_that_no_run_measured_leaves_the_other_metrics_their_place():
    records = [run({"subject": d}, "failed" if d == "b" else 0.5) for d in ("a", "b")]
    table = render_all(from_records(records, told=notes(folds_over="subject")))[0]
    assert [c.metric.name for c in table.columns] == ["my_score/a"]
    assert any("Runs: 2, of which 1 ok, 0 diverged, 1 failed" in sentence for sentence in table.caption)


# --- setting fields ------------------------------------------------------------------------------------------------


def test_a_setting_field_that_a_person_gave_its_default_makes_a_row_of_its_own():
    filled = run({}, 0.25, "bgn", norm_options={"norm_batch_size": 64})
    asked = run({}, 0.5, "bgn", norm_options={"norm_batch_size": None})  # its default, so that no label shows it
    (_,) = task_table(from_records([filled, asked])).rows
    told = notes(given={asked.spec.key: ("norm_batch_size",)})
    assert [row.label for row in task_table(from_records([filled, asked], told=told)).rows] == [
        "bgn",
        "bgn [bgn(norm_batch_size=None)]",
    ]


# --- the file ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_and_a_later_plan_adds_to_it(tmp_path):
    first, second = run({"method": "a"}), run({"method": "b"})
    assert write_tasks(tmp_path, notes([(first, None)])) == []
    write_tasks(tmp_path, notes([(second, first)], version="2", headline="my_loss"))
    told, trouble = read_tasks(tmp_path)
    assert trouble == ""
    assert {version: told.declaration("mine", version).headline for version in ("1", "2", "3")} == {
        "1": "my_score",
        "2": "my_loss",
        "3": None,
    }
    assert told.baselines == {first.spec.key: None, second.spec.key: first.spec.key}
    assert told.declaration("mine", "1").metrics["my_loss"] == LOSS
    before = (tmp_path / TASKS).stat()
    write_tasks(tmp_path, notes([(second, first)], version="2", headline="my_loss"))
    assert (tmp_path / TASKS).stat() == before


def test_each_version_of_a_task_is_described_by_its_own_words(tmp_path):
    write_tasks(tmp_path, notes())
    write_tasks(tmp_path, notes(version="2", headline="my_loss"))
    for version in ("1", "2"):
        write_record(tmp_path, run({"v": version}, version=version))
    df = results.load(tmp_path)
    assert df.attrs["tasks"]["mine"]["headline"] == "my_loss"
    assert json.loads(json.dumps(df.attrs)) == df.attrs, "pandas stores them as JSON"


def test_the_oldest_versions_go():
    told = TaskNotes()
    for version in range(MOST_VERSIONS + 3):
        told = told.followed_by(notes(version=str(version)))
    assert [*told.tasks["mine"]] == [str(v) for v in range(3, MOST_VERSIONS + 3)]


GOOD = notes().model_dump(mode="json", by_alias=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": 2}',
        json.dumps(GOOD | {"tasks": 3}),
        json.dumps(GOOD | {"baselines": {"k": 3}}),
        json.dumps({"tasks": {"mine": {"1": {"metrics": {"m": {"name": "m", "title": "t", "digits": 10**9}}}}}}),
        json.dumps({"tasks": {"mine": {"1": {"metrics": {"m": {"name": "m", "title": "t", "scale": 1e999}}}}}}),
        json.dumps(
            {"tasks": {"mine": {"1": {"metrics": {f"m{i}": {"name": "m", "title": "t"} for i in range(3000)}}}}}
        ),
        json.dumps({"tasks": {"mine": {"1": {"headline": "h" * 1000}}}}),
    ],
)
def test_a_damaged_or_foreign_file_is_said_passed_over_and_set_aside(tmp_path, content):
    write_record(tmp_path, run({}))
    file = tmp_path / TASKS
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    df = results.load(tmp_path)
    assert df.attrs["unread"].startswith(f"{file}: not what a plan says of its tasks (")
    assert "\n" not in df.attrs["unread"]
    assert (len(df), "tasks" in df.attrs, df.attrs["damaged"]) == (1, False, [])
    assert results.tables_text(render_all(df))
    assert file.read_bytes() == before, "reading changes nothing"
    (line,) = write_tasks(tmp_path, notes())
    assert line.endswith("set aside as tasks.json.damaged-1")
    assert (tmp_path / "tasks.json.damaged-1").read_bytes() == before
    assert "tasks" in results.load(tmp_path).attrs


def test_neither_a_link_nor_a_folder_is_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(GOOD))
    (tmp_path / TASKS).symlink_to(elsewhere)
    assert "is a link" in read_tasks(tmp_path)[1]
    write_tasks(tmp_path, notes(headline="my_loss"))
    assert elsewhere.read_text() == json.dumps(GOOD)
    (tmp_path / TASKS).unlink()
    (tmp_path / TASKS).mkdir()
    assert "is a directory" in read_tasks(tmp_path)[1]
    write_tasks(tmp_path, notes())
    assert read_tasks(tmp_path)[1] == ""


def test_a_metric_of_a_foreign_file_prints_within_bounds_under_the_name_of_its_runs(tmp_path):
    metric = {"name": "other", "title": "t" * 5000, "unit": "\x1b[31m&_\n", "higher_is_better": True, "later": 1}
    told = {"tasks": {"mine": {"1": {"metrics": {"my_score": metric}, "later": []}}}, "later": 1}
    write_record(tmp_path, run({}))
    (tmp_path / TASKS).write_text(json.dumps(told))
    table = render_all(results.load(tmp_path))[0]
    (column,) = table.columns
    assert (column.metric.name, column.metric.higher_is_better, len(column.title) < 200) == ("my_score", True, True)
    assert table.rows[0].cells[0].mean == 0.5
    assert "\x1b" not in results.to_text(table) + results.to_latex(table) + results.to_markdown(table)


def test_a_folder_that_says_nothing_has_the_frame_that_it_had(tmp_path):
    write_record(tmp_path, run({"method": "a"}))
    df = results.load(tmp_path)
    assert BASELINE not in df.columns
    assert not {"tasks", "unread"} & df.attrs.keys()


@pytest.mark.parametrize("again", [False, True])
def test_a_gain_that_a_task_measures_itself_is_its_own(again):
    own = [run({}, v, n, metrics={"gain": v}) for n, v in (("bn", 0.25), ("gn", 0.5))]
    metric = Metric("gain", "gain", "points", True, 1, 100.0)
    told = notes()
    told.tasks["mine"]["1"].metrics["gain"] = metric
    adapted = [
        r.model_copy(
            update={
                "spec": r.spec.model_copy(update={"task": "other", "task_options": {"method": m}}),
                "metrics": {"target_top1": v},
            }
        )
        for r, m, v in ((own[0], "source_only", 0.5), (own[0], "dann", 0.75))
    ]
    df = from_records([*own, *adapted], told=told)
    df = derived.with_gain(df) if again else df
    (mine, other, _) = render_all(df)
    assert {row.label: cell.mean for row, cell in zip(mine.rows, column(mine, "gain").values(), strict=True)} == {
        "bn": 0.25,
        "gn": 0.5,
    }
    assert column(other, "gain")["method=dann", "bn"].mean == 0.25

"""What results/record.py promises: identity of specs, records that are whole or absent, damage that is reported."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from results.record import RecordError, RunRecord, RunSpec
from results.store import (
    RECORD,
    VERSIONS,
    find_record,
    read_record,
    read_versions,
    record_files,
    run_folder,
    run_lock,
    set_aside,
    write_record,
    write_versions,
)

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "task": "classification",
    "norm": "bgn",
    "norm_options": {"num_groups": 8, "eps": 1e-5},
    "task_options": {"dataset": "made_up", "epochs": 3, "channels": [16, 32]},
    "seed": 0,
    "norm_version": "1",
    "task_version": "1",
    "data_checksum": "abc",
}
CHANGED = {
    "task": "few_shot",
    "norm": "bn",
    "norm_options": {"num_groups": 4, "eps": 1e-5},
    "task_options": {"dataset": "made_up", "epochs": 3, "channels": [32, 16]},
    "seed": 1,
    "norm_version": "2",
    "task_version": "2",
    "data_checksum": "abd",
}


def spec(**changes):
    return RunSpec(**{**FIELDS, **changes})


def record(status="ok", **changes):
    metrics = {"top1": 0.1 + 0.2} if status == "ok" else {}
    return RunRecord(spec=spec(), status=status, metrics=metrics, **changes)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
options = st.dictionaries(st.text(max_size=5), values, max_size=4)


@settings(deadline=None, max_examples=40)
@given(norm=options, task=options, label=st.text(max_size=5), seed=st.integers(0, 2**63))
def test_a_key_depends_on_the_content_alone(norm, task, label, seed):
    one = spec(norm_options=norm, task_options=task, seed=seed)
    reverse = spec(norm_options=dict(reversed(norm.items())), task_options=dict(reversed(task.items())), seed=seed)
    assert one.key == reverse.key == one.model_copy(update={"norm_label": label}).key
    assert RunSpec.model_validate_json(one.model_dump_json()).key == one.key, "a stored spec keeps its key"
    assert len(one.key) == 24
    assert set(one.key) <= set("0123456789abcdef")


@settings(deadline=None, max_examples=40)
@given(first=options, second=options)
def test_different_options_have_different_keys(first, second):
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (spec(task_options=first).key == spec(task_options=second).key) == same


@pytest.mark.parametrize("name", CHANGED)
def test_a_key_changes_with_every_field(name):
    assert spec(**{name: CHANGED[name]}).key != spec().key


def test_a_copy_with_another_seed_has_its_own_key():
    one = spec()
    assert one.key == spec().key
    assert one.model_copy(update={"seed": 1}).key == spec(seed=1).key != one.key


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_options_that_json_can_not_say_have_no_key(value):
    with pytest.raises(ValueError, match="JSON"):
        _ = spec(norm_options={"eps": value}).key


@pytest.mark.parametrize(
    "entry",
    [
        record(),
        record("diverged", reason="step 3: conv1", history=[{"loss": float("inf"), "epoch": 0}]),
        record("failed", reason='"quoted", ünïcode\nand a second line', seconds=1.5, artifacts=["a.json"]),
        record("skipped", environment={"threads": 1, "nested": {"a": [1, None]}}, evidence={"equals": None}),
    ],
    ids=lambda r: r.status,
)
def test_a_record_is_read_as_it_was_written(tmp_path, entry):
    file = write_record(tmp_path, entry)
    assert file == run_folder(tmp_path, entry.spec) / RECORD
    assert read_record(file) == entry == find_record(tmp_path, entry.spec)
    assert list(record_files(tmp_path)) == [file]
    assert [p.name for p in file.parent.iterdir()] == [RECORD]


def test_metrics_keep_every_digit_and_history_writes_null_for_what_is_not_finite(tmp_path):
    file = write_record(tmp_path, record(history=[{"loss": float("nan"), "top1": 0.5}]))
    assert read_record(file).metrics["top1"] == 0.1 + 0.2
    assert json.loads(file.read_text())["history"] == [{"loss": None, "top1": 0.5}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_is_refused_before_it_can_spoil_a_file(value):
    with pytest.raises(ValidationError, match="finite"):
        RunRecord(spec=spec(), status="ok", metrics={"top1": value})


@pytest.mark.parametrize("changes", [{"status": "fine"}, {"extra": 1}, {"schema": 2}])
def test_unknown_fields_statuses_and_schemas_are_refused(changes):
    with pytest.raises(ValidationError):
        RunRecord.model_validate({"spec": FIELDS, "status": "ok", **changes})


def test_a_failing_write_keeps_the_old_record_and_leaves_nothing_behind(tmp_path, monkeypatch):
    file = write_record(tmp_path, record("failed", reason="first"))

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, record())
    assert read_record(file).reason == "first"
    assert [p.name for p in file.parent.iterdir()] == [RECORD]


KILLED_WHILE_WRITING = """
import os, signal, sys
from results.record import RunRecord, RunSpec
from results.store import run_lock, write_record
spec = RunSpec.model_validate_json(sys.argv[2])
run_lock(sys.argv[1], spec).acquire()
write_record(sys.argv[1], RunRecord(spec=spec, status="failed", reason="first"))
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write_record(sys.argv[1], RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}))
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_record_and_a_free_lock(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path), spec().model_dump_json()], cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    folder = run_folder(tmp_path, spec())
    assert find_record(tmp_path, spec()).reason == "first"
    assert len(list(folder.glob(f".{RECORD}.*"))) == 1, "the half-made file is there, under a name that is no record's"
    assert len(list(record_files(tmp_path))) == 1
    with run_lock(tmp_path, spec()).acquire(timeout=0):
        write_record(tmp_path, record())
    assert sorted(p.name for p in folder.iterdir()) == [RECORD], "the next writer cleans up"


def test_a_lock_is_held_once(tmp_path):
    with run_lock(tmp_path, spec()), pytest.raises(Timeout):
        run_lock(tmp_path, spec()).acquire(timeout=0)


GOOD = record().model_dump_json(by_alias=True)
DAMAGED = {
    "empty": b"",
    "cut": GOOD[: len(GOOD) // 2].encode(),
    "binary": bytes(range(256)),
    "a list": b"[]",
    "another program's JSON": b'{"name": "x"}',
    "another schema": GOOD.replace('"schema":1', '"schema":99').encode(),
    "an unknown field": GOOD.replace('"status"', '"colour":1,"status"').encode(),
    "a metric as text": GOOD.replace("0.30000000000000004", '"high"').encode(),
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_reported_in_one_line_and_can_be_set_aside(tmp_path, content):
    file = run_folder(tmp_path, spec()) / RECORD
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(RecordError) as caught:
        find_record(tmp_path, spec())
    assert str(caught.value).startswith(f"{file}: not a run record")
    assert "\n" not in str(caught.value)
    assert file.exists(), "reading moves nothing"
    aside = set_aside(file)
    assert find_record(tmp_path, spec()) is None
    assert aside.read_bytes() == content


def test_the_line_about_a_damaged_record_names_the_field(tmp_path):
    file = tmp_path / RECORD
    file.write_bytes(DAMAGED["another schema"])
    with pytest.raises(RecordError, match=r"schema: .*schema 99; this version reads 1"):
        read_record(file)


def test_a_missing_or_unreadable_file_is_a_record_error(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        read_record(tmp_path / RECORD)
    with pytest.raises(RecordError, match="directory"):
        read_record(tmp_path)


def test_the_record_of_another_run_is_not_taken_for_this_one(tmp_path):
    file = write_record(tmp_path, record())
    other = run_folder(tmp_path, spec(seed=7))
    other.mkdir(parents=True)
    (other / RECORD).write_bytes(file.read_bytes())
    with pytest.raises(RecordError, match=f"another run .{spec().key}"):
        find_record(tmp_path, spec(seed=7))


def test_setting_aside_never_overwrites(tmp_path):
    for number in range(3):
        (tmp_path / RECORD).write_text(str(number))
        assert set_aside(tmp_path / RECORD).name == f"{RECORD}.damaged-{number + 1}"
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["0", "1", "2"]
    with pytest.raises(FileNotFoundError):
        set_aside(tmp_path / RECORD)
    assert len(list(tmp_path.iterdir())) == 3, "a name reserved in vain is freed"


def test_results_imports_no_torch_and_records_no_pandas():
    code = (
        "import sys, results.record; assert 'pandas' not in sys.modules; "
        "import results.tables.build; print(sorted({'torch', 'norms', 'tasks', 'suite'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


NOTHING = {"norm": {}, "task": {}, "part": {}, "data": {}, "config": ""}


def test_what_was_planned_last_is_noted_with_its_data(tmp_path):
    plain = {"norm": {"bgn": "1"}, "task": {"classification": "1"}, "part": {}, "config": "a.yaml"}
    write_versions(tmp_path, [spec(), spec(data_checksum="abd", seed=1)], "a.yaml")
    assert read_versions(tmp_path) == plain | {"data": {"classification": {"made_up": ["abc", "abd"]}}}
    write_versions(tmp_path, [spec(), spec(task_options={"dataset": "other"}), spec(task="mine", task_options={})])
    assert read_versions(tmp_path)["data"] == {
        "classification": {"made_up": ["abc"], "other": ["abc"]},
        "mine": {"": ["abc"]},
    }
    assert read_versions(tmp_path)["config"] == "a.yaml"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{not JSON", {}),
        ("[]", {}),
        ("null", {}),
        ("\udcff", {}),
        ("[" * 100_000, {}),
        ('{"norm": {"bn": 1}}', {"norm": {"bn": "1"}}),
        ('{"norm": [], "task": {"t": "2"}, "data": 3, "config": {}}', {"task": {"t": "2"}}),
        ('{"data": {"t": {"s": ["c"], "x": "c"}, "u": []}}', {"data": {"t": {"s": ["c"]}}}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_note_that_can_not_be_read_in_part_counts_for_the_rest(tmp_path, text, read):
    assert read_versions(tmp_path) == NOTHING
    (tmp_path / VERSIONS).write_bytes(text.encode(errors="surrogateescape"))
    assert read_versions(tmp_path) == NOTHING | read
    write_versions(tmp_path, [spec()])
    assert read_versions(tmp_path)["data"]["classification"] == {"made_up": ["abc"]}

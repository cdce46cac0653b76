"""Options that came after records had been made orphan none; old and new runs are one setting of a table."""

import json
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results.frame import from_records
from results.record import RunRecord, RunSpec, record_text
from results.store import read_record, write_record
from results.tables.build import render_all
from suite.planning import Plan, plan_config
from suite.status import Status
from tasks import get_task, task_names
from tasks.options import NEWER, Options, newer_options

OLD = Path(__file__).parent / "records" / "classification_before_newer_options.json"
KEY = "5436a0c2b38762fa6b808ed6"  # that it was stored under
# Each means what runs did before the option existed: another value here would give old numbers a new meaning, and
# dropping an option would orphan every record that was made before it.
SUPERVISED = {"optimizer": "sgd", "betas": None, "gradient_clip": None, "compile": False}
CLASSIFICATION = {**SUPERVISED, "milestones": None}
WORKERS = {"workers": 1, "sync_norms": False}
PHASE = {"optimizer": "sgd", "schedule": "cosine", "warmup": 0.0, "milestones": None}
MEANT = {
    "classification": {**CLASSIFICATION, **WORKERS},
    "adversarial": {**SUPERVISED, **WORKERS, "precision": "float32"},
    "domain_adaptation": {**CLASSIFICATION, **WORKERS, "precision": "float32"},
    "domain_generalization": {**CLASSIFICATION, **WORKERS, "precision": "float32"},
    "few_shot": {**CLASSIFICATION, "optimizer": "adam", "momentum": None, "precision": "float32"},
    "architecture_search": {
        **{f"{phase}_{name}": value for phase in ("search", "retrain") for name, value in PHASE.items()},
        "betas": None,
        "precision": "float32",
        "compile": False,
    },
}
OFF = {
    "optimizer": "adamw",
    "betas": [0.5, 0.9],
    "milestones": [0.3],
    "gradient_clip": 1.0,
    "compile": True,
}


@pytest.fixture(scope="module")
def old():
    return read_record(OLD)


def planned(old, **options):
    """What a config with the old record's options asks for today; versions may have risen since."""
    config = {
        "norms": [{"gn": {"num_groups": 8}}],
        "seeds": [0],
        "tasks": {"classification": {**old.spec.task_options, **options}},
    }
    (spec,) = plan_config(config).runs
    same = {name: getattr(old.spec, name) for name in ("norm_version", "task_version", "data_checksum")}
    return spec.model_copy(update=same)


def test_the_record_of_a_day_before_keeps_its_key_and_its_text(old):
    assert old.spec.key == KEY
    assert not old.spec.task_options.keys() & CLASSIFICATION.keys(), "else this record proves nothing"
    assert json.loads(record_text(old)) == json.loads(OLD.read_text())


def test_its_config_finds_it_done(old, tmp_path):
    write_record(tmp_path, old)
    spec = planned(old)
    assert spec.task_options.keys() > old.spec.task_options.keys(), "a new record says all of its options"
    grid = Status(Plan([spec], [], "reduced", 1), tmp_path, retry=False)
    assert (spec.key, grid.states, grid.todo) == (KEY, ["ok"], [])


@pytest.mark.parametrize("task", task_names())
def test_what_the_options_of_a_task_meant_before_they_existed_is_fixed(task):
    assert newer_options(get_task(task).options) == MEANT[task]


@pytest.mark.parametrize("task", [*MEANT])
@pytest.mark.parametrize(
    ("unused", "used"),
    [
        ({"betas": [0.5, 0.9], "optimizer": "sgd"}, {"optimizer": "sgd"}),
        ({"betas": [0.9, 0.999], "optimizer": "adamw"}, {"optimizer": "adamw"}),
        ({"momentum": 0.5, "optimizer": "adamw"}, {"optimizer": "adamw"}),
        ({"milestones": [0.2]}, {}),
        ({"milestones": [0.5, 0.75], "schedule": "steps"}, {"schedule": "steps"}),
    ],
)
def test_what_is_unused_or_at_its_default_makes_no_further_run(task, unused, used):
    options = get_task(task).options

    def resolved(given):
        if task != "architecture_search":
            return options(**given)
        both = {"optimizer", "schedule", "milestones"}
        names = {n: [n] if n not in both else [f"search_{n}", f"retrain_{n}"] for n in given}
        return options(order="first", **{name: value for n, value in given.items() for name in names[n]})

    assert resolved(unused) == resolved(used)


@pytest.mark.parametrize("option", CLASSIFICATION)
def test_off_its_default_each_is_another_run(old, option):
    spec = old.spec.model_copy(update={"newer": CLASSIFICATION})
    changed = spec.model_copy(update={"task_options": {**spec.task_options, option: OFF[option]}})
    assert spec.key == KEY != changed.key


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_of_them_at_their_defaults_in_any_order_share_a_key(old, data):
    subset = data.draw(st.lists(st.sampled_from(sorted(CLASSIFICATION)), unique=True))
    options = {**old.spec.task_options, **{name: CLASSIFICATION[name] for name in subset}}
    ordered = {name: options[name] for name in data.draw(st.permutations(sorted(options)))}
    newer = {name: CLASSIFICATION[name] for name in data.draw(st.permutations(sorted(CLASSIFICATION)))}
    spec = old.spec.model_copy(update={"task_options": ordered, "newer": newer})
    assert spec.key == KEY
    assert RunSpec.model_validate_json(spec.model_dump_json()).key == KEY, "a stored spec keeps its key"


def test_true_is_not_one_and_a_value_without_its_mark_counts():
    plain = {"task": "t", "norm": "bn", "norm_options": {}, "seed": 0}
    plain |= {"norm_version": "1", "task_version": "1", "data_checksum": ""}

    def key(options, newer):
        return RunSpec(**plain, task_options=options, newer=newer).key

    assert key({}, {}) == key({}, {"compile": True}) == key({"compile": True}, {"compile": True})
    assert len({key({}, {}), key({"compile": 1}, {"compile": True}), key({"compile": True}, {})}) == 3
    with pytest.raises(ValueError, match="JSON"):
        key({"clip": 1.0}, {"clip": float("nan")})


def test_a_mark_counts_in_every_form_of_a_field():
    class Marked(Options):
        pair: Annotated[tuple[int, int] | None, NEWER] = (1, 2)
        kind: Annotated[str, NEWER] = "a"
        other: int = 3

    assert newer_options(Marked) == {"pair": [1, 2], "kind": "a"}


def record(seed, newer=None, version="1", **options):
    spec = RunSpec(
        task="classification",
        norm="bn",
        norm_options={},
        task_options={"dataset": "made_up", **options},
        seed=seed,
        norm_version="1",
        task_version=version,
        data_checksum="",
        newer=newer or {},
    )
    return RunRecord(spec=spec, status="ok", metrics={"top1": 0.5 + seed / 10})


def test_a_table_of_old_and_new_records_shows_one_setting():
    newer = {"optimizer": "sgd", "betas": None}
    df = from_records([record(0), record(1, newer, optimizer="sgd", betas=None)])
    assert df["option.optimizer"].tolist() == ["sgd", "sgd"]
    (table,) = [table for table in render_all(df) if table.name == "classification"]
    assert [(row.setting, row.cells[0].n) for row in table.rows] == [((), 2)]


def test_an_option_off_its_default_stands_beside_the_old_records_default():
    newer = {"optimizer": "sgd"}
    df = from_records([record(0), record(0, newer, optimizer="adamw")])
    (table,) = [table for table in render_all(df) if table.name == "classification"]
    assert [dict(row.setting) for row in table.rows] == [{"optimizer": "adamw"}, {"optimizer": "sgd"}]


def test_nothing_is_filled_in_across_versions_or_where_records_disagree():
    records = [record(0), record(1, {"a": 1}, version="2", a=1)]
    df = from_records(records, stale=True)
    assert df["option.a"].isna().tolist() == [seed == 0 for seed in df["seed"]]
    records = [record(0), record(1, {"a": 1}, a=1), record(2, {"a": 2}, a=2)]
    df = from_records(records)
    assert df["option.a"].isna().tolist() == [seed == 0 for seed in df["seed"]]

"""suite.plan: a config becomes exactly the runs it names, or one line per mistake."""

import itertools

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

import tasks
from results.record import RunSpec
from suite.config import read_config
from suite.plan import Overrides, PlanError, parse_seeds, plan, plan_config
from tasks.base import NotPrepared, Options, Setting

few = settings(deadline=None, max_examples=50)


class FakeOptions(Options):
    dataset: str = "here"
    learning_rate: float = 0.1
    epochs: int = Field(3, ge=1)
    batch_size: int = 64
    norm_batch_size: int | None = None
    milestones: tuple[int, ...] = (1, 2)
    stages: list[list[int]] | None = None

    @model_validator(mode="after")
    def _divides(self):
        if self.norm_batch_size is not None and self.batch_size % self.norm_batch_size:
            raise ValueError(f"norm_batch_size {self.norm_batch_size} does not divide {self.batch_size}")
        return self


class FakeTask:
    name = "fake"
    version = 7
    options = FakeOptions
    metrics = ("top1",)

    def __init__(self, folder):
        self.asked = folder / "asked"  # a file: tasks are asked in a process of their own

    def setting(self, options):
        return Setting(norm_batch_size=options.norm_batch_size or options.batch_size, image_shape=(1, 8, 8))

    def data_checksum(self, options, data_dir):
        if options.dataset == "far":
            raise NotPrepared('data set "far" is not prepared: run_suite.py data prepare far')
        return f"sum of {options.dataset}"

    def why_not(self, norm, info, options):
        with self.asked.open("a") as log:
            log.write(f"{info.name} ")
        if info.name == "ln":
            raise TypeError("a defect of the layer")
        return "it needs\nmore channels" if info.name == "pn" else None


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    task = FakeTask(tmp_path)
    monkeypatch.setitem(tasks._TASKS, "fake", task)
    return task


def made(config, **overrides):
    return plan_config({"norms": ["bn"], "seeds": 0, "tasks": {"fake": None}, **config}, Overrides(**overrides))


def lines_of(config, **overrides):
    with pytest.raises(PlanError) as caught:
        made(config, **overrides)
    return caught.value.lines


def test_a_spec_is_complete_after_defaults():
    (spec,) = made({"norms": [{"bgn": {"num_groups": 8}}]}).runs
    assert spec.norm == "bgn"
    assert spec.norm_options["num_groups"] == 8
    assert spec.norm_options["norm_batch_size"] == 64  # the run's setting
    assert set(spec.task_options) == set(FakeOptions.model_fields)
    assert (spec.task_version, spec.data_checksum, spec.norm_label) == ("7", "sum of here", "bgn(num_groups=8)")
    assert RunSpec.model_validate_json(spec.model_dump_json()).key == spec.key


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"learning_rate": [0.1, 0.2, 0.3]}, 3),
        ({"learning_rate": [0.1, 0.2], "epochs": [1, 2, 3]}, 6),
        ({"learning_rate": [0.1, "1e-1", 0.1]}, 1),  # the same value three times
        ({"milestones": [4, 5]}, 1),  # one value of a sequence option
        ({"milestones": [[4], [5, 6]]}, 2),  # an axis of sequences
        ({"stages": [[1], [2]]}, 1),
        ({"stages": [[[1], [2]], [[3]]]}, 2),
        ({"norm_batch_size": [2, 64, None]}, 2),  # None is the SGD batch
    ],
)
def test_a_list_is_an_axis_unless_the_option_is_a_sequence(options, expected):
    assert len(made({"tasks": {"fake": options}}).runs) == expected


@few
@given(
    rates=st.lists(st.floats(1e-4, 1, allow_nan=False), min_size=1, max_size=4, unique=True),
    epochs=st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True),
    norms=st.lists(st.sampled_from(["bn", "gn", "ln", "in", "none"]), min_size=1, max_size=4, unique=True),
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
)
def test_a_grid_is_the_product_of_its_axes_and_no_run_is_named_twice(rates, epochs, norms, seeds):
    options = {"learning_rate": rates, "epochs": epochs}
    runs = plan_config({"norms": norms, "seeds": seeds, "tasks": {"fake": options}}).runs
    assert len(runs) == len(rates) * len(epochs) * len(norms) * len(seeds)
    assert len({spec.key for spec in runs}) == len(runs)
    found = {(s.task_options["learning_rate"], s.task_options["epochs"], s.norm, s.seed) for s in runs}
    assert found == set(itertools.product(rates, epochs, norms, seeds))


def test_a_norm_that_does_not_mix_samples_runs_once_for_every_norm_batch():
    runs = made({"norms": ["gn", "bn"], "tasks": {"fake": {"norm_batch_size": [2, 4, 64]}}}).runs
    assert [s.task_options["norm_batch_size"] for s in runs if s.norm == "gn"] == [None]
    assert sorted(s.task_options["norm_batch_size"] for s in runs if s.norm == "bn") == [2, 4, 64]


def test_norm_options_make_a_grid_and_labels_name_what_differs_from_the_default():
    runs = made({"norms": ["gn", {"gn": {"num_groups": 32}}, {"bgn": {"num_groups": [1, "auto"]}}]}).runs
    assert [s.norm_label for s in runs] == ["gn", "bgn(num_groups=1)", "bgn"]


def test_a_task_entry_may_be_a_list_of_blocks_with_their_own_norms_and_seeds():
    runs = made({"tasks": {"fake": [{"epochs": 1, "norms": ["ln"], "seeds": "3-4"}, {"epochs": 2}]}}).runs
    assert [(s.task_options["epochs"], s.norm, s.seed) for s in runs] == [(1, "ln", 3), (1, "ln", 4), (2, "bn", 0)]


def test_what_can_not_serve_is_skipped_with_its_reason_and_decided_once_for_all_seeds(fake):
    result = made({"norms": ["bn", "pn"], "seeds": "0-9"})
    assert [s.norm for s in result.runs] == ["bn"] * 10
    assert {(s.norm, reason) for s, reason in result.skipped} == {("pn", "it needs more channels")}
    assert fake.asked.read_text() == "bn pn "


def test_a_layer_that_breaks_while_planning_is_planned_so_that_its_run_can_say_why():
    assert [s.norm for s in made({"norms": ["ln"]}).runs] == ["ln"]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default():
    config = {"tasks": {"fake": {"epochs": 5, "learning_rate": 0.2}}}
    (spec,) = made(config, settings=("fake.epochs=9",)).runs
    assert (spec.task_options["epochs"], spec.task_options["learning_rate"]) == (9, 0.2)
    assert spec.task_options["batch_size"] == 64
    assert len(made(config, settings=("fake.epochs=[1, 2]", "fake.milestones=[7, 8]")).runs) == 2
    assert [s.seed for s in made({"seeds": [7], "tasks": {"fake": {"seeds": 8}}}, seeds="0-1,5").runs] == [0, 1, 5]
    assert made({"threads": 2}).threads == 2
    assert made({"threads": 2}, threads=3).threads == 3


@pytest.mark.parametrize(
    ("chosen", "labels"),
    [
        (("bgn",), ["bgn(num_groups=1)", "bgn(num_groups=8)"]),  # every entry of the config with that name
        (("bgn(num_groups=8)",), ["bgn(num_groups=8)"]),
        (("ln",), ["ln"]),  # not in the config, registered
        (("ln", "bn"), ["ln", "bn"]),
    ],
)
def test_norms_of_the_command_line_select_entries_or_add_registered_names(chosen, labels):
    runs = made({"norms": ["bn", {"bgn": {"num_groups": [1, 8]}}]}, norms=chosen).runs
    assert [s.norm_label for s in runs] == labels


def test_plugin_norms_join_every_list_unless_norms_are_chosen():
    config = {"tasks": {"fake": [{}, {"epochs": 9, "norms": ["gn"]}]}}
    assert [s.norm for s in made(config, plugin_norms=("ln",)).runs] == ["bn", "ln", "gn", "ln"]
    assert [s.norm for s in made({"norms": ["ln"]}, plugin_norms=("ln",)).runs] == ["ln"]
    assert [s.norm for s in made({}, plugin_norms=("ln",), norms=("bn",)).runs] == ["bn"]


MISTAKES = [
    ({"norm": ["bn"]}, {}, ['unknown key "norm"', 'did you mean "norms"']),
    ({"budget": "small"}, {}, ["budget", "reduced, full"]),
    ({"threads": 0}, {}, ["threads 0"]),
    ({"norms": ["bm"]}, {}, ['unknown norm "bm"', 'did you mean "bn"']),
    ({"norms": "bgnn"}, {}, ['unknown norm "bgnn"', 'did you mean "bgn"']),
    ({"norms": {"bn": {}}}, {}, ["a list of names is needed"]),
    ({"norms": [["bn"]]}, {}, ["a name or {name"]),
    ({"norms": [3]}, {}, ["3"]),
    ({"norms": [{"gn": {"groups": 8}}]}, {}, ['unknown option "groups"', "num_groups"]),
    ({"norms": [{"gn": {"num_groups": "many"}}]}, {}, ["num_groups", "'many'"]),
    ({"norms": [{"gn": {"num_groups": []}}]}, {}, ["empty list"]),
    ({"norms": [{"gn": 8}]}, {}, ["a mapping of options"]),
    ({"norms": None}, {}, ["norms: missing", "bn"]),
    ({"seeds": None}, {}, ["seeds: missing"]),
    ({"seeds": "3-1"}, {}, ['"3-1"', "backwards", '"1-3"']),
    ({"tasks": {"clasification": {}}}, {}, ["clasification", 'did you mean "classification"']),
    ({"tasks": {}}, {}, ["nothing to run"]),
    ({"tasks": 3}, {}, ["a mapping is needed, not 3"]),
    ({"tasks": {"fake": 3}}, {}, ["a mapping of options is needed, not 3"]),
    ({"tasks": {"fake": {"epoch": 3}}}, {}, ['unknown option "epoch"', 'did you mean "epochs"']),
    ({"tasks": {"fake": {"epochs": "three"}}}, {}, ['option "epochs"', "'three'", "integer"]),
    ({"tasks": {"fake": {"epochs": 0}}}, {}, ['option "epochs"', "greater than or equal to 1"]),
    ({"tasks": {"fake": {"epochs": []}}}, {}, ['option "epochs"', "empty list"]),
    ({"tasks": {"fake": {"norm_batch_size": 3}}}, {}, ['task "fake": norm_batch_size 3 does not divide 64']),
    ({"tasks": {"fake": {"dataset": "far"}}}, {}, ["data prepare far"]),
    ({}, {"tasks": ("fakes",)}, ['--tasks "fakes"', 'did you mean "fake"']),
    ({}, {"norms": ("bgm",)}, ['--norms "bgm"', 'did you mean "bgn"']),
    ({}, {"seeds": "a"}, ['seeds "a"']),
    ({}, {"settings": ("epochs=3",)}, ["task.option=value"]),
    ({}, {"settings": ("fakes.epochs=3",)}, ['no task "fakes"', 'did you mean "fake"']),
    ({}, {"settings": ("fake.epoch=3",)}, ['unknown option "epoch"', 'did you mean "epochs"']),
    ({}, {"settings": ("fake.epochs=[1",)}, ["not YAML"]),
    ({}, {"settings": ("fake.epochs=&e [*e]",)}, ["not YAML"]),
]


@pytest.mark.parametrize(("config", "overrides", "parts"), MISTAKES, ids=lambda v: str(v)[:40])
def test_a_mistake_is_one_line_that_says_what_is_allowed(config, overrides, parts):
    (line,) = lines_of(config, **overrides)
    for part in parts:
        assert part in line
    assert "\n" not in line


def test_all_mistakes_are_reported_at_once():
    config = {
        "budgets": "full",
        "norms": ["bn", "bgnn", {"gn": {"groups": 2}}],
        "seeds": "3-1",
        "tasks": {"fake": {"epoch": 1, "learning_rate": "fast"}, "classificaton": {}},
    }
    assert len(lines_of(config)) == 7
    assert len(lines_of(config, settings=("x",), norms=("nope",))) == 9
    assert len(lines_of({"tasks": {"fake": {"dataset": "far", "epochs": "three"}}, "seeds": "x"})) == 3
    assert len(lines_of({"tasks": None, "norms": ["bm"], "seeds": "x"})) == 3


def test_a_grid_of_which_every_run_would_be_skipped_is_a_mistake():
    assert lines_of({"norms": ["pn"], "seeds": "0-9"}) == [
        'task "fake": nothing to run: norm "pn": it needs more channels'
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["No such file"]),
        ("- bn\n- gn\n", ["a mapping", "not a list"]),
        ("", ["a mapping", "not nothing"]),
        ("just text", ["a mapping", "not text"]),
        ("norms: [bn\nseeds: 0", ["line 2"]),
        ("norms: [bn]\nseeds: 0\nnorms: [gn]\n", ["line 3", '"norms" is given twice']),
        ("tasks:\n  fake: {epochs: 1, epochs: 2}\n", ["line 2", '"epochs" is given twice']),
        ("a: !!python/object/apply:os.system [ls]", ["line 1", "python/object"]),
        ("tasks:\n\tfake: {}\n", ["line 2", "'\\t'"]),
        ("tasks: {fake: {epochs: &e [*e]}}", ["inside themselves"]),
        ("[" * 1000, ["nested too deeply"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, parts):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        plan(file)
    (line,) = caught.value.lines
    for part in ["c.yaml", *parts]:
        assert part in line


def test_a_file_gives_the_runs_of_its_mapping(tmp_path):
    config = {"norms": ["bn", "ln"], "seeds": "0-2", "tasks": {"fake": {"learning_rate": [0.1, 0.3]}}}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(config))
    assert plan(file) == plan_config(config)


@few
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 30)), min_size=1, max_size=5))
def test_seed_ranges_expand_to_what_they_say(ranges):
    text = ",".join(str(a) if not n else f"{a}-{a + n}" for a, n in ranges)
    assert parse_seeds(text) == list(dict.fromkeys(s for a, n in ranges for s in range(a, a + n + 1)))


@pytest.mark.parametrize(
    ("given", "expected"), [(3, [3]), ([1, 0, 1], [1, 0]), (["0-2", 5], [0, 1, 2, 5]), (" 0 - 1 , 4", [0, 1, 4])]
)
def test_seeds_are_a_list_a_number_or_text(given, expected):
    assert parse_seeds(given) == expected


@pytest.mark.parametrize("given", ["3-1", "-1", "", "1,,2", "1.5", "x", 1.5, True, -1, [], [[1]], {}, "0-999999999"])
def test_other_seeds_are_refused(given):
    with pytest.raises(ValueError, match="seed"):
        parse_seeds(given)


def test_the_suites_own_configs_are_found_from_any_folder_and_a_file_that_is_there_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "classification" in read_config("configs/quick.yaml")["tasks"]
    for path in ("quick.yaml", "other/quick.yaml", tmp_path / "configs" / "quick.yaml"):
        with pytest.raises(PlanError, match="No such file"):
            read_config(path)
    with pytest.raises(PlanError, match=r'did you mean "configs/quick\.yaml"'):
        read_config("configs/quik.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick.yaml").write_text("seeds: 7", encoding="utf-8")
    assert read_config("configs/quick.yaml") == {"seeds": 7}

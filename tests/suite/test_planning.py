"""suite.planning: a config becomes exactly the runs it names, or one line per mistake."""

import itertools
import os
import subprocess
from collections.abc import Sequence

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator
from torch import nn

import suite.planning as planning
import tasks
from norms.registry import register
from results.record import RunSpec
from suite.blocks import Overrides
from suite.config import LONGEST_LINE, MOST_LINES, ManyRuns, PlanError, parse_seeds, read_config
from suite.planning import plan, plan_config
from suite.progress import Names
from suite.status import Status, describe
from tasks.base import NotPrepared, Setting
from tasks.options import LeftOut, Options

few = settings(deadline=None, max_examples=50)


class FakeOptions(Options):
    dataset: str = "here"
    source: str = "a"
    target: str = "b"
    flips: bool = False
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
        if self.source == self.target:
            raise LeftOut(f'source and target are both "{self.source}"')
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
        if options.dataset == "locked":
            raise PermissionError(13, "Permission denied", "/locked")
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
        ({"learning_rate": [0.1, 0.10, 1e-1]}, 1),  # the same value three times
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
    ({"norms": [3]}, {}, ["norms: 3: a name"]),
    ({"norms": [True]}, {}, ["norms: true: a name"]),
    ({"norms": [None]}, {}, ["norms: null: a name"]),
    ({"norms": [{3: {}}]}, {}, ["norms: a name is text, not 3"]),
    ({"norms": [{None: {}}]}, {}, ["norms: a name is text, not nothing"]),
    ({"norms": [{"gn": {3: 8}}]}, {}, ["norms: gn: a name is text, not 3"]),
    ({"norms": [{"gn": {"num_groups": "yes"}}]}, {}, ["num_groups", "an integer", "not text"]),
    ({"norms": [{"gn": {"num_groups": True}}]}, {}, ["num_groups", "an integer", "not true or false"]),
    ({"norms": []}, {}, ["norms: an empty list leaves nothing to run"]),
    ({"norms": [{"gn": []}]}, {}, ["a mapping of options", "not a list"]),
    ({"norms": [{"bn": {"eps": [*range(400)], "momentum": [*range(400)]}}]}, {}, ["160,000", "at most 100,000"]),
    ({3: "x"}, {}, ["config: a name is text, not 3"]),
    ({"tasks": {3: {}}}, {}, ["tasks: a name is text, not 3"]),
    ({"tasks": {True: {}}}, {}, ["tasks: a name is text, not true or false"]),
    ({"tasks": {"fake": {3: 1}}}, {}, ["fake: a name is text, not 3"]),
    ({"tasks": []}, {}, ["nothing to run"]),
    ({"tasks": {"fake": []}}, {}, ['task "fake": an empty list leaves nothing to run']),
    ({"tasks": {"fake": {"norms": []}}}, {}, ['task "fake": norms: an empty list']),
    ({"tasks": {"fake": {"seeds": []}}}, {}, ["seeds: an empty list"]),
    ({"seeds": []}, {}, ["seeds: an empty list"]),
    ({"seeds": "1:30"}, {}, ['seeds "1:30"']),
    ({"seeds": [True]}, {}, ["seeds true"]),
    ({"seeds": [f"{i}00000-{i}99999" for i in range(1, 11)]}, {}, ["more than 100,000 seeds"]),
    ({"threads": True}, {}, ["threads true"]),
    ({"threads": 4097}, {}, ["threads 4097", "1 to 4096"]),
    ({"norms": "plain, wide"}, {}, ["a list is written [plain, wide]"]),
    ({"threads": "2"}, {}, ["threads '2'"]),
    ({"budget": True}, {}, ["budget true", "reduced, full"]),
    ({"budget": ["full"]}, {}, ["budget ['full']"]),
    ({"tasks": {"fake": {"learning_rate": True}}}, {}, ["learning_rate", "a number is needed, not true or false"]),
    ({"tasks": {"fake": {"learning_rate": "0.1"}}}, {}, ["learning_rate", "write 0.1 without quotes"]),
    ({"tasks": {"fake": {"norm_batch_size": "yes"}}}, {}, ["norm_batch_size", "an integer is needed, not text"]),
    ({"tasks": {"fake": {"flips": "yes"}}}, {}, ["flips", "not text; write true"]),
    ({"tasks": {"fake": {"flips": 1}}}, {}, ["flips", "true or false is needed, not a number"]),
    ({"tasks": {"fake": {"epochs": 10**400}}}, {}, ["tasks: fake: epochs", "64 bits"]),
    ({"tasks": {"fake": {"learning_rate": [0.1, float("inf")]}}}, {}, ["tasks: fake: learning_rate", "finite"]),
    ({"tasks": {"fake": {"dataset": "x" * 10**5}}}, {}, ["100,000 characters; 4,096"]),
    (
        {"tasks": {"fake": {k: [*range(1, 21)] for k in ("epochs", "batch_size", "dataset", "source", "target")}}},
        {},
        ["3,200,000", "20 epochs x 20 batch_size", "at most 100,000"],
    ),
    ({"tasks": {"fake": {"source": ["a", "b"], "target": "b", "epochs": 0}}}, {}, ["epochs"]),
    ({"tasks": {"fake": {"source": ["b", "b"]}}}, {}, ['source and target are both "b"']),
    ({}, {"settings": ("fake.epochs=1", "fake.epochs=2")}, ["fake.epochs is given twice", "fake.epochs=[1, 2]"]),
    ({}, {"settings": ("fake.epochs=2,3",)}, ["a list is written [2, 3]"]),
    (
        {"tasks": {"classification": {"schedule": "cosine,steps"}}},
        {},
        ["schedule", "a list is written [cosine, steps]"],
    ),
    ({"tasks": {"classification": {"model": "resnet8, resnet20"}}}, {}, ["is written [resnet8, resnet20]"]),
    ({"tasks": {"classification": {"dataset": "mnist,usps"}}}, {}, ["unknown data set", "is written [mnist, usps]"]),
    ({}, {"settings": ("fake.epochs=" + "9" * 309,)}, ["309 digits"]),
    ({}, {"settings": ("fake.epochs={3: 1}",)}, ["a name is text, not 3"]),
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
    ({"tasks": {"fake": {"dataset": "locked"}}}, {}, ["its data can not be read: Permission denied: /locked"]),
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
    assert len(line) <= LONGEST_LINE


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
        ("norms: !!set {bn}", ["line 1", "!!set is unknown"]),
        ("norms: [bn]\nseeds: !!int ''", ["line 2", "!!int does not fit"]),
        ("norms: [bn]\r\nseeds: 1e999\r\n", ["line 2", "no finite number"]),
        ("norms: [bn]\nseeds: \0", ["line 2", "U+0000"]),
        ("norms: [bn]\n---\nseeds: 0", ["line 2", "another document"]),
        (b" " * (2**20 + 1), ["larger than 1 MiB"]),
        (b"\xfe\xff\0", ["UTF-8"]),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_may_begin_with_a_byte_order_mark_and_end_lines_as_windows_does(tmp_path, encoding):
    file = tmp_path / "c.yaml"
    file.write_bytes("norms: [bn]  # größer\r\nseeds: 0\r\ntasks: {fake: {}}\r\n".encode(encoding))
    assert len(plan(file).runs) == 1


def test_a_config_that_is_no_regular_file_is_one_line_and_a_link_to_one_is_read(tmp_path):
    (tmp_path / "c.yaml").write_text("norms: [bn]\nseeds: 0\ntasks: {fake: {}}\n")
    (tmp_path / "link.yaml").symlink_to("c.yaml")
    assert plan(tmp_path / "link.yaml") == plan(tmp_path / "c.yaml")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("loop", "pipe", "folder", "x" * 300, "nul\0", "folder/none"):
        with pytest.raises(PlanError) as caught:
            plan(tmp_path / name)
        (line,) = caught.value.lines
        assert line.startswith('config "')
        assert len(line) <= LONGEST_LINE


def test_a_pipe_is_read_to_its_end_and_within_the_bound(tmp_path):
    def written(script):
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writer:
            return read_config(f"/dev/fd/{writer.stdout.fileno()}")

    assert written("echo 'norms: [bn]'; sleep 0.2; echo 'seeds: 3'") == {"norms": ["bn"], "seeds": 3}
    with pytest.raises(PlanError, match="larger than 1 MiB"):
        written("yes '# x'")


@pytest.mark.parametrize("where", ['{"\\ud800": 1}', '{model: "\\ud800"}', '{dataset: "folder:\\ud800"}'])
def test_half_a_character_is_a_mistake_with_its_place(where, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"norms: [bn]\nseeds: 0\ntasks: {{classification: {where}}}\n")
    with pytest.raises(PlanError, match=r"classification.*U\+D800 is half a character"):
        plan(file)


def test_keys_that_begin_with_x_are_a_place_for_anchors(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "x-common: &common {epochs: 5, learning_rate: 0.3}\nx-2: 3\nnorms: [bn]\nseeds: 0\n"
        "tasks: {fake: [{<<: *common, epochs: 6}, {<<: *common}]}\n"
    )
    assert [(s.task_options["epochs"], s.task_options["learning_rate"]) for s in plan(file).runs] == [
        (6, 0.3),
        (5, 0.3),
    ]


def test_numbers_are_the_same_run_however_they_are_written(tmp_path):
    def key(options):
        file = tmp_path / "c.yaml"
        file.write_text(f"norms: [bn]\nseeds: [007]\ntasks: {{fake: {options}}}\n")
        (spec,) = plan(file).runs
        assert spec.seed == 7
        return spec.key

    assert (
        key("{batch_size: 0100}") == key("{batch_size: 1e2}") == key("{batch_size: 0x64}") == key("{batch_size: 100}")
    )
    assert key("{learning_rate: 1}") == key("{learning_rate: 1.0}") == key("{learning_rate: 1e0}")
    assert key("{learning_rate: 0.0}") == key("{learning_rate: -0.0}") == key("{learning_rate: 0}")


def test_a_norms_option_that_is_a_list_by_its_type_is_one_value(monkeypatch):
    @register(name="listed", source="test", mixes_samples=False, keeps_stats=False)
    class Listed(nn.Module):
        def __init__(self, num_channels, *, sizes: Sequence[int] | None = None, affine: bool = True):
            super().__init__()

    def options(sizes):
        return [s.norm_options["sizes"] for s in made({"norms": [{"listed": {"sizes": sizes}}]}).runs]

    assert options([2, 3]) == [[2, 3]]
    assert options([[2, 3], [4]]) == [[2, 3], [4]]
    assert options([None, [4]]) == [None, [4]]


def test_combinations_that_an_options_model_leaves_out_are_no_mistake_and_are_counted():
    result = made({"tasks": {"fake": {"source": ["a", "b", "c"], "target": ["a", "b", "c"]}}})
    pairs = [(s.task_options["source"], s.task_options["target"]) for s in result.runs]
    assert sorted(pairs) == sorted(itertools.permutations("abc", 2))
    assert len(result.left_out) == 3
    assert "source and target are both" in result.left_out[0]
    adaptation = {"dataset": "digits", "source": ["mnist", "uci"], "target": ["mnist", "uci"], "model": "resnet8"}
    result = plan_config({"norms": ["bn"], "seeds": 0, "tasks": {"domain_adaptation": adaptation}})
    assert [(s.task_options["source"], s.task_options["target"]) for s in result.runs] == [
        ("mnist", "uci"),
        ("uci", "mnist"),
    ]


def test_without_data_a_grid_is_planned_and_each_missing_set_is_named_once():
    config = {"norms": ["bn", "gn"], "seeds": 0, "tasks": {"fake": {"dataset": ["here", "far"], "epochs": [1, 2]}}}
    result = plan_config(config, without_data=True)
    assert len(result.runs) == 8
    assert result.missing == ('data set "far" is not prepared: run_suite.py data prepare far',)
    with pytest.raises(PlanError, match="data prepare far"):
        plan_config(config)


def test_more_than_100_000_runs_are_planned_only_where_they_are_meant(monkeypatch):
    config = {"seeds": "0-49999", "norms": ["bn", "ln", "gn"]}
    with pytest.raises(ManyRuns, match="150,000 runs"):
        made(config)
    with pytest.raises(PlanError, match="1,500,000 runs; at most 1,000,000"):
        made({**config, "tasks": {"fake": {"epochs": [*range(1, 11)]}}}, many=True)
    monkeypatch.setattr(planning, "MOST_RUNS", 100)  # a larger plan takes seconds
    with pytest.raises(ManyRuns, match="150 runs"):
        made({**config, "seeds": "0-49"})
    assert len(made({**config, "seeds": "0-49"}, many=True).runs) == 150
    monkeypatch.setattr(planning, "MOST_CELLS", 5)
    with pytest.raises(PlanError, match="6 combinations of settings and norms"):
        made({**config, "seeds": 0, "tasks": {"fake": {"epochs": [1, 2]}}})


def test_many_or_long_mistakes_are_cut():
    lines = lines_of({"tasks": {"fake": {"epochs": [f"x{i}" for i in range(90_000)]}}})
    assert len(lines) == MOST_LINES
    assert lines[-1].startswith("and ")
    (line,) = lines_of({"tasks": {"x" * 4000: {}}})
    assert len(line) <= LONGEST_LINE
    lines = PlanError(f"{i}" for i in range(67)).lines
    assert (len(lines), lines[-1]) == (30, "and 38 more mistakes")
    assert PlanError(["a\n\u2028b"]).lines == ["a b"]


def test_a_mapping_that_holds_itself_is_one_line():
    config = {"norms": ["bn"], "seeds": 0, "tasks": {"fake": {}}}
    config["tasks"]["fake"]["stages"] = [config]
    with pytest.raises(PlanError, match="inside themselves"):
        plan_config(config)


@pytest.mark.parametrize(
    ("method", "gives", "said"),
    [
        (
            "data_checksum",
            "options.dataset",
            "data_checksum(options, data_dir) raised AttributeError: 'Options' object",
        ),
        ("setting", "options.dataset", "setting(options) raised AttributeError: 'Options' object"),
        ("setting", "{}", "setting(options) gives a tasks.Setting; given {}"),
    ],
)
def test_a_task_of_ones_own_that_breaks_while_planning_is_one_line(tmp_path, method, gives, said):
    own = {"setting": "Setting()", "data_checksum": "''", method: gives}
    (tmp_path / "broken.py").write_text(
        "from tasks import Options, Setting, register_task\n\n\n"
        "class Broken:\n"
        "    name, version, options, metrics = 'planning_broken', 1, Options, ('top1',)\n"
        "    run = why_not = print\n"
        f"    def setting(self, options): return {own['setting']}\n"
        f"    def data_checksum(self, options, data_dir): return {own['data_checksum']}\n\n\n"
        "register_task(Broken())\n"
    )
    config = {"plugins": ["broken.py"], "norms": ["bn"], "seeds": [0], "tasks": {"planning_broken": {}}}
    with pytest.raises(PlanError) as caught:
        plan_config(config, tried=False, folder=tmp_path)
    (line,) = caught.value.lines
    assert line.startswith(f'task "planning_broken": {said}')


def test_a_dry_run_of_many_settings_is_one_line_per_norm(tmp_path):
    rates = [0.001 * number for number in range(1, 61)]
    options = {"dataset": "fashion_mnist_mini", "model": "resnet8", "learning_rate": rates}
    planned = plan_config({"norms": ["bn", "gn", "in"], "seeds": [0, 1, 5], "tasks": {"classification": options}})
    everything = [*planned.runs, *(spec for spec, _ in planned.skipped)]
    lines = [*describe(Status(planned, tmp_path / "out", retry=False), Names(everything))]
    assert len(lines) == 5
    assert [line.split()[:5] for line in lines[1:3:2]] == [["classification", "60", "bn", "0-1,5", "180"]]
    assert lines[-1] == "180 settings of norms are summed up by norm; --json lists every run"

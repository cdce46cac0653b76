"""Data sets of one's own: registered, checked before anything runs, served by the functions that serve the suite's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tasks
from norms import make_norm, plugins
from tasks.base import NotPrepared, RunContext
from tasks.data import (
    Contents,
    DatasetInfo,
    InMemory,
    Source,
    Split,
    check_batch_size,
    check_classifiable,
    check_disjoint,
    check_domains,
    checksum,
    class_counts,
    dataset_info,
    dataset_names,
    domain_labels,
    domain_names,
    in_memory,
    is_prepared,
    listed,
    load,
    load_disjoint,
    load_domains,
    open_folder,
    prepare,
    register_dataset,
)
from tasks.data import catalog as catalog_module
from tasks.data.images import make_data

NOWHERE = Path("/nonexistent")
PAGE = Path(__file__).parents[3] / "docs" / "data.md"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten."""
    monkeypatch.setattr(catalog_module, "_SOURCES", {})


def part(seed, labels, shape=(3, 8, 8)):
    labels = np.array(labels, np.int64)
    return np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), dtype=np.uint8), labels


def whole(seed=0, classes=4):
    labels = list(range(classes))
    return {"train": part(seed, labels * 8), "val": part(seed + 1, labels * 3), "test": part(seed + 2, labels * 4)}


def disjoint():
    return {"train": part(0, [0, 1] * 9), "val": part(1, [2, 3] * 9), "test": part(2, [4, 5] * 9)}


def put(given=None, name="mine", *, replace=False, **facts):
    facts = {"num_classes": 4, "title": "Mine", **facts}
    return register_dataset(name, InMemory(lambda: whole() if given is None else given, **facts), replace=replace)


# a set in memory


def test_arrays_are_loaded_as_given():
    given = whole()
    put(given, image_shape=(3, 8, 8), class_names="abcd")
    data, info = load("mine", NOWHERE), dataset_info("mine")
    assert dataset_names()[-1] == "mine"
    assert info.image_shape == data.image_shape == (3, 8, 8)
    assert (data.name, data.title, data.kind, data.class_names) == ("mine", "Mine", "real", tuple("abcd"))
    for p, (images, labels) in given.items():
        assert np.array_equal(getattr(data, p).images.numpy(), images)
        assert np.array_equal(getattr(data, p).labels.numpy(), labels)
        assert class_counts("mine", NOWHERE)[p].tolist() == np.bincount(labels).tolist()
    assert data.checksum == checksum("mine", NOWHERE)
    assert load("mine", NOWHERE, classes=2).num_classes == 2
    assert is_prepared("mine", NOWHERE)
    assert in_memory("mine", NOWHERE)
    assert not prepare("mine", NOWHERE).made
    assert [(each.here, each.name) for each in listed(NOWHERE)][-1] == ("yes", "mine")
    check_classifiable("mine", NOWHERE, 3)


def test_tensors_and_odd_strides_are_taken_and_later_edits_change_nothing():
    given = whole()
    images, labels = given["train"]
    turned = {**given, "train": (images.transpose(0, 1, 3, 2)[::-1], torch.from_numpy(labels[::-1].copy()))}
    put(turned)
    data = load("mine", NOWHERE)
    assert np.array_equal(data.train.images.numpy(), images.transpose(0, 1, 3, 2)[::-1])
    assert data.train.images.is_contiguous()
    images[:] = 0
    assert load("mine", NOWHERE).train.images.any()


def test_the_function_is_called_once_and_only_when_data_are_asked_for():
    calls = []
    register_dataset("mine", InMemory(lambda: calls.append(1) or whole(), num_classes=4, title="Mine"))
    dataset_info("mine")
    dataset_names()
    assert not calls
    for _ in range(2):
        load("mine", NOWHERE)
        checksum("mine", NOWHERE)
    assert calls == [1]


def test_the_checksum_is_of_the_content():
    def edited(change):
        given = whole()
        change(given)
        put(given, replace=True)
        return checksum("mine", NOWHERE)

    def pixel(given):
        given["test"][0][0, 0, 0, 0] ^= 1

    def label(given):
        given["train"][1][:2] = given["train"][1][1::-1].copy()

    def parts_swapped(given):
        given["val"], given["test"] = given["test"], given["val"]

    same = edited(lambda given: None)
    assert edited(lambda given: None) == same
    assert len({same, edited(pixel), edited(label), edited(parts_swapped)}) == 4


def test_domains_serve_adaptation_and_generalization():
    put({"photo": whole(0), "art": whole(10)}, domains=("art", "photo"))
    assert domain_names("mine", NOWHERE) == ("art", "photo") == dataset_info("mine").domains
    assert [data.name for data in load_domains("mine", NOWHERE).values()] == ["mine/art", "mine/photo"]
    assert domain_labels("mine", NOWHERE)["art"]["val"].bincount().tolist() == [3] * 4
    check_domains("mine", NOWHERE, ["photo", "art"], 3)
    check_batch_size("mine", NOWHERE, ["photo"], 32)
    with pytest.raises(ValueError, match="batch_size 33 exceeds the 32"):
        check_batch_size("mine", NOWHERE, ["photo"], 33)
    for call, message in (
        (lambda: load("mine", NOWHERE), "has domains; give domain= one of art, photo"),
        (lambda: load("mine", NOWHERE, domain="foto"), 'unknown domain "foto".*did you mean "photo"'),
        (lambda: check_classifiable("mine", NOWHERE), r"has domains \(art, photo\); one without is needed"),
        (lambda: domain_names("glyphs", NOWHERE), "allowed: .*mnist_usps_svhn, mine, or a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_disjoint_classes_serve_few_shot():
    put(disjoint(), num_classes=6, few_shot=True)
    check_disjoint("mine", NOWHERE)
    assert load_disjoint("mine", NOWHERE).disjoint_classes
    with pytest.raises(ValueError, match="is a few-shot one"):
        check_classifiable("mine", NOWHERE)
    put(name="other")
    with pytest.raises(ValueError, match="share classes; allowed: glyphs, omniglot, mine, or a folder"):
        check_disjoint("other", NOWHERE)


def changed(part_name, images=None, labels=None):
    given = whole()
    old = given[part_name]
    given[part_name] = (old[0] if images is None else images(old[0]), old[1] if labels is None else labels(old[1]))
    return given


def without(part_name):
    return {p: arrays for p, arrays in whole().items() if p != part_name}


def copied():
    given = whole()
    given["test"][0][[3, 5]] = given["train"][0][[7, 9]]
    return given


@pytest.mark.parametrize(
    ("given", "facts", "message"),
    [
        (copied(), {}, "2 images are in two parts: test also in train, such as test 3 and train 7; leave them out"),
        ({**whole(), "val": whole()["train"]}, {}, "32 images are in two parts: val also in train, such as val 0 and"),
        (changed("test", labels=lambda y: y % 3), {}, 'the test part has no image of class "3"; every part needs'),
        (changed("train", labels=lambda y: y % 3), {"class_names": "abcd"}, 'the train part has no image of class "d"'),
        (changed("val", labels=lambda y: y + 1), {}, "the val part has a label 4; with num_classes 4 they are 0 to 3"),
        (changed("val", labels=lambda y: y - 1), {}, "the val part has a label -1"),
        (whole(), {"num_classes": 5}, 'the train part has no image of class "4"'),
        (changed("val", images=lambda x: x / 255), {}, r"images of the val part are float64 \(12, 3, 8, 8\); they"),
        (changed("val", images=lambda x: x.astype(">u2")), {}, "images of the val part are >u2"),
        (changed("val", images=lambda x: x[:, 0]), {}, r"are uint8 \(12, 8, 8\); they must be uint8 \(N, C, H, W\)"),
        (changed("val", images=lambda x: x[:0]), {}, "they must be uint8"),
        (changed("val", images=lambda x: x[1:]), {}, "the val part has 11 images and 12 labels"),
        (changed("val", images=lambda x: x[..., :4]), {}, r"several shapes: \(3, 8, 4\), \(3, 8, 8\)"),
        (changed("val", images=lambda x: x.tolist()), {}, "as numpy arrays or tensors"),
        (changed("val", images=lambda x: torch.zeros(12, 3, 8, 8, dtype=torch.bfloat16)), {}, "BFloat16"),
        (changed("val", labels=lambda y: y.astype(np.uint8)), {}, r"labels of the val part are uint8 \(12,\); "),
        (changed("val", labels=lambda y: np.eye(4, dtype=np.int64)[y]), {}, r"they must be int64 \(N,\)"),
        ({**whole(), "val": whole()["val"][0]}, {}, r"the val part is not \(images, labels\)"),
        (without("val"), {}, "parts are train, val, test; given train, test"),
        (None, {"image_shape": (1, 8, 8)}, r"images are \(3, 8, 8\), image_shape says \(1, 8, 8\)"),
        ({"a": whole(), "b": whole()}, {}, r"parts are train, val, test; given a, b \(domains= names domains\)"),
        ({"a": whole()}, {"domains": ("a", "b")}, "domains are a, b; given a"),
        ({"a": whole(), "b": copied()}, {"domains": ("a", "b")}, '2 images are in two parts of domain "b"'),
        (disjoint(), {"num_classes": 7, "few_shot": True}, 'the whole part has no image of class "6"'),
        (whole(), {"few_shot": True}, 'few_shot: class "0" is in two parts'),
        ([1], {}, "its function gives list, not a dict of parts"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_arrays_is_one_line_before_anything_runs(given, facts, message):
    put(given, **facts)
    task = tasks.get_task("classification")
    for ask in (checksum, lambda *of: task.data_checksum(task.options(dataset="mine", batch_size=4), NOWHERE)):
        if ask is not checksum and {"domains", "few_shot"} & facts.keys():
            continue
        with pytest.raises(ValueError, match=message) as caught:
            ask("mine", NOWHERE)
        assert str(caught.value).startswith('data set "mine": ')
        assert "\n" not in str(caught.value)
    (line,) = [each for each in listed(NOWHERE) if each.name == "mine"]
    assert line.here == "damaged"


def test_a_function_that_fails_is_one_line_and_data_that_are_not_here_are_not_prepared():
    def fails():
        raise FileNotFoundError(2, "No such file", "/a/b.npz")

    def lacks():
        raise NotPrepared("put b.npz into /a")

    register_dataset("mine", InMemory(fails, num_classes=4, title="Mine"))
    with pytest.raises(ValueError, match=r'"mine": its function failed with FileNotFoundError: .*/a/b\.npz'):
        checksum("mine", NOWHERE)
    register_dataset("other", InMemory(lacks, num_classes=4, title="Mine"))
    with pytest.raises(NotPrepared, match=r"put b\.npz"):
        load("other", NOWHERE)
    assert not is_prepared("other", NOWHERE)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_classes": 1}, "num_classes 1, 0 class_names"),
        ({"num_classes": True}, "num_classes true"),
        ({"class_names": "abc"}, "num_classes 4, 3 class_names"),
        ({"kind": "fake"}, 'kind "fake": allowed are real and synthetic'),
        ({"domains": ("a", "a")}, "all different"),
        ({"domains": ("a",)}, "two names or more"),
        ({"domains": "ab"}, "two names or more"),
        ({"domains": ("a", "b"), "few_shot": True}, "a few-shot set has no domains"),
    ],
)
def test_facts_that_can_not_be_are_refused_at_once(facts, message):
    with pytest.raises(ValueError, match=message):
        put(**facts)


# names


def test_a_name_is_registered_once_and_replaced_when_asked():
    put()
    with pytest.raises(
        ValueError, match=rf'"mine" is already registered by {__file__}:\d+; .* must choose another'
    ) as e:
        put()
    assert "\n" not in str(e.value)
    put(whole(7), replace=True)
    assert np.array_equal(load("mine", NOWHERE).test.images.numpy(), whole(7)["test"][0])
    for name, message in (
        ("glyphs", "is one of the suite"),
        ("Mine", "lower case"),
        ("folder:x", "lower case"),
        (3, "lower"),
    ):
        with pytest.raises(ValueError, match=message):
            put(name=name, replace=True)
    with pytest.raises(ValueError, match=r"int does not derive from tasks\.data\.Source"):
        register_dataset("three", 3)
    with pytest.raises(
        ValueError, match=r'unknown data set "mime"; allowed: .*mine, folder:PATH; did you mean "mine"\?'
    ):
        load("mime", NOWHERE)


def test_what_registered_sets_do_not_take_is_said():
    put()
    for call, message in (
        (lambda: prepare("mine", NOWHERE, size=8), '"mine" takes no size; imagenet, folders do'),
        (lambda: prepare("mine", NOWHERE, source=NOWHERE), '"mine" takes no source; mnist, .*imagenet do'),
        (lambda: load("mine", NOWHERE, domian="x"), 'unknown option "domian"; allowed: classes'),
        (lambda: load("mine", NOWHERE, classes=5), "classes=5 is not in 2..4"),
        (lambda: open_folder("mine", NOWHERE), "is not a folder of images: use load"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


PLUGIN = """
from tasks.data import InMemory, register_dataset
import numpy as np
def parts():
    draw = np.random.default_rng({seed})
    labels = np.arange(8) % 2
    return {{p: (draw.integers(0, 256, (8, 1, 4, 4), dtype=np.uint8), labels) for p in ("train", "val", "test")}}
register_dataset("{name}", InMemory(parts, num_classes=2, title="t"))
"""


def test_a_plugins_sets_go_when_it_is_loaded_again_and_two_plugins_do_not_share_a_name(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(PLUGIN.format(name="first", seed=0))
    assert plugins.load(one).names == (("dataset", "first"),)
    before = checksum("first", NOWHERE)
    one.write_text(PLUGIN.format(name="first", seed=1))
    plugins.load(one)
    assert checksum("first", NOWHERE) != before
    one.write_text(PLUGIN.format(name="second", seed=1))
    plugins.load(one)
    assert dataset_names()[-1] == "second"
    assert "first" not in dataset_names()
    other.write_text(PLUGIN.format(name="second", seed=2))
    with pytest.raises(ValueError, match=rf'"second" is already registered by {one}:\d+') as caught:
        plugins.load(other)
    assert "\n" not in str(caught.value)
    other.write_text(PLUGIN.format(name="second", seed=2).replace('title="t")', 'title="t"), replace=True'))
    with pytest.raises(ValueError, match=r'"second" is already registered by'):
        plugins.load(other)
    assert "second" in dataset_names()


def test_a_plugin_on_offer_is_loaded_when_its_set_is_asked_for(tmp_path, monkeypatch):
    file = tmp_path / "offered.py"
    file.write_text(PLUGIN.format(name="offered", seed=0))
    there = plugins.load(file)
    catalog_module.forget_dataset("offered")
    monkeypatch.delitem(plugins.sys.modules, plugins._module_name(file))  # as in another process
    plugins.offer([there])
    assert load("offered", NOWHERE).num_classes == 2


def test_a_source_says_what_it_can_do_and_the_rest_has_an_answer():
    class Minimal(Source):
        def info(self, name):
            return dataset_info("glyphs")

    minimal = Minimal()
    assert not minimal.prepare("x", NOWHERE).made
    assert minimal.in_memory("x", NOWHERE)
    assert minimal.few_shot("x", NOWHERE)
    assert minimal.domains("x", NOWHERE) == ()
    with pytest.raises(ValueError, match="use load"):
        minimal.open("x", NOWHERE)


class Own(Source):
    """A source of one's own that gives what it is told to."""

    def __init__(self, given, disjoint=False):
        self.given, self.disjoint = given, disjoint

    def info(self, name):
        return DatasetInfo(name, "Own", "synthetic", None, None, {}, (), False, "registered", "none", self.disjoint)

    def is_prepared(self, name, data_dir):
        return True

    def checksum(self, name, data_dir):
        return "own"

    def contents(self, name, data_dir):
        count = 6 if self.disjoint else 4
        return Contents(tuple(map(str, range(count))), disjoint_classes=self.disjoint)

    def labels(self, name, data_dir, domain):
        return {part: torch.from_numpy(labels) for part, (_, labels) in self.given().items()}

    def load(self, name, data_dir, *, classes=None):
        parts = {part: Split(torch.from_numpy(i), torch.from_numpy(k)) for part, (i, k) in self.given().items()}
        facts = {"num_classes": 6 if self.disjoint else 4, "disjoint_classes": self.disjoint, "classes": classes}
        return make_data(name, "Own", parts, kind="synthetic", checksum="own", **facts)


class Half(Own):
    def contents(self, name, data_dir):
        """Not written yet."""


def changed(part, place, value):
    given = whole()
    given[part][place][:] = value
    return given


def test_a_source_of_ones_own_is_looked_at_too():
    register_dataset("mine", Own(whole))
    assert load("mine", NOWHERE, classes=3).num_classes == 3
    assert class_counts("mine", NOWHERE)["val"].sum() == len(whole()["val"][1])
    twice = whole()
    twice["test"][0][1] = twice["train"][0][2]
    for call, source, message in (
        (class_counts, Own(lambda: changed("val", 1, 1)), 'the val part has no image of class "0"'),
        (class_counts, Own(lambda: changed("test", 1, 7)), "the test part has a label 7; with 4 class_names"),
        (class_counts, Own(lambda: {"train": whole()["train"]}), "parts are train, val, test; given train"),
        (class_counts, Own(lambda: 1 / 0), r"Own\.labels failed with ZeroDivisionError"),
        (load, Own(lambda: changed("test", 1, 1)), 'the test part has no image of class "0"'),
        (load, Own(lambda: twice), "1 image is in two parts: test also in train, such as test 1 and train 2"),
        (load_disjoint, Own(whole, disjoint=True), 'few_shot: class "0" is in two parts'),
        (class_counts, Half(whole), r"Half\.contents gives NoneType, not Contents"),
    ):
        register_dataset("mine", source, replace=True)
        catalog_module._class_counts.cache_clear()
        with pytest.raises(ValueError, match=f'^data set "mine": {message}') as caught:
            call("mine", NOWHERE)
        assert "\n" not in str(caught.value)


# the page


def test_the_plugin_of_the_page_trains(tmp_path):
    (text,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "rings.py").write_text(text)
    plugins.load(tmp_path / "rings.py")
    task = tasks.get_task("classification")
    options = task.options(dataset="rings", model="resnet8", epochs=1, max_steps=2, batch_size=16)
    assert task.data_checksum(options, NOWHERE) == load("rings", NOWHERE).checksum
    outcome = task.run(
        make_norm("bn"), options, RunContext(torch.device("cpu"), seed=0, data_dir=NOWHERE, folder=tmp_path)
    )
    assert 0 <= outcome.metrics["top1"] <= 100


# every task


@pytest.mark.parametrize(
    ("task", "name", "options"),
    [
        ("classification", "plain", {"batch_size": 8}),
        ("adversarial", "plain", {"batch_size": 8, "attack_images": 16}),
        ("architecture_search", "plain", {"search_batch_size": 8, "retrain_batch_size": 8, "auxiliary_weight": 0}),
        ("few_shot", "apart", {"way": 2, "shot": 1, "queries": 2}),
        ("domain_adaptation", "styles", {"source": "photo", "target": "art", "batch_size": 8}),
        ("domain_generalization", "styles", {"held_out": "art", "batch_size": 8}),
    ],
)
def test_every_task_takes_a_set_of_its_kind(task, name, options):
    put(name="plain")
    put(disjoint(), name="apart", num_classes=6, few_shot=True)
    put(
        {d: whole(10 * i) for i, d in enumerate(("photo", "art", "sketch"))},
        name="styles",
        domains=("photo", "art", "sketch"),
    )
    task = tasks.get_task(task)
    assert task.data_checksum(task.options(dataset=name, **options), NOWHERE) == checksum(name, NOWHERE)


def test_the_shape_of_images_is_known_once_they_are_read():
    register_dataset("mine", InMemory(whole, num_classes=4, title="Mine"))
    before = dataset_info("mine").image_shape
    checksum("mine", NOWHERE)  # as a plan does before it asks whether norms fit
    assert (before, dataset_info("mine").image_shape) == (None, (3, 8, 8))

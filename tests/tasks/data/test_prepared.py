"""Prepared data: torchvision's sets without a network, folders of images, and what an interruption leaves."""

import json
import os
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from parts.tiny_sets import MNIST_LIKE, known, pixels, tiny
from PIL import Image

from tasks.base import NotPrepared
from tasks.classification import task as classification
from tasks.data import (
    checksum,
    dataset_info,
    dataset_names,
    domain_names,
    folders,
    is_prepared,
    lazy,
    load,
    load_domains,
    loaded_batches,
    open_folder,
    prepare,
)
from tasks.data.folders import list_folder
from tasks.data.lazy import decode
from tasks.data.sources import downloads
from tasks.data.sources.downloads import DOWNLOADS


class Fake:
    """Stands for a torchvision set: 40 training and 20 test images in the attributes and shapes of the real class."""

    classes = tuple("abcdefghij")

    def __init__(self, root, train=True, split=None, download=False):
        assert download
        assert os.path.isdir(root)
        count = 40 if (split or ("train" if train else "test")) == "train" else 20
        self.data, self.targets = self.make(count), [i % 10 for i in range(count)]
        self.labels = np.array(self.targets)


class FakeCifar(Fake):
    def make(self, count):
        return pixels(count, 32, 32, 3, seed=count)


class FakeSvhn(Fake):
    def make(self, count):
        return pixels(count, 3, 32, 32, seed=count)


class FakeStl(Fake):
    def make(self, count):
        return pixels(count, 3, 96, 96, seed=count)


FAKES = {
    "cifar10": ("CIFAR10", FakeCifar),
    "cifar100": ("CIFAR100", FakeCifar),
    "svhn": ("SVHN", FakeSvhn),
    "stl10": ("STL10", FakeStl),
}
ARCHIVES = (*MNIST_LIKE, "emnist", "usps")


def offer(name, data_dir, monkeypatch):
    """A tiny set of that name, ready to be prepared."""
    if name in FAKES:
        known(monkeypatch, name)
        monkeypatch.setattr(torchvision.datasets, *FAKES[name])
    else:
        tiny(monkeypatch, data_dir, name)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    offer("cifar10", tmp_path, monkeypatch)
    prepare("cifar10", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [*FAKES, *ARCHIVES])
def test_a_torchvision_set_is_prepared_once_and_loaded_as_listed(name, tmp_path, monkeypatch):
    offer(name, tmp_path, monkeypatch)
    assert not is_prepared(name, tmp_path)
    prepare(name, tmp_path)
    assert is_prepared(name, tmp_path)
    monkeypatch.setattr(downloads, "prepare_download", None)  # from here on nothing may download
    prepare(name, tmp_path)
    data, info = load(name, tmp_path), dataset_info(name)
    assert data.image_shape == info.image_shape
    assert data.num_classes == info.num_classes
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 20)  # a class of 4 gives 1 to val
    assert torch.bincount(data.val.labels, minlength=10)[:10].tolist() == [1] * 10
    assert data.checksum == checksum(name, tmp_path)
    assert data.kind == "real"
    assert {p.name for p in tmp_path.iterdir()} == {name, "downloads"}


def test_images_reach_the_cache_unchanged_and_the_right_way_up(tmp_path, monkeypatch):
    for name in ("mnist", "emnist", "cifar10", "usps"):
        offer(name, tmp_path, monkeypatch)
        prepare(name, tmp_path)
    gray = pixels(20, 28, 28, seed=20)
    assert np.array_equal(load("mnist", tmp_path).test.images[:, 0, 2:30, 2:30].numpy(), gray)
    assert np.array_equal(load("emnist", tmp_path).test.images[:, 0, 2:30, 2:30].numpy(), gray.transpose(0, 2, 1))
    colour = load("cifar10", tmp_path).test.images.numpy()
    assert np.array_equal(colour, pixels(20, 32, 32, 3, seed=20).transpose(0, 3, 1, 2))
    small = pixels(20, 16, 16, seed=20)
    large = load("usps", tmp_path).test.images[:, 0].numpy()
    assert np.array_equal(large[:, 0, 0], small[:, 0, 0])
    assert np.array_equal(large[:, 31, 31], small[:, 15, 15])


def test_train_and_val_together_are_the_published_training_set(cifar):
    data = load("cifar10", cifar)
    both = {image.numpy().tobytes() for part in (data.train, data.val) for image in part.images}
    assert both == {image.tobytes() for image in pixels(40, 32, 32, 3, seed=40).transpose(0, 3, 1, 2)}


def test_a_downloaded_set_is_made_again_by_force_only(cifar, monkeypatch):
    before = checksum("cifar10", cifar)
    monkeypatch.setattr(FakeCifar, "make", lambda self, count: pixels(count, 32, 32, 3, seed=count + 1))
    assert not prepare("cifar10", cifar).made
    assert checksum("cifar10", cifar) == before
    assert prepare("cifar10", cifar, force=True).made
    assert checksum("cifar10", cifar) != before
    assert {p.name for p in cifar.iterdir()} == {"cifar10", "downloads"}


def test_omniglot_has_disjoint_classes_by_alphabet(tmp_path, monkeypatch):
    offer("omniglot", tmp_path, monkeypatch)
    prepare("omniglot", tmp_path)
    data = load("omniglot", tmp_path)
    assert data.class_names == tuple(sorted(data.class_names[:16])) + tuple(sorted(data.class_names[16:]))
    names = [{data.class_names[k].split("/")[0] for k in p.labels.tolist()} for p in (data.train, data.val, data.test)]
    assert names[0] == {"Alphabet 0", "Alphabet 1"}
    assert names[1] == {f"Alphabet {i}" for i in range(2, 8)}
    assert names[2] == {"Other 1", "Other 2"}
    assert data.disjoint_classes
    assert data.train.images.shape == (12, 1, 32, 32)
    drawn = Image.fromarray(pixels(105, 105, seed=1001)).convert("1").convert("L").resize((32, 32))
    assert np.array_equal(data.train.images[1, 0].numpy(), 255 - np.asarray(drawn))


@pytest.mark.parametrize("name", [*DOWNLOADS, "imagenet", "folder:somewhere"])
def test_a_missing_set_names_the_command_that_prepares_it(name, tmp_path):
    for ask in (load, checksum):
        with pytest.raises(NotPrepared, match=f"run `python run_suite.py data prepare {name} --data-dir {tmp_path}`"):
            ask(name, tmp_path)
        with pytest.raises(NotPrepared, match=f"run `python run_suite.py data prepare {name}`"):
            ask(name, Path("data"))
    assert not is_prepared(name, tmp_path)
    assert dataset_info(name).how.startswith(f"python run_suite.py data prepare {name}")


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("Dataset not found or corrupted")])
def test_a_failed_download_says_so_and_leaves_nothing(error, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(ValueError, match=r'"cifar10" could not be downloaded or read: .*Nothing of it was prepared'):
        prepare("cifar10", tmp_path)
    assert not is_prepared("cifar10", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"downloads"}


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    offer("cifar10", tmp_path, monkeypatch)
    saved, save = [], np.save

    def interrupt(path, *args, **options):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, *args, **options)

    monkeypatch.setattr(np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"downloads"}
    monkeypatch.setattr(np, "save", save)
    prepare("cifar10", tmp_path)
    assert len(load("cifar10", tmp_path).test) == 20


def test_two_processes_that_prepare_at_once_end_with_one_set(tmp_path, monkeypatch):
    class Slow(FakeCifar):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if Slow.first:
                Slow.first = False
                prepare("cifar10", tmp_path)  # the other one is faster

    known(monkeypatch, "cifar10")
    Slow.first = True
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Slow)
    prepare("cifar10", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"cifar10", "downloads"}
    assert len(load("cifar10", tmp_path).train) == 30


def test_damage_to_any_file_is_found(cifar):
    for path in sorted((cifar / "cifar10").glob("*.npy")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{path.name}: damaged or missing; delete .* run `python run_suite.py"):
            load("cifar10", cifar)
        path.unlink()
        with pytest.raises(ValueError, match="damaged or missing"):
            load("cifar10", cifar)
        path.write_bytes(content)
    assert len(load("cifar10", cifar).train) == 30


@pytest.mark.parametrize(
    ("text", "message"), [("{", "damaged"), ("[]", "damaged"), ('{"format": 0}', "written as format 0, this is format")]
)
def test_a_manifest_that_can_not_be_used_is_named(cifar, text, message):
    (cifar / "cifar10" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        load("cifar10", cifar)


def test_the_checksum_follows_the_content_and_reads_no_images(tmp_path, monkeypatch):
    sums = set()
    known(monkeypatch, "cifar10")
    for seed in (0, 1):
        monkeypatch.setattr(FakeCifar, "make", lambda self, count, seed=seed: pixels(count, 32, 32, 3, seed=seed))
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCifar)
        folder = tmp_path / str(seed)
        prepare("cifar10", folder)
        for path in (folder / "cifar10").glob("*.npy"):
            path.unlink()
        sums.add(checksum("cifar10", folder))
    assert len(sums) == 2


def test_the_first_classes_of_a_prepared_set(cifar):
    data = load("cifar10", cifar, classes=3)
    assert data.num_classes == 3
    assert data.class_names == ("a", "b", "c")
    assert data.test.labels.unique().tolist() == [0, 1, 2]
    assert data.mean != load("cifar10", cifar).mean
    with pytest.raises(ValueError, match=r"classes=11 is not in 2\.\.10"):
        load("cifar10", cifar, classes=11)
    with pytest.raises(ValueError, match='unknown domain "x"; allowed: none'):
        load("cifar10", cifar, domain="x")


# folders


def make_folder(root, layout, count=10, side=(20, 30)):
    """layout: {top: classes}; `count` PNGs in each class, the first of their pixels coding class and number."""
    for top, classes in layout.items():
        for k, name in enumerate(classes):
            (root / top / name).mkdir(parents=True)
            for i in range(count):
                array = pixels(*side, 3, seed=hash((len(top), k, i)) % 2**32)
                Image.fromarray(array).save(root / top / name / f"{i}.png")
    return root


def test_a_folder_of_splits(tmp_path):
    root = make_folder(tmp_path / "pets", {"train": ["cat", "dog"], "test": ["cat", "dog"]})
    name = f"folder:{root}"
    prepare(name, tmp_path / "data", size=16)
    data = load(name, tmp_path / "data")
    assert data.title == "pets"
    assert data.class_names == ("cat", "dog")
    assert data.image_shape == (3, 16, 16)
    assert [torch.bincount(p.labels).tolist() for p in (data.train, data.val, data.test)] == [[9, 9], [1, 1], [10, 10]]
    first = np.stack([decode(root / "test" / "cat" / f"{i}.png", 16) for i in range(10)])
    assert np.array_equal(data.test.images[:10].numpy(), first)
    prepare(name, tmp_path / "data", size=16)
    with pytest.raises(ValueError, match="prepared with another size"):
        prepare(name, tmp_path / "data", size=32)


@pytest.mark.parametrize(
    ("layout", "val", "test"),
    [
        ({"train": "ab", "valid": "ab", "test": "ab"}, 20, 20),
        ({"Train": "ab", "Test": "a"}, 2, 10),
        ({"train": "ab", "val": "ab"}, 2, 20),  # ImageNet: its val is the test part
    ],
)
def test_split_names_are_understood(tmp_path, layout, val, test):
    listing = list_folder(make_folder(tmp_path, layout))
    assert len(listing.domains[""]["val"]) == val
    assert len(listing.domains[""]["test"]) == test
    everything = [path for images in listing.domains[""].values() for path, _ in images]
    assert len(set(everything)) == len(everything)


def test_a_folder_of_domains(tmp_path):
    root = make_folder(tmp_path / "office", {"amazon": "ab", "dslr": "ab", "webcam": "ab"})
    name = f"folder:{root}"
    prepare(name, tmp_path / "data", size=8)
    domains = load_domains(name, tmp_path / "data")
    assert list(domains) == list(domain_names(name, tmp_path / "data")) == ["amazon", "dslr", "webcam"]
    for data in domains.values():
        assert [len(p) for p in (data.train, data.val, data.test)] == [14, 2, 4]
    one = load(name, tmp_path / "data", domain="dslr")
    assert torch.equal(one.train.images, domains["dslr"].train.images)
    with pytest.raises(ValueError, match="has domains; give domain= one of amazon, dslr, webcam"):
        load(name, tmp_path / "data")
    with pytest.raises(ValueError, match=r'unknown domain "dlsr".*did you mean "dslr"'):
        load(name, tmp_path / "data", domain="dlsr")


def test_a_few_shot_folder_keeps_its_classes_apart(tmp_path):
    root = make_folder(tmp_path / "mini", {"train": "abc", "val": "de", "test": "fg"})
    prepare(f"folder:{root}", tmp_path / "data", size=8)
    data = load(f"folder:{root}", tmp_path / "data")
    assert data.disjoint_classes
    assert [p.labels.unique().tolist() for p in (data.train, data.val, data.test)] == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match="no image is left in the val part"):
        load(f"folder:{root}", tmp_path / "data", classes=2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "no such folder"),
        ({}, "no subfolders; expected root/split/class"),
        ({"train": ""}, 'split "train" has no class folders'),
        ({"train": "ab"}, "found train; expected train and test"),
        ({"test": "ab", "val": "ab"}, "expected train and test"),
        ({"train": "ab", "test": "abc"}, 'class "c" is in test but not in train'),
        ({"train": "ab", "test": "cd"}, "so a val folder is needed"),
        ({"train": "a", "test": "a"}, "one class"),
        ({"val": "ab", "valid": "ab", "train": "ab"}, "name one split twice"),
        ({"train": "ab", "photo": "ab"}, "mixes splits .* with other names"),
        ({"photo": "ab"}, 'one subfolder, "photo"'),
        (
            {"photo": "ab", "art": "abc"},
            'domain "photo" has no class folder "c", which domain "art" has; all domains need',
        ),
    ],
)
def test_an_unsupported_layout_says_what_was_found(tmp_path, layout, message):
    root = tmp_path / "root"
    if layout is not None:
        root.mkdir()
        for top in layout:
            (root / top).mkdir()
        for top, classes in layout.items():
            for name in classes:
                (root / top / name).mkdir()
                for i in range(3):
                    Image.fromarray(pixels(4, 4, 3)).save(root / top / name / f"{i}.png")
    with pytest.raises(ValueError, match=message):
        prepare(f"folder:{root}", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_folders_without_usable_images_are_named(tmp_path):
    root = make_folder(tmp_path / "root", {"train": "ab", "test": "ab"}, count=3)
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match='no image in "train/c"'):
        list_folder(root)
    (root / "train" / "c" / "readme.txt").unlink()
    (root / "train" / "c").rmdir()
    (root / "train" / "a" / "0.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"0\.png: can not be decoded as an image"):
        prepare(f"folder:{root}", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []
    few = make_folder(tmp_path / "few", {"photo": "ab", "art": "ab"}, count=2)
    with pytest.raises(ValueError, match=r'domain "art" of folder .*too few images per class'):
        list_folder(few)


@pytest.mark.parametrize(("mode", "side"), [("RGB", (10, 40)), ("L", (40, 10)), ("P", (9, 9)), ("RGBA", (33, 8))])
def test_any_image_becomes_a_square_of_three_channels(tmp_path, mode, side):
    Image.fromarray(pixels(*side)).convert(mode).save(tmp_path / "x.png")
    image = decode(tmp_path / "x.png", 8)
    assert image.shape == (3, 8, 8)
    assert image.dtype == np.uint8


def test_decoding_keeps_the_middle(tmp_path):
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, 8:16] = 200
    Image.fromarray(array).save(tmp_path / "x.png")
    assert (decode(tmp_path / "x.png", 8) == 200).all()


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder that counts as too large for memory."""
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 1000)
    root = make_folder(tmp_path / "large", {"train": "ab", "val": "ab"})
    prepare("imagenet", tmp_path / "data", source=root, size=16)
    return tmp_path / "data"


def test_a_large_folder_is_decoded_while_it_is_read(large):
    data = open_folder("imagenet", large)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 20)
    assert data.image_shape == (3, 16, 16)
    assert data.checksum == checksum("imagenet", large)
    images = torch.stack([data.train[i][0] for i in range(18)]).double() / 255
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor(data.mean, dtype=torch.float64))
    with pytest.raises(ValueError, match="too large to be held in memory"):
        load("imagenet", large)
    generator = torch.Generator().manual_seed(0)
    batches = list(loaded_batches(data.train, 4, generator))
    assert [x.shape for x, _ in batches] == [(4, 3, 16, 16)] * 4
    assert batches[0][0].dtype == torch.uint8
    ordered = list(loaded_batches(data.test, 8, None, drop_last=False))
    assert torch.equal(torch.cat([y for _, y in ordered]), data.test.labels)
    with pytest.raises(ValueError, match="batch_size 19"):
        loaded_batches(data.train, 19, generator)


def test_workers_do_not_change_the_batches(large):
    data = open_folder("imagenet", large)
    here, there = (
        list(loaded_batches(data.train, 6, torch.Generator().manual_seed(3), workers=workers)) for workers in (0, 2)
    )
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(here, there, strict=True))


def test_a_large_folder_that_changed_is_refused(large):
    data = open_folder("imagenet", large)
    path = data.train.root / data.train.paths[0]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="missing or changed since the folder was prepared"):
        data.train[0]
    index = large / "imagenet" / "index.json"
    index.write_text(json.dumps({"train": [], "val": [], "test": []}))
    with pytest.raises(ValueError, match=r"index\.json: damaged or missing"):
        open_folder("imagenet", large)


def test_options_that_do_not_apply_are_refused(tmp_path, monkeypatch):
    for call, message in (
        (lambda: prepare("cifar10", tmp_path, size=32), '"cifar10" takes no size'),
        (lambda: prepare("glyphs", tmp_path, source=tmp_path), '"glyphs" takes no source'),
        (lambda: prepare("imagenet", tmp_path), "imagenet is not downloaded: give the folder"),
        (lambda: prepare("cifar", tmp_path), 'unknown data set "cifar"'),
        (lambda: prepare(f"folder:{tmp_path}", tmp_path, size=0), "size 0"),
        (lambda: prepare("folder:", tmp_path), 'unknown data set "folder:"'),
        (lambda: open_folder("cifar10", tmp_path), "is not a folder of images: use load"),
        (lambda: load("cifar10", tmp_path, split="classes"), 'unknown option "split"; allowed: domain, classes'),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    prepare("glyphs", tmp_path)  # built in: nothing to do
    assert list(tmp_path.iterdir()) == []
    root = make_folder(tmp_path / "large", {"train": "ab", "val": "cd", "test": "ef"})
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 1000)
    with pytest.raises(ValueError, match="choose a smaller size for a few-shot set"):
        prepare(f"folder:{root}", tmp_path / "data")


def test_every_listed_name_has_its_facts():
    assert dataset_names()[:4] == ["fashion_mnist_mini", "fashion_shifted", "digits", "glyphs"]
    for name in dataset_names():
        info = dataset_info(name)
        assert info.name == name
        assert info.licence
        assert bool(info.how) != info.builtin
        assert info.sizes or name == "imagenet"
        assert str(info).startswith(info.title)
        assert "None" not in str(info)


def test_decoding_workers_are_forked_on_linux_even_where_the_run_itself_came_from_a_fork_server(monkeypatch):
    asked = []

    def loader(images, **options):
        asked.append(options["multiprocessing_context"])
        return ()

    monkeypatch.setattr(lazy, "DataLoader", loader)
    images = lazy.FolderImages(Path(), [("a.png", 0, 1)] * 4, 8)
    for workers in (0, 2):
        list(loaded_batches(images, 2, None, workers=workers))
    assert asked == [None, "fork" if sys.platform == "linux" else None]


@pytest.mark.parametrize(
    ("layout", "classes", "message"),
    [
        (("train/a", "train/b", "test/a", "test/b"), None, None),
        (("train/a", "train/b", "test/a", "test/b"), 2, None),
        (("train/a", "train/b", "test/a", "test/b"), 3, "has 2 classes; num_classes=3 is not in 2..2"),
        (("train/a", "train/b", "val/c", "test/d"), None, "share no class"),
        (("photo/a", "photo/b", "sketch/a", "sketch/b"), None, "has domains .photo, sketch."),
    ],
)
def test_what_no_single_classifier_can_learn_is_known_before_a_run(tmp_path, layout, classes, message):
    for number, folder in enumerate(layout):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (9, 9), (number, i, 0)).save(tmp_path / "set" / folder / f"{i}.png")
    name = f"folder:{tmp_path / 'set'}"
    prepare(name, tmp_path / "data", size=8)
    options = classification.TASK.options(dataset=name, num_classes=classes, batch_size=8)
    if message is None:
        assert classification.TASK.data_checksum(options, tmp_path / "data") == checksum(name, tmp_path / "data")
    else:
        with pytest.raises(ValueError, match=message):
            classification.TASK.data_checksum(options, tmp_path / "data")


def test_more_classes_than_a_built_in_set_has_are_known_before_a_run(tmp_path):
    with pytest.raises(ValueError, match="has 10 classes; num_classes=11 is not in 2"):
        classification.TASK.data_checksum(classification.TASK.options(num_classes=11), tmp_path)

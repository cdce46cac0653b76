"""`data prepare NAME --source DIR`: the publishers' archives from a folder, verified; nothing is downloaded
or written there."""

import hashlib
import io
import pickle
import tarfile

import pytest
import scipy.io
import torchvision
from parts.tiny_sets import LABELS, archives, deliver, known, pixels, publish, tiny

from tasks.data import checksum, is_prepared, load, prepare


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def lay(folder, files, how):
    """Lay archives as torchvision does, side by side, or below the set's name."""
    name, how = how
    for path, content in files.items():
        place = {"torchvision": path, "flat": path.rpartition("/")[2], "named": f"{name}/{path.rpartition('/')[2]}"}[
            how
        ]
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("downloads")

    for place in ("utils.download_url", "cifar.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{place}", fail)


@pytest.mark.parametrize("how", ["torchvision", "flat", "named"])
@pytest.mark.parametrize("name", ["mnist", "kmnist", "emnist", "usps", "omniglot"])
def test_archives_of_a_folder_make_the_set_that_a_download_makes(name, how, tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path / "downloaded", name)
    prepare(name, tmp_path / "downloaded")
    lay(tmp_path / "mine", files, (name, how))
    before = snapshot(tmp_path / "mine")
    assert prepare(name, tmp_path / "data", source=tmp_path / "mine").made
    assert checksum(name, tmp_path / "data") == checksum(name, tmp_path / "downloaded")
    assert [p.name for p in (tmp_path / "data").iterdir()] == [name]
    assert snapshot(tmp_path / "mine") == before
    assert not prepare(name, tmp_path / "data", source=tmp_path / "mine").made


def test_another_folder_of_data_is_a_source(tmp_path, monkeypatch):
    tiny(monkeypatch, tmp_path / "other", "mnist")
    prepare("mnist", tmp_path / "data", source=tmp_path / "other")
    assert len(load("mnist", tmp_path / "data").test) == 20


def cifar(monkeypatch):
    """The files of a tiny CIFAR-10: archive, and what lies in it."""
    kind, members = torchvision.datasets.CIFAR10, {}
    lists = {"train_list": [], "test_list": []}
    for part, count in (("train", 40), ("test", 20)):
        entry = {"data": pixels(count, 3072, seed=count), "labels": LABELS[part].tolist()}
        content = pickle.dumps(entry, protocol=2)
        members[f"{part}_batch"] = content
        lists[f"{part}_list"] = [[f"{part}_batch", hashlib.md5(content).hexdigest()]]
    members["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, content in members.items():
            entry = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for attribute, value in lists.items():
        monkeypatch.setattr(kind, attribute, value)
    md5 = hashlib.md5(members["batches.meta"]).hexdigest()
    monkeypatch.setattr(kind, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    known(monkeypatch, "cifar10")
    return {kind.filename: buffer.getvalue()}, {
        f"{kind.base_folder}/{file}": content for file, content in members.items()
    }


@pytest.mark.parametrize("below", [".", "cifar10", "downloads/cifar10"])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_archives_are_unpacked_elsewhere_and_unpacked_ones_are_read_where_they_lie(
    packed, below, tmp_path, monkeypatch
):
    archive, members = cifar(monkeypatch)
    source, data = tmp_path / "mine", tmp_path / "data"
    lay(source / below, archive if packed else members, ("cifar10", "torchvision"))
    before = snapshot(source)
    prepare("cifar10", data, source=source)
    loaded = load("cifar10", data)
    assert loaded.class_names == tuple("abcdefghij")
    assert (loaded.test.images.numpy().reshape(20, -1) == pixels(20, 3072, seed=20)).all()
    assert [p.name for p in data.iterdir()] == ["cifar10"]
    assert snapshot(source) == before


def test_what_lies_half_unpacked_is_passed_over_for_the_archive(tmp_path, monkeypatch):
    archive, members = cifar(monkeypatch)
    half = {path: content[:-1] if "train" in path else content for path, content in members.items()}
    lay(tmp_path / "mine", half, ("cifar10", "torchvision"))
    with pytest.raises(ValueError, match=r'"cifar10" could not be read from .*: cifar-10-python\.tar\.gz is missing'):
        prepare("cifar10", tmp_path / "data", source=tmp_path / "mine")
    lay(tmp_path / "mine", archive, ("cifar10", "flat"))
    prepare("cifar10", tmp_path / "data", source=tmp_path / "mine")
    assert len(load("cifar10", tmp_path / "data").train) == 30


def svhn(monkeypatch, folder):
    split_list = {"extra": ["http://127.0.0.1:9/", "extra_32x32.mat", "0" * 32]}  # not needed
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 40), ("test", 20)):
        file = folder / f"{part}_32x32.mat"
        scipy.io.savemat(file, {"X": pixels(32, 32, 3, count, seed=count), "y": LABELS[part][:, None] + 1})
        split_list[part] = ["http://127.0.0.1:9/", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
    known(monkeypatch, "svhn")


def test_a_joined_set_takes_a_folder_with_the_archives_of_all_its_members(tmp_path, monkeypatch):
    source, data = tmp_path / "mine", tmp_path / "data"
    for name in ("mnist", "usps"):
        lay(source, tiny(monkeypatch, tmp_path / "elsewhere", name), (name, "torchvision"))
    known(monkeypatch, "svhn")
    with pytest.raises(ValueError, match=r'"svhn" could not be read from .*: train_32x32\.mat is missing'):
        prepare("mnist_usps_svhn", data, source=source)
    assert [is_prepared(name, data) for name in ("mnist", "usps", "svhn")] == [True, True, False]
    svhn(monkeypatch, source / "svhn")
    assert prepare("mnist_usps_svhn", data, source=source).made
    assert is_prepared("mnist_usps_svhn", data)
    assert {p.name for p in data.iterdir()} == {"mnist", "usps", "svhn"}


def test_files_of_one_name_are_told_apart_by_their_md5(tmp_path, monkeypatch):
    fashion, digits = archives("fashion_mnist", seed=5), archives("mnist")
    for name, files in (("fashion_mnist", fashion), ("mnist", digits)):
        known(monkeypatch, name)
        publish(monkeypatch, name, files)
    source = tmp_path / "mine"
    lay(source, fashion, ("fashion_mnist", "flat"))
    lay(source, digits, ("mnist", "named"))
    prepare("mnist", tmp_path / "data", source=source)
    prepare("fashion_mnist", tmp_path / "data", source=source)
    assert load("mnist", tmp_path / "data").checksum != load("fashion_mnist", tmp_path / "data").checksum


@pytest.mark.parametrize("name", ["mnist", "emnist", "usps", "omniglot"])
def test_a_missing_or_another_file_is_named_in_one_line_and_nothing_is_prepared(name, tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path / "elsewhere", name)
    first = next(iter(files))
    last = first.rpartition("/")[2]
    source, data = tmp_path / "mine", tmp_path / "data"
    for content, message in (
        (None, rf"{last} is missing"),
        (b"half", rf"{last} has md5 {hashlib.md5(b'half').hexdigest()}"),
    ):
        lay(source, {path: c for path, c in files.items() if path != first}, (name, "torchvision"))
        if content is not None:
            lay(source, {first: content}, (name, "torchvision"))
        source.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message) as caught:
            prepare(name, data, source=source)
        assert "\n" not in str(caught.value)
        assert not is_prepared(name, data)
        assert not list(data.glob("*"))
    with pytest.raises(ValueError, match=r"could not be read from .*/nowhere: no such folder"):
        prepare(name, data, source=tmp_path / "nowhere")


def test_a_failed_repetition_from_a_folder_leaves_what_was_there(tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path / "data", "mnist")
    prepare("mnist", tmp_path / "data")
    before = checksum("mnist", tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is missing"):
        prepare("mnist", tmp_path / "data", source=tmp_path / "empty", force=True)
    assert checksum("mnist", tmp_path / "data") == before
    deliver(tmp_path / "other", "mnist", files)
    assert prepare("mnist", tmp_path / "data", source=tmp_path / "other", force=True).made


def test_a_set_that_is_not_whole_says_where_it_was_read(tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path / "other", "mnist")
    assert files
    known(monkeypatch, "mnist", sizes={"train": 41, "test": 20})
    with pytest.raises(ValueError, match=r"published are 41\. Nothing of it was prepared; it was read from .*other"):
        prepare("mnist", tmp_path / "data", source=tmp_path / "other")

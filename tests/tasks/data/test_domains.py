"""Sets with domains: those put together from torchvision's, and whether domains can serve one set of classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from parts.tiny_sets import known, pixels, tiny
from PIL import Image

from tasks.base import NotPrepared
from tasks.data import (
    check_classifiable,
    check_disjoint,
    check_domains,
    checksum,
    dataset_info,
    dataset_names,
    domain_labels,
    domain_names,
    in_memory,
    is_prepared,
    load,
    load_domains,
    open_folder,
    prepare,
)
from tasks.data.sources import downloads, joined
from tasks.data.sources.downloads import DOWNLOADS, prepare_download
from tasks.data.sources.joined import JOINED

NAME = "mnist_usps_svhn"
MEMBERS = ("mnist", "usps", "svhn")
NOWHERE = Path("/nonexistent")


class FakeSvhn:
    """Stands for the torchvision set: 40 training and 20 test images."""

    seed = 0

    def __init__(self, root, split, download):
        assert download
        count = 40 if split == "train" else 20
        self.data = pixels(count, 3, 32, 32, seed=self.seed + count)
        self.labels = np.arange(count) % 10


def deliver_all(data_dir, monkeypatch, seeds=(0, 0, 0)):
    """Lay out the members' archives, each with its seed."""
    for name, seed in zip(("mnist", "usps"), seeds, strict=False):
        tiny(monkeypatch, data_dir, name, seed=seed)
    known(monkeypatch, "svhn")
    monkeypatch.setattr(torchvision.datasets, "SVHN", FakeSvhn)
    monkeypatch.setattr(FakeSvhn, "seed", seeds[2])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The members that were downloaded and decoded."""
    deliver_all(tmp_path, monkeypatch)
    names = []

    def spy(name, data_dir, **options):
        names.append(name)
        return prepare_download(name, data_dir, **options)

    monkeypatch.setattr(joined, "prepare_download", spy)
    monkeypatch.setattr(downloads, "prepare_download", spy)
    return names


@pytest.fixture
def data_dir(asked, tmp_path):
    prepare(NAME, tmp_path)
    return tmp_path


def make_folder(root, layout):
    """layout: {domain: {class: number of images}}."""
    for domain, classes in layout.items():
        (root / domain).mkdir(parents=True)
        for name, count in classes.items():
            (root / domain / name).mkdir()
            for i in range(count):
                Image.new("RGB", (8, 8), (i, len(name), 0)).save(root / domain / name / f"{i}.png")
    return root


def prepared_folder(tmp_path, layout):
    name = f"folder:{make_folder(tmp_path / 'photos', layout)}"
    prepare(name, tmp_path / "data", size=8)
    return name, tmp_path / "data"


# joined sets


@pytest.mark.parametrize("name", JOINED)
def test_members_of_a_joined_set_are_downloads_of_one_size_and_number_of_classes(name):
    members = [DOWNLOADS[m] for m in JOINED[name].members]
    assert {m.image_shape[1:] for m in members} == {members[0].image_shape[1:]}
    assert {m.image_shape[0] for m in members} <= {1, 3}
    assert {m.num_classes for m in members} == {len(JOINED[name].class_names)}
    assert not any(m.disjoint_classes for m in members)


def test_every_member_is_one_domain_in_three_channels(data_dir):
    domains = load_domains(NAME, data_dir)
    assert tuple(domains) == domain_names(NAME, data_dir) == MEMBERS
    for domain, data in domains.items():
        alone = load(domain, data_dir)
        assert data.name == f"{NAME}/{domain}"
        assert data.title == alone.title
        assert data.image_shape == (3, 32, 32)
        assert data.class_names == tuple("0123456789")
        assert data.checksum == checksum(NAME, data_dir)
        for part in ("train", "val", "test"):
            mine, theirs = getattr(data, part), getattr(alone, part)
            assert torch.equal(mine.labels, theirs.labels)
            assert mine.images.is_contiguous()
            assert all(torch.equal(mine.images[:, c], theirs.images[:, c % theirs.images.shape[1]]) for c in range(3))
    assert load("mnist", data_dir).image_shape == (1, 32, 32)


@pytest.mark.parametrize("classes", [None, 4])
@pytest.mark.parametrize("domain", MEMBERS)
def test_moments_are_those_of_the_three_channels(data_dir, domain, classes):
    data = load(NAME, data_dir, domain=domain, classes=classes)
    floats = data.train.images.double() / 255
    assert torch.allclose(floats.mean((0, 2, 3)), torch.tensor(data.mean, dtype=torch.float64))
    assert torch.allclose(floats.std((0, 2, 3), correction=0), torch.tensor(data.std, dtype=torch.float64))
    assert len(data.mean) == len(data.std) == 3
    assert data.num_classes == len(data.class_names) == (classes or 10)
    assert int(data.train.labels.max()) == data.num_classes - 1


def test_only_missing_members_are_prepared_and_nothing_is_stored_twice(asked, tmp_path):
    prepare("mnist", tmp_path)
    assert not is_prepared(NAME, tmp_path)
    for ask in (load_domains, checksum, domain_labels):
        with pytest.raises(
            NotPrepared, match=rf"usps, svhn of .* missing\): run `python run_suite.py data prepare {NAME} --data-dir "
        ):
            ask(NAME, tmp_path)
    with pytest.raises(NotPrepared, match=f"data prepare {NAME}"):
        load(NAME, tmp_path, domain="mnist")
    with pytest.raises(NotPrepared, match=f"data prepare {NAME}"):
        check_domains(NAME, tmp_path, ["mnist"])
    asked.clear()
    prepare(NAME, tmp_path)
    assert asked == ["usps", "svhn"]
    assert is_prepared(NAME, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {*MEMBERS, "downloads"}
    prepare(NAME, tmp_path)
    assert len(asked) == 2


def test_a_failed_member_leaves_the_others_prepared(asked, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no route")

    monkeypatch.setattr(torchvision.datasets, "SVHN", fail)
    with pytest.raises(ValueError, match=r'"svhn" could not be downloaded or read: .*Nothing of it was prepared'):
        prepare(NAME, tmp_path)
    assert [is_prepared(m, tmp_path) for m in (*MEMBERS, NAME)] == [True, True, False, False]


@pytest.mark.parametrize("seeds", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_the_checksum_changes_when_one_member_does(data_dir, tmp_path, monkeypatch, seeds):
    other = tmp_path / "other"
    deliver_all(other, monkeypatch, seeds)
    prepare(NAME, other)
    assert checksum(NAME, data_dir) != checksum(NAME, other)
    assert sum(checksum(m, data_dir) != checksum(m, other) for m in MEMBERS) == 1


def test_a_joined_set_is_listed_like_any_other():
    info = dataset_info(NAME)
    assert NAME in dataset_names()
    assert str(info) == (
        "MNIST, USPS and SVHN · real · 10 classes · 3x32x32 · 140548 train + 38039 test · domains mnist, usps, svhn · "
        "python run_suite.py data prepare mnist_usps_svhn · licence: CC BY-SA 3.0 (MNIST), "
        "no licence stated; published for research (USPS), non-commercial use only (SVHN)"
    )
    assert in_memory(NAME, NOWHERE)
    assert domain_names(NAME, NOWHERE) == MEMBERS


def test_what_a_joined_set_can_not_do_is_said(data_dir):
    for call, message in (
        (lambda: check_classifiable(NAME, data_dir), r"has domains \(mnist, usps, svhn\); one without is needed"),
        (lambda: check_disjoint(NAME, data_dir), "is no few-shot one"),
        (lambda: load(NAME, data_dir), "has domains; give domain= one of mnist, usps, svhn"),
        (lambda: load(NAME, data_dir, domain="svnh"), r'unknown domain "svnh"; allowed: .*; did you mean "svhn"\?'),
        (lambda: load(NAME, data_dir, domain="mnist", classes=11), rf'"{NAME}/mnist" has 10 classes; classes=11'),
        (lambda: load(NAME, data_dir, domian="mnist"), 'unknown option "domian"; allowed: domain, classes'),
        (lambda: open_folder(NAME, data_dir), "is not a folder of images: use load"),
        (lambda: prepare(NAME, data_dir, size=32), "takes no size"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# domains that serve one set of classes


def test_domains_with_every_class_in_every_part_pass(data_dir):
    check_domains("digits", NOWHERE, ["mnist", "uci", "fonts", "blend"])
    check_domains("digits", NOWHERE, ["uci"], classes=2)
    check_domains(NAME, data_dir, MEMBERS)
    check_domains(NAME, data_dir, ["svhn", "usps"], classes=10)


@pytest.mark.parametrize(
    ("name", "used", "classes", "message"),
    [
        ("digits", ["mnist", "minst"], None, r'"digits": unknown domain "minst"; allowed: .*; did you mean "mnist"\?'),
        (NAME, ["uspss"], None, r'unknown domain "uspss"; allowed: mnist, usps, svhn; did you mean "usps"\?'),
        ("digits", ["mnist"], 1, r"has 10 classes; num_classes=1 is not in 2\.\.10"),
        (NAME, ["mnist"], 11, r"has 10 classes; num_classes=11 is not in 2\.\.10"),
        ("glyphs", ["mnist"], None, f'"glyphs" has no domains; allowed: fashion_shifted, digits, {NAME}, or a folder'),
        ("cifar10", ["mnist"], None, '"cifar10" has no domains'),
        ("digit", ["mnist"], None, 'unknown data set "digit"'),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_prepared(name, used, classes, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_domains(name, NOWHERE, used, classes)
    assert not isinstance(raised.value, NotPrepared)


def test_a_class_too_small_for_every_part_is_named_with_its_domain(tmp_path):
    name, data_dir = prepared_folder(
        tmp_path, {"art": {"cat": 9, "dog": 9, "owl": 2}, "photo": {"cat": 9, "dog": 9, "owl": 9}}
    )
    check_domains(name, data_dir, ["photo"])
    check_domains(name, data_dir, ["art", "photo"], classes=2)
    with pytest.raises(
        ValueError, match=r'the val part of domain "art" has no image of class "owl".*give art/owl 3'
    ) as e:
        check_domains(name, data_dir, ["photo", "art"])
    assert name in str(e.value)
    assert "\n" not in str(e.value)


def test_labels_are_those_of_the_parts_read_once_without_images(data_dir, monkeypatch):
    loaded = load_domains(NAME, data_dir)
    for path in data_dir.glob("*/*_images.npy"):
        path.unlink()
    labels = domain_labels(NAME, data_dir)
    for domain, data in loaded.items():
        assert all(torch.equal(labels[domain][part], getattr(data, part).labels) for part in ("train", "val", "test"))
    monkeypatch.setattr(joined, "read_labels", None)  # from here on nothing is read
    assert domain_labels(NAME, data_dir) is labels
    check_domains(NAME, data_dir, MEMBERS)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_labels_of_other_sets_hold_no_images(tmp_path, name):
    data_dir = NOWHERE
    if name == "folder":
        name, data_dir = prepared_folder(tmp_path, {"art": {"cat": 5, "dog": 4}, "photo": {"cat": 3, "dog": 3}})
    labels, loaded = domain_labels(name, data_dir), load_domains(name, data_dir)
    assert list(labels) == list(loaded)
    for domain, parts in labels.items():
        assert list(parts) == ["train", "val", "test"]
        for part, values in parts.items():
            assert values.dtype == torch.int64
            assert torch.equal(values, getattr(loaded[domain], part).labels)
            assert values.untyped_storage().nbytes() == 8 * len(values)


def test_labels_follow_the_content(asked, tmp_path):
    make_folder(tmp_path / "photos", {"art": {"cat": 3, "dog": 3}, "photo": {"cat": 3, "dog": 3}})
    name, counts = f"folder:{tmp_path / 'photos'}", []
    for extra in ("3.png", "4.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "art" / "dog" / extra)
        prepare(name, tmp_path / extra, size=8)
        (tmp_path / extra).rename(tmp_path / "data")  # what was prepared before is replaced
        counts.append(sum(map(len, domain_labels(name, tmp_path / "data")["art"].values())))
        (tmp_path / "data").rename(tmp_path / f"old {extra}")
    assert counts == [7, 8]


def test_damaged_labels_are_found(data_dir):
    path = data_dir / "usps" / "0_val_labels.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"0_val_labels\.npy: damaged or missing; delete .* data prepare usps"):
        check_domains(NAME, data_dir, ["mnist"])


# folders of domains


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"art": {}, "photo": {"cat": 3, "dog": 3}}, 'domain "art" has no class folders'),
        (
            {"art": {"cat": 0, "dog": 0}, "photo": {"cat": 3, "dog": 3}},
            r'domain "art" has 2 class folders and no image in any of them \(allowed: .*\.png',
        ),
        (
            {"art": {"cat": 3, "dog": 3}, "photo": {"cat": 3, "dog": 0}},
            r'no image in "photo/dog" \(domain "photo", class "dog"; allowed: .*\.png',
        ),
        (
            {"art": {"cat": 3, "dog": 3}, "photo": {"cat": 3}},
            'domain "photo" has no class folder "dog", which domain "art" has; all domains need the same classes',
        ),
        (
            {"art": {"cat": 3}, "photo": {"cat": 3, "dog": 3}, "sketch": {"cat": 3, "dog": 3}},
            'domain "art" has no class folder "dog", which domain "photo" has',
        ),
        (
            {"art": {"back_pack": 3, "bike": 3}, "photo": {"backpack": 3, "bike": 3}},
            r'domain "art" has no class folder "backpack", which domain "photo" has; .*; did you mean "back_pack"\?',
        ),
        ({"art": {"cat": 3, "dog": 3}, "test": {"cat": 3, "dog": 3}}, "art, test mixes splits"),
        ({"art": {"cat": 2, "dog": 2}, "photo": {"cat": 3, "dog": 3}}, 'domain "art" of folder .* too few images per'),
    ],
)
def test_what_is_wrong_with_a_folder_of_domains_is_one_line_that_names_the_domain(tmp_path, layout, message):
    with pytest.raises(ValueError, match=message) as raised:
        prepared_folder(tmp_path, layout)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_files_beside_the_class_folders_are_no_images_of_a_domain(tmp_path):
    root = make_folder(tmp_path / "photos", {"art": {}, "photo": {"cat": 3, "dog": 3}})
    Image.new("RGB", (8, 8)).save(root / "art" / "0.png")
    with pytest.raises(ValueError, match='domain "art" has no class folders; expected root/split/class'):
        prepare(f"folder:{root}", tmp_path / "data")

"""Folders of images as people have them: litter, links, splits within domains, and images in the wrong place."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts.image_folders import image, make
from PIL import Image

from tasks.data import check_domains, checksum, folders, layout, load, load_domains, open_folder, prepare
from tasks.data.images import stratified
from tasks.data.layout import SPLITS, list_folder


def counts(listing):
    return {domain: {part: len(images) for part, images in parts.items()} for domain, parts in listing.domains.items()}


@pytest.mark.parametrize(
    "litter",
    [
        "train/a/.ipynb_checkpoints/0-checkpoint.png",
        "train/a/.git/objects/x.png",
        "train/.thumbnails/x.png",
        "train/a/._0.png",
        "train/a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "train/a/__MACOSX/0.png",
        "train/__MACOSX/a/0.png",
        "__MACOSX/train/a/._0.png",
        ".cache/x/y.png",
        "$RECYCLE.BIN/x.png",
        "train/a/Thumbs.db",
        "readme.txt",
    ],
)
def test_hidden_names_count_at_no_level(tmp_path, litter):
    classes = "train/a", "train/b", "test/a", "test/b"
    clean, root = make(tmp_path / "clean", *classes), make(tmp_path / "root", *classes)
    (root / litter).parent.mkdir(parents=True, exist_ok=True)
    (root / litter).write_bytes((root / "train/a/0.png").read_bytes())
    assert list_folder(root) == list_folder(clean)


def test_a_root_below_a_hidden_folder_is_one_like_others(tmp_path):
    root = make(tmp_path / ".cache" / "set", "train/a", "train/b", "test/a", "test/b")
    assert counts(list_folder(root)) == {"": {"train": 18, "val": 2, "test": 20}}


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        (("train", "test"), (18, 2, 20)),
        (("Train", "valid"), (18, 2, 20)),
        (("Training", "testing"), (18, 2, 20)),
        (("train", "val", "test"), (20, 20, 20)),
    ],
)
def test_splits_within_domains_are_the_parts_of_each(tmp_path, splits, sizes):
    root = make(
        tmp_path / "vlcs", *(f"{d}/{s}/{c}" for d in ("photo", "sketch") for s in splits for c in ("dog", "car"))
    )
    name = f"folder:{root}"
    prepare(name, tmp_path / "data", size=6)
    domains = load_domains(name, tmp_path / "data")
    assert list(domains) == ["photo", "sketch"]
    for data in domains.values():
        assert data.class_names == ("car", "dog")
        assert tuple(map(len, (data.train, data.val, data.test))) == sizes
    check_domains(name, tmp_path / "data", ["photo", "sketch"])
    test = "test" if "test" in splits else splits[1]
    listing = list_folder(root)
    for domain, parts in listing.domains.items():
        assert {path.rsplit("/", 2)[0] for path, _ in parts["test"]} == {f"{domain}/{test}"}
        assert {path.rsplit("/", 2)[0] for path, _ in parts["train"]} == {f"{domain}/{splits[0]}"}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            ("photo/train/a", "photo/train/b", "art/a", "art/b"),
            'domain "photo" has splits .train., domain "art" has a, b',
        ),
        (("p/train/a", "p/train/b", "p/test/a", "q/train/a", "q/val/a", "q/test/a"), "expected the same splits in all"),
        (("p/train/a", "p/train/b", "q/train/a", "q/train/b"), "found p/train; expected train and test"),
        (("p/val/a", "p/valid/a", "p/train/a", "q/train/a", "q/val/a"), "p/train, p/val, p/valid name one split twice"),
        (
            ("train2017/a", "train2017/b", "val2017/a", "val2017/b"),
            '"train2017" and the folders beside it look like spl',
        ),
        (
            ("train/a", "train/b", "dev/a", "dev/b"),
            '"dev" and the folders beside it look like splits; call those train',
        ),
        (
            ("p/Train-Set", "p/test_set", "q/Train-Set", "q/test_set"),
            '"p/Train-Set" and the folders beside it look like',
        ),
        (("p/training", "p/testing", "q/training", "q/testing"), '"p/testing" has no class folders'),
        (("p/train/a", "p/test/a", "q/train/a", "q/train/b", "q/test/b"), 'domain "p" has no class folder "b"'),
        (("p/train/a", "p/test/b", "q/train/a", "q/test/b"), 'class "b" is in test but not in train of domain "p"'),
        (("p/train", "p/test", "q/train", "q/test"), '"p/test" has no class folders'),
        (("p/a", "p/test", "q/a", "q/test"), '"p/test" has a split\'s name where a class stands beside a'),
        (("p/a", "p/b", "p/c", "p/valid", "q/a"), '"p/valid" has a split\'s name where a class stands beside a, b, c'),
        (("p/a", "p/train", "q/a", "q/train"), '"p/train" has a split\'s name where a class stands beside a'),
        (("p/a", "p/b", "p/test", "p/train", "q/a"), "has a split's name where a class stands"),
        (("train/train", "train/test", "test/train", "test/test"), "has a split's name where a class stands; expected"),
        (("train/photo/a", "train/art/a", "test/photo/a", "test/art/a"), "lies deeper than a class folder's images"),
        (("train/a/images", "train/b/images", "val/images"), '"train/a/images/0.png" lies deeper'),
        (("p/train/a/sub", "p/test/a", "q/train/a", "q/test/a"), '"p/train/a/sub/0.png" lies deeper'),
        (("p/a", "p/b/x/y/z", "q/a", "q/b"), '"p/b/x/y/z/0.png" lies deeper'),
    ],
)
def test_a_level_that_is_no_layout_is_refused_by_its_path(tmp_path, classes, message):
    root = make(tmp_path / "root", *classes, count=3)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(f"folder:{root}", tmp_path / "data")
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_below_a_split_classes_may_be_called_after_it(tmp_path):
    listing = list_folder(
        make(tmp_path / "set", *(f"{split}/{split}{c}" for split in ("train", "val", "test") for c in "01"))
    )
    assert listing.class_names == ["test0", "test1", "train0", "train1", "val0", "val1"]
    assert listing.disjoint_classes


def test_one_image_too_deep_is_refused_and_folders_without_images_are_not(tmp_path):
    root = make(tmp_path / "root", "train/a", "train/b", "test/a", "test/b")
    (root / "train/a/notes/more").mkdir(parents=True)
    (root / "train/a/notes/more/boxes.txt").write_text("0 0 1 1")
    assert counts(list_folder(root)) == {"": {"train": 18, "val": 2, "test": 20}}
    image(root / "train/a/sub/x.png", 0)
    with pytest.raises(ValueError, match=r'"train/a/sub/x.png" lies deeper .*expected root/split/class'):
        list_folder(root)


@pytest.mark.parametrize("layout", ["train/{},test/{}", "photo/{},art/{}", "p/train/{},p/test/{},q/train/{},q/test/{}"])
def test_the_class_of_trains_is_a_class_and_a_note_says_so(tmp_path, layout):
    tops = layout.split(",")
    root = make(tmp_path / "root", *(top.format(c) for top in tops for c in ("bus", "car", "train")))
    listing = list_folder(root)
    assert listing.class_names == ["bus", "car", "train"]
    assert len(listing.notes) == len(tops)
    assert f'"{tops[0].format("train")}" is taken for a class, not for a split' in listing.notes


def test_images_above_the_classes_are_told(tmp_path):
    root = make(tmp_path / "root", "train/a", "train/b", "test/a", "test/b")
    image(root / "teaser.png", 0)
    image(root / "train" / "x.png", 1)
    assert list_folder(root).notes == [
        '1 images above the class folders are left out, such as "teaser.png"',
        '1 images above the class folders are left out, such as "train/x.png"',
    ]


def test_linked_folders_and_files_are_followed(tmp_path):
    elsewhere = make(tmp_path / "elsewhere", "cats", "dogs")
    root = make(tmp_path / "root", "test/cat", "test/dog")
    (root / "train").mkdir()
    (root / "train/cat").symlink_to(elsewhere / "cats")
    (root / "train/dog").mkdir()
    for file in (elsewhere / "dogs").iterdir():
        (root / "train/dog" / file.name).symlink_to(file)
    listing = list_folder(root)
    assert counts(listing) == {"": {"train": 18, "val": 2, "test": 20}}
    assert ("train/cat/0.png", 0) in listing.domains[""]["train"] + listing.domains[""]["val"]
    (tmp_path / "alias").symlink_to(root)
    assert list_folder(tmp_path / "alias").domains == listing.domains


def test_links_in_a_circle_end(tmp_path):
    root = make(tmp_path / "root", "train/a", "train/b", "test/a", "test/b")
    (root / "train/a/again").symlink_to(root / "train/a")
    with pytest.raises(ValueError, match=r'"train/a/again/0.png" lies deeper'):
        list_folder(root)
    (root / "train/a/again").unlink()
    (root / "train/a/notes").mkdir()
    (root / "train/a/notes/self").symlink_to(root / "train/a/notes")
    assert counts(list_folder(root)) == {"": {"train": 18, "val": 2, "test": 20}}


@pytest.mark.parametrize("where", ["train/c", "train/a/x.png", "train/a/x", "valid"])
def test_links_to_nothing_are_named(tmp_path, where):
    root = make(tmp_path / "root", "train/a", "train/b", "test/a", "test/b")
    (root / where).symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f'"{where}" is a link that leads nowhere'):
        list_folder(root)
    (root / where).unlink()
    (root / where).symlink_to(root / where)
    with pytest.raises(ValueError, match=f'"{where}" is a link that leads nowhere'):
        list_folder(root)


def test_what_only_has_the_name_of_an_image_is_named(tmp_path):
    root = make(tmp_path / "root", "train/a", "train/b", "test/a", "test/b")
    (root / "train/a/1x.png").mkdir()
    with pytest.raises(ValueError, match=r'"train/a/1x.png" is a folder with an image\'s name'):
        prepare(f"folder:{root}", tmp_path / "data")
    (root / "train/a/1x.png").rmdir()
    os.mkfifo(root / "train/a/1y.png")
    with pytest.raises(ValueError, match=r'"train/a/1y.png" is no regular file'):
        prepare(f"folder:{root}", tmp_path / "data")


# the same image in two parts


def copy(root, one, other):
    (root / other).write_bytes((root / one).read_bytes())


def test_an_image_in_two_parts_is_counted_and_told(tmp_path):
    root = make(tmp_path / "root", *(f"{part}/{c}" for part in ("train", "val", "test") for c in "ab"))
    name = f"folder:{root}"
    assert prepare(name, tmp_path / "clean", size=6).notes == ()
    for i in (1, 2, 3):
        copy(root, f"train/a/{i}.png", f"test/a/{i}.png")
    with Image.open(root / "train/b/1.png") as same:  # the same pixels in another format
        same.save(root / "val/b/other.bmp")
    copy(root, "train/b/1.png", "train/b/2.png")  # within one part: the owner's affair
    assert prepare(name, tmp_path / "data", size=6).notes == (
        '1 image of val is also in train, such as "val/b/other.bmp" and "train/b/1.png"',
        '3 images of test are also in train, such as "test/a/1.png" and "train/a/1.png"',
    )
    (manifest,) = (tmp_path / "data").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["in_two_parts"] == {"": {"val in train": 1, "test in train": 3}}
    assert len(load(name, tmp_path / "data").test) == 20


def test_domains_may_share_images(tmp_path):
    root = make(tmp_path / "root", "p/a", "p/b", "q/a", "q/b")
    for i in range(10):
        copy(root, f"p/a/{i}.png", f"q/a/{i}.png")
    assert prepare(f"folder:{root}", tmp_path / "data", size=6).notes == ()
    for i in range(10):
        copy(root, "p/a/0.png", f"p/a/{i}.png")
        copy(root, "q/b/0.png", f"q/b/{i}.png")
    notes = prepare(f"folder:{root}", tmp_path / "data", size=6, force=True).notes
    assert [note.split(",")[0] for note in notes] == [
        "2 images of val are also in train",
        "4 images of test are also in train",
        "4 images of test are also in val",
    ]


def test_images_of_a_large_set_are_compared_by_their_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 100)
    root = make(tmp_path / "root", *(f"{part}/{c}" for part in ("train", "val", "test") for c in "ab"))
    copy(root, "train/a/1.png", "test/b/x.png")
    (root / "val/a/y.png").write_bytes((root / "train/a/2.png").read_bytes()[:-1] + b"\0")  # of its size
    notes = prepare(f"folder:{root}", tmp_path / "data", size=6).notes
    assert notes == ('1 image of test is also in train, such as "test/b/x.png" and "train/a/1.png"',)
    assert len(open_folder(f"folder:{root}", tmp_path / "data").test) == 21


names = st.sampled_from(["train", "test", "val", "Valid", "photo", "art", ".git", "a", "b", "x.png", "__MACOSX", "dog"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(names, min_size=1, max_size=5), min_size=1, max_size=12))
def test_any_tree_is_a_set_without_split_names_and_hidden_files_or_refused(tmp_path_factory, paths):
    root = tmp_path_factory.mktemp("tree")
    for number, path in enumerate(paths):
        folder = root.joinpath(*path)
        for i in range(3):
            image(folder / f"{i}.png", 10 * number + i)
    try:
        listing = list_folder(root)
    except ValueError as error:
        message = str(error)
    else:
        message = f'folder "{root}"'
        everything = [path for parts in listing.domains.values() for images in parts.values() for path, _ in images]
        assert sorted(everything) == sorted(set(everything)) == sorted(listing.sizes)
        assert not any(step.startswith((".", "__MAC")) for path in everything for step in path.split("/"))
        assert not {name.lower() for name in listing.class_names} & (set(SPLITS) - {"train"})
        assert "train" not in listing.class_names or listing.notes
    assert str(root) in message
    assert "\n" not in message


# root/class/*


def test_class_folders_without_splits_are_cut_and_the_cut_is_recorded(tmp_path):
    root, name = make(tmp_path / "pets", "cat", "dog", "owl"), f"folder:{tmp_path / 'pets'}"
    done = prepare(name, tmp_path / "data", size=6)
    assert done.layout == (
        'layout root/class/*: 3 classes; each class cut 70 : 10 : 20 into train, val, test (salt "folder")'
    )
    data = load(name, tmp_path / "data")
    assert data.class_names == ("cat", "dog", "owl")
    parts = {"train": data.train, "val": data.val, "test": data.test}
    assert {p: part.labels.bincount().tolist() for p, part in parts.items()} == {
        "train": [7] * 3,
        "val": [1] * 3,
        "test": [2] * 3,
    }
    (path,) = (tmp_path / "data").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    assert (manifest["layout"], manifest["cut"]["salt"], manifest["cut"]["rule"]) == (
        "root/class/*",
        "folder",
        "stratified by class",
    )
    # the recorded rule, applied again, gives the same parts
    cut = manifest["cut"]
    labels = np.repeat([0, 1, 2], 10)
    paths = np.array([f"{c}/{i}.png" for c in ("cat", "dog", "owl") for i in range(10)])
    listing = list_folder(root)
    for part, index in stratified(labels, cut["fractions"], cut["salt"]).items():
        assert [p for p, _ in listing.domains[""][part]] == paths[index].tolist()


def test_the_cut_is_part_of_the_checksum(tmp_path, monkeypatch):
    make(tmp_path / "pets", "cat", "dog")
    sums = set()
    for fractions in ({"train": 0.7, "val": 0.1, "test": 0.2}, {"train": 0.6, "val": 0.2, "test": 0.2}):
        monkeypatch.setattr(layout, "WHOLE_FRACTIONS", fractions)
        prepare(f"folder:{tmp_path / 'pets'}", tmp_path / "data", size=6, force=True)
        sums.add(checksum(f"folder:{tmp_path / 'pets'}", tmp_path / "data"))
    assert len(sums) == 2


def test_class_folders_too_large_for_memory_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 100)
    make(tmp_path / "pets", "cat", "dog")
    prepare(f"folder:{tmp_path / 'pets'}", tmp_path / "data", size=6)
    data = open_folder(f"folder:{tmp_path / 'pets'}", tmp_path / "data")
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (
            ("train/a", "train/b", "test/a", "test/b"),
            "root/split/class/*: 2 classes; each class cut 90 : 10 into train, ",
        ),
        (
            ("train/a", "train/b", "val/a", "val/b", "test/a", "test/b"),
            "root/split/class/*: 2 classes; parts as the fol",
        ),
        (
            ("train/a", "train/b", "val/c", "val/d", "test/e", "test/f"),
            "root/split/class/*: 6 classes; parts as the fol",
        ),
        (
            ("p/a", "p/b", "q/a", "q/b"),
            "root/domain/class/*: 2 classes in 2 domains; each class cut 70 : 10 : 20 into t",
        ),
        (
            ("p/train/a", "p/train/b", "p/test/a", "q/train/a", "q/train/b", "q/test/b"),
            "root/domain/split/class/*: 2 cla",
        ),
        (("bus", "car", "train"), "root/class/*: 3 classes"),
        (("Train 1", "bus"), "root/class/*: 2 classes"),
    ],
)
def test_the_layout_that_was_taken_is_told(tmp_path, classes, named):
    root = make(tmp_path / "set", *classes)
    assert prepare(f"folder:{root}", tmp_path / "data", size=6).layout.startswith(f"layout {named}")
    assert prepare(f"folder:{root}", tmp_path / "data", size=6).layout.startswith(f"layout {named}")


def test_a_class_of_trains_beside_other_classes_is_noted(tmp_path):
    assert list_folder(make(tmp_path / "set", "bus", "car", "train")).notes == [
        '"train" is taken for a class, not for a split'
    ]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("cat",), 'one class, "cat"; expected two or more'),
        (("cat", "dog/x"), 'domain "cat" has no class folders'),
        (("cat", "dog", "dog/puppies"), 'domain "cat" has no class folders'),
        (("cat", "dog/a/b/c"), 'domain "cat" has no class folders'),
        (("bus", "train"), "mixes splits .* with other names"),
        (("train", "test"), 'split "test" has no class folders'),
        (("bus", "car", "test"), "mixes splits"),
        (("bus", "car", "test", "train"), "mixes splits"),
        (("train2017", "val2017"), "look like splits"),
    ],
)
def test_class_folders_of_mixed_depth_or_with_names_of_splits_are_refused(tmp_path, classes, message):
    root = make(tmp_path / "root", *classes, count=3)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(f"folder:{root}", tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("count", "message"), [(0, "has no image"), (2, "has 2 images")])
def test_a_class_that_can_not_be_in_every_part_is_named(tmp_path, count, message):
    root = make(tmp_path / "root", "cat", "dog")
    (root / "owl").mkdir()
    make(root, "owl", count=count)
    with pytest.raises(ValueError, match=f'class "owl" {message}; a cut into train, val, test needs 3 or more'):
        prepare(f"folder:{root}", tmp_path / "data")


def test_images_in_the_domains_folders_do_not_make_them_classes(tmp_path):
    root = make(tmp_path / "root", *(f"{d}/{s}/{c}" for d in "pq" for s in ("train", "test") for c in "ab"), count=3)
    for d in "pq":
        image(root / d / "teaser.png", 5)
    assert list_folder(root).layout == "root/domain/split/class/*"
    other = make(tmp_path / "other", "p/a", "p/b", "q/a", "q/b", count=3)
    for d in "pq":
        image(other / d / "teaser.png", 5)
    listing = list_folder(other)
    assert listing.layout == "root/domain/class/*"
    assert len(listing.notes) == 2

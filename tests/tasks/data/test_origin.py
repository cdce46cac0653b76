"""Prepared folders know what they were made from: a change is said, `--force` makes them again, and readers see whole
sets."""

import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from parts.image_folders import image, make
from typer.testing import CliRunner

from suite.cli import app
from tasks.base import NotPrepared
from tasks.data import checksum, decoding, folders, is_prepared, listed, load, open_folder, prepare, swap
from tasks.data.prepared import new_folder
from tasks.data.sources.folder import folder_root

CLASSES = "train/a", "train/b", "test/a", "test/b"


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "set", *CLASSES)


@pytest.fixture
def data_dir(tmp_path, root):
    assert prepare(f"folder:{root}", tmp_path / "data", size=6).made
    return tmp_path / "data"


def manifest_of(data_dir):
    (path,) = data_dir.glob("*/manifest.json")
    return path


def test_the_same_images_are_not_prepared_twice(root, data_dir):
    assert not prepare(f"folder:{root}", data_dir).made
    assert not prepare(f"folder:{root}/", data_dir, size=6).made
    os.utime(root / "train/a/0.png", (1, 1))  # a copy has other times
    assert not prepare(f"folder:{root}", data_dir).made


def grow(root):
    image(root / "train/a/more.png", 77)


def shrink(root):
    (root / "test/b/3.png").unlink()


def rename(root):
    (root / "test/b/3.png").rename(root / "test/b/33.png")


def move(root):
    (root / "test/b/3.png").rename(root / "train/b/33.png")


def edit(root):
    content = (root / "train/a/1.png").read_bytes()
    (root / "train/a/1.png").write_bytes(
        (root / "train/a/2.png").read_bytes().ljust(len(content), b"\0")[: len(content)]
    )


def add_class(root):
    make(root, "train/new", "test/new")


@pytest.mark.parametrize("change", [grow, shrink, rename, move, edit, add_class])
@pytest.mark.parametrize("older", [False, True])
def test_a_changed_folder_says_so_and_force_makes_it_again(root, data_dir, change, older):
    name = f"folder:{root}"
    if older:  # a manifest of 1.4 names the folder only, so the images can be counted at most
        path = manifest_of(data_dir)
        path.write_text(
            json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ("source", "decoding")})
        )
    before = load(name, data_dir)
    change(root)
    if older and change in (rename, move, edit):
        done = prepare(name, data_dir)
        assert not done.made
        assert done.notes[0].startswith("an older version prepared it: only the folder and the number of images were")
    else:
        with pytest.raises(ValueError, match=r"has changed since it was prepared \(.*\); --force makes it again"):
            prepare(name, data_dir)
    assert load(name, data_dir).checksum == before.checksum
    assert prepare(name, data_dir, force=True).made
    after = load(name, data_dir)
    assert after.image_shape == (3, 6, 6)  # the size it had
    assert (after.checksum == before.checksum) == (change is rename)
    assert not prepare(name, data_dir).made
    assert sorted(p.name for p in data_dir.iterdir()) == [manifest_of(data_dir).parent.name]


def test_another_source_or_none_is_said(tmp_path, root):
    other, data = make(tmp_path / "other", *CLASSES), tmp_path / "data"
    prepare("imagenet", data, source=root, size=6)
    before = checksum("imagenet", data)
    assert not prepare("imagenet", data).made
    assert not prepare("imagenet", data, source=root).made
    with pytest.raises(ValueError, match=rf"was prepared from {root}, not from {other}; --force makes it again"):
        prepare("imagenet", data, source=other)
    with pytest.raises(ValueError, match='folder "/nowhere": no such folder'):
        prepare("imagenet", data, source=Path("/nowhere"))
    with pytest.raises(ValueError, match='folder "/nowhere": no such folder'):
        prepare("imagenet", data, source=Path("/nowhere"), force=True)
    assert checksum("imagenet", data) == before
    image(other / "train/a/more.png", 5)
    assert prepare("imagenet", data, source=other, force=True).made
    assert json.loads(manifest_of(data).read_text())["root"] == str(other)
    assert prepare("imagenet", data, force=True).made  # from where it was made
    assert not prepare("imagenet", data, source=other).made
    assert checksum("imagenet", data) != before


def test_a_folder_that_is_gone_is_said_and_its_set_stays(root, data_dir):
    root.rename(root.with_name("moved"))
    with pytest.raises(ValueError, match="no such folder"):
        prepare(f"folder:{root}", data_dir)
    with pytest.raises(ValueError, match="no such folder"):
        prepare(f"folder:{root}", data_dir, force=True)
    assert len(load(f"folder:{root}", data_dir).test) == 20


def test_a_damaged_manifest_is_mended_by_force(root, data_dir):
    manifest_of(data_dir).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        prepare(f"folder:{root}", data_dir)
    assert prepare(f"folder:{root}", data_dir, size=6, force=True).made
    assert len(load(f"folder:{root}", data_dir).test) == 20


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("source", 3),
        ("source", {}),
        ("source", {"images": "5"}),
        ("root", 5),
        ("root", None),
        ("size", "6"),
        ("size", 0),
    ],
)
def test_what_a_manifest_says_of_its_source_is_not_believed(root, data_dir, fact, value):
    path = manifest_of(data_dir)
    facts = json.loads(path.read_text())
    for changed in (facts | {fact: value}, {key: facts[key] for key in facts if key != fact or fact == "source"}):
        path.write_text(json.dumps(changed))
        if changed == facts:
            continue  # a manifest without its source is an older version's
        with pytest.raises(ValueError, match=rf"{path.parent}.*(damaged|not prepared from a folder)"):
            prepare(f"folder:{root}", data_dir)
        path.unlink()
    path.write_text(json.dumps(facts))
    assert not prepare(f"folder:{root}", data_dir).made


def test_a_failed_repetition_leaves_what_was_there(root, data_dir):
    before = checksum(f"folder:{root}", data_dir)
    (root / "train/a/0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png: can not be decoded"):
        prepare(f"folder:{root}", data_dir, force=True)
    assert checksum(f"folder:{root}", data_dir) == before
    assert len(load(f"folder:{root}", data_dir).train) == 18
    assert [p.name for p in data_dir.iterdir()] == [manifest_of(data_dir).parent.name]


def test_a_reader_sees_the_old_set_or_the_new_one(root, data_dir):
    name, seen, done = f"folder:{root}", [], threading.Event()

    def read():
        while not done.is_set():
            data = load(name, data_dir)
            seen.append((data.checksum, len(data.train), int((data.train.labels == 0).sum())))

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        try:
            for _ in range(8):
                for i in range(10):
                    image(root / "train/a" / f"more{i}.png", 50 + i)
                prepare(name, data_dir, force=True)
                for i in range(10):
                    (root / "train/a" / f"more{i}.png").unlink()
                prepare(name, data_dir, force=True)
        finally:
            done.set()
        reader.result(60)
    assert {facts[1:] for facts in seen} <= {(18, 9), (27, 18)}
    assert len(set(seen)) <= 2 < len(seen)


def test_folders_change_places_also_where_the_system_has_no_call_for_it(tmp_path, monkeypatch):
    def named(folder, text):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "name").write_text(text)
        return tmp_path / folder

    one, other = named("one", "1"), named("other", "2")
    for expected in ("2", "1"):
        swap.exchange(one, other)
        assert ((one / "name").read_text(), (other / "name").read_text()) == (expected, "12".replace(expected, ""))
        monkeypatch.setattr(swap, "_exchanged", lambda *paths: False)
    assert len(list(tmp_path.iterdir())) == 2
    rename = Path.rename

    def fail(self, target):
        if self == one:
            raise OSError("the second rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="second rename"):
        swap.exchange(one, other)
    assert (other / "name").read_text() == "2"


def test_whoever_prepares_second_without_force_changes_nothing(tmp_path):
    for text, replace in (("first", False), ("second", False), ("third", True)):
        with new_folder(tmp_path, "x", replace=replace) as folder:
            (folder / "manifest.json").write_text(text)
    assert (tmp_path / "x/manifest.json").read_text() == "third"
    with new_folder(tmp_path, "x") as folder:
        (folder / "manifest.json").write_text("fourth")
    assert (tmp_path / "x/manifest.json").read_text() == "third"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_linked_set_gives_its_place_and_keeps_its_files(tmp_path, root, data_dir):
    place = manifest_of(data_dir).parent
    place.rename(tmp_path / "scratch")
    place.symlink_to(tmp_path / "scratch")
    assert len(load(f"folder:{root}", data_dir).train) == 18
    prepare(f"folder:{root}", data_dir, force=True)
    assert not place.is_symlink()
    assert [p.name for p in data_dir.iterdir()] == [place.name]
    assert (tmp_path / "scratch" / "manifest.json").exists()


# identity


def test_the_checksum_of_ordinary_folders_is_as_ever(tmp_path):
    # images of the size that is prepared, written without compression: what NormSuite 1.4 said of them
    for number, folder in enumerate(CLASSES):
        for i in range(5):
            path = tmp_path / "set" / folder / f"{i}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"P6 4 4 255\n" + bytes((48 * number + i + k) % 256 for k in range(48)))
    prepare(f"folder:{tmp_path / 'set'}", tmp_path / "data", size=4)
    assert checksum(f"folder:{tmp_path / 'set'}", tmp_path / "data") == "e81733020b1ffc14"


@pytest.mark.parametrize(
    ("constant", "places"), [("DECODING", ("folders", "prepared", "origin")), ("INDEX", ("folders", "prepared"))]
)
def test_how_images_are_read_is_part_of_a_large_sets_identity_only(tmp_path, root, monkeypatch, constant, places):
    name, found = f"folder:{root}", {}
    for large in (False, True):
        monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 0 if large else 2**30)
        for version in (2, 3):
            for place in places:
                monkeypatch.setattr(f"tasks.data.{place}.{constant}", version)
            data_dir = tmp_path / f"{large} {version}"
            prepare(name, data_dir, size=6)
            found[large, version] = checksum(name, data_dir)
    assert found[False, 2] == found[False, 3]
    assert found[True, 2] != found[True, 3]


@pytest.mark.parametrize("lacking", ["decoding", "index"])
def test_a_large_set_that_an_older_version_prepared_is_to_be_made_again(tmp_path, root, monkeypatch, lacking):
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 0)
    prepare("imagenet", tmp_path, source=root, size=6)
    path = manifest_of(tmp_path)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != lacking}))
    for ask in (checksum, open_folder, prepare):
        with pytest.raises(ValueError, match="decodes some images in another way; prepare the data set again with"):
            ask("imagenet", tmp_path)
    prepare("imagenet", tmp_path, source=root, size=6, force=True)
    assert len(open_folder("imagenet", tmp_path).train) == 18
    assert decoding.DECODING == 2


def test_a_set_in_memory_of_another_decoding_is_used_and_said(root, data_dir, monkeypatch):
    monkeypatch.setattr("tasks.data.origin.DECODING", 3)
    assert len(load(f"folder:{root}", data_dir).train) == 18
    with pytest.raises(ValueError, match="this version decodes some images in another way; --force"):
        prepare(f"folder:{root}", data_dir)


# names and the command line


def test_a_home_is_expanded(tmp_path, root, data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_root("folder:~/set") == root
    assert is_prepared("folder:~/set", data_dir)
    assert checksum("folder:~/set", data_dir) == checksum(f"folder:{root}", data_dir)
    assert np.array_equal(load("folder:~/set", data_dir).test.images, load(f"folder:{root}", data_dir).test.images)
    assert not prepare("folder:~/set", data_dir).made
    with pytest.raises(ValueError, match=r'data set "folder:~nobody-at-all/x": .*home'):
        load("folder:~nobody-at-all/x", data_dir)
    with pytest.raises(ValueError, match=r'source "~nobody-at-all/x": .*home'):
        prepare("imagenet", data_dir, source=Path("~nobody-at-all/x"))


@pytest.mark.parametrize("name", ["folder:/my photos", "folder:it's", "folder:a;b", "folder:$HOME"])
def test_commands_in_messages_can_be_pasted(name, tmp_path):
    with pytest.raises(NotPrepared) as caught:
        load(name, tmp_path)
    command = str(caught.value).split("`")[1]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert words.stdout.splitlines() == ["python", "run_suite.py", "data", "prepare", name, "--data-dir", str(tmp_path)]


def test_data_prepare_says_what_it_did(tmp_path, root):
    run, data = CliRunner(), str(tmp_path / "data")
    (root / "test/a/0.png").write_bytes((root / "train/a/0.png").read_bytes())
    arguments = ["data", "prepare", f"folder:{root}", "--data-dir", data, "--size", "6"]
    first = run.invoke(app, arguments)
    assert "warning: 1 image of test is also in" in first.stderr
    assert first.stdout == f"folder:{root} is prepared in {data}\n"
    assert run.invoke(app, arguments).stdout == f"folder:{root} is prepared already in {data}: nothing to do\n"
    assert f"folder:{root} is prepared in {data}\n" in run.invoke(app, [*arguments, "--force"]).stdout
    assert run.invoke(app, ["data", "prepare", "glyphs"]).stdout == "glyphs is built in: nothing to do\n"
    grow(root)
    failed = run.invoke(app, arguments)  # main() prints its errors
    assert isinstance(failed.exception, ValueError)
    assert str(failed.exception).endswith(
        "has changed since it was prepared (41 images, was 40); --force makes it again"
    )
    assert failed.stdout == ""


# a folder is its content, not its path


def test_a_moved_folder_is_found_again_and_prepare_learns_its_place(tmp_path, root, data_dir):
    before, moved = checksum(f"folder:{root}", data_dir), tmp_path / "elsewhere" / "set"
    moved.parent.mkdir()
    root.rename(moved)
    name = f"folder:{moved}"
    assert is_prepared(name, data_dir)
    assert checksum(name, data_dir) == before
    assert len(load(name, data_dir).test) == 20
    assert not prepare(name, data_dir).made
    assert json.loads(manifest_of(data_dir).read_text())["root"] == str(moved)
    assert checksum(name, data_dir) == before
    assert checksum(f"folder:{root}", data_dir) == before  # the path that the images had
    grow(moved)
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        prepare(name, data_dir)
    assert prepare(name, data_dir, force=True).made
    assert len(list(data_dir.iterdir())) == 1


@pytest.mark.parametrize("spelt", ["folder:{}/nowhere/set", "folder:set", "folder:/another/machine/set"])
def test_a_copied_data_folder_serves_where_the_images_never_were(tmp_path, root, data_dir, spelt, monkeypatch):
    before = checksum(f"folder:{root}", data_dir)
    data_dir.rename(tmp_path / "copied")
    shutil.rmtree(root)
    monkeypatch.chdir(tmp_path / "copied")
    name = spelt.format(tmp_path)
    assert checksum(name, tmp_path / "copied") == before
    assert len(load(name, tmp_path / "copied").test) == 20
    with pytest.raises(NotPrepared):
        load("folder:/another/machine/sets", tmp_path / "copied")


def test_another_folder_of_one_name_is_another_set(tmp_path, root, data_dir):
    other = make(tmp_path / "b" / "set", *CLASSES, count=11)
    with pytest.raises(NotPrepared):  # also while nobody prepared it
        load(f"folder:{other}", data_dir)
    root.rename(root.with_name("gone"))
    with pytest.raises(NotPrepared):
        load(f"folder:{other}", data_dir)
    prepare(f"folder:{other}", data_dir, size=6)
    assert checksum(f"folder:{other}", data_dir) != checksum(f"folder:{root}", data_dir)
    with pytest.raises(
        ValueError, match=r"does not exist, and folders of this name with different images are prepared: "
    ) as e:
        load("folder:/nowhere/set", data_dir)
    assert str(root) in str(e.value)
    assert str(other) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_moved_folder_with_other_bytes_of_one_size_is_another_set(tmp_path, root, data_dir):
    moved = tmp_path / "b" / "set"
    moved.parent.mkdir()
    root.rename(moved)
    edit(moved)
    with pytest.raises(NotPrepared):
        load(f"folder:{moved}", data_dir)


def test_two_copies_of_one_content_are_one(tmp_path, root, data_dir):
    other = shutil.copytree(root, tmp_path / "b" / "set")
    prepare(f"folder:{other}", data_dir, size=6)
    assert len(list(data_dir.iterdir())) == 2
    assert checksum("folder:/nowhere/set", data_dir) == checksum(f"folder:{root}", data_dir)


def test_a_link_by_which_a_folder_was_prepared_is_a_name_of_it(tmp_path, root):
    (tmp_path / "cats").symlink_to(root)
    prepare(f"folder:{tmp_path / 'cats'}", tmp_path / "data", size=6)
    shutil.rmtree(root)
    (tmp_path / "cats").unlink()
    for name in ("cats", "set"):
        assert len(load(f"folder:/nowhere/{name}", tmp_path / "data").test) == 20


def test_names_that_begin_alike_are_told_apart(tmp_path, root, data_dir):
    prepare(f"folder:{make(tmp_path / 'set-12345678', *CLASSES, count=5)}", data_dir, size=6)
    assert len(load("folder:/nowhere/set", data_dir).test) == 20
    assert len(load("folder:/nowhere/set-12345678", data_dir).test) == 10


def test_a_moved_large_set_is_decoded_from_its_new_place(tmp_path, root, monkeypatch):
    monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 0)
    prepare(f"folder:{root}", tmp_path / "data", size=6)
    prepare("imagenet", tmp_path / "data", source=root, size=6)
    first = open_folder(f"folder:{root}", tmp_path / "data").train[0][0]
    moved = tmp_path / "b" / "set"
    moved.parent.mkdir()
    root.rename(moved)
    assert np.array_equal(open_folder(f"folder:{moved}", tmp_path / "data").train[0][0], first)
    assert not prepare("imagenet", tmp_path / "data", source=moved).made
    assert np.array_equal(open_folder("imagenet", tmp_path / "data").train[0][0], first)


def test_data_list_shows_prepared_folders_and_damaged_ones(tmp_path, root, data_dir):
    other = make(tmp_path / "pics", "p/a", "p/b", "q/a", "q/b")
    prepare(f"folder:{other}", data_dir, size=6)
    rows = {each.name: each for each in listed(data_dir)}
    assert rows[f"folder:{root}"].here == "yes"
    assert rows[f"folder:{root}"].what == f"set · real · 2 classes · 3x6x6 · 40 images · prepared from {root}"
    assert "domains p, q" in rows[f"folder:{other}"].what
    shutil.rmtree(other)
    (damaged,) = data_dir.glob("folder-set-*")
    (damaged / "manifest.json").write_text("{")
    (data_dir / ".preparing-x").mkdir()
    (data_dir / ".preparing-x" / "manifest.json").write_text("{")
    shown = CliRunner().invoke(app, ["data", "list", "--data-dir", str(data_dir)]).stdout
    assert "which is gone" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith(damaged.name)]
    assert " damaged " in line
    assert "preparing" not in shown
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == [
        "fashion_mnist_mini",
        "fashion_shifted",
        "digits",
        "glyphs",
    ]


@pytest.mark.parametrize(
    "fact", [{"layout": 3}, {"cut": "x"}, {"cut": {"rule": "r", "salt": "s", "fractions": {"a": "b"}}}]
)
def test_what_a_manifest_says_of_its_cut_is_not_believed(root, data_dir, fact):
    path = manifest_of(data_dir)
    path.write_text(json.dumps(json.loads(path.read_text()) | fact))
    with pytest.raises(ValueError, match=r"damaged \(layout or cut"):
        prepare(f"folder:{root}", data_dir)


def test_a_set_without_its_manifest_says_what_makes_it_again(root, data_dir):
    manifest_of(data_dir).unlink()
    with pytest.raises(ValueError, match=r"without its manifest\.json; --force makes it again"):
        prepare(f"folder:{root}", data_dir, size=6)
    assert prepare(f"folder:{root}", data_dir, size=6, force=True).made
    assert load(f"folder:{root}", data_dir).num_classes == 2

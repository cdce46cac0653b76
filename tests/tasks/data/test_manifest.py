"""Folders of prepared data as anyone may have written them: a damaged one is an error that names its file."""

import hashlib
import io
import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts.tiny_sets import tiny
from PIL import Image
from typer.testing import CliRunner

from suite import cli
from tasks.data import check_classifiable, checksum, class_counts, folders, is_prepared, load, open_folder, prepare
from tasks.data.manifest import content_checksum


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A prepared set, and its files as they were."""
    data_dir = tmp_path_factory.mktemp("mnist")
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny(monkeypatch, data_dir, "mnist")
        prepare("mnist", data_dir)
    folder = data_dir / "mnist"
    return data_dir, folder, {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A prepared set that counts as too large for memory."""
    root, data_dir = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(root / part / label / f"{i}.png")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", 1)
        prepare("imagenet", data_dir, source=root, size=4)
    folder = data_dir / "imagenet"
    return data_dir, folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def restore(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content)


def questions(name, data_dir):
    """Everything that reads a prepared folder."""
    read = open_folder if name == "imagenet" else load
    return [
        lambda: checksum(name, data_dir),
        lambda: is_prepared(name, data_dir),
        lambda: check_classifiable(name, data_dir),
        lambda: class_counts(name, data_dir),
        lambda: read(name, data_dir),
    ]


def ask(name, data_dir, folder):
    """Ask all; the only error there may be is one short ValueError that names a file of the folder. Returns them."""
    errors = []
    for question in questions(name, data_dir):
        try:
            question()
        except ValueError as error:
            errors.append(str(error))
    for error in errors:
        assert str(folder) in error
        assert "\n" not in error
        assert len(error) < 600
    return errors


def changed(stored, /, **facts):
    """The text of a manifest with other facts; a fact of ... is left out, the checksum is made to fit the files."""
    manifest = json.loads(stored["manifest.json"]) | facts
    if isinstance(facts.get("files"), dict):
        manifest["checksum"] = content_checksum(facts["files"])
    return json.dumps({key: value for key, value in manifest.items() if value is not ...})


def digests(stored, /, **others):
    return {**json.loads(stored["manifest.json"])["files"], **others}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": 1, "x": ' + "[" * 100_000,
        '{"format": ' + "9" * 5000 + "}",
        '{"format": 1.0}',
        '{"format": true}',
        '{"format": 1}',
        "null",
        "",
        '"\ud800"'.encode("utf-8", "surrogatepass"),
        b"\xff\xfe",
        b"\0" * 1000,
    ],
)
def test_a_manifest_that_is_none_is_named(mnist, text):
    data_dir, folder, files = mnist
    (folder / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    errors = ask("mnist", data_dir, folder)
    restore(folder, files)
    assert len(errors) == 5
    assert all("manifest.json: " in error for error in errors)


@pytest.mark.parametrize(
    "facts",
    [
        *[{key: ...} for key in ("name", "title", "kind", "num_classes", "class_names", "disjoint_classes", "domains")],
        *[{key: ...} for key in ("moments", "files", "checksum")],
        *[{key: 7.5} for key in ("name", "num_classes", "class_names", "domains", "moments", "files", "checksum")],
        {"num_classes": True},
        {"num_classes": -1},
        {"num_classes": 11},
        {"num_classes": int("9" * 309)},
        {"class_names": [1] * 10},
        {"domains": []},
        {"domains": ["", ""]},
        {"domains": [["a"]]},
        {"files": []},
        {"files": {}},
        {"files": {"../../etc/passwd": "0" * 64}},
        {"files": {"0_train_images.npy": 1}},
        {"moments": {"": [[float("nan")], [1.0]]}},
        {"moments": {"": [[0.5], [float("inf")]]}},
        {"moments": {"": [[0.5], [0.0]]}},
        {"moments": {"": [[0.5, 0.5], [1.0]]}},
        {"moments": {"": [0.5, 1.0]}},
        {"moments": {"x": [[0.5], [1.0]]}},
        {"checksum": "0" * 16},
    ],
    ids=str,
)
def test_a_manifest_that_lacks_a_fact_is_named(mnist, facts):
    data_dir, folder, files = mnist
    (folder / "manifest.json").write_text(changed(files, **facts))
    errors = ask("mnist", data_dir, folder)
    restore(folder, files)
    assert len(errors) == 5
    assert all("manifest.json: damaged (" in error for error in errors)


def npy(array=None, shape=None, descr="|u1"):
    """A .npy file: of an array, or with a header that its content does not keep."""
    buffer = io.BytesIO()
    if array is not None:
        np.save(buffer, array)
        return buffer.getvalue()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + b"\0" * 100


LABELS_OF_VAL = np.arange(10)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("0_val_images.npy", npy(np.zeros((10, 32, 32), np.uint8))),
        ("0_val_images.npy", npy(np.zeros((10, 1, 32, 32), np.float32))),
        ("0_val_images.npy", npy(shape=(10**12, 1, 32, 32))),
        ("0_val_images.npy", npy(shape=(10**400, 1, 32, 32))),
        ("0_val_images.npy", npy(shape=(-1, 1, 32, 32))),
        ("0_val_images.npy", npy(shape=(10, 1, 32, 32))),
        ("0_val_images.npy", npy(shape=(1,), descr="|O")),
        ("0_val_images.npy", b""),
        ("0_val_images.npy", b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000),
        ("0_val_images.npy", b"\x93NUMPY\x09\x00v"),
        ("0_val_images.npy", b"PK\x03\x04"),
        ("0_val_images.npy", b"\x80\x04]."),
        ("0_val_labels.npy", npy(LABELS_OF_VAL + 1)),
        ("0_val_labels.npy", npy(LABELS_OF_VAL - 1)),
        ("0_val_labels.npy", npy(LABELS_OF_VAL.astype(np.int32))),
        ("0_val_labels.npy", npy(LABELS_OF_VAL[None])),
    ],
)
def test_arrays_whose_digest_fits_and_whose_form_does_not_are_named(mnist, file, content):
    data_dir, folder, files = mnist
    (folder / file).write_bytes(content)
    text = changed(files, files=digests(files, **{file: hashlib.sha256(content).hexdigest()}))
    (folder / "manifest.json").write_text(text)
    errors = ask("mnist", data_dir, folder)
    restore(folder, files)
    assert errors
    assert all(f"{file}: damaged or missing; delete {folder}" in error for error in errors)


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("0_val_images.npy", np.zeros((9, 1, 32, 32), np.uint8)),
        ("0_val_images.npy", np.zeros((10, 1, 16, 16), np.uint8)),
        ("0_val_images.npy", np.zeros((10, 3, 32, 32), np.uint8)),
        ("0_val_labels.npy", LABELS_OF_VAL[:9]),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_named(mnist, file, array):
    data_dir, folder, files = mnist
    content = npy(array)
    (folder / file).write_bytes(content)
    text = changed(files, files=digests(files, **{file: hashlib.sha256(content).hexdigest()}))
    (folder / "manifest.json").write_text(text)
    errors = ask("mnist", data_dir, folder)
    restore(folder, files)
    assert [f"{folder}: its arrays do not fit each other" in error for error in errors] == [True]


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"train": [], "val": [], "test": []},
        {"train": 1, "val": 1, "test": 1},
        {"train": [["a.png", 0]], "val": [["a.png", 0, 1]], "test": [["a.png", 0, 1]]},
        *[
            {part: [entry] for part in ("train", "val", "test")}
            for entry in (
                ["../a.png", 0, 1],
                ["train/../../a.png", 0, 1],
                ["/etc/passwd", 0, 1],
                ["a\0.png", 0, 1],
                ["a.png", 2, 1],
                ["a.png", -1, 1],
                ["a.png", True, 1],
                ["a.png", 0, float("nan")],
                ["a.png", 0, 10**309],
                [["a.png"], 0, 1],
                "a.png",
            )
        ],
    ],
    ids=str,
)
def test_an_index_of_another_form_or_of_files_elsewhere_is_named(imagenet, index):
    data_dir, folder, files = imagenet
    content = json.dumps({"domains": {"": index}}).encode()
    (folder / "index.json").write_bytes(content)
    (folder / "manifest.json").write_text(changed(files, files={"index.json": hashlib.sha256(content).hexdigest()}))
    errors = ask("imagenet", data_dir, folder)
    restore(folder, files)
    assert len(errors) == 2
    assert all("index.json: damaged or missing; delete" in error for error in errors)


def test_a_deep_or_enormous_index_is_named(imagenet, monkeypatch):
    data_dir, folder, files = imagenet
    content = b"[" * 200_000
    (folder / "index.json").write_bytes(content)
    (folder / "manifest.json").write_text(changed(files, files={"index.json": hashlib.sha256(content).hexdigest()}))
    assert all("nested too deeply" in error for error in ask("imagenet", data_dir, folder))
    with (folder / "index.json").open("r+b") as file:
        file.truncate(2**40)  # sparse
    assert all("larger than 2048 MiB" in error for error in ask("imagenet", data_dir, folder))
    (folder / "index.json").unlink()
    restore(folder, files)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**309),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["format", "name", "kind", "num_classes", "class_names", "disjoint_classes", "domains", "moments", "files"]
CHANGES = st.dictionaries(
    st.sampled_from([*KEYS, "checksum", "root", "size", "source", "decoding"]), VALUES, min_size=1, max_size=3
)


def fuzz(mnist, imagenet, examples, seconds):
    """Whatever stands in a manifest, an index or an array: no error but one that names the file, and soon."""
    end = time.monotonic() + seconds

    @settings(
        max_examples=examples,
        deadline=2000,
        database=None,
        derandomize=examples < 1000,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(["mnist", "imagenet"]),
        st.integers(0, 9),
        CHANGES,
        st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=6)), max_size=4),
    )
    def attempt(name, which, facts, cuts):
        if time.monotonic() > end:
            return
        data_dir, folder, files = mnist if name == "mnist" else imagenet
        try:
            if which < 4:
                (folder / "manifest.json").write_text(changed(files, **facts), encoding="utf-8")
            else:
                file = sorted(files)[which % len(files)]
                content = files[file]
                for place, put in cuts:
                    content = content[: place % (len(content) + 1)] + put + content[place % (len(content) + 1) + 1 :]
                (folder / file).write_bytes(content)
                if file != "manifest.json":  # as by one who fits the digest to the damage
                    digest = hashlib.sha256(content).hexdigest()
                    (folder / "manifest.json").write_text(changed(files, files=digests(files, **{file: digest})))
            ask(name, data_dir, folder)
        finally:
            restore(folder, files)

    attempt()


def test_no_manifest_index_or_array_gives_a_traceback(mnist, imagenet):
    fuzz(mnist, imagenet, 150, 60)


@pytest.mark.slow
def test_no_manifest_index_or_array_gives_a_traceback_for_minutes(mnist, imagenet):
    fuzz(mnist, imagenet, 50_000, 150)


def test_one_odd_folder_does_not_stop_the_list_of_data_sets(mnist, tmp_path):
    _, _, files = mnist
    for name, content in (("mnist", b"[" * 100_000), ("kmnist", files["manifest.json"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(content)
    (tmp_path / "usps").write_text("a file")
    (tmp_path / "svhn" / "manifest.json").mkdir(parents=True)
    (tmp_path / "emnist").symlink_to("emnist")
    done = CliRunner().invoke(cli.app, ["data", "list", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name in ("mnist", "usps", "svhn", "emnist"):
        assert lines[name].split()[1] == "damaged"
        assert str(tmp_path / name) in lines[name]
    assert lines["mnist_usps_svhn"].split()[1] == "damaged"
    assert [lines[name].split()[1] for name in ("kmnist", "cifar10", "digits")] == ["yes", "no", "yes"]


def test_a_damaged_manifest_is_not_taken_for_a_prepared_set(tmp_path):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: damaged .*; delete .*mnist and prepare the data set again"):
        prepare("mnist", tmp_path)


def test_a_file_that_ends_too_early_is_no_ctrl_c(tmp_path, monkeypatch, capsys):
    """Click takes an EOFError for Ctrl-C: exit 130 and a blank line."""
    import tasks.data

    def ends(*args, **options):
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    monkeypatch.setattr(tasks.data, "prepare", ends)
    monkeypatch.setattr("sys.argv", ["run_suite.py", "data", "prepare", "usps"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: a file ends too early: Compressed file ended before the end-of-stream marker was reached\n"
    )

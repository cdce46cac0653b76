"""What a data set is known to hold is there, or it is not prepared: partial, damaged and interrupted downloads."""

import contextlib
import errno
import functools
import http.server
import os
import threading

import numpy as np
import pytest
import torchvision
from parts.tiny_sets import LABELS, archives, deliver, idx, known, omniglot, pixels, publish, tiny

from tasks.data import is_prepared, load, prepare
from tasks.data.prepared import new_folder

TOO_FEW = {"train": LABELS["train"][:30], "test": LABELS["test"]}
OUT_OF_RANGE = {"train": np.where(LABELS["train"] == 3, 255, LABELS["train"]), "test": LABELS["test"]}
CLASS_ABSENT = {"train": np.where(LABELS["train"] == 3, 4, LABELS["train"]), "test": LABELS["test"]}
REFUSED = r'data set "{}" is not whole: .*{}.*\. Nothing of it was prepared'


def refuse(name, data_dir, message):
    """Nothing is prepared, and the error of one line says why."""
    with pytest.raises(ValueError, match=REFUSED.format(name, message)) as caught:
        prepare(name, data_dir)
    assert len(str(caught.value).splitlines()) == 1
    assert not is_prepared(name, data_dir)
    assert {p.name for p in data_dir.iterdir()} == {"downloads"}


@pytest.mark.parametrize("name", ["mnist", "emnist", "usps"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (TOO_FEW, "the train part has 30 images, published are 40"),
        (OUT_OF_RANGE, "the train part has a label 255; classes are 0 to 9"),
        (CLASS_ABSENT, 'the train part has no image of class "'),
    ],
)
def test_a_partial_set_is_not_prepared(name, labels, message, tmp_path, monkeypatch):
    tiny(monkeypatch, tmp_path, name, labels=labels)
    refuse(name, tmp_path, message)


def test_images_without_labels_and_labels_without_images_are_not_prepared(tmp_path, monkeypatch):
    files = archives("mnist")
    files["MNIST/raw/train-labels-idx1-ubyte.gz"] = idx(LABELS["train"][:20])
    known(monkeypatch, "mnist")
    publish(monkeypatch, "mnist", files)
    deliver(tmp_path, "mnist", files)
    refuse("mnist", tmp_path, r"the train part has 40 images and labels \(20,\)")


def test_images_of_another_form_are_not_prepared(tmp_path, monkeypatch):
    files = archives("mnist")
    files["MNIST/raw/train-images-idx3-ubyte.gz"] = idx(pixels(40, 20, 28))
    known(monkeypatch, "mnist")
    publish(monkeypatch, "mnist", files)
    deliver(tmp_path, "mnist", files)
    refuse("mnist", tmp_path, r"images of the train part are uint8 \(1, 24, 32\), not uint8 \(1, 32, 32\)")


class HalfCifar:
    """Stands for a torchvision set that was half read."""

    classes = tuple("abcdefghij")

    def __init__(self, root, train, download):
        count = 20
        self.data, self.targets = pixels(count, 32, 32, 3), [i % 10 for i in range(count)]


def test_sets_that_torchvision_reads_are_compared_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", HalfCifar)
    known(monkeypatch, "cifar10")
    refuse("cifar10", tmp_path, "the train part has 20 images, published are 40")
    known(monkeypatch, "cifar10", num_classes=12)
    refuse("cifar10", tmp_path, "it has 10 classes, published are 12")


def test_omniglot_is_read_from_its_archive_whatever_lies_unpacked_beside_it(tmp_path, monkeypatch):
    files = tiny(monkeypatch, tmp_path, "omniglot")
    left = tmp_path / "downloads" / "omniglot" / "omniglot-py" / "images_background" / "Alphabet 0" / "character1"
    left.mkdir(parents=True)  # an extraction stopped here
    prepare("omniglot", tmp_path)
    data = load("omniglot", tmp_path)
    assert sorted({int(k) for p in (data.train, data.val, data.test) for k in p.labels}) == list(range(20))

    files["omniglot-py/images_background.zip"] = omniglot(1, [f"Alphabet {i}" for i in range(7)])  # one is missing
    publish(monkeypatch, "omniglot", files)
    deliver(tmp_path / "other", "omniglot", files)
    refuse("omniglot", tmp_path / "other", "it has 18 classes, published are 20")


@pytest.mark.parametrize("name", ["mnist", "emnist"])
def test_unpacked_files_and_old_pickles_of_torchvision_are_not_read(name, tmp_path, monkeypatch):
    tiny(monkeypatch, tmp_path, name)
    folder = tmp_path / "downloads" / name / name.upper()
    for file in ("raw/train-images-idx3-ubyte", "raw/emnist-balanced-train-images-idx3-ubyte", "processed/training.pt"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"half")
    prepare(name, tmp_path)
    assert len(load(name, tmp_path).train) == 30


@contextlib.contextmanager
def publisher(folder, monkeypatch):
    """An address that serves the files of `folder`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("left", [0, 7, None])
def test_an_interrupted_download_heals(left, tmp_path, monkeypatch):
    """Half a usps.bz2, or an empty one, made every later `data prepare` end as if by Ctrl-C."""
    files = tiny(monkeypatch, tmp_path, "usps")
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    half = tmp_path / "downloads" / "usps" / "usps.bz2"
    half.write_bytes(files["usps.bz2"][: len(files["usps.bz2"]) // 2 if left is None else left])
    with publisher(tmp_path, monkeypatch) as address:
        of_parts = torchvision.datasets.USPS.split_list
        served = {part: [address + file, file, md5] for part, (_, file, md5) in of_parts.items()}
        monkeypatch.setattr(torchvision.datasets.USPS, "split_list", served)
        prepare("usps", tmp_path)
    assert half.read_bytes() == files["usps.bz2"]
    assert len(load("usps", tmp_path).train) == 30


@pytest.mark.parametrize("name", ["mnist", "emnist", "usps", "omniglot"])
def test_a_damaged_archive_is_named_and_never_opened(name, tmp_path, monkeypatch):
    from tasks.data.sources import downloads

    files = tiny(monkeypatch, tmp_path, name)
    for reader in ("read_gzip", "read_gzip_in_zip", "read_libsvm", "images_by_class"):
        monkeypatch.setattr(downloads, reader, lambda path, *_: pytest.fail(f"{path} was opened"))
    first = tmp_path / "downloads" / name / next(iter(files))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"{first.name}: damaged, its md5 is not the published one, and not downloaded"
    ):
        prepare(name, tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match=rf"{first.name}: missing and not downloaded .*Nothing of it was prepared"):
        prepare(name, tmp_path)
    assert not first.exists()


# the folder of prepared sets


def test_what_killed_preparations_left_is_removed_and_that_of_others_stays(tmp_path, monkeypatch):
    gone = os.fork()
    if not gone:
        os._exit(0)
    os.waitpid(gone, 0)
    with new_folder(tmp_path, "mine") as temporary:
        _, host, process, _ = temporary.name.split("-")
        assert process == str(os.getpid())
        (temporary / "manifest.json").write_text("{}")
        other = tmp_path / f".preparing-{'0' * 8}-{gone}-0"
        old_elsewhere = tmp_path / f".preparing-{'1' * 8}-{gone}-0"
        of_older_versions = tmp_path / ".preparing-k3v_x2"
        dead, odd = tmp_path / f".preparing-{host}-{gone}-0", tmp_path / f".preparing-{host}-x-0"
        for folder in (other, old_elsewhere, of_older_versions, dead, odd):
            folder.mkdir()
            (folder / "0_train_images.npy").write_text("half")
        for folder in (old_elsewhere, of_older_versions):
            os.utime(folder, (0, 0))
        with new_folder(tmp_path, "second") as second:
            (second / "manifest.json").write_text("{}")
        assert temporary.exists()
        assert {p for p in tmp_path.iterdir() if p.name.startswith(".")} == {temporary, other, odd}
    assert (tmp_path / "mine" / "manifest.json").exists()


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    tiny(monkeypatch, tmp_path, "mnist")
    for fault, reason in (
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("123 requested and 0 written"), "123 requested and 0 written: is the disk full"),  # numpy's own
    ):

        def full(path, *args, fault=fault, **options):
            path.write_bytes(b"half")
            raise fault

        monkeypatch.setattr(np, "save", full)
        with pytest.raises(ValueError, match=rf"{tmp_path / 'mnist'}: can not be written: .*{reason}"):
            prepare("mnist", tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"downloads"}


def test_a_data_dir_that_is_a_file_is_named(tmp_path):
    file = tmp_path / "data"
    file.write_text("")
    for call in (prepare, load, is_prepared):
        with pytest.raises(ValueError, match=rf"{file}: not a folder"):
            call("mnist", file)


def test_a_data_dir_that_can_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    tiny(monkeypatch, tmp_path, "mnist")
    monkeypatch.setattr("pathlib.Path.mkdir", refused)  # root, who runs tests, may write everywhere
    with pytest.raises(ValueError, match=rf"Permission denied: '{tmp_path}"):
        prepare("mnist", tmp_path)
    with (
        pytest.raises(ValueError, match=rf"{tmp_path}.*: can not be written: .*Permission denied"),
        new_folder(tmp_path, "folder"),
    ):
        pytest.fail("written to")

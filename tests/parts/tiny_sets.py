"""Downloaded sets of a few images: archives in the publishers' own formats, and what is known of the sets."""

import bz2
import dataclasses
import gzip
import hashlib
import io
import struct
import zipfile

import numpy as np
import torchvision
from PIL import Image

from tasks.data.sources.downloads import DOWNLOADS

TRAIN, TEST = 40, 20
LABELS = {"train": np.arange(TRAIN) % 10, "test": np.arange(TEST) % 10}
MNIST_LIKE = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def known(monkeypatch, name, **facts):
    """Let the set be published with 40 training and 20 test images of 10 classes, unless said otherwise."""
    facts = {"sizes": {"train": TRAIN, "test": TEST}, "num_classes": 10, **facts}
    monkeypatch.setitem(DOWNLOADS, name, dataclasses.replace(DOWNLOADS[name], **facts))


def idx(array):
    """An array as a compressed IDX file."""
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes(), mtime=0)


def libsvm(images, labels):
    """USPS: values v of -1 to 1, such that images are floor((v + 1) / 2 * 255)."""
    lines = []
    for image, label in zip(images.reshape(len(images), -1), labels, strict=True):
        values = (image.astype(np.float64) + 0.25) / 255 * 2 - 1
        lines.append(" ".join([str(label + 1), *(f"{i}:{v:.8f}" for i, v in enumerate(values, 1))]))
    return bz2.compress("\n".join(lines).encode())


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def omniglot(seed, alphabets, drawers=3):
    """Two characters of each alphabet, `drawers` images of each, in an order that is not the alphabet's."""
    folder = "images_background" if seed else "images_evaluation"
    members = {}
    for label, name in reversed(list(enumerate(f"{a}/character{c}" for a in alphabets for c in (1, 2)))):
        for drawer in range(drawers):
            buffer = io.BytesIO()
            Image.fromarray(pixels(105, 105, seed=1000 * seed + 10 * label + drawer)).convert("1").save(buffer, "PNG")
            members[f"{folder}/{name}/{drawer}.png"] = buffer.getvalue()
    return zipped({f"{folder}/.DS_Store": b"", **members})


def archives(name, seed=0, labels=LABELS):
    """file below downloads/<name> -> content, as the publisher serves it; images are of the parts' size as seed."""
    counts = {"train": len(labels["train"]), "test": len(labels["test"])}
    if name in MNIST_LIKE:
        folder = f"{MNIST_LIKE[name]}/raw"
        files = {}
        for part, prefix in (("train", "train"), ("test", "t10k")):
            files[f"{folder}/{prefix}-images-idx3-ubyte.gz"] = idx(
                pixels(counts[part], 28, 28, seed=seed + counts[part])
            )
            files[f"{folder}/{prefix}-labels-idx1-ubyte.gz"] = idx(labels[part])
        return files
    if name == "emnist":
        members = {}
        for part in ("train", "test"):
            stem = f"gzip/emnist-balanced-{part}"
            members[f"{stem}-images-idx3-ubyte.gz"] = idx(pixels(counts[part], 28, 28, seed=seed + counts[part]))
            members[f"{stem}-labels-idx1-ubyte.gz"] = idx(labels[part])
        return {"EMNIST/raw/gzip.zip": zipped(members)}
    if name == "usps":
        return {
            file: libsvm(pixels(counts[part], 16, 16, seed=seed + counts[part]), labels[part])
            for part, file in (("train", "usps.bz2"), ("test", "usps.t.bz2"))
        }
    assert name == "omniglot"
    return {
        "omniglot-py/images_background.zip": omniglot(1, [f"Alphabet {i}" for i in range(8)]),
        "omniglot-py/images_evaluation.zip": omniglot(0, ["Other 1", "Other 2"]),
    }


def publish(monkeypatch, name, files):
    """Let torchvision know these archives by their md5, under addresses that answer nothing."""
    md5 = {path.rpartition("/")[2]: hashlib.md5(content).hexdigest() for path, content in files.items()}
    sets = torchvision.datasets
    if name in MNIST_LIKE:
        kind = getattr(sets, MNIST_LIKE[name])
        monkeypatch.setattr(kind, "resources", [(file, md5[file]) for file, _ in kind.resources])
        monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
    elif name == "emnist":
        monkeypatch.setattr(sets.EMNIST, "url", "http://127.0.0.1:9/gzip.zip")
        monkeypatch.setattr(sets.EMNIST, "md5", md5["gzip.zip"])
        monkeypatch.setattr(sets.EMNIST, "classes_split_dict", {"balanced": list("abcdefghij")})
    elif name == "usps":
        of_parts = {"train": "usps.bz2", "test": "usps.t.bz2"}
        split_list = {part: [f"http://127.0.0.1:9/{file}", file, md5[file]] for part, file in of_parts.items()}
        monkeypatch.setattr(sets.USPS, "split_list", split_list)
    else:
        monkeypatch.setattr(sets.Omniglot, "zips_md5", {file.removesuffix(".zip"): md5[file] for file in md5})
        monkeypatch.setattr(sets.Omniglot, "download_url_prefix", "http://127.0.0.1:9")


def deliver(data_dir, name, files):
    """Lay the archives where a finished download leaves them."""
    for path, content in files.items():
        target = data_dir / "downloads" / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def tiny(monkeypatch, data_dir, name, **options):
    """A tiny set of that name, known, published and downloaded; returns its archives."""
    files = archives(name, **options)
    if name == "omniglot":
        known(monkeypatch, name, num_classes=20, sizes={"train": 48, "test": 12})
    else:
        known(monkeypatch, name)
    publish(monkeypatch, name, files)
    deliver(data_dir, name, files)
    return files

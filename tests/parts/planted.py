"""Images of a few planted classes, and the name "planted" under which tasks find them."""

from types import SimpleNamespace

import torch

from tasks import data as datasets
from tasks.data.images import Split, make_data

NAME = "planted"
PARTS = ("train", "val", "test")


def bars(sizes, shape, classes=4, seed=0, contrast=1.0, shuffled=False):
    """Classes that differ by where a bright bar stands; with `shuffled` the labels say nothing. sizes: of PARTS."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for part, size in zip(PARTS, sizes, strict=True):
        labels = torch.arange(size) % classes
        images = torch.randint(60, (size, *shape), generator=draw)
        for i, label in enumerate(labels.tolist()):
            images[i, :, 4 * label : 4 * label + 3] += 150
        if shuffled:
            labels = labels[torch.randperm(size, generator=draw)]
        parts[part] = Split((images * contrast).to(torch.uint8), labels)
    return make_data(NAME, "planted bars", parts, kind="synthetic", checksum="0", num_classes=classes)


def known(monkeypatch, value):
    """Let a data set be known as "planted" until the test ends; a test may put another one into `.value` of what is
    returned."""
    held = SimpleNamespace(value=value)
    described = SimpleNamespace(image_shape=value.image_shape, num_classes=value.num_classes)
    answers = {
        "dataset_info": lambda: described,
        "in_memory": lambda: True,
        "load": lambda: held.value,
        "load_disjoint": lambda: held.value,
        "check_classifiable": lambda: None,
        "check_disjoint": lambda: None,
        "checksum": lambda: str(id(held.value)),
        "class_counts": lambda: {part: getattr(held.value, part).labels.bincount() for part in PARTS},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(datasets, name, _instead(getattr(datasets, name), answer))
    return held


def _instead(real, answer):
    def told(name, *rest, **more):
        return answer() if name == NAME else real(name, *rest, **more)

    return told

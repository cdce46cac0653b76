"""Folders of small images, all different."""

import numpy as np
from PIL import Image


def image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(array).save(path)


def make(root, *classes, count=10):
    """`count` images in each class folder, all different."""
    for number, folder in enumerate(classes):
        for i in range(count):
            image(root / folder / f"{i}.png", 1000 * number + i)
    return root

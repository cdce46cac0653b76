"""glyphs: about 1,000 characters as classes, each in 10 to 21 text faces, 32x32 gray. Synthetic.

Classes: the letters and numbers that at least 10 faces cover, those with more faces first, then by code point (so the
62 ASCII letters and digits come first, then what every Unicode family has). Walking in this order, a character is kept
if the mean image of its faces differs from that of every kept one by more than LOOK_ALIKE; so letters that are drawn
alike in several scripts, and accents that 32 pixels can not tell apart, stand for one class once. An image that equals
an earlier one byte for byte is left out, and a class that keeps fewer than 10 images so is too.

Two ways to cut it:

- split="faces" (classification): all parts have the same classes and no family of faces in common: a style of a
  family has near twins among the family's others, so holding out single faces would test memory. test is DejaVu Sans,
  val is STIX General (another whole family, so that val asks the same kind of question; it lacks some classes and is
  the harder one), train is the rest. A ResNet with batch norm of 64 that reads DejaVu Sans at 90 % after 12 epochs
  reads DejaVu Serif at 56 % when that is held out instead: the choice of family is an option, and part of a setting.
- split="classes" (few-shot): the parts have disjoint classes, about 64 : 16 : 20, every face in each. A letter and its
  accented forms (equal base letter after compatibility decomposition and case folding) are in the same part, since a
  new class that differs from a training class by an accent is hardly new. Labels stay global: 0 to num_classes - 1.
"""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import torch

from norms.values import nearest
from tasks.data.images import ImageData, Split, make_data
from tasks.data.sources.builtin import Builtin, described
from tasks.data.sources.faces import FACE_FAMILIES, FACES, FAMILIES, covered, render
from tasks.data.store import read_builtin

FILE = "glyphs.npz"
TITLE = "Glyphs"
TEST_FAMILY, VAL_FAMILY = "DejaVu Sans", "STIX General"
DESCRIPTION = f"{TITLE} (classification: test {TEST_FAMILY}, val {VAL_FAMILY}, train the other families)"
NUM_CLASSES = 1024
SIZES = {"train": 8420, "val": 1797, "test": 4092}  # of all classes, split="faces"
FEWEST_FACES = 10
LOOK_ALIKE = 0.04  # squared distance of two mean images over the sum of their squared norms
PARTS = {"train": 0.64, "val": 0.16, "test": 0.20}


def load_glyphs(
    checksum: str,
    *,
    classes: int | None = None,
    split: str = "faces",
    test_family: str = TEST_FAMILY,
    val_family: str = VAL_FAMILY,
) -> ImageData:
    """The three parts, (1, 32, 32); `Split.groups` is each image's face.

    Args:
        checksum: recorded in the result.
        classes: the first K classes (default: all).
        split: "faces" or "classes", see above.
        test_family, val_family: the families held out when split="faces".

    Raises:
        ValueError: unknown split or family, equal families, families given with split="classes", too many classes.
    """
    arrays = read_builtin(FILE)
    images = torch.from_numpy(arrays["images"])[:, None]
    labels = torch.from_numpy(arrays["labels"]).long()
    faces = torch.from_numpy(arrays["faces"]).long()
    characters = tuple(str(c) for c in arrays["characters"])
    if split == "faces":
        _check_families(test_family, val_family)
        family = np.array(FACE_FAMILIES)
        held = {"test": family == test_family, "val": family == val_family}
        held["train"] = ~(held["test"] | held["val"])
        masks = {part: torch.from_numpy(held[part])[faces] for part in PARTS}
    elif split == "classes":
        part_of = class_parts(characters)
        masks = {part: torch.tensor([p == part for p in part_of])[labels] for part in PARTS}
    else:
        raise ValueError(
            f'glyphs: unknown split "{split}"; allowed: faces, classes{nearest(split, ("faces", "classes"))}'
        )
    return make_data(
        "glyphs",
        TITLE,
        {part: Split(images[mask], labels[mask], faces[mask]) for part, mask in masks.items()},
        kind="synthetic",
        checksum=checksum,
        num_classes=len(characters),
        classes=classes,
        class_names=characters,
        group_names=FACES,
        group_families=FACE_FAMILIES,
        disjoint_classes=split == "classes",
    )


def class_parts(characters: tuple[str, ...]) -> list[str]:
    """The few-shot part of each class: whole base letters go to a part, in an order fixed by their hash."""
    bases = [unicodedata.normalize("NFKD", c).casefold()[0] for c in characters]
    order = sorted(set(bases), key=lambda base: hashlib.sha256(base.encode()).digest())
    part_of, placed = {}, 0
    for base in order:
        share = placed / len(bases)
        part_of[base] = "test" if share < PARTS["test"] else "val" if share < PARTS["test"] + PARTS["val"] else "train"
        placed += bases.count(base)
    return [part_of[base] for base in bases]


def rebuild_glyphs() -> dict[str, np.ndarray]:
    """The arrays of FILE, rendered from matplotlib's faces (see tasks.data.sources.faces)."""
    coverage = {face: covered(face) for face in FACES}
    candidates = sorted({c for characters in coverage.values() for c in characters})
    drawn: dict[str, dict[int, np.ndarray]] = {}
    for character in candidates:
        if sum(character in characters for characters in coverage.values()) < FEWEST_FACES:
            continue
        glyphs = {i: render(face, character) for i, face in enumerate(FACES) if character in coverage[face]}
        found = {i: glyph for i, glyph in glyphs.items() if glyph is not None}
        if len(found) >= FEWEST_FACES:
            drawn[character] = found
    ordered = sorted(drawn, key=lambda c: (-len(drawn[c]), c))
    means = np.stack([np.mean(list(drawn[c].values()), axis=0, dtype=np.float64).ravel() for c in ordered])
    alike = relative_distances(means) <= LOOK_ALIKE
    seen: set[bytes] = set()
    kept: list[int] = []
    for k, character in enumerate(ordered):
        # by content, so that two faces of one class that agree (obliques of a round letter) count once
        new = {glyph.tobytes(): face for face, glyph in reversed(drawn[character].items())}
        faces = sorted(face for content, face in new.items() if content not in seen)
        if len(faces) < FEWEST_FACES or alike[k, kept].any():
            continue
        drawn[character] = {face: drawn[character][face] for face in faces}
        seen.update(new)
        kept.append(k)
    characters = [ordered[k] for k in kept]
    return {
        "images": np.stack([image for c in characters for image in drawn[c].values()]),
        "labels": np.array([k for k, c in enumerate(characters) for _ in drawn[c]], np.int16),
        "faces": np.array([face for c in characters for face in drawn[c]], np.uint8),
        "characters": np.array(characters),
    }


def relative_distances(means: np.ndarray) -> np.ndarray:
    """Squared distances of images (N, P) over the sums of their squared norms: (N, N), from 0 to 2."""
    norms = (means**2).sum(axis=1)
    sums = norms[:, None] + norms
    return (sums - 2 * means @ means.T) / sums


def _check_families(test_family: str, val_family: str) -> None:
    for family in (test_family, val_family):
        if family not in FAMILIES:
            raise ValueError(
                f'glyphs: unknown family "{family}"; allowed: {", ".join(FAMILIES)}{nearest(family, FAMILIES)}'
            )
    if test_family == val_family:
        raise ValueError(f'glyphs: "{test_family}" is given as test_family and as val_family; they must differ')


GLYPHS = Builtin(
    described("glyphs", DESCRIPTION, "synthetic", NUM_CLASSES, 1, SIZES, "fonts' licences", few_shot=True),
    FILE,
    load_glyphs,
    few_shot_options={"split": "classes"},
)

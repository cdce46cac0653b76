"""Random resized crops of whole images: drawn where a run's generators are, cut where files are decoded.

Szegedy et al. 2015, arXiv:1409.4842, section 6: 8 to 100 % of the area, width 3/4 to 4/3 of the height. The rule is
that of torchvision's RandomResizedCrop: sides rounded to pixels, ten attempts, the first that fits counts, else the
largest central crop of an allowed aspect; then resized, bilinear with antialias. What differs:

- Draws are the caller's: one seed makes the crops of one batch, so that they depend on no process and no batch before.
- A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size where the crop still has `size` pixels a side.
- The crop is mirrored as it is cut, every second on average: RandomHorizontalFlip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tasks.data.batches import CROP_AREA, CROP_ASPECT, CROP_ATTEMPTS

Box = tuple[int, int, int, int]
"""left, top, right, bottom, in pixels"""


class Crop(NamedTuple):
    """What was drawn for one image, whose size is known where it is decoded.

    Args:
        areas, aspects: of each attempt, as a fraction of the image's area, and width over height.
        x, y: where the crop lies between the image's sides, in [0, 1).
        mirrored: turned left to right afterwards.
    """

    areas: list[float]
    aspects: list[float]
    x: float
    y: float
    mirrored: bool

    def box(self, width: int, height: int) -> Box:
        """The crop of an image of so many pixels."""
        for area, aspect in zip(self.areas, self.aspects, strict=True):
            pixels = area * width * height
            wide, high = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < wide <= width and 0 < high <= height:
                left, top = int(self.x * (width - wide + 1)), int(self.y * (height - high + 1))
                return left, top, left + wide, top + high
        low, high_aspect = CROP_ASPECT
        wide = width if width / height < high_aspect else max(1, round(height * high_aspect))
        high = height if width / height > low else max(1, round(width / low))
        left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high


def draw_crops(count: int, seed: int) -> list[Crop]:
    """The crops of the images of one batch, in its order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> torch.Tensor:
        uniform = torch.rand(count, CROP_ATTEMPTS, generator=generator, dtype=torch.float64)
        return low + (high - low) * uniform

    areas, aspects = draw(*CROP_AREA).tolist(), draw(*map(math.log, CROP_ASPECT)).exp().tolist()
    places = torch.rand(count, 3, generator=generator, dtype=torch.float64).tolist()
    return [Crop(a, r, x, y, flip < 0.5) for a, r, (x, y, flip) in zip(areas, aspects, places, strict=True)]

"""Batches and augmentation of uint8 images on any device.

Every draw comes from the generator that is passed in, and is made on that generator's device (the CPU, so that equal
seeds give equal images everywhere) before it is moved. Values stay on the scale 0 to 255 until `normalize`, so a pixel
that augmentation brings in from outside is 0: the background of the built-in sets, not the mean colour.

Legend: N images, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from norms.values import nearest
from norms.workers import ALONE, Workers
from tasks.data.images import Split

Augmentation = Literal["none", "crop", "crop_flip", "resized_crop_flip", "affine"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation)

ROTATION_DEGREES = 15.0
SHEAR_DEGREES = 10.0
SCALE = (0.8, 1.2)
TRANSLATION = 0.1  # of the image's side, each way
CROP_PADDING = 8  # an eighth of the side: 4 pixels at 32x32
CROP_AREA = (0.08, 1.0)  # of the image's, and below: width over height; Szegedy et al. 2015, arXiv:1409.4842, section 6
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Share:
    """A worker's part of a batch. Workers draw for the whole batch, all the same, and each keeps its own rows.

    Args:
        count: N, of the whole batch.
        workers: whose part it is: x[r::W] of a batch x.
        groups: a batch of so many equal groups [a; b; ...] is dealt out group by group: [a[r::W]; b[r::W]; ...].
    """

    count: int
    workers: Workers = ALONE
    groups: int = 1

    def of(self, draws: Tensor, dim: int = 0) -> Tensor:
        """The worker's rows of what was drawn for the whole batch: N along `dim`."""
        if self.workers.alone:
            return draws
        order = torch.arange(self.count, device=draws.device).view(self.groups, -1)
        return draws.index_select(dim, order[:, self.workers.rank :: self.workers.size].flatten())


def shuffled_batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator,
    *,
    drop_last: bool = True,
    skip: int = 0,
    to: Workers = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in an order drawn at once: (images uint8 (B, C, H, W), labels (B,)), on the split's device.

    Args:
        split: what to draw from.
        batch_size: B, in images.
        generator: draws the order (one permutation per call).
        drop_last: leave out the last images when they do not fill a batch.
        skip: batches to leave out at the start; they are not read.
        to: the worker whose part of each batch is read.

    Raises:
        ValueError: at once, when batch_size is below 1, or above the split's size while drop_last leaves no batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    if drop_last and batch_size > len(split):
        raise ValueError(f"batch_size {batch_size} exceeds the {len(split)} images, so drop_last leaves no batch")
    order = torch.randperm(len(split), generator=generator, device=generator.device).to(split.labels.device)
    stop = len(split) - len(split) % batch_size if drop_last else len(split)
    chunks = map(to.share, order[:stop].split(batch_size)[skip:])
    return ((split.images[index], split.labels[index]) for index in chunks)


def single_class_batches(
    split: Split, batch_size: int, groups: int, generator: torch.Generator, *, skip: int = 0, to: Workers = ALONE
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in which x[k::groups] of every batch x, for each k, holds images of one class; otherwise as
    shuffled_batches. Images that do not fill a group or a batch are left out.

    Args:
        split: what to draw from.
        batch_size, groups, generator: as in single_class_order.
        skip: batches to leave out at the start; they are not read.
        to: the worker whose part of each batch is read.

    Raises:
        ValueError: at once, as single_class_order.
    """
    order = single_class_order(split.labels, batch_size, groups, generator)
    chunks = map(to.share, order.to(split.labels.device)[skip:])
    return ((split.images[index], split.labels[index]) for index in chunks)


def single_class_order(labels: Tensor, batch_size: int, groups: int, generator: torch.Generator) -> Tensor:
    """Which images stand in the batches of one epoch of single_class_batches: int64 (batches, B), on the CPU.

    Args:
        labels: (N,).
        batch_size: B, in images; `groups` divides it.
        groups: single-class groups in a batch.
        generator: draws the order of the images of each class, then the order of all groups.

    Raises:
        ValueError: `groups` does not divide batch_size, or the images fill no batch.
    """
    if groups < 1 or batch_size % groups:
        raise ValueError(f"{groups} single-class groups do not divide a batch of {batch_size}")
    size = batch_size // groups
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=generator, device=generator.device).cpu()
    whole = []
    for label in labels.unique():
        of_class = order[labels[order] == label]
        whole.append(of_class[: len(of_class) // size * size].view(-1, size))
    drawn = torch.cat(whole)
    drawn = drawn[torch.randperm(len(drawn), generator=generator, device=generator.device).cpu()]
    if len(drawn) < groups:
        raise ValueError(f"no batch: {len(drawn)} groups of {size} images of one class, {groups} in a batch")
    batches = drawn[: len(drawn) // groups * groups].view(-1, groups, size)
    return batches.transpose(1, 2).flatten(1)


def single_class_count(labels: Tensor, batch_size: int, groups: int) -> int:
    """Batches of one epoch of `single_class_batches`."""
    size = batch_size // groups
    return sum(int(count) // size for count in labels.cpu().unique(return_counts=True)[1]) // groups


def ordered_batches(split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in stored order, views without a copy; the last batch may be smaller."""
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1")
    return zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std per channel, float32. images: (N, C, H, W), uint8 or float, 0 to 255."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, -1, 1, 1)
    return images.float().mul_(scale).sub_(offset) if images.dtype == torch.uint8 else images * scale - offset


def augment(images: Tensor, generator: torch.Generator, kind: str, share: Share | None = None) -> Tensor:
    """A random change of each image. images: (N, C, H, W) on the scale 0 to 255; same shape returned.

    Args:
        images: uint8 or float.
        generator: the source of every draw; the number of draws depends on the size of the whole batch and kind only.
        kind: which change.
            none: none.
            crop: a random crop after zero padding by an eighth of the side.
            crop_flip: that, and a horizontal flip of every second image on average.
            resized_crop_flip: a crop of 8 to 100 % of the area whose width is 3/4 to 4/3 of its height, resized to the
                image's size, bilinear, and such a flip (how ImageNet is trained: Szegedy et al. 2015, arXiv:1409.4842,
                section 6).
            affine: rotation within 15 degrees, scale 0.8 to 1.2, shear within 10 degrees, translation within a tenth
                of the side, bilinear, zeros outside.
        share: the part of a batch that the images are; None: they are all of it.

    Returns:
        The dtype of the images; float32 for uint8 where the change is bilinear.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "none":
        return images
    share = share or Share(len(images))
    if kind == "affine":
        return _affine(images, generator, share)
    if kind == "resized_crop_flip":
        return _resized_crop(images, generator, share)
    if kind in ("crop", "crop_flip"):
        return _crop(images, generator, share, flip=kind == "crop_flip")
    raise ValueError(
        f'unknown augmentation "{kind}"; allowed: {", ".join(AUGMENTATIONS)}{nearest(kind, AUGMENTATIONS)}'
    )


def cutout(images: Tensor, generator: torch.Generator, side: int) -> Tensor:
    """A square of `side` pixels of each image is set to 0; its centre is drawn over the whole image, so that part of it
    may lie outside (DeVries & Taylor 2017, arXiv:1708.04552).

    Args:
        images: (N, C, H, W), normalized, so that 0 is the mean colour. Not changed.
        generator: the source of every draw.
        side: in pixels; 0 returns the images as they are.
    """
    if not side:
        return images
    n, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (n, 1), generator=generator, device=generator.device)
        at = torch.arange(length, device=centre.device) - centre + side // 2
        inside.append(((at >= 0) & (at < side)).to(images.device))
    rows, columns = inside
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _crop(images: Tensor, generator: torch.Generator, share: Share, *, flip: bool) -> Tensor:
    (n, _, height, width), drawn = images.shape, (share.count, 1)
    pad_y, pad_x = height // CROP_PADDING, width // CROP_PADDING
    top = share.of(torch.randint(2 * pad_y + 1, drawn, generator=generator, device=generator.device))
    left = share.of(torch.randint(2 * pad_x + 1, drawn, generator=generator, device=generator.device))
    rows = top + torch.arange(height, device=top.device)
    columns = left + torch.arange(width, device=left.device)
    if flip:
        mirrored = share.of(torch.rand(drawn, generator=generator, device=generator.device)) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows, columns = rows.to(images.device), columns.to(images.device)
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    # indexing (N, H, W) positions with the channels last in the result, then moving them back
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _affine(images: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    height, width = images.shape[2:]
    draws = torch.rand(5, share.count, generator=generator, device=generator.device) * 2 - 1
    draws = share.of(draws, dim=1)
    angle = draws[0] * math.radians(ROTATION_DEGREES)
    shear = torch.tan(draws[1] * math.radians(SHEAR_DEGREES))
    # the matrix maps output to input positions, so an image drawn `scale` times larger is read at 1 / scale
    zoom = 1 / (SCALE[0] + (draws[2] + 1) / 2 * (SCALE[1] - SCALE[0]))
    cos, sin, aspect = angle.cos() * zoom, angle.sin() * zoom, height / width
    shift = draws[3:] * 2 * TRANSLATION  # grid coordinates span 2
    row_x = torch.stack([cos, (shear * cos - sin) * aspect, shift[0]], dim=1)
    row_y = torch.stack([sin / aspect, shear * sin + cos, shift[1]], dim=1)
    return _looked_at(images, torch.stack([row_x, row_y], dim=1))


def _resized_crop(images: Tensor, generator: torch.Generator, share: Share) -> Tensor:
    height, width = images.shape[2:]

    def draw(low: float, high: float, count: int) -> Tensor:
        uniform = torch.rand(count, share.count, generator=generator, device=generator.device)
        return low + (high - low) * share.of(uniform, dim=1)

    area = draw(*CROP_AREA, CROP_ATTEMPTS)
    aspect = torch.exp(draw(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1]), CROP_ATTEMPTS))
    at_x, at_y, mirror = draw(-1, 1, 3)
    # sides as fractions of the image's; the first attempt that fits inside counts
    wide, high = torch.sqrt(area * aspect * height / width), torch.sqrt(area / aspect * width / height)
    fits = (wide <= 1) & (high <= 1)
    first = fits.int().argmax(0, keepdim=True)
    wide, high = (torch.where(fits.any(0), s.gather(0, first)[0], 1.0) for s in (wide, high))
    zero = torch.zeros_like(wide)
    row_x = torch.stack([torch.where(mirror < 0, -wide, wide), zero, at_x * (1 - wide)], dim=1)
    row_y = torch.stack([zero, high, at_y * (1 - high)], dim=1)
    return _looked_at(images, torch.stack([row_x, row_y], dim=1), padding_mode="border")


def _looked_at(images: Tensor, theta: Tensor, padding_mode: str = "zeros") -> Tensor:
    """Each output position is read at where `theta` (N, 2, 3) takes it, in coordinates from -1 to 1; bilinear."""
    x = images.float() if images.dtype == torch.uint8 else images
    if not len(x):  # a worker's part of a small batch, which affine_grid refuses
        return x
    theta = theta.to(device=x.device, dtype=x.dtype)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=padding_mode, align_corners=False)

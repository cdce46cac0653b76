"""Batches and augmentation: every draw comes from the generator, and every change is one that was asked for."""

import pytest
import torch

from tasks.data import AUGMENTATIONS, Split, augment, cutout, normalize, ordered_batches, shrink, shuffled_batches
from tasks.data.batches import single_class_batches
from tasks.data.images import make_data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def split():
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 16, 16).contiguous()
    return Split(images, torch.arange(50))


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator(1))


@pytest.mark.parametrize("drop_last", [True, False])
def test_an_epoch_shows_every_image_once_with_its_label(split, drop_last):
    batches = list(shuffled_batches(split, 16, generator(), drop_last=drop_last))
    labels = torch.cat([y for _, y in batches])
    assert [len(y) for _, y in batches] == [16, 16, 16] + ([] if drop_last else [2])
    assert len(labels.unique()) == len(labels)
    assert all(x.dtype == torch.uint8 and torch.equal(x[:, 0, 0, 0].long(), y) for x, y in batches)


def test_the_order_is_the_generators_and_moves_on(split):
    source = generator()
    first = [torch.cat([y for _, y in shuffled_batches(split, 10, source)]) for _ in range(2)]
    again = torch.cat([y for _, y in shuffled_batches(split, 25, generator())])
    assert torch.equal(first[0], again)  # the batch size does not change the order
    assert not torch.equal(first[0], first[1])


def test_ordered_batches_are_views_in_stored_order(split):
    batches = list(ordered_batches(split, 20))
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    assert batches[0][0].data_ptr() == split.images.data_ptr()


@pytest.mark.parametrize("size", [0, -1, 51])
def test_a_batch_size_that_gives_no_batch_is_refused_at_once(split, size):
    with pytest.raises(ValueError, match=f"batch_size {size}"):
        shuffled_batches(split, size, generator())


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_equal_generators_give_equal_images_and_the_input_is_untouched(images, kind):
    before = images.clone()
    first, second = augment(images, generator(), kind), augment(images, generator(), kind)
    other = augment(images, generator(1), kind)
    assert torch.equal(first, second)
    assert torch.equal(first, other) == (kind == "none")
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.float().min() >= 0
    assert first.float().max() <= 255
    global_state = torch.get_rng_state()
    augment(images, generator(), kind)
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_an_images_draw_depends_on_its_place_not_on_content_or_type(images, kind):
    as_float = augment(images.float(), generator(), kind)
    assert torch.equal(as_float, augment(images, generator(), kind).float())
    changed = images.clone()
    changed[1:] = 0
    assert torch.equal(augment(changed, generator(), kind)[0], augment(images, generator(), kind)[0])
    double = augment(images.double(), generator(), kind)
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), as_float, atol=0.1)


@pytest.mark.parametrize(("kind", "mirrored"), [("crop", False), ("crop_flip", True)])
def test_a_crop_is_a_shift_by_up_to_an_eighth_with_zeros_outside(images, kind, mirrored):
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    shifts, flips = set(), 0
    for original, result in zip(padded, augment(images, generator(), kind), strict=True):
        found = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if torch.equal(result.flip(2) if flip else result, original[:, i : i + 32, j : j + 32])
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flips += found[0][2]
    assert len(shifts) > 30
    assert 16 < flips < 48 if mirrored else flips == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 48)])
def test_a_resized_crop_is_a_part_of_the_image_of_the_stated_area_and_aspect_and_every_second_is_mirrored(shape):
    height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x = torch.stack([rows, columns]).expand(400, 2, height, width)  # each pixel says where it is
    y = augment(x, generator(), "resized_crop_flip")
    inner = slice(8, -8)  # positions of pixels at the border are clamped
    high = (y[:, 0].diff(dim=1)[:, inner, inner]).mean((1, 2)) * height
    wide = (y[:, 1].diff(dim=2)[:, inner, inner]).mean((1, 2)) * width
    mirrored = wide < 0
    assert 150 < mirrored.sum() < 250
    wide = wide.abs()
    area, aspect = wide * high / (height * width), wide / high
    assert 0.079 < area.min() < 0.12
    assert 0.9 < area.max() < 1.001
    assert 0.749 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.334
    middle = torch.stack([y[:, 0].mean((1, 2)), y[:, 1].mean((1, 2))])
    for at, side, length in ((middle[0], high, height), (middle[1], wide, width)):
        assert (at - side / 2).min() > -0.5  # half a pixel, by which clamped borders move the mean
        assert (at + side / 2).max() < length + 0.5
        places = (at - side / 2) / (length - side).clamp(min=1)
        assert places[side < length - 8].quantile(0.1) < 0.2
        assert places[side < length - 8].quantile(0.9) > 0.8
    # inside, the values are the linear interpolation between the crop's edges
    steps = torch.arange(width) - (width - 1) / 2
    line = middle[1][:, None] + torch.where(mirrored, -wide, wide)[:, None] / width * steps
    assert torch.allclose(y[:, 1, height // 2, inner], line[:, inner], atol=0.5)


@pytest.mark.parametrize("shape", [(32, 32), (32, 48)])
def test_an_affine_change_stays_within_its_stated_ranges(shape):
    height, width = shape
    x = torch.zeros(400, 1, height, width)
    x[:, :, height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255  # a block in the middle
    moved = augment(x, generator(), "affine")
    mass = moved.sum((1, 2, 3))
    rows = (moved.sum((1, 3)) * torch.arange(height)).sum(1) / mass - (height - 1) / 2
    columns = (moved.sum((1, 2)) * torch.arange(width)).sum(1) / mass - (width - 1) / 2
    # the shift is drawn on the input's side, so the largest scale (and a little shear) stretches it
    for position, side in ((rows, height), (columns, width)):
        assert 0.08 * side < position.abs().max() < 0.1 * side * 1.2 * 1.4
        assert position.mean().abs() < 0.01 * side
    scale = (mass / (64 * 255)).sqrt()
    assert scale.min() > 0.78
    assert scale.max() < 1.22
    assert scale.max() - scale.min() > 0.3


def test_an_affine_change_turns_both_ways_by_up_to_its_angle():
    x = torch.zeros(400, 1, 64, 64)
    x[:, :, 30:34, 8:56] = 255  # a horizontal bar
    turned = augment(x, generator(), "affine")
    grid = torch.arange(64.0)
    mass = turned.sum((1, 2, 3))
    cx, cy = (turned.sum((1, 2)) * grid).sum(1) / mass, (turned.sum((1, 3)) * grid).sum(1) / mass
    dx, dy = grid[None, None, :] - cx[:, None, None], grid[None, :, None] - cy[:, None, None]
    weights = turned[:, 0]
    angle = torch.rad2deg((weights * dx * dy).sum((1, 2)) / (weights * dx * dx).sum((1, 2)))
    assert 12 < angle.max() < 18
    assert -18 < angle.min() < -12


@pytest.mark.parametrize("side", [1, 4, 7, 16])
def test_cutout_empties_one_square_that_may_reach_outside(side):
    images = torch.ones(400, 2, 16, 12)
    images = images.repeat(10, 1, 1, 1)
    cut = cutout(images, generator(), side)
    assert images.eq(1).all()
    empty = cut.eq(0)
    assert torch.equal(empty[:, 0], empty[:, 1])
    rows, columns = empty[:, 0].any(2).sum(1), empty[:, 0].any(1).sum(1)
    assert torch.equal(empty[:, 0].sum((1, 2)), rows * columns)  # a rectangle
    assert rows.max() == min(side, 16)
    assert columns.max() == min(side, 12)
    # the centre is inside, so at least half of the square is, too
    assert rows.min() >= side // 2
    assert torch.equal(cutout(images, generator(), side), cut)
    hits = empty[:, 0].float().mean(0)
    assert hits.gt(0).all(), "every pixel is emptied sometimes"


def test_no_cutout_is_no_draw():
    source = generator()
    images = torch.ones(3, 1, 8, 8)
    assert cutout(images, source, 0) is images
    assert torch.equal(source.get_state(), generator().get_state())


def test_shrinking_averages_and_measures_anew():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=generator())
    parts = {part: Split(images + k, torch.arange(6) % 2) for k, part in enumerate(("train", "val", "test"))}
    data = make_data("x", "x", parts, kind="real", checksum="0", num_classes=2)
    small = shrink(data, 4)
    assert small.image_shape == (3, 4, 4)
    expected = data.test.images.double().view(6, 3, 4, 2, 4, 2).mean((3, 5)).round()
    assert torch.equal(small.test.images.double(), expected)
    assert small.mean == pytest.approx((small.train.images.double().mean((0, 2, 3)) / 255).tolist())
    assert shrink(data, 8) is data
    with pytest.raises(ValueError, match="image_size 3 of 8x8; allowed: 4, 8"):
        shrink(data, 3)


def test_normalize_gives_the_stated_moments_to_the_data_they_were_measured_on(images):
    x = images.float() / 255
    mean, std = tuple(x.mean((0, 2, 3)).tolist()), tuple(x.std((0, 2, 3), correction=0).tolist())
    y = normalize(images, mean, std)
    assert y.dtype == torch.float32
    assert torch.allclose(y, (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1), atol=1e-5)
    scaled = images.float()
    assert torch.allclose(normalize(scaled, mean, std), y)
    assert torch.equal(scaled, images.float())


def test_unknown_augmentations_are_named_with_the_nearest(images):
    with pytest.raises(
        ValueError, match=r'"afine"; allowed: none, crop, crop_flip, resized_crop_flip, affine; did you mean "affine"\?'
    ):
        augment(images, generator(), "afine")


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_everything_happens_on_the_images_device(images, kind):
    out = normalize(augment(images.to("meta"), generator(), kind), (0.5,) * 3, (0.5,) * 3)
    assert out.device.type == "meta"
    assert out.shape == images.shape


def test_a_split_moves_and_selects_whole(split):
    moved = Split(split.images, split.labels, split.labels).to("meta")
    assert {t.device.type for t in (moved.images, moved.labels, moved.groups)} == {"meta"}
    part = split.select(split.labels > 40)
    assert part.images[:, 0, 0, 0].tolist() == part.labels.tolist() == list(range(41, 50))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_every_group_of_a_batch_is_of_one_class_and_no_image_comes_twice(groups):
    labels = torch.arange(203) % 3
    split = Split(torch.arange(203, dtype=torch.uint8).view(-1, 1, 1, 1), labels)
    batches = list(single_class_batches(split, 8, groups, torch.Generator().manual_seed(0)))
    size = 8 // groups
    assert len(batches) == sum(n // size for n in labels.bincount().tolist()) // groups
    for images, of in batches:
        assert images.shape == (8, 1, 1, 1)
        assert torch.equal(labels[images.flatten().long()], of)
        for k in range(groups):
            assert len(set(of[k::groups].tolist())) == 1
    seen = torch.cat([images.flatten() for images, _ in batches])
    assert len(seen.unique()) == len(seen)
    mixed = [len(set(of.tolist())) for _, of in batches]
    assert (max(mixed) > 1) is (groups > 1)


def test_single_class_batches_that_can_not_be_drawn_are_refused_at_once():
    split = Split(torch.zeros(9, 1, 1, 1, dtype=torch.uint8), torch.arange(9) % 3)
    with pytest.raises(ValueError, match="3 single-class groups do not divide a batch of 8"):
        single_class_batches(split, 8, 3, torch.Generator())
    with pytest.raises(ValueError, match="no batch: 0 groups of 4 images of one class, 2 in a batch"):
        single_class_batches(split, 8, 2, torch.Generator())

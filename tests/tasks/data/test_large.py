"""Sets too large for memory: crops of whole images, batches that no number of workers changes, tasks that read them."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from parts.resuming import results, resumed
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from norms.registry import make_norm
from norms.workers import Workers
from tasks import get_task
from tasks.base import RunContext
from tasks.data import folders, lazy, load_domains, open_folder, prepare
from tasks.data.batches import CROP_AREA, CROP_ASPECT, CROP_ATTEMPTS
from tasks.data.crops import Crop, draw_crops
from tasks.data.decoding import _read, decode, regular_file
from tasks.data.images import channel_moments
from tasks.data.lazy import loaded_batches
from tasks.data.reading import (
    UNLABELLED,
    augmented,
    by_class,
    first,
    in_order,
    left_to_augment,
    moments_of,
    select,
    stream,
    without_labels,
)

RESIZED_CROP = "resized_crop_flip"


def picture(width, height, seed=0):
    """Coarse noise, of which a decoder that reduces loses little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def folder(root, names, count, size=(20, 16), seed=0):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(*size, seed=seed + 1000 * number + i).save(root / name / f"{i}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module", autouse=True)
def decoded_alike():
    """Images that are read and images in memory have one middle here, so that their numbers can be compared."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lazy, "SHORTER", 1)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of splits and one of domains, each prepared in memory ("held") and as too large for it ("read")."""
    base = tmp_path_factory.mktemp("large")
    names = {
        "splits": folder(base / "splits", [f"{part}/{c}" for part in ("train", "test") for c in "abc"], 12),
        "domains": folder(base / "domains", [f"{d}/{c}" for d in ("art", "photo", "sketch") for c in "ab"], 20),
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        for where, largest in (("held", 2**31), ("read", 0)):
            monkeypatch.setattr(folders, "LARGEST_IN_MEMORY", largest)
            for name in names.values():
                prepare(name, base / where, size=8)
    return base, names


@pytest.fixture
def train(place):
    base, names = place
    return open_folder(names["splits"], base / "read", workers=0).train


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The crop


@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_torchvisions_of_the_same_box(tmp_path, seed):
    picture(50, 37, seed).save(tmp_path / "x.png")
    (crop,) = draw_crops(1, seed)
    left, top, right, bottom = crop.box(50, 37)
    whole = Image.open(tmp_path / "x.png")
    expected = TF.resized_crop(whole, top, left, bottom - top, right - left, [24, 24], InterpolationMode.BILINEAR)
    expected = TF.horizontal_flip(expected) if crop.mirrored else expected
    assert np.array_equal(decode(tmp_path / "x.png", 24, crop).transpose(1, 2, 0), np.asarray(expected))


def test_crops_have_torchvisions_distribution():
    image = torch.zeros(3, 375, 500)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(image, list(CROP_AREA), list(CROP_ASPECT)) for _ in range(3000)]
    ours = [crop.box(500, 375) for crop in draw_crops(3000, 0)]
    theirs = torch.tensor([(left, top, left + w, top + h) for top, left, h, w in theirs]).double()
    ours = torch.tensor(ours).double()
    assert ((ours[:, :2] >= 0).all(), (ours[:, 2] <= 500).all(), (ours[:, 3] <= 375).all()) == (True, True, True)

    def facts(boxes):
        sides = boxes[:, 2:] - boxes[:, :2]
        return torch.stack([sides.prod(1) / (500 * 375), (sides[:, 0] / sides[:, 1]).log(), *boxes.T / 500], 1)

    one, two = facts(ours), facts(theirs)
    error = (one.var(0) / 3000 + two.var(0) / 3000).sqrt()
    assert ((one.mean(0) - two.mean(0)).abs() < 4 * error).all()
    assert torch.allclose(one.std(0), two.std(0), rtol=0.06)
    assert abs(sum(crop.mirrored for crop in draw_crops(3000, 0)) / 3000 - 0.5) < 0.04


@pytest.mark.parametrize(("width", "height"), [(400, 20), (20, 400), (30, 30)])
def test_where_no_attempt_fits_the_largest_central_crop_counts_as_torchvisions_does(width, height):
    never = Crop([4.0] * CROP_ATTEMPTS, [1.0] * CROP_ATTEMPTS, 0.9, 0.9, False)
    top, left, h, w = RandomResizedCrop.get_params(torch.zeros(3, height, width), [4.0, 4.0], list(CROP_ASPECT))
    assert never.box(width, height) == (left, top, left + w, top + h)


def test_a_jpeg_is_reduced_to_no_less_than_its_crop_needs_and_looks_the_same(tmp_path):
    picture(800, 600).save(tmp_path / "x.jpg", quality=95)
    whole, reductions = Image.open(tmp_path / "x.jpg").convert("RGB"), set()
    for crop in draw_crops(40, 3):
        with regular_file(tmp_path / "x.jpg") as file:
            rgb, full = _read(file, 32, crop)
        assert full == (800, 600)
        left, top, right, bottom = crop.box(*full)
        reductions.add(round(full[0] / rgb.width))
        assert min(right - left, bottom - top) * rgb.width / full[0] >= 32 or rgb.size == full
        square = whole.crop((left, top, right, bottom)).resize((32, 32), Image.Resampling.BILINEAR)
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else square
        difference = np.abs(decode(tmp_path / "x.jpg", 32, crop).transpose(1, 2, 0) - np.asarray(square, np.float32))
        assert difference.mean() < 3
    assert {4, 8} <= reductions <= {1, 2, 4, 8}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_crops_are_of_the_image_as_exif_turns_it(tmp_path, suffix, orientation):
    upright = picture(400, 240)
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 98, "subsampling": 0} if suffix == "jpg" else {}
    upright.transpose(back).save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    upright.save(tmp_path / f"upright.{suffix}", **options)
    for crop in draw_crops(8, 0):
        turned, straight = (decode(tmp_path / f"{n}.{suffix}", 24, crop).astype(int) for n in ("turned", "upright"))
        assert np.abs(turned - straight).mean() < 2


def test_one_pixel_and_thin_images_are_cropped(tmp_path):
    for number, size in enumerate([(1, 1), (1, 300), (300, 1)]):
        Image.new("RGB", size, (9, 8, 7)).save(tmp_path / f"{number}.jpg", quality=100)
        for crop in draw_crops(20, number):
            assert np.abs(decode(tmp_path / f"{number}.jpg", 8, crop).astype(int) - [[[9]], [[8]], [[7]]]).max() < 4


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (224, 224), (80, 300)])
def test_evaluation_is_the_published_middle(tmp_path, monkeypatch, width, height):
    monkeypatch.setattr(lazy, "SHORTER", 256 / 224)
    path = tmp_path / "x.png"
    picture(width, height).save(path)
    image, _ = lazy.FolderImages(tmp_path, [("x.png", 0, path.stat().st_size)], 224)[0]
    expected = TF.center_crop(TF.resize(Image.open(path), [256], InterpolationMode.BILINEAR), [224, 224])
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).mean() < 3  # a row's rounding


# Batches


def equal(one, two):
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))


def passes(part, count, augmentation, take=stream, **given):
    batches = take(part, 6, order=generator(3), augmentation=augmentation, **given)
    return [next(batches) for _ in range(count * len(batches))]


@pytest.mark.parametrize("augmentation", [RESIZED_CROP, "crop_flip"])
def test_no_number_of_workers_changes_a_batch(place, augmentation):
    base, names = place
    found = [
        passes(open_folder(names["splits"], base / "read", workers=workers).train, 2, augmentation)
        for workers in (0, 1, 3)
    ]
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    assert all(images.shape == (6, 3, 8, 8) and images.dtype == torch.uint8 for images, _ in found[0])


def test_crops_are_drawn_anew_in_every_pass_from_the_order_alone(train):
    state = torch.get_rng_state()
    batches = passes(train, 2, RESIZED_CROP)
    assert torch.equal(torch.get_rng_state(), state)
    middle = dict(zip(train.paths, [image for image, _ in (train[i] for i in range(len(train)))], strict=True))
    shown = torch.cat([images for images, _ in batches])
    assert len({image.numpy().tobytes() for image in shown}) == len(shown)
    assert not {image.numpy().tobytes() for image in shown} & {image.numpy().tobytes() for image in middle.values()}
    order = torch.cat([labels for _, labels in batches])
    assert torch.equal(
        order, torch.cat([labels for _, labels in passes(train, 1, "none")] + [order[len(order) // 2 :]])
    )


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 7, 10])
@pytest.mark.parametrize(("take", "given"), [(stream, {}), (by_class, {"groups": 2})])
def test_a_stream_of_crops_goes_on_where_another_was(train, taken, take, given):
    def begun():
        return take(train, 6, order=generator(3), augmentation=RESIZED_CROP, **given)

    whole = begun()
    expected = [next(whole) for _ in range(3 * len(whole))]
    stopped, going = begun(), begun()
    for _ in range(taken):
        next(stopped)
    going.load_state_dict(stopped.state_dict())
    assert equal([next(going) for _ in range(3 * len(whole) - taken)], expected[taken:])


def test_groups_of_one_class_are_read_from_files_too(train):
    for images, labels in passes(train, 2, RESIZED_CROP, by_class, groups=3):
        assert images.shape == (6, 3, 8, 8)
        assert all(len(labels[k::3].unique()) == 1 for k in range(3))


def test_evaluation_and_selection_keep_the_middle_of_the_whole_image(train):
    middle = torch.stack([train[i][0] for i in range(len(train))])
    assert torch.equal(torch.cat([images for images, _ in in_order(train, 7)]), middle)
    index = torch.tensor([5, 0, 9])
    assert torch.equal(select(train, index).images, middle[index])
    assert torch.equal(select(train, index).labels, train.labels[index])
    assert torch.equal(first(train, 4).images, middle[:4])
    assert len(first(train, 10_000)) == len(train)


def test_augmentation_is_left_to_the_device_but_for_the_crop_of_a_file(place, train):
    base, names = place
    held = next(iter(load_domains(names["domains"], base / "held").values())).train
    assert left_to_augment(train, RESIZED_CROP) == "none"
    assert left_to_augment(train, "crop_flip") == "crop_flip"
    assert left_to_augment(held, RESIZED_CROP) == RESIZED_CROP
    chunks = torch.arange(8).split(4)
    crops, again = (torch.cat([*augmented(train, chunks, RESIZED_CROP, generator(), "cpu")]) for _ in range(2))
    plain = torch.cat([*augmented(train, chunks, "none", generator(), "cpu")])
    assert torch.equal(crops, again)
    assert not torch.equal(crops, plain)
    assert torch.equal(plain, select(train, torch.arange(8)).images)


def test_who_must_not_see_labels_sees_the_same_images(place, train):
    base, names = place
    held = next(iter(load_domains(names["domains"], base / "held").values())).train
    for part in (train, held):
        blind = without_labels(part)
        assert equal(
            [(x, torch.zeros(1)) for x, _ in in_order(blind, 5)], [(x, torch.zeros(1)) for x, _ in in_order(part, 5)]
        )
        assert (blind.labels == UNLABELLED).all()
        assert (part.labels >= 0).all()


def test_the_last_batch_is_whole_or_left_out_and_what_is_skipped_is_not_read(train, monkeypatch):
    read = []
    real = type(train).__getitem__
    monkeypatch.setattr(type(train), "__getitem__", lambda self, index: (read.append(index), real(self, index))[1])
    batches = list(loaded_batches(train, 7, generator(), crops=True, skip=3))
    assert [len(labels) for _, labels in batches] == [7] * (len(train) // 7 - 3)
    assert len(read) == 7 * len(batches)


@pytest.mark.parametrize(("take", "given"), [(stream, {}), (by_class, {"groups": 2})])
@pytest.mark.parametrize("batch", [6, 2])
def test_a_worker_decodes_its_own_part_of_a_batch_with_the_crops_of_one_process(take, given, batch, train, monkeypatch):
    read = []
    real = type(train).__getitem__
    monkeypatch.setattr(type(train), "__getitem__", lambda self, index: (read.append(index), real(self, index))[1])

    def begun(**to):
        return take(train, batch, order=generator(3), augmentation=RESIZED_CROP, **given, **to)

    whole = begun()
    count = 2 * len(whole) + 1
    expected = [next(whole) for _ in range(count)]
    for rank in range(4):
        read.clear()
        own = begun(to=Workers(rank, 4))  # of two images the last workers have none
        parts = [next(own) for _ in range(count)]
        assert equal(parts, [(images[rank::4], labels[rank::4]) for images, labels in expected])
        assert len(read) == sum(len(labels) for _, labels in parts)


def test_a_worker_decodes_the_evaluation_batches_that_are_its_own(train, monkeypatch):
    whole = list(in_order(train, 7))
    read = []
    real = type(train).__getitem__
    monkeypatch.setattr(type(train), "__getitem__", lambda self, index: (read.append(index), real(self, index))[1])
    for rank in range(8):  # more than there are batches
        read.clear()
        own = list(in_order(train, 7, Workers(rank, 8)))
        assert equal(own, whole[rank::8])
        assert len(read) == sum(len(labels) for _, labels in own)


# Domains and classes


def test_each_domain_of_a_large_folder_is_read_as_it_is_held(place):
    base, names = place
    held = load_domains(names["domains"], base / "held")
    read = {domain: open_folder(names["domains"], base / "read", domain=domain, workers=0) for domain in held}
    for domain, data in held.items():
        for part in ("train", "val", "test"):
            one, two = getattr(data, part), getattr(read[domain], part)
            assert torch.equal(one.images, torch.cat([images for images, _ in in_order(two, 50)]))
            assert torch.equal(one.labels, two.labels)
        assert (data.name, data.mean, data.std, data.class_names) == (
            read[domain].name, read[domain].mean, read[domain].std, read[domain].class_names,
        )  # fmt: skip
    exact = channel_moments(torch.cat([data.train.images for data in held.values()]))
    assert moments_of(list(held.values())) == exact
    for pooled, true in zip(moments_of(list(read.values())), exact, strict=True):
        assert pooled == pytest.approx(true, abs=1e-9)
    with pytest.raises(ValueError, match='unknown domain "foto"; allowed: art, photo, sketch; did you mean "photo"'):
        open_folder(names["domains"], base / "read", domain="foto")
    with pytest.raises(ValueError, match="has domains; give domain="):
        open_folder(names["domains"], base / "read")
    with pytest.raises(ValueError, match='unknown domain "art"; allowed: none'):
        open_folder(names["splits"], base / "read", domain="art")


def test_the_first_classes_of_a_large_folder(place):
    base, names = place
    data = open_folder(names["splits"], base / "read", classes=2)
    assert (data.num_classes, data.class_names) == (2, ("a", "b"))
    assert all(set(getattr(data, part).labels.tolist()) == {0, 1} for part in ("train", "val", "test"))
    with pytest.raises(ValueError, match=r"has 3 classes; classes=4 is not in 2\.\.3"):
        open_folder(names["splits"], base / "read", classes=4)


# Tasks

SUPERVISED = {"model": "resnet8", "width": 4, "epochs": 1, "batch_size": 12}
ATTACKS = {"steps": 1, "attack_images": 6, "pgd_steps": 1, "pgd_restarts": 1, "autoattack": (), "method": "pgd"}
TASKS = {
    "classification": ("splits", {**SUPERVISED, "recalibration_images": 12, "num_classes": 2}),
    "adversarial": ("splits", {**SUPERVISED, **ATTACKS}),
    "domain_adaptation": ("domains", {**SUPERVISED, "adabn_images": 12, "source": "art", "target": "photo"}),
    "domain_generalization": (
        "domains",
        {**SUPERVISED, "held_out": "photo", "domains": ("art", "photo", "sketch")},
    ),
}


def run(place, name, where, workers=0, **given):
    base, names = place
    kind, options = TASKS[name]
    task = get_task(name)
    chosen = task.options(dataset=names[kind], **{**options, **given})
    task.data_checksum(chosen, base / where)
    assert task.steps(chosen, base / where) > 0
    context = RunContext(torch.device("cpu"), 0, base / where, base, loader_workers=workers)
    return results(task.run(make_norm("bn"), chosen, context))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_reads_files_gives_the_run_of_the_same_images_in_memory(place, name):
    # num_classes: mean and deviation of the kept classes are measured where they are held
    given = {"augmentation": "crop_flip", **({"num_classes": None} if name == "classification" else {})}
    held, read = (run(place, name, where, **given) for where in ("held", "read"))
    if name != "domain_generalization":
        assert held == read
    else:  # the joint moments are summed in another order
        assert held[0] == pytest.approx(read[0], abs=1e-3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TASKS)
def test_workers_change_no_run_and_crops_of_whole_images_do(place, name):
    here, there = (run(place, name, "read", workers, augmentation=RESIZED_CROP) for workers in (0, 2))
    assert here == there
    if name == "classification":
        assert run(place, name, "held", augmentation=RESIZED_CROP) != here


@pytest.mark.usefixtures("one_thread")
def test_a_run_of_crops_goes_on_within_an_epoch(place):
    base, names = place
    task, given = get_task("classification"), {"augmentation": RESIZED_CROP, "batch_size": 6, "epochs": 2}
    chosen = task.options(dataset=names["splits"], **{**TASKS["classification"][1], **given})
    stopped, parts = resumed(task, make_norm("bn"), chosen, [1, 5], base, data_dir=base / "read")
    assert parts == 3
    assert results(stopped) == run(place, "classification", "read", **given)


def test_a_task_that_needs_all_images_at_once_says_what_to_do(place):
    base, names = place
    task = get_task("architecture_search")
    with pytest.raises(
        ValueError, match=r"is too large for memory, and architecture_search needs one that fits; .*--size"
    ):
        task.data_checksum(task.options(dataset=names["splits"]), base / "read")

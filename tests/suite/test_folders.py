"""suite.folders: a folder of images is the same data wherever it lies and however its path is written."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import suite
from results.record import RunSpec
from suite.config import PlanError
from suite.folders import located
from suite.planning import plan_config
from tasks.data import prepare


def images(root, seed=0):
    draw = np.random.default_rng(seed)
    for part in ("train", "test"):
        for label in "ab":
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(20):
                Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    """tmp_path, with the prepared folder x/pets; the working and the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare(f"folder:{images(tmp_path / 'x' / 'pets')}", tmp_path / "data", size=8)
    return tmp_path


SMALL = {"model": "resnet8", "width": 4, "epochs": 1, "max_steps": 1, "batch_size": 8, "recalibration_images": 8}


def planned(dataset, here):
    config = {"norms": ["bn"], "seeds": 0, "tasks": {"classification": {"dataset": dataset, **SMALL}}}
    return plan_config(config, data_dir=here / "data")


def spellings(here):
    relative = ["x/pets", "x/pets/", "./x/pets", "x//pets/.", "x/../x/pets", "x/pets/train/.."]
    return [*relative, str(here / "x" / "pets"), f"{here}/./x/pets/"]


def test_every_spelling_of_a_path_is_one_run_that_names_the_folder(here):
    plans = [planned(f"folder:{path}", here) for path in spellings(here)]
    assert {p.runs[0].key for p in plans} == {plans[0].runs[0].key}
    assert {p.runs[0].task_options["dataset"] for p in plans} == {"folder:pets"}
    assert len(planned([f"folder:{path}" for path in spellings(here)], here).runs) == 1
    for p in plans:
        (path,) = p.folders.values()
        assert os.path.isabs(path.removeprefix("folder:"))
        assert os.path.samefile(path.removeprefix("folder:"), here / "x" / "pets")


def test_a_folder_that_was_moved_is_the_same_data_and_other_images_are_not(here):
    before = planned("folder:x/pets", here).runs[0]
    shutil.move(here / "x", here / "y")
    prepare("folder:y/pets", here / "data", size=8)
    assert planned("folder:y/pets", here).runs[0].key == before.key
    prepare(f"folder:{images(here / 'z' / 'pets', seed=1)}", here / "data", size=8)
    other = planned("folder:z/pets", here).runs[0]
    assert other.task_options == before.task_options
    assert other.key != before.key


def test_a_moved_folder_needs_no_preparation_and_neither_does_one_that_is_gone(here):
    before = planned("folder:x/pets", here).runs
    (here / "y").mkdir()
    (here / "x" / "pets").rename(here / "y" / "pets")
    assert planned("folder:y/pets", here).runs == before
    shutil.rmtree(here / "y" / "pets")
    for gone in ("folder:x/pets", "folder:y/pets", "folder:pets", "folder:/another/machine/pets"):
        plan = planned(gone, here)
        assert plan.runs == before
    (here / "out").mkdir()
    record = suite.Runner(data_dir=here / "data", folders=plan.folders)(
        plan.runs[0], here / "out", lambda fraction: None
    )
    assert (record.status, record.reason) == ("ok", "")


def test_a_run_on_other_data_than_were_planned_fails_and_says_so(here):
    plan = planned("folder:x/pets", here)
    shutil.rmtree(here / "x" / "pets")
    prepare(f"folder:{images(here / 'x' / 'pets', seed=1)}", here / "data", size=8, force=True)
    (here / "out").mkdir()
    record = suite.Runner(data_dir=here / "data", folders=plan.folders)(
        plan.runs[0], here / "out", lambda fraction: None
    )
    assert record.status == "failed"
    assert 'data set "folder:pets" changed after planning: checksum' in record.reason


def test_a_link_gives_a_folder_another_name(here):
    (here / "cats").symlink_to(here / "x" / "pets")
    runs = planned(["folder:x/pets", "folder:cats", "folder:cats/"], here).runs
    assert [s.task_options["dataset"] for s in runs] == ["folder:pets", "folder:cats"]
    assert runs[0].data_checksum == runs[1].data_checksum


def test_a_folder_that_is_here_is_called_by_its_own_name(here, monkeypatch):
    monkeypatch.chdir(here / "x" / "pets")
    assert planned("folder:.", here).runs[0].task_options["dataset"] == "folder:pets"
    monkeypatch.chdir(here / "x" / "pets" / "train")
    assert planned("folder:..", here).runs[0].task_options["dataset"] == "folder:pets"


def test_two_folders_of_one_name_with_different_images_are_refused_in_one_plan(here):
    prepare(f"folder:{images(here / 'z' / 'pets', seed=1)}", here / "data", size=8)
    with pytest.raises(PlanError) as caught:
        planned(["folder:x/pets", "folder:z/pets"], here)
    (line,) = caught.value.lines
    for part in ('"folder:x/pets" and "folder:z/pets" hold different images', "folder:pets", "rename", "link"):
        assert part in line
    shutil.copytree(here / "x" / "pets", here / "same" / "pets")
    prepare("folder:same/pets", here / "data", size=8)
    assert len(planned(["folder:x/pets", "folder:same/pets"], here).runs) == 1


def test_a_run_finds_its_folder_and_records_its_name(here):
    p = planned("folder:x/pets/", here)
    runner = suite.Runner(data_dir=here / "data", folders=p.folders)
    (here / "elsewhere").mkdir()
    os.chdir(here / "elsewhere")  # monkeypatch.chdir of the fixture puts it back
    record = runner(p.runs[0], here / "elsewhere", lambda fraction: None)
    assert (record.status, record.reason) == ("ok", "")
    assert record.spec.task_options["dataset"] == "folder:pets"
    assert str(here) not in record.model_dump_json()


def test_a_record_with_a_whole_path_is_read_and_run_as_it_is(here):
    (spec,) = planned("folder:x/pets", here).runs
    path = f"folder:{here / 'x' / 'pets'}"
    old = spec.model_copy(update={"task_options": {**spec.task_options, "dataset": path}})
    assert RunSpec.model_validate_json(old.model_dump_json()).key == old.key != spec.key
    assert located(old.task_options, {"folder:pets": "folder:/nowhere"})["dataset"] == path


def test_options_of_any_shape_are_located():
    options = {"pair": ["folder:a", "digits"], "more": {"of": [["folder:b"]]}, "n": 3}
    paths = {"folder:a": "folder:/x/a", "folder:b": "folder:/x/b"}
    assert located(options, paths) == {"pair": ["folder:/x/a", "digits"], "more": {"of": [["folder:/x/b"]]}, "n": 3}

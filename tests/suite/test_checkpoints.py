"""suite.checkpoints: whatever lies in the place of a checkpoint costs a line; what was stored before stays usable."""

import errno
import io
import json
import math
import os
import pickle
import resource
import zipfile

import pytest
import torch

from suite import checkpoints
from suite.checkpoints import BEFORE, NEWEST, Checkpoints, found
from tasks.journal import Position

KEY = "0" * 24
SIZE = 10_000  # numbers


def state(number):
    return {
        "rows": [],
        "steps": number,
        "loops": {"training": {"w": torch.full((SIZE,), float(number))}},
        "results": {},
    }


def opened(folder, key=KEY):
    said = []
    return Checkpoints(folder, key, {"torch": "2"}, said.append, lambda: 1.5), said


@pytest.fixture
def stored(tmp_path):
    """A folder with the checkpoints of epochs 2 and 3."""
    made, said = opened(tmp_path)
    for number in (1, 2, 3):
        assert made.save(state(number), Position("training", number - 1, 90, number))
    assert not said
    return tmp_path


def torch_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Code:
    def __reduce__(self):
        return print, ("executed",)


def with_note(content, note, compression=zipfile.ZIP_STORED):
    file = io.BytesIO(torch_file(content))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/normsuite.json", note, compression)
    return file.getvalue()


def note(**changes):
    known = {"key": KEY, "position": {}, "text": "epoch 3 of 90", "seconds": 1.0, "parts": [], "format": 1}
    return json.dumps(known | changes)


def pickled(member):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(with_note(state(3), note()))) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, member if name.endswith("data.pkl") else source.read(name))
    return file.getvalue()


DAMAGED = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "one bit": lambda whole: (
        whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :]
    ),
    "foreign": lambda whole: b"not a checkpoint \x1b[2J\n" * 100,
    "no note": lambda whole: torch_file(state(3)),
    "no archive of torch": lambda whole: zipped({"archive/normsuite.json": note()}),
    "another run": lambda whole: with_note(state(3), note(key="1" * 24)),
    "another format": lambda whole: with_note(state(3), note(format=2)),
    "a note of a megabyte and more": lambda whole: with_note(state(3), " " * 2**22, zipfile.ZIP_DEFLATED),
    "a note with a time that is none": lambda whole: with_note(state(3), note(seconds=math.nan)),
    "a note of other types": lambda whole: with_note(state(3), note(text=["epoch"])),
    "a note nested too deeply": lambda whole: with_note(state(3), "[" * 100_000),
    "code": lambda whole: pickled(pickle.dumps(Code())),
    "an old pickle": lambda whole: pickle.dumps(Code()),
}


NOT_IN_NOTE = ("one bit", "no archive of torch", "code")
"""What only shows where all is read."""


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_newest_falls_back_to_the_one_before_and_then_to_the_start(stored, damage, capfd):
    for name in (NEWEST, BEFORE):
        (stored / name).write_bytes(DAMAGED[damage]((stored / name).read_bytes()))
        made, said = opened(stored)
        candidate = next(made.candidates())
        if name == NEWEST:
            assert candidate["steps"] == 2
            assert (made.note.text, made.seconds) == ("epoch 2 of 90", 1.5)
            (line,) = said
            assert line.endswith("; the one before it is read")
        else:
            assert (candidate, made.note, made.seconds) == (None, None, 0.0)
            first, line = said
            assert first.endswith("; the one before it is read")
            assert line.endswith("; the run begins anew")
            assert found(stored, KEY) is None or damage in NOT_IN_NOTE
        assert str(stored / name) in line
        assert line.isprintable()
        assert len(line) < 500
    assert capfd.readouterr() == ("", ""), "nothing is executed"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_regular_file_is_none(stored, kind):
    (stored / NEWEST).rename(stored / "aside")
    make = {"folder": os.mkdir, "pipe": os.mkfifo, "link": lambda file: os.symlink(stored / "aside", file)}[kind]
    make(stored / NEWEST)
    assert found(stored, KEY).origin == "from epoch 2 of 90"
    made, said = opened(stored)
    assert next(made.candidates())["steps"] == 2
    assert said == [f"{stored / NEWEST}: not a checkpoint (is not a regular file); the one before it is read"]
    saved = made.save(state(4), Position("training", 3, 90, 4))
    assert saved is (kind != "folder")
    assert next(opened(stored)[0].candidates())["steps"] == (4 if saved else 2)
    assert checkpoints.read(stored / BEFORE, KEY)[0]["steps"] == 2, "what is damaged takes nobody's place"


def test_a_full_disk_costs_one_line_and_the_old_checkpoint_stays(stored):
    made, said = opened(stored)
    assert next(made.candidates())["steps"] == 3
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, before[1]))
    try:
        for number in (4, 5):
            grown = state(number) | {"rows": [{"epoch": 1.0}] * 10 * number}  # torch's own message would differ
            assert made.save(grown, Position("training", number - 1, 90, number)) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = said
    assert line == f"no checkpoint at epoch 4 of 90: {os.strerror(errno.EFBIG)}"
    assert sorted(path.name for path in stored.iterdir()) == sorted([NEWEST, BEFORE])
    assert next(opened(stored)[0].candidates())["steps"] == 3
    assert made.save(state(6), Position("training", 5, 90, 6))
    assert [checkpoints.read(stored / name, KEY)[0]["steps"] for name in (NEWEST, BEFORE)] == [6, 3]


def test_seconds_and_parts_add_up_over_processes(stored):
    made, _ = opened(stored)
    next(made.candidates())
    made.save(state(4), Position("training", 3, 90, 4))
    again, _ = opened(stored)
    next(again.candidates())
    assert again.seconds == 3.0
    assert [part["until"] for part in again.parts("the end")] == ["epoch 3 of 90", "epoch 4 of 90", "the end"]


def test_a_stored_run_leaves_no_checkpoint_and_nothing_of_a_killed_writer(stored):
    (stored / f".{NEWEST}.deadbeef.1.abcd").write_bytes(b"half")
    (stored / "record.json").write_text("{}")
    checkpoints.remove(stored)
    assert [path.name for path in stored.iterdir()] == ["record.json"]

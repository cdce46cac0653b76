"""results.files: whole files or none, no link followed, no pipe waited for, nothing left behind."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from results import files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    files.write_text(tmp_path / "a.json", "one")
    files.write_text(tmp_path / "a.json", "zwei ä")
    assert files.read_bytes(tmp_path / "a.json").decode() == "zwei ä"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("write", [lambda f: files.write_text(f, "new"), lambda f: files.open_new(f).close()])
def test_a_link_is_replaced_and_its_target_stays(tmp_path, write):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    write(link)
    assert precious.read_text() == "precious"
    assert not link.is_symlink()


def test_a_hard_link_is_replaced_and_its_other_name_stays(tmp_path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    os.link(precious, link)
    with files.open_new(link) as stream:
        stream.write(b"x")
    assert precious.read_text() == "precious"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, reason in (
        ("pipe", "not a regular file"),
        ("folder", "directory"),
        ("loop", "is a link"),
        ("endless", "is a link"),
    ):
        outcome = []

        def attempt(file=tmp_path / name, outcome=outcome):
            try:
                files.read_bytes(file)
            except OSError as error:
                outcome.append(error.strerror)

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(5)
        assert outcome
        assert reason in outcome[0]
    with pytest.raises(OSError, match="not a regular file"):
        files.read_bytes("/dev/zero")


def test_a_file_beyond_the_limit_is_refused_without_being_read(tmp_path):
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(8 * 2**30)
    with pytest.raises(OSError, match="larger than 256 MiB"):
        files.read_bytes(tmp_path / "huge")


def test_leftovers_of_killed_writers_go_with_the_next_write_and_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files._host()
    left = tmp_path / f".a.json.{host}.{dead.pid}.0011"
    alive = tmp_path / f".a.json.{host}.{os.getpid()}.0011"
    elsewhere = tmp_path / f".a.json.00000000.{dead.pid}.0011"
    forgotten = tmp_path / f".a.json.00000000.{dead.pid}.0022"
    for file in (left, alive, elsewhere, forgotten):
        file.touch()
    os.utime(forgotten, (0, 0))
    files.write_text(tmp_path / "a.json", "x")
    assert not left.exists()
    assert not forgotten.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_a_file_system_that_refuses_to_sync_folders_is_good_enough(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor):
        import stat

        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_an_error_while_writing_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/record.json'"):
        files.write_text(tmp_path / "record.json", "x")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_appended_to_a_file_that_is_there_and_to_nothing_else(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"one\n")
    files.append(file, b"two\n")
    assert file.read_bytes() == b"one\ntwo\n"
    link.symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for other in (link, tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match="Errno"):
            files.append(other, b"three\n")
    assert file.read_bytes() == b"one\ntwo\n"

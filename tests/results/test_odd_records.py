"""Folders of results as they are after accidents, on odd file systems and from strangers: what can not be read is named
in one line, and everything else is shown.
"""

import copy
import csv
import io
import json
import math
import os
import re
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import results
from results import record as records
from results.record import RecordError, RunRecord, RunSpec, record_text
from results.rows import natural
from results.store import (
    RECORD,
    VERSIONS,
    find_record,
    read_record,
    read_versions,
    record_files,
    run_folder,
    write_record,
)
from results.tables.writing import FORMATS

HOSTILE = "a\x1b[2J\u202eb\u200b\nc"
"""Clears the screen, turns what follows around, hides, and starts a line of its own."""


def entry(norm="bn", seed=0, metrics=None, **changes):
    options = {"dataset": "made_up", "norm_batch_size": 2, **changes.pop("options", {})}
    spec = RunSpec(
        task=changes.pop("task", "classification"),
        norm=norm,
        norm_options=changes.pop("norm_options", {}),
        task_options=options,
        seed=seed,
        norm_version="1",
        task_version="1",
        data_checksum="c",
        norm_label=changes.pop("label", ""),
    )
    return RunRecord(spec=spec, status="ok", metrics=metrics or {"top1": 0.5}, **changes)


def shown(folder):
    """The frame, and everything that is printed and written of it."""
    df = results.load(folder)
    tables = results.render_all(df)
    with tempfile.TemporaryDirectory() as out:
        files = results.write_tables(tables, out, FORMATS)
        texts = [file.read_text(encoding="utf-8") for file in files]
    return df, [results.tables_text(tables, 100), *texts]


def lines_are_plain(lines):
    return all(line.isprintable() and len(line) <= 1000 for line in lines)


def a_folder(file):
    file.unlink()
    file.mkdir()


def a_link_to(target):
    def make(file):
        file.unlink()
        file.symlink_to(target)

    return make


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def text(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


def option(value):
    return text(lambda content: content.replace(b'"made_up"', value))


def too_large(file):
    with file.open("r+b") as stream:
        stream.truncate(8 * 2**30)  # takes no space


def a_file_for_its_folder(file):
    file.unlink()
    file.parent.rmdir()
    file.parent.touch()


def a_loop_for_its_folder(file):
    file.unlink()
    file.parent.rmdir()
    file.parent.symlink_to(file.parent)


DAMAGED = {
    "a folder": (a_folder, "is a directory"),
    "a link to itself": (a_link_to(RECORD), "is a link"),
    "a link to an endless file": (a_link_to("/dev/zero"), "is a link"),
    "a link to nowhere": (a_link_to("nowhere"), "is a link"),
    "a pipe": (a_pipe, "not a regular file"),
    "8 GB": (too_large, "larger than 32 MiB"),
    "its folder is a file": (a_file_for_its_folder, "the folder of a run is needed"),
    "its folder is a loop of links": (a_loop_for_its_folder, "leads nowhere"),
    "NaN": (option(b"NaN"), "not a run record"),
    "infinity": (option(b"1e999"), "not a run record"),
    "deep": (option(b"[" * 100_000 + b"]" * 100_000), "not a run record"),
    "surrogate": (option(rb'"\ud800"'), "not a run record"),
    "not UTF-8": (option(b'"\xff"'), "not a run record"),
    "a byte order mark": (text(lambda content: b"\xef\xbb\xbf" + content), "not a run record"),
    "a key twice": (option(b'"made_up", "dataset": "other"'), '"dataset" is given twice'),
    "5000 digits": (option(b"9" * 5000), "not a run record"),
    "a metric of 400 digits": (text(lambda content: content.replace(b"0.5", b"9" * 400)), "metrics.top1"),
    "2,001 options": (
        option(b'"made_up", ' + b", ".join(b'"o%d": 1' % i for i in range(2_000))),
        "a mapping of 2002 entries; 2000 are allowed",
    ),
    "a million wrong epochs": (
        text(lambda content: content.replace(b'"history": [', b'"history": [' + b"1," * 1_000_000 + b"{}")),
        "history.0",
    ),
    "endless seconds": (text(lambda content: content.replace(b'"seconds": 0.0', b'"seconds": 1e300')), "seconds"),
    "escapes": (
        text(lambda content: content.replace(b'"top1"', rb'"\u001b[2J\n\u202e' + b"x" * 3000 + b'"')),
        "U+001B",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_one_odd_record_is_named_and_all_others_are_shown(tmp_path, kind):
    make, reason = DAMAGED[kind]
    for seed in (0, 1):
        write_record(tmp_path, entry(seed=seed))
    file = write_record(tmp_path, entry(seed=2))
    make(file)
    start = time.monotonic()
    df, texts = shown(tmp_path)
    assert time.monotonic() - start < 5
    assert df["seed"].tolist() == [0, 1]
    assert "1 damaged record could not be read." in texts[0]
    (line,) = df.attrs["damaged"]
    assert str(file.parent) in line
    assert reason in line
    assert lines_are_plain([line])
    with pytest.raises(ValueError, match=re.escape(line)):
        results.load(tmp_path, strict=True)


@pytest.mark.parametrize("kind", [k for k in DAMAGED if not k.startswith("its folder")])
def test_a_run_with_an_odd_record_is_damaged_and_nothing_worse(tmp_path, kind):
    stored = entry()
    make, _ = DAMAGED[kind]
    make(write_record(tmp_path, stored))
    file = run_folder(tmp_path, stored.spec) / RECORD
    with pytest.raises(RecordError) as caught:
        read_record(file)
    assert lines_are_plain([str(caught.value)])
    with pytest.raises(RecordError):
        find_record(tmp_path, stored.spec)


def test_what_is_no_folder_of_a_run_is_nobodys_business(tmp_path):
    write_record(tmp_path, entry())
    for folder in (tmp_path / "runs", tmp_path / "runs/classification", tmp_path / "runs/classification/bn"):
        (folder / ".DS_Store").touch()
        (folder / "notes.txt").touch()
        (folder / "empty").mkdir()
    (tmp_path / "runs/again").symlink_to(tmp_path / "runs")  # round and round
    df = results.load(tmp_path)
    assert (len(df), df.attrs["damaged"]) == (1, [])


def test_folders_that_lead_nowhere_or_can_not_be_listed_are_named(tmp_path, monkeypatch):
    """They may hold runs: a disk that is not mounted must not look like runs that were never made."""
    write_record(tmp_path, entry())
    write_record(tmp_path, entry("gn"))
    (tmp_path / "runs/few_shot").symlink_to("/not/mounted")
    listed = os.scandir

    def refuse(folder):
        if str(folder).endswith("/gn"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    df = results.load(tmp_path)
    assert df["norm"].tolist() == ["bn"]
    assert df.attrs["damaged"] == [
        f"{tmp_path}/runs/classification/gn: can not be listed: Permission denied",
        f"{tmp_path}/runs/few_shot: is a link that leads nowhere; a folder is needed",
    ]


def test_a_record_that_could_not_be_read_again_is_not_written(monkeypatch):
    assert read_back(record_text(entry())) == entry()
    monkeypatch.setattr(records, "LARGEST", 2**20)
    for wrong, words in (
        (entry(metrics={f"m{i}": 0.5 for i in range(2_001)}), "2001 entries"),
        (entry(history=[{"loss": 1.0}] * 100_000), "a record of 2 MiB; up to 1 MiB are read"),
        (entry(options={"rate": math.nan}), "not JSON compliant"),
    ):
        with pytest.raises(ValueError, match=words):
            record_text(wrong)


def read_back(written):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / RECORD
        file.write_text(written, encoding="utf-8")
        return read_record(file)


VALUES = (1e308, -1e308, 1.7e308, 1e-320, -1e-320, -0.0, 5e-324, 1e15)


def test_numbers_at_the_ends_of_their_range_are_shown_short(tmp_path):
    """A valid config reaches some of these: the run ended well, then every table of the folder raised."""
    large = 10**308 + 7
    for seed, value in enumerate(VALUES):
        for norm, rate in (("bn", large), ("gn", 2**63), ("ln", -(2**64))):
            metrics = {"top1": value, "test_loss": value, "mine": value, "norm_parameters": abs(value)}
            write_record(tmp_path, entry(norm, seed, metrics, options={"rate": rate}, norm_options={"groups": rate}))
    write_record(tmp_path, entry("bn", 10**400, {"top1": 1e308}, options={"rate": 2}))
    df, texts = shown(tmp_path)
    assert len(df) == 3 * len(VALUES) + 1
    assert df.attrs["damaged"] == []
    assert set(df["option.rate"]) == {large, 2**63, -(2**64), 2}
    for printed in (texts[0], *(t for t in texts[1:] if t.startswith(("#", "%", "\\")))):
        numbers = re.findall(r"[0-9.…]+", printed)
        assert max(map(len, numbers)) <= 160, max(numbers, key=len)
    assert "1.0e+310" in texts[0]


def test_what_others_wrote_into_a_record_reaches_no_terminal_and_no_format(tmp_path):
    for seed, rate in ((0, HOSTILE), (1, "=cmd|' /C calc'!A0")):
        write_record(
            tmp_path,
            entry(
                "bn",
                seed,
                {HOSTILE: 0.5, "top1": 0.5, "@sum": 0.5},
                label=f"bn({HOSTILE})",
                options={"rate": rate, HOSTILE: 1, "fixed": HOSTILE},
                norm_options={HOSTILE: HOSTILE},
                evidence={"data": HOSTILE, "equals": HOSTILE, "masking": HOSTILE, HOSTILE: 1},
                environment={"torch": f"{HOSTILE}{seed}", HOSTILE: 1},
            ),
        )
    df, texts = shown(tmp_path)
    assert HOSTILE in df.columns  # the frame has what was stored
    assert set(df["option.fixed"]) == {HOSTILE}
    for printed in texts:
        assert "".join(printed.split("\n")).isprintable()
        assert "U+001B" in printed
    tidy = [t for t in texts if t.startswith("table,")]
    assert any("'=cmd" in t for t in tidy)
    for table in tidy:
        for row in csv.reader(io.StringIO(table)):
            assert all(not cell.startswith(("=", "+", "-", "@")) or float(cell) is not None for cell in row)


def test_tables_of_a_record_with_endless_texts_stay_short(tmp_path):
    long = "x" * 1_000_000
    for seed, rate in ((0, long), (1, f"{long}y")):
        changes = {"label": f"bn({long})", "options": {"rate": rate, "fixed": long}, "evidence": {"data": long}}
        write_record(tmp_path, entry("bn", seed, {"top1": 0.5, "m" * 200: 0.5}, **changes))
    _, texts = shown(tmp_path)
    assert max(len(line) for line in texts[0].split("\n")) < 1000
    for printed in texts:
        if not printed.startswith(("table,", "task,")):
            assert len(printed) < 100_000


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"norm": {"bn": "1"}}',
        '{"norm": [], "task": 3}',
        '{"norm": {"bn": ' + "[" * 500 + "]" * 500 + '}, "task": {}}',
        "null",
        "\ud800".encode(errors="surrogatepass"),
        b"",
        '{"data": {"classification": {"made_up": [null, {}, 3]}}}',
    ],
)
def test_a_deep_or_incomplete_note_of_versions_is_none(tmp_path, content):
    write_record(tmp_path, entry())
    (tmp_path / VERSIONS).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert isinstance(read_versions(tmp_path), dict)
    df, _ = shown(tmp_path)
    assert len(df) == 1


def test_a_name_given_twice_among_a_million_is_found_at_once(tmp_path):
    file = write_record(tmp_path, entry(environment={"threads": 1}))
    many = "".join(f'"n{i}":1,' for i in range(200_000))
    text = file.read_text().replace('"threads": 1', f'"inner": {{{many}"last": 1, "last": 2}}')
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(RecordError, match='"last" is given twice'):
        read_record(file)
    assert time.monotonic() - start < 5


def test_times_that_no_frame_can_hold_give_way_to_the_files(tmp_path):
    times = ("9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+23:00", 1e300, -1e18, "soon", [1], 4e10)
    for seed, finished in enumerate(times):
        file = write_record(tmp_path, entry(seed=seed, environment={"finished": finished}))
        os.utime(file, (1e9, 1e9))
    df = results.load(tmp_path)
    assert {int(t.timestamp()) for t in df["finished"]} == {10**9}


def test_values_of_any_size_have_an_order():
    ordered = [-(10**400), -1e308, -1, 0.5, 1, 1e308, 10**400, "a2", "a10", "a" + "9" * 5000, "a" + "1" * 5001, None]
    backwards = ordered[::-1]
    assert sorted(backwards, key=natural) == ordered
    assert natural("a007") == natural("a7")
    assert natural(math.nan) == natural(None)


# Any record that JSON can say, and any damage to a good one, gives tables or one short line.

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 10**309, -(10**400), 2**1024]),
    st.floats(),
    st.sampled_from(VALUES),
    st.text(max_size=8),
    st.sampled_from([HOSTILE, "=1+1", "-0.5", "9" * 5000, "2" * 40, "nan", "source_only", "\u0301" * 9]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.fixed_dictionaries({"label": inner, "name": inner, "version": inner}),
    ),
    max_leaves=6,
)
OPTIONS = st.one_of(
    st.fixed_dictionaries(
        {"method": st.sampled_from(["source_only", "dann"])},
        optional={"held_out": st.sampled_from(["a", "b", None]), "norm_batch_size": st.sampled_from([None, 1, 2])},
    ),
    st.dictionaries(st.sampled_from(["dataset", "norm_batch_size", "learning_rate", "held_out", "x", HOSTILE]), JSON),
)
METRICS = st.dictionaries(
    st.sampled_from(["top1", "target_top1", "val_top1", "composition_shift", "gain", "mine", "target_top1/a", HOSTILE]),
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(VALUES)),
    max_size=4,
)
SPECS = st.fixed_dictionaries(
    {
        "task": st.sampled_from(["classification", "domain_generalization", "mine", "mine!", "MINE_", "all_tables"]),
        "norm": st.sampled_from(["bn", "gn", "in"]),
        "norm_options": OPTIONS,
        "task_options": OPTIONS,
        "seed": st.one_of(st.integers(0, 2), st.sampled_from([-1, 2**63, 10**309])),
        "norm_version": st.sampled_from(["1", "2"]),
        "task_version": st.just("1"),
        "data_checksum": st.sampled_from(["c", "d"]),
        "norm_label": st.sampled_from(["", "bn", HOSTILE, "=1"]),
    }
)
ENTRIES = st.fixed_dictionaries(
    {"spec": SPECS},
    optional={
        "status": st.sampled_from(["ok", "ok", "ok", "diverged", "failed", "skipped", "lost"]),
        "reason": st.text(max_size=20),
        "metrics": METRICS,
        "history": st.lists(
            st.dictionaries(st.sampled_from(["epoch", "loss", "seed", HOSTILE]), st.one_of(st.none(), st.floats()))
        ),
        "seconds": st.floats(),
        "environment": st.dictionaries(
            st.sampled_from(["finished", "commit", "torch", "device", "x"]), JSON, max_size=3
        ),
        "evidence": st.dictionaries(
            st.sampled_from(["data", "budget", "equals", "masking", "constant_output", "mixes_samples"]),
            JSON,
            max_size=3,
        ),
        "schema": st.sampled_from([1, 1, 1, 2, None]),
    },
)
DAMAGE = st.one_of(
    st.none(),
    st.tuples(st.just("cut"), st.integers(0, 400)),
    st.tuples(st.just("flip"), st.integers(0, 400), st.integers(0, 255)),
    st.tuples(
        st.just("insert"), st.integers(0, 400), st.sampled_from([b"[" * 3000, b"NaN", b"\xff", b'"a":', b"{}", b"\x00"])
    ),
)
PLANNED = st.one_of(
    st.none(),
    st.binary(max_size=20),
    st.builds(
        lambda found: json.dumps(found).encode(), st.dictionaries(st.sampled_from(["norm", "task", "data"]), JSON)
    ),
)


def damage(content, how):
    if how is None:
        return content
    kind, place, *rest = how
    place = min(place, len(content))
    if kind == "cut":
        return content[:place]
    return content[:place] + (bytes(rest) if kind == "flip" else rest[0]) + content[place + (kind == "flip") :]


def tables_or_a_line(stored, planned):
    """What the fuzz asks of every folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        if planned is not None:
            (folder / VERSIONS).write_bytes(planned)
        for number, (found, how) in enumerate(stored):
            content = copy.deepcopy(found)
            spec = content["spec"]
            try:
                key = RunSpec(**spec).key
            except ValueError:
                key = f"{number:024x}"
            home = folder / "runs" / spec["task"] / spec["norm"] / key
            home.mkdir(parents=True, exist_ok=True)
            (home / RECORD).write_bytes(damage(json.dumps({"status": "ok", **content}).encode(), how))
        start = time.monotonic()
        df = results.load(folder)
        if df.empty:
            with pytest.raises(ValueError, match=r"^no runs to tabulate($|; left out, )"):
                results.render_all(df)
            return
        df, texts = shown(folder)
        assert time.monotonic() - start < 20
        results.load_history(folder)
        assert lines_are_plain(df.attrs["damaged"])
        left_out = sum(df.attrs["stale"].values()) + len(df.attrs["damaged"]) + len(df.attrs["doubles"])
        assert len(df) + left_out == len(list(record_files(folder)))
        for printed in texts:
            assert "".join(printed.split("\n")).isprintable()
            assert len(printed) < 2_000_000
        assert max(map(len, texts[0].split("\n"))) < 2000


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, **FUZZ)
@given(st.lists(st.tuples(ENTRIES, DAMAGE), max_size=4), PLANNED)
def test_any_folder_of_records_gives_tables_or_a_line(stored, planned):
    tables_or_a_line(stored, planned)


@pytest.mark.slow
@settings(max_examples=4000, **FUZZ)
@given(st.lists(st.tuples(ENTRIES, DAMAGE), max_size=8), PLANNED)
def test_any_folder_of_records_gives_tables_or_a_line_for_minutes(stored, planned):
    tables_or_a_line(stored, planned)

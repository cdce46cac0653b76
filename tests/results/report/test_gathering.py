"""What stands in a report: the frame's numbers, what the folder lacks, and no more than a page holds."""

import json
import math

import pytest
from parts.many_runs import plant

import results
from results.declared import Checked, FactCheck, NormNote, NormNotes
from results.record import RECORD, RunRecord, RunSpec
from results.report import gather, write_report
from results.report.content import LARGEST
from results.report.page import packed
from results.store import NORMS, read_norms, run_folder, write_norms, write_record

ODD = "<b>$x_1$\u202e\x1b[2J\nend"


def record(norm="bn", seed=0, value=0.5, status="ok", **more):
    spec = RunSpec(
        task="classification",
        norm=norm,
        norm_options=more.pop("norm_options", {"eps": 1e-5}),
        task_options={"dataset": "made_up", "norm_batch_size": more.pop("batch", 2)},
        seed=seed,
        norm_version=more.pop("version", "1"),
        task_version="1",
        data_checksum="c",
        norm_label=more.pop("label", norm),
    )
    metrics = {"top1": value, "step_seconds": 0.01 * (2 if norm == "gn" else 1)} if status == "ok" else {}
    reason = "" if status == "ok" else "it did"
    return RunRecord(spec=spec, status=status, reason=reason, metrics=metrics, **more)


def planted(folder, *records):
    for each in records:
        write_record(folder, each)
    return folder


def note(folder, version="1", measured="1"):
    check = FactCheck(fact="axes", declared="NHW", measured="NHW", verdict="holds")
    checked = Checked(norm="bn", norm_version=measured, version="9.9", time="2026-11-28T10:00", checks=(check,))
    told = NormNote(source="A paper", about="y = x\n\n    indented", axes="NHW", mixes_samples=True)
    write_norms(folder, NormNotes(norms={"bn": {version: told}}, checked={"bn": checked}))


def decoded(column):
    return [None if i is None else column["values"][i] for i in column["of"]] if isinstance(column, dict) else column


def test_runs_are_those_of_the_frame_in_full_precision(tmp_path):
    planted(tmp_path, *(record(norm, seed, math.sqrt(seed + 2) / 3) for norm in ("bn", "gn") for seed in range(3)))
    planted(tmp_path, record("gn", 3, status="diverged"))
    df, runs = results.load(tmp_path), gather(tmp_path).runs
    assert runs["key"] == df["key"].tolist()
    assert decoded(runs["norm"]) == df["norm_label"].tolist()
    assert decoded(runs["status"]) == df["status"].tolist()
    assert runs["seed"] == df["seed"].tolist()
    values = runs["metrics"]["top1"]["values"]
    assert [math.nan if v is None else v for v in values] == pytest.approx(
        df["top1"].tolist(), rel=0, abs=0, nan_ok=True
    )
    assert all((tmp_path / folder / RECORD).is_file() for folder in runs["folder"])


def test_a_card_says_what_the_folder_says_and_costs_are_relative_to_the_reference(tmp_path):
    planted(tmp_path, *(record(norm, seed) for norm in ("bn", "gn") for seed in (0, 1)))
    planted(tmp_path, record("gn", 2, status="diverged"))
    note(tmp_path)
    bn, gn = gather(tmp_path).cards
    assert (bn.label, bn.source, bn.about, bn.axes) == ("bn", "A paper", "y = x\n\n    indented", "NHW")
    assert bn.checks == (("axes", "NHW", "NHW", "holds"),)
    assert "9.9" in bn.checked
    assert dict(bn.facts)["mixes samples in training"] == "yes"
    assert "2.00 × bn (geometric mean of 2 pairs)" in dict(gn.cost)["classification: step"]
    assert gn.health == (("diverged", "1 of 3"),)
    assert not gn.checks
    assert "does not say" in gn.checked


def test_facts_of_another_version_of_a_norm_are_not_shown_as_holding(tmp_path):
    planted(tmp_path, record(version="2"))
    note(tmp_path, version="2", measured="1")
    (card,) = gather(tmp_path).cards
    assert card.checks == ()
    assert "another version of the norm (1; its runs are of 2)" in card.checked
    assert results.load(tmp_path).attrs["norms"]["bn"]["checks"] == []


def test_damaged_notes_of_norms_are_set_aside_once_and_passed_over_before(tmp_path):
    planted(tmp_path, record())
    (tmp_path / NORMS).write_text('{"schema": 1, "norms": {"bn": 3}}')
    assert "norms.json" in results.load(tmp_path).attrs["unread"]
    assert any("norms.json" in line for line in gather(tmp_path).warnings)
    (line,) = write_norms(tmp_path, NormNotes(norms={"bn": {"1": NormNote(source="S")}}))
    assert "set aside" in line
    assert read_norms(tmp_path)[0].norms["bn"]["1"].source == "S"
    assert write_norms(tmp_path, NormNotes()) == []


def test_notes_are_shared_by_the_parts_of_a_frame(tmp_path):
    planted(tmp_path, record())
    note(tmp_path)
    df = results.load(tmp_path)
    assert df[df["seed"] == 0].attrs["norms"] is df.attrs["norms"]
    assert json.loads(json.dumps(df.attrs["norms"])) == df.attrs["norms"]


@pytest.mark.parametrize("case", ["failures", "damaged", "one seed", "other versions"])
def test_every_folder_has_a_report_that_says_what_is_the_matter(tmp_path, case):
    first = record(status="failed") if case == "failures" else record()
    planted(tmp_path, first, record("gn"))
    if case == "failures":
        planted(tmp_path, record("gn", status="failed"))
    if case == "damaged":
        for norm in ("bn", "gn"):
            (run_folder(tmp_path, record(norm).spec) / RECORD).write_text("{")
    if case == "other versions":
        planted(tmp_path, record(version="2", seed=5, status="failed"))
    content = gather(tmp_path)
    said = " ".join(content.warnings)
    words = {
        "failures": "No run ended well",
        "damaged": "No record here can be read",
        "one seed": "One run a cell",
        "other versions": "Left out, of other versions",
    }
    assert words[case] in said
    file = write_report(tmp_path, content)
    assert file.read_text(encoding="utf-8").startswith("<!")


def test_names_that_people_gave_stay_texts(tmp_path):
    planted(tmp_path, record(label=ODD, norm_options={"eps": ODD}), record("gn", artifacts=["../../secret.txt"]))
    (tmp_path / "secret.txt").write_text("secret")
    content = gather(tmp_path)
    assert any(card.label == ODD for card in content.cards)
    page = write_report(tmp_path, content).read_text(encoding="utf-8")
    assert "<b>$x" not in page
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "secret" not in json.dumps([f for files in content.runs["artifacts"] for f in files if "text" in f])


def test_artifacts_are_embedded_where_they_are_small_texts(tmp_path):
    file = write_record(tmp_path, record(artifacts=["genotype.json", "picture.png", "gone.txt"]))
    (file.parent / "genotype.json").write_text('{"normal": []}')
    (files,) = gather(tmp_path).runs["artifacts"]
    assert files[0] == {"name": "genotype.json", "kind": "text", "text": '{"normal": []}'}
    assert files[1:] == [{"name": "picture.png", "kind": "file"}, {"name": "gone.txt", "kind": "file"}]


def test_curves_are_thinned_until_the_page_holds_them_and_it_says_so(tmp_path):
    history = [{"epoch": float(e), "train_loss": math.sin(e)} for e in range(1, 1001)]
    planted(tmp_path, record(history=history))
    content = gather(tmp_path)
    (curves,) = content.runs["curves"]
    xs, ys = curves["train_loss"]
    assert len(xs) == 200
    assert (xs[0], xs[-1]) == (1, 1000)
    assert all(y == pytest.approx(math.sin(x), rel=1e-4) for x, y in zip(xs, ys, strict=True))
    assert any("200 of up to 1,000 points" in line for line in content.left_out)


@pytest.mark.slow
def test_a_report_of_ten_thousand_records_keeps_within_its_size(tmp_path):
    content = gather(plant(tmp_path, 10_000))
    assert len(content.runs["key"]) == 10_000
    assert {"critical_difference", "differences_classification_top1"} <= {d.name for d in content.drawings}
    assert write_report(tmp_path, content).stat().st_size <= LARGEST
    assert len(packed(content.runs)) < LARGEST / 2

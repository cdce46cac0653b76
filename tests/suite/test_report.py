"""What plans and checks tell a results folder of its norms, and the command `report`."""

import pytest
import typer.testing

from norms.registry import norm_definition, norm_info
from results.record import RunRecord, RunSpec
from results.store import read_norms, write_record
from suite import console
from suite.checking import measured
from suite.cli.app import app
from suite.describing import norm_notes, tell_folder
from suite.planning import plan_config


def planted(folder, norm="rms", label="rms", **options):
    spec = RunSpec(
        task="classification",
        norm=norm,
        norm_options=options,
        task_options={"dataset": "made_up"},
        seed=0,
        norm_version="1",
        task_version="1",
        data_checksum="c",
        norm_label=label,
    )
    return write_record(folder, RunRecord(spec=spec, status="ok", metrics={"top1": 0.5}))


def call(*words):
    return typer.testing.CliRunner().invoke(app, [*map(str, words)])


def test_a_plan_tells_the_folder_what_its_norms_declare(tmp_path):
    config = {"norms": ["bn", "gn"], "seeds": 0, "tasks": {"classification": {"dataset": "fashion_mnist_mini"}}}
    planned = plan_config(config, tried=False, without_data=True)
    assert tell_folder(tmp_path, planned.runs, planned.told) == []
    notes = read_norms(tmp_path)[0].norms
    assert sorted(notes) == ["bn", "gn"]
    told, info = notes["gn"][str(norm_info("gn").version)], norm_info("gn")
    assert (told.source, told.axes, told.mixes_samples) == (info.source, info.axes, info.mixes_samples)
    assert told.about.splitlines()[0] == norm_definition("gn").splitlines()[0] != ""
    assert "num_groups" in told.options


def test_a_class_without_a_docstring_has_no_definition_of_a_class_above_it(monkeypatch):
    from norms import registry

    class Bare(registry.nn.Module):
        def __init__(self, num_channels, *, affine=True):
            super().__init__()

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry.register(name="bare_of_report", source="none", mixes_samples=False, keeps_stats=False)(Bare)
    assert norm_definition("bare_of_report") == ""
    (note,) = norm_notes(["bare_of_report"]).norms["bare_of_report"].values()
    assert note.axes is None


def test_report_measures_the_norms_of_a_folder_and_keeps_it(tmp_path, monkeypatch):
    from norms import conformance

    monkeypatch.setattr(conformance, "FACTS", conformance.FACTS[:3])
    planted(tmp_path)
    planted(tmp_path, "of_no_plugin_here", "of_no_plugin_here")
    result = call("report", tmp_path, "--check")
    assert result.exit_code == 0, result.output
    assert "of_no_plugin_here is not checked" in result.output
    found = read_norms(tmp_path)[0].checked["rms"]
    assert [c.verdict for c in found.checks] == ["holds"] * 3
    assert found.norm_version == str(norm_info("rms").version)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "shape kept" in page


def test_a_row_with_options_is_measured_besides_its_norm(monkeypatch):
    from norms import conformance

    monkeypatch.setattr(conformance, "FACTS", conformance.FACTS[:1])
    spec = RunSpec(
        task="t",
        norm="gn",
        norm_options={"num_groups": 4},
        task_options={},
        seed=0,
        norm_version="1",
        task_version="1",
        data_checksum="",
        norm_label="gn(num_groups=4)",
    )
    told, lines = measured([spec])
    assert list(told.checked) == ["gn", "gn(num_groups=4)"]
    assert lines == []


def test_report_writes_where_it_is_told_and_refuses_a_folder_without_runs(tmp_path, monkeypatch):
    planted(tmp_path / "runs_here")
    out = tmp_path / "other" / "page.html"
    assert call("report", tmp_path / "runs_here", "--out", out).exit_code == 0
    assert out.is_file()
    assert not (tmp_path / "runs_here" / "report.html").exists()
    monkeypatch.setattr("suite.planning.planned_keys", lambda *_: {"0" * 24})
    words = ["report", str(tmp_path / "runs_here"), "--config", "any.yaml"]
    assert call(*words).exit_code == 0
    assert (tmp_path / "runs_here" / "report_custom.html").is_file()  # `run` would write over report.html
    with pytest.raises(ValueError, match="name another file"):
        app([*words, "--out", str(tmp_path / "runs_here" / "report.html")], standalone_mode=False)
    assert not (tmp_path / "runs_here" / "report.html").exists()
    with pytest.raises(ValueError, match="runs_here"):
        app(["report", str(tmp_path / "runs_her")], standalone_mode=False)


def test_a_report_that_can_not_be_made_is_one_line(tmp_path, monkeypatch):
    planted(tmp_path)
    assert console.report_line(tmp_path, 1) == f"report: {tmp_path / 'report.html'}"
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    line = console.report_line(tmp_path, 1)
    assert line.startswith("no report (")
    assert "\n" not in line
    monkeypatch.setattr(console, "MOST_REPORTED", 0)
    assert "writes a page" in console.report_line(tmp_path, 1)

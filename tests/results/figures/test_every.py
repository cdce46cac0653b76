"""results.figures.every, .drawing and the command `figures`."""

import sys

import pytest
from parts.drawn_runs import frame, history, run, said, sweep

from results.figures.every import FIGURES, draw_all
from results.store import write_record
from suite import cli

EPOCHS = [{"epoch": e, "train_loss": 1 / e} for e in (1, 2)]


def test_what_a_frame_supports_is_drawn_and_the_rest_has_a_reason():
    records = sweep(seeds=2, values=(1, 4), history=EPOCHS)
    drawings, refused = draw_all(frame(records), history(records))
    assert [d.name for d in drawings] == [
        *("classification_top1_by_norm_batch_size", "classification_learning", "classification_cost_step_seconds"),
        *("performance_profiles", "differences_classification_top1"),
    ]
    assert list(refused) == ["domain_heat_map (classification)", "critical_difference", "axes_cubes"]
    assert "no domains" in refused["domain_heat_map (classification)"]
    for drawing in drawings:
        over_blocks = drawing.name == "performance_profiles"
        assert ("2 seeds each" if over_blocks else "n = 2 (seeds 0, 1)") in said(drawing.figure)
        assert drawing.alt
        assert drawing.task == ("" if over_blocks else "classification")


def test_failures_only_are_refused_and_not_a_crash():
    drawings, refused = draw_all(frame([run(n, 0, status="failed", width=w) for n in ("bn", "gn") for w in (1, 2)]))
    assert drawings == []
    assert {name.partition(" ")[0] for name in refused} == {name for name, _ in FIGURES}
    assert all(refused.values())
    silent = [run("bn"), *sweep(("gn",), 1, history=EPOCHS, task="few_shot")]
    _, refused = draw_all(frame(silent), history(silent), only=["learning_curves"])
    assert refused == {"learning_curves (classification)": "classification: no run recorded an epoch"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"only": ["option_curv"]}, 'unknown figure "option_curv".*did you mean "option_curve"'),
        ({"task": "clas"}, 'unknown task "clas"'),
        ({"metric": "top2"}, 'unknown metric "top2".*did you mean "top1"'),
        ({"metric": "robust_top1"}, 'no run here measured "robust_top1"'),
        ({"option": "norm_batch"}, 'unknown option "norm_batch".*did you mean "norm_batch_size"'),
        ({"reference": "gnn"}, 'unknown reference "gnn".*did you mean "gn"'),
    ],
)
def test_unknown_names_raise_with_the_nearest(asked, message):
    with pytest.raises(ValueError, match=message):
        draw_all(frame(sweep(seeds=1)), **asked)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run_suite.py", "figures", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_the_command_writes_files_beside_the_runs_and_names_what_is_refused(tmp_path, monkeypatch, capsys):
    for record in sweep(("bn", "gn"), 2, (1, 4)):
        write_record(tmp_path, record)
    assert call(monkeypatch, tmp_path, "--format", "svg,pdf", "--only", "option_curve,domain_heat_map") == 0
    out = capsys.readouterr().out
    stem = tmp_path / "figures" / "classification_top1_by_norm_batch_size"
    assert {f"{stem}.svg", f"{stem}.pdf", f"{stem}.txt"} <= set(out.splitlines())
    assert "not drawn: domain_heat_map (classification): classification: no domains" in out
    assert (stem.parent / f"{stem.name}.svg").read_text().startswith("<?xml")
    assert (stem.parent / f"{stem.name}.pdf").read_bytes().startswith(b"%PDF")
    assert "Alternative text: Line chart" in (stem.parent / f"{stem.name}.txt").read_text()


def test_the_command_exits_2_for_mistakes_and_for_nothing_to_draw(tmp_path, monkeypatch, capsys):
    write_record(tmp_path, run("bn", 0, status="failed"))
    assert call(monkeypatch, tmp_path, "--only", "option_curv") == 2
    assert 'did you mean "option_curve"' in capsys.readouterr().err
    assert call(monkeypatch, tmp_path, "--format", "pfd") == 2
    assert 'did you mean "pdf"' in capsys.readouterr().err
    assert call(monkeypatch, tmp_path) == 2
    captured = capsys.readouterr()
    assert "not drawn: option_curve (classification)" in captured.out
    assert "none is supported by its runs" in captured.err
    assert not (tmp_path / "figures").exists()

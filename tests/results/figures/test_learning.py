"""results.figures.learning: means over runs that ended well, epoch by epoch."""

import pytest
from parts.drawn_runs import drawn, frame, history, points, run, said

from results.figures.learning import learning_curves


def epochs(seed, count=5, scale=1.0):
    return [
        {"epoch": e, "train_loss": scale * (2 / e + 0.1 * seed), "val_top1": 0.1 * e + 0.01 * seed}
        for e in range(1, count + 1)
    ]


@pytest.fixture(scope="module")
def learned():
    """bn whole, gn with a run that diverged after two epochs, pn with failures only, ln without any epoch."""
    records = [run("bn", s, history=epochs(s)) for s in range(3)]
    records += [run("gn", s, history=epochs(s, 5, 2.0)) for s in range(2)]
    records += [run("gn", 2, status="diverged", history=epochs(2, 2, 50.0))]
    records += [run("pn", 0, status="failed", history=epochs(0, 3))]
    records += [run("ln", 0, status="diverged")]
    return records, learning_curves(history(records), df=frame(records))


def test_the_means_are_those_of_a_groupby_over_runs_that_ended_well(learned):
    records, drawing = learned
    whole = history(records)
    part = whole[whole["status"] == "ok"].groupby(["norm_label", "epoch"])
    for quantity, scale in (("train_loss", 1), ("val_top1", 100)):
        table = part[quantity].agg(["mean", "std", "count"])
        found = {(m["norm"], m["epoch"]): m for m in drawing.data if m["quantity"] == quantity and m["n"]}
        assert found.keys() == set(table.index)
        for place, row in table.iterrows():
            mark = found[place]
            assert (mark["mean"], mark["std"], mark["n"]) == pytest.approx(
                (scale * row["mean"], scale * row["std"], row["count"])
            )
    loss = drawing.figure.axes[0]
    lines = {line.get_label(): points(line) for line in loss.lines}
    assert lines["mean gn"] == pytest.approx({e: 2 * (2 / e + 0.05) for e in range(1, 6)})


def test_a_run_that_ended_early_ends_in_a_cross_and_is_in_no_mean(learned):
    _, drawing = learned
    loss = drawing.figure.axes[0]
    ends = sorted(line.get_xydata()[0].tolist() for line in loss.lines if line.get_label() == "stop")
    assert ends == [[2, pytest.approx(50 * 1.2)], [3, pytest.approx(2 / 3)]]
    assert {m["n"] for m in drawing.data if m["norm"] == "gn" and m["mean"] is not None} == {2}
    caption, picture = " ".join(drawing.caption), said(drawing.figure)
    assert "gn, seed 2: diverged" in caption
    assert "pn, seed 0: failed" in caption
    assert "Runs without a curve: ln, seed 0: diverged before its first epoch ended" in caption
    assert "dotted to ×: a run that ended early; 1 run without any epoch" in picture
    assert "n = 2 to 3 (seeds 0-2)" in picture
    assert "3 runs ended early" in drawing.alt


def test_settings_are_panels_and_need_the_frame():
    records = [run("bn", s, history=epochs(s), learning_rate=rate) for s in range(2) for rate in (0.1, 1.0)]
    with pytest.raises(ValueError, match=r"give df=results.load"):
        learning_curves(history(records), "train_loss")
    drawing = learning_curves(history(records), "train_loss", df=frame(records))
    assert [axes.get_title(loc="left") for axes in drawing.figure.axes] == ["learning_rate=0.1", "learning_rate=1.0"]
    assert {m["n"] for m in drawing.data} == {2}


def test_a_search_and_its_retraining_are_two_parts():
    records = [run("bn", 0, history=[*epochs(0, 3), *epochs(1, 2)])]
    drawing = learning_curves(history(records), "train_loss")
    assert [axes.get_title(loc="left") for axes in drawing.figure.axes] == ["part 1 of 2", "part 2 of 2"]
    assert [len(points(line)) for line in drawn(drawing.figure, "mean")] == [3, 2]
    assert not drawn(drawing.figure, "band")


def test_mistakes_and_nothing_to_draw():
    records = [run("bn", 0, history=epochs(0))]
    with pytest.raises(ValueError, match=r'unknown quantity "train_los".*did you mean "train_loss"'):
        learning_curves(history(records), "train_los")
    with pytest.raises(ValueError, match="single epoch"):
        learning_curves(history([run("bn", 0, history=epochs(0, 1))]))
    with pytest.raises(ValueError, match="no runs"):
        learning_curves(history([]))

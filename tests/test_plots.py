"""The picture of a run: what is drawn, what is passed over, and what is said when there is none."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxprompt.plots import SweepRow, smooth, write_run_plot, write_sweep_plot

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
BASELINES = {"majority": 50.9, "bare backbone": 52.1}


@pytest.fixture
def run(tmp_path):
    """A finished run's metrics.jsonl, with a spike, a null, and two lines that are no record."""
    lines = [{"step": 0, "eval/accuracy": 50.0, "eval/loss": 0.7, "eval/token_f1": 40.0}]
    for step in range(1, 121):
        loss = 100.0 if step == 60 else 2 / step + 0.3
        lines.append({"step": step, "loss": loss, "examples_per_second": 30.0})
        if step % 40 == 0:
            scores = {"eval/accuracy": 50 + step / 4, "eval/token_f1": 40.0}
            lines.append({"step": step, **scores, "eval/loss": 0.5, "note": "text"})
    lines.append({"step": 121, "loss": None})
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n[3]\n{"step": 122, "lo')
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, instead of their pixels."""
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    drawn = []
    plain = agg.FigureCanvasAgg.print_png

    def print_png(canvas, file):
        drawn.append(canvas.figure)
        return plain(canvas, file)

    monkeypatch.setattr(agg.FigureCanvasAgg, "print_png", print_png)
    return drawn


def curves(axes):
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}


def test_loss_and_scores_are_drawn(run, figures):
    png = run.parent / "plots" / "run.png"
    said = write_run_plot(run, png, title="sst2 on jaxprompt-mini", baselines=BASELINES)
    assert said == f"picture: {png}"
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    assert os.listdir(png.parent) == ["run.png"]
    (figure,) = figures
    above, below = figure.axes
    assert figure.get_suptitle() == "sst2 on jaxprompt-mini"
    assert (above.get_ylabel(), below.get_ylabel()) == ("loss", "score, %")
    assert below.get_xlabel() == "step"
    losses, scores = curves(above), curves(below)
    assert list(losses) == ["training, raw", "training, smoothed", "evaluation"]
    np.testing.assert_array_equal(losses["training, raw"][0], range(1, 121))
    assert max(losses["training, raw"][1]) == 100.0
    np.testing.assert_allclose(losses["evaluation"][1], [0.7, 0.5, 0.5, 0.5])
    assert above.get_ylim()[1] < 100.0  # the spike leaves the picture, not the curve
    assert list(scores) == [
        "accuracy, last 80.0",
        "token f1, last 40.0",
        "majority 50.9",
        "bare backbone 52.1",
    ]
    np.testing.assert_allclose(scores["accuracy, last 80.0"], ([0, 40, 80, 120], [50, 60, 70, 80]))
    assert set(scores["majority 50.9"][1]) == {50.9}
    low, high = below.get_ylim()
    assert low < 40 and high > 80
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in below.lines}
    assert len(looks) >= 3  # two curves differ, baselines differ from them
    assert len({line.get_color() for line in below.lines[:2]}) == 2


def test_held_out_losses_of_several_objectives_are_among_the_losses(tmp_path, figures):
    record = {"step": 1, "loss": 3.0}
    for name in ("span_corruption", "prefix_lm", "supervised", "supervised_2"):
        record |= {
            f"eval/{name}/loss": 4.0,
            f"eval/{name}/accuracy": 30.0,
            f"eval/{name}/exact": 1.0,
        }
    run = tmp_path / "metrics.jsonl"
    run.write_text(json.dumps(record), encoding="utf-8")
    write_run_plot(run, tmp_path / "run.png")
    above, below = figures[0].axes
    assert list(curves(above))[2:] == [
        "evaluation, span corruption", "evaluation, prefix lm", "evaluation, supervised",
        "evaluation, supervised 2",
    ]  # fmt: skip
    assert len(below.lines) == 8 and not any("loss" in name for name in curves(below))
    looks = {(line.get_color(), line.get_linestyle()) for line in below.lines}
    assert len(looks) == 8
    assert above.get_ylim()[1] > 4.0


def test_a_run_without_scores_has_one_panel(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    write_run_plot(path, tmp_path / "run.png", baselines=BASELINES)
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "loss"
    assert axes.get_ylim() == pytest.approx((1.9, 2.1))


def test_scores_alone_have_one_panel(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "eval/accuracy": 60.0}\n')
    write_run_plot(path, tmp_path / "run.png")
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["score, %"]


def test_a_long_name_leaves_room_for_what_is_drawn(tmp_path, figures):
    """Warnings are errors here: matplotlib has one for axes that have become nothing."""
    long = "distil " + "/".join(["a directory"] * 40) + " last"
    rows = [SweepRow(long, [50.0, 60.0], 40.0, 45.0), SweepRow("short", [55.0], 40.0, 45.0)]
    write_sweep_plot(tmp_path / "sweep.png", rows)
    (axes,) = figures[0].axes
    cut, whole = (label.get_text() for label in axes.get_yticklabels())
    assert cut.startswith("distil a directory") and cut.endswith(" last") and len(cut) < 50
    assert whole == "short"


def test_a_picture_replaces_the_one_before(run):
    pytest.importorskip("matplotlib")
    png = run.parent / "run.png"
    png.write_bytes(b"old")
    write_run_plot(run, png)
    assert png.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("text", [None, "", '{"step": 1, "examples_per_second": 3}\n'])
def test_nothing_to_draw(tmp_path, text):
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    said = write_run_plot(path, tmp_path / "run.png")
    assert said == f"no picture: {path} holds neither a loss nor a score"
    assert not (tmp_path / "run.png").exists()


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    said = write_run_plot(run, run.parent / "run.png")
    assert said == "no picture: it needs matplotlib (pip install 'jaxprompt[plots]')"


def test_a_full_disk_leaves_the_old_picture(run, monkeypatch):
    agg = pytest.importorskip("matplotlib.backends.backend_agg")

    def fail(canvas, file):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(agg.FigureCanvasAgg, "print_png", fail)
    png = run.parent / "run.png"
    png.write_bytes(b"old")
    said = write_run_plot(run, png)
    assert said == f"no picture: cannot write {png}: No space left on device"
    assert png.read_bytes() == b"old"
    assert sorted(os.listdir(run.parent)) == ["metrics.jsonl", "run.png"]


def test_pyplot_stays_out(run):
    pytest.importorskip("matplotlib")
    script = (
        "import sys; from jaxprompt.plots import write_run_plot;"
        "print(write_run_plot(sys.argv[1], sys.argv[2]), 'matplotlib.pyplot' in sys.modules)"
    )
    png = str(run.parent / "run.png")
    command = [sys.executable, "-c", script, str(run), png]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"picture: {png} False\n"


def test_smoothing_is_a_gaussian_mean_of_what_is_there():
    values = np.random.default_rng(0).normal(size=30)
    places = np.arange(30)
    weights = np.exp(-0.5 * ((places[:, None] - places) / 2) ** 2)
    weights *= np.abs(places[:, None] - places) <= 6
    expected = weights @ values / weights.sum(axis=1)
    np.testing.assert_allclose(smooth(values, 2), expected)
    np.testing.assert_allclose(smooth(values, 0), values)
    for count in (1, 2, 3, 8):
        np.testing.assert_allclose(smooth([5.0] * count, 4), [5.0] * count)

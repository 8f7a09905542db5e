"""Tables, curves, score plots; from-scratch's report on made-up runs, whichever way they end."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from megatron_ext.arch import num_parameters
from megatron_ext.pruning.plan import save_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.pruning.scores_file import load_scores, save_scores
from megatron_ext.pruning.targets import target_arch
from megatron_ext.report import (
    curve,
    markdown_table,
    new_figure,
    plot_curves,
    plot_layer_scores,
    plot_ranked_scores,
    read_metrics,
    score_axes,
)
from megatron_ext.runtime.errors import RUNTIME, USAGE, UserError
from tests.models import LLAMA, MOE
from tests.test_scores import random_scores
from tools import plot_scores

from_scratch = importlib.import_module("examples.from-scratch.report")


def test_needs_neither_megatron_nor_matplotlib():
    program = (
        "import sys, megatron_ext.report; "
        "print([m for m in ('megatron', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_metrics_and_curves(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 0, "a": 2.0}\n{"iteration": 5, "b": 7.0}\n{"iteration": 9, "a": 1}'
    )
    metrics = read_metrics(path)
    assert curve(metrics, "a") == ([0, 9], [2.0, 1])
    assert curve(metrics, "b", tokens_per_step=100) == ([500], [7.0])
    assert curve(metrics, "c") == ([], [])


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"a": 1}'])
def test_bad_metrics_are_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"iteration": 0}}\n{line}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(path)
    with pytest.raises(UserError, match="none cannot be read") as caught:
        read_metrics(tmp_path / "none")
    assert caught.value.code == RUNTIME


def test_a_table_that_one_can_read():
    rows = [["teacher", 1234567, 0.12349, None], ["b", 0, -1.0, "x"]]
    assert markdown_table(["model", "size", "KL", "note"], rows).splitlines() == [
        "| model   |      size |     KL | note |",
        "| ------- | --------: | -----: | ---: |",
        "| teacher | 1,234,567 |  0.123 |    - |",
        "| b       |         0 | -1.000 |    x |",
    ]


def test_curves_keep_their_points():
    _, (axes, _) = new_figure(1, 2)
    curves = {"a": ([0, 10], [1.0, 0.5]), "b": ([0, 5, 9], [0.0, 3.0, 2.0]), "c": ([4], [1.0])}
    plot_curves(axes, curves, title="t", x="tokens", y="nats")
    assert {line.get_label(): line.get_xydata().tolist() for line in axes.lines} == {
        name: [[x, y] for x, y in zip(*points, strict=True)] for name, points in curves.items()
    }
    _, (axes,) = new_figure(1, 1)
    plot_curves(axes, curves | {"d": ([1], [0.0])}, title="t", x="tokens", y="nats", log=True)
    assert [len(line.get_xydata()) for line in axes.lines] == [2, 2, 1, 0]


@pytest.mark.parametrize(("lowest", "scale"), [(0.05, "log"), (0.5, "linear"), (0.0, "linear")])
def test_a_logarithmic_axis_only_where_scores_span_it(lowest, scale):
    scores = random_scores(LLAMA)
    vector = torch.full((LLAMA.hidden_size,), 1.0)
    vector[3] = lowest
    _, (axes,) = new_figure(1, 1)
    plot_ranked_scores(axes, replace(scores, vectors={"hidden": vector}), "hidden")
    assert axes.get_yscale() == scale


def test_scores_are_drawn_in_order():
    scores = random_scores(LLAMA)
    _, axes = new_figure(2, 2)
    for place, axis in zip(axes, ("hidden", "ffn", "heads"), strict=False):
        plot_ranked_scores(place, scores, axis, num_kept=2)
        names = [axis] if axis == "hidden" else [f"{axis}.{i}" for i in range(LLAMA.num_layers)]
        assert [line.get_label() for line in place.lines] == [*names, "2 kept"]
        for line, name in zip(place.lines, names, strict=False):
            drawn, vector = torch.tensor(line.get_ydata()), scores.vectors[name]
            assert drawn.tolist() == sorted(drawn.tolist(), reverse=True)
            assert math.isclose(drawn.mean(), 1, rel_tol=1e-5)
            assert math.isclose(drawn[0] / drawn[-1], vector.max() / vector.min(), rel_tol=1e-5)
    plot_layer_scores(axes[3], scores)
    assert [bar.get_height() for bar in axes[3].patches] == scores.vectors["layers"].tolist()


# ---------------------------------------------------------------------------- from-scratch's


def write_runs(folder, ce_loss):
    """Write what run.sh leaves behind; distillation ends at loss 3.2 and KL 0.1."""
    scores = random_scores(LLAMA)
    save_scores(folder / "scores.safetensors", scores)
    target = target_arch(LLAMA, hidden_size=32, ffn_hidden_size=48)
    save_plan(folder / "plan.json", make_plan(scores, LLAMA, target))
    (folder / "settings.txt").write_text("BATCH=4\nSEQ_LENGTH=8\n")
    (folder / "times.tsv").write_text("corpus\t3\nteacher\t10\nteacher\t7\n")
    values = {  # (KL, loss) at iterations 0, 5, 10
        "teacher": [(None, 7.0), (None, 3.5), (None, 3.125)],
        "distilled": [(0.5, 4.0), (0.2, 3.5), (0.1, 3.2)],
        "control-random": [(4.0, 7.0), (2.0, 5.0), (1.0, 4.0)],
        "control-ce": [(None, 4.0), (None, 3.5), (None, ce_loss)],
        "control-ce-kl": [(0.3, ce_loss)],
    }
    for run, points in values.items():
        (folder / run).mkdir()
        lines = []
        for i, (kl, loss) in enumerate(points):
            row = {"iteration": 5 * i, from_scratch.LM: loss}
            lines.append(json.dumps(row | ({} if kl is None else {from_scratch.KL: kl})))
        (folder / run / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "texts").mkdir()
    for model in ("teacher", "pruned", "distilled"):
        (folder / "texts" / f"{model}.txt").write_text(f"text of {model}\n")


@pytest.mark.parametrize(
    ("ce_loss", "verdict"), [(3.3, "lower"), (3.1, "higher"), (3.2, "the same")]
)
def test_the_report_says_how_it_came_out(tmp_path, capsys, ce_loss, verdict):
    write_runs(tmp_path, ce_loss)
    from_scratch.main(["--output", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert text in capsys.readouterr().out + "\n"
    assert f"its loss is {verdict} (3.200 against {ce_loss:.3f})" in text
    assert "KL is lower (0.100 against 1.000) and its loss is lower (3.200 against 4.000)" in text
    assert "In its last 160 tokens the teacher's loss fell by 0.375" in text
    tables = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    rows = {(name.strip(), len(cells)): [x.strip() for x in cells] for name, *cells in tables}
    small = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
    sizes = [f"{num_parameters(small, embeddings=e):,}" for e in (True, False)]
    assert rows["pruned, cross entropy", 7] == [
        *sizes, "320", "0.500", "0.300", "4.000", f"{ce_loss:.3f}"
    ]  # fmt: skip
    assert rows["pruned, untouched", 7] == [*sizes, "0", "0.500", "-", "4.000", "-"]
    assert rows["teacher", 7][2:] == ["320", "-", "0.000", "7.000", "3.125"]
    assert rows["teacher", 7][0] == f"{num_parameters(LLAMA):,}"
    assert (rows["corpus", 1], rows["all", 1]) == (["3"], ["20"])
    assert "text of distilled" in text
    assert (tmp_path / "report.png").read_bytes()[1:4] == b"PNG"


def test_unfinished_runs_and_bad_flags_are_named(tmp_path):
    with pytest.raises(UserError, match="missing --output") as caught:
        from_scratch.main([])
    assert caught.value.code == USAGE
    write_runs(tmp_path, 3.0)
    (tmp_path / "control-ce-kl" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"control-ce-kl/metrics\.jsonl cannot be read"):
        from_scratch.main(["--output", str(tmp_path)])


@pytest.mark.parametrize(("arch", "panels"), [(LLAMA, 3), (MOE, 5)])
def test_scores_as_a_picture(arch, panels, tmp_path):
    path, out = tmp_path / "scores", tmp_path / "scores.png"
    save_scores(path, random_scores(arch))
    assert len(score_axes(load_scores(path))) == panels
    plot_scores.main(["--scores", str(path), "--out", str(out)])
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"--out x\.xyz: end it in one of"):
        plot_scores.main(["--scores", str(path), "--out", "x.xyz"])
    with pytest.raises(UserError, match=r"--scores nowhere: no such file"):
        plot_scores.main(["--scores", "nowhere", "--out", str(out)])
    assert sorted(tmp_path.iterdir()) == [path, out]

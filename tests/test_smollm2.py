"""The example of a real model: its report on made-up runs, its corpus on a small tree."""

import importlib
import json
from dataclasses import replace

import pytest

from megatron_ext.pruning.plan import save_plan
from megatron_ext.pruning.planner import make_plan
from megatron_ext.runtime.errors import RUNTIME, USAGE, UserError
from tests.models import LLAMA
from tests.test_scores import random_scores

report = importlib.import_module("examples.smollm2-135m.report")
corpus = importlib.import_module("examples.smollm2-135m.corpus")
EVALUATION = """some warning: of a library
tokens                         1,024
lm loss                         {loss}
teacher lm loss                 3.1003
kl(teacher || student)          {kl}
top-1 agreement                 0.2258
"""


@pytest.fixture
def run(tmp_path):
    """Two candidates, of which the second was evaluated a second time, and a control."""
    for name, layers in {"deep": 3, "flat": 2}.items():
        target = replace(LLAMA, num_layers=layers)
        (tmp_path / "pruned" / name).mkdir(parents=True)
        plan = make_plan(random_scores(LLAMA), LLAMA, target)
        save_plan(tmp_path / "plans" / f"{name}.json", plan)
    curves = {
        "distilled-deep": [(0, 4.0), (8, 2.0)],
        "distilled-flat": [(0, 5.0), (8, 2.5), (16, 0.5)],
        "control-random": [(0, 9.0), (16, 3.0)],
    }
    for name, points in curves.items():
        rows = [{"iteration": at, report.KL: kl, report.LM: kl + 3} for at, kl in points]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    for folder in ("evaluations", "texts"):
        (tmp_path / folder).mkdir()
    for name, kl in {"teacher": 0, "pruned-deep": 4.0, "distilled-deep": 1.9}.items():
        text = EVALUATION.format(loss=kl + 3.5, kl=kl)
        if name == "teacher":  # beside no other
            text = "\n".join(text.splitlines()[:3])
        (tmp_path / "evaluations" / f"{name}.txt").write_text(text)
        (tmp_path / "texts" / f"{name}.txt").write_text(f"written by {name}\n")
    (tmp_path / "settings.txt").write_text("BATCH=8\nSEQ_LENGTH=16\n")
    (tmp_path / "times.tsv").write_text("prune\t3\nprune\t4\n")
    return tmp_path


def test_the_best_is_that_of_the_last_evaluation_that_all_had(run, capsys):
    report.main(["best", "--out", str(run)])
    assert capsys.readouterr().out == "deep\n"


def test_no_candidate_is_said(tmp_path):
    with pytest.raises(UserError, match="no candidate has been evaluated") as caught:
        report.main(["best", "--out", str(tmp_path)])
    assert caught.value.code == RUNTIME
    with pytest.raises(UserError, match="best, write") as caught:
        report.main([])
    assert caught.value.code == USAGE


def test_the_report_has_every_model_and_its_text(run):
    report.main(["write", "--out", str(run)])
    text = (run / "report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "7.500" in rows["deep, pruned"]
    assert "1.900" in rows["deep, distilled"]
    assert "0.226" in rows["deep, distilled"]
    assert "3.500" in rows["teacher"]
    assert rows["teacher"].count(" - ") == 2
    sizes = [int(rows[name].split("|")[2].replace(",", "")) for name in ("teacher", "deep, pruned")]
    assert sizes[0] > sizes[1]
    assert "| prune | " in " ".join(rows["prune"].split())
    assert "written by distilled-deep" in text
    assert (run / "report.png").stat().st_size > 10_000


def test_texts_lose_their_markup():
    page = "<html><head><title>no</title></head><nav>menu</nav><p>One\nline.</p><p>Two.</p></html>"
    assert corpus.page(page) == "One line.\n\nTwo."
    assert corpus.pod("=head1 NAME\n\nuse B<strict> now\n") == "NAME\n\nuse strict now\n"
    assert corpus.rst(".. note::\n:ref:`the page <label>` says `x`.") == "\nthe page says `x`."
    assert corpus.unwrap("aa\nb\n \ncc") == "aa b\n\ncc"


def test_a_sample_does_not_depend_on_the_order():
    texts = [(f"d{i}", f"{i} " * 200) for i in range(200)]
    one, other = (corpus.sample("s", iter(order), 20_000) for order in (texts, texts[::-1]))
    assert one == other
    assert 20_000 < sum(len(json.loads(line)["text"]) for _, line in one) < 21_000
    assert 0 < sum(is_validation for is_validation, _ in one) < len(one) / 4
    assert not corpus.sample("s", iter([("short", "too short")]), 1e6)

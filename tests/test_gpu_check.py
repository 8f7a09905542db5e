"""tools/gpu_check.py: its checks on a CPU with tiny sizes, its table, and how it fails."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_ext.cli.programs import parse_prune, parse_train
from megatron_ext.model.fp8 import check_models
from tests.engine import stand_in
from tests.programs import ROOT
from tests.ranks import run_ranks
from tools import gpu_check
from tools.gpu import engine, graphs, losses, programs, steps
from tools.gpu.setup import Found, UnavailableError, ceiling_checks, facts, prepare


def all_rows():
    """Return the rows of the parts that need no process of their own, and the machine's facts."""
    setup = prepare("cpu", quick=True)
    parts = {
        "ceilings": ceiling_checks,
        "engine": engine.engine_checks,
        "fp8": steps.fp8_checks,
        "losses": losses.loss_checks,
        "graphs": graphs.graph_checks,
        "step": steps.step_checks,
        "calibration": programs.calibration_checks,
    }
    rows = [r for part, checks in parts.items() for r in gpu_check.rows_of(part, checks(setup))]
    return rows, facts(setup)


def test_every_check_runs_without_a_gpu():
    rows, found = run_ranks(1, all_rows)[0]
    verdicts = {(row["part"], row["check"]): row["verdict"] for row in rows}
    missing = "not available on this machine: no Transformer Engine on a GPU"
    for (part, check), verdict in verdicts.items():
        needs_engine = part == "engine" or "FP8" in check
        ok = verdict == missing if needs_engine else verdict in ("ok", "measured")
        if any(name in check for name in ("Model Optimizer", "Liger")):
            ok = verdict == "measured" or verdict.startswith("not available on this machine: ")
        if part == "graphs":
            ok = verdict.startswith("not available on this machine: no ")
        assert ok or "kernels" in check, (part, check, verdict)
    assert len(rows) == len(verdicts) > 25
    assert all(found.values())
    text = gpu_check.table(rows, found)
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == len(rows) + 1


LINES = """
 iteration 1/2 | elapsed time per iteration (ms): 12.5 | kd loss: 2.000000E-01 |
 iteration 2/2 | elapsed time per iteration (ms): 10.5 | kd loss: 1.000000E-01 |
"""


def test_captured_runs_are_compared_loss_by_loss():
    same = graphs.side_by_side(LINES, LINES.replace("12.5", "2.5"))
    assert same.ok
    assert same.result == "2 losses, at most 0.0e+00 apart; 11.5 ms, 6.5 captured"
    assert not graphs.side_by_side(LINES, LINES.replace("1.000000E-01", "1.020000E-01")).ok
    with pytest.raises(ValueError, match="shorter"):
        graphs.side_by_side(LINES, LINES.splitlines()[1])


def parities(change):
    """Return the rows of the comparison with layers that stand in for Transformer Engine's."""
    setup = replace(prepare("cpu", quick=True), engine=True)
    stand_in()
    if change:
        build = engine.build_model

        def other(arch, options, groups, *, seed):
            chunks = build(arch, options, groups, seed=seed)
            if options.transformer_impl == "transformer_engine":
                chunks[0].decoder.layers[1].mlp.linear_fc1.layer_norm_weight.data.add_(0.2)
            return chunks

        engine.build_model = other
    return list(gpu_check.rows_of("engine", engine.engine_checks(setup)))


def test_layers_that_are_alike_pass():
    rows = run_ranks(1, parities, False)[0]
    assert [row["verdict"] for row in rows] == ["ok"] * 9, rows


def test_layers_that_differ_fail():
    rows = run_ranks(1, parities, True)[0]
    assert {row["verdict"] for row in rows if "loss" in row["check"]} == {
        "failed: beyond the limit"
    }


def test_a_row_that_fails_leaves_the_others():
    def fail():
        raise ValueError("no memory\nand more")

    def absent():
        raise UnavailableError("no GPU")

    checks = [("a", fail), ("b", absent), ("c", lambda: Found("3 | 4", "5", ok=False))]
    checks += [("d", lambda: Found("6"))]
    rows = list(gpu_check.rows_of("part", checks))
    assert [row["verdict"] for row in rows] == [
        "failed: ValueError no memory",
        "not available on this machine: no GPU",
        "failed: beyond the limit",
        "measured",
    ]
    assert "| part | c | 3 / 4 | 5 | failed: beyond the limit |" in gpu_check.table(
        rows, {"x": "y"}
    )


def test_parts_that_crash_and_rows_that_fail_are_in_the_exit_code(tmp_path, monkeypatch, capsys):
    """The processes of the parts are replaced: one dies after its first row, one is well."""

    def run(command, **_):
        part = command[command.index("--run-part") + 1]
        rows = [{"commit": "abc"}, gpu_check.row_of(part, "first", "1", verdict="ok")]
        with open(command[command.index("--into") + 1], "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return type("Done", (), {"returncode": -11 if part == "fp8" else 0})

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    output = tmp_path / "gpu.md"
    output.write_text(f"Head.\n\n{gpu_check.MARK}\n\nan older table\n")
    argv = ["--output", str(output)]
    assert gpu_check.main([*argv, "--parts", "engine,losses"]) == 0
    assert gpu_check.main([*argv, "--parts", "engine,fp8"]) == 1
    text = output.read_text()
    assert text.startswith("Head.\n")
    assert "older" not in text
    assert "| fp8 | first | 1 |  | ok |" in text
    assert "| fp8 | the part itself |  |  | failed: the process ended with code -11 |" in text
    assert "* commit: abc" in text
    # Parts that come later join those of a run that was cut short, and take their places.
    rows = ["--rows", str(tmp_path / "rows.jsonl")]
    assert gpu_check.main([*argv, *rows, "--parts", "engine,losses"]) == 0
    assert gpu_check.main([*argv, *rows, "--parts", "losses,step"]) == 0
    text = output.read_text()
    assert [part for part in gpu_check.PARTS if f"| {part} | first |" in text] == [
        "engine",
        "losses",
        "step",
    ]
    assert text.count("| losses | first |") == 1
    # Of a part that died and is run again, what comes later counts.
    died = [*argv, "--rows", str(tmp_path / "died.jsonl"), "--parts"]
    assert gpu_check.main([*died, "fp8"]) == 1
    gpu_check.append(tmp_path / "died.jsonl", gpu_check.row_of("fp8", "first", verdict="ok"))
    assert gpu_check.main([*died, "engine"]) == 0
    with pytest.raises(SystemExit):
        gpu_check.main(["--parts", "none"])
    assert "there are ceilings" in capsys.readouterr().err


def test_the_script_writes_its_table(tmp_path):
    output = tmp_path / "gpu.md"
    command = [str(ROOT / "tools/gpu_check.sh"), "--device", "cpu", "--quick", "--parts", "losses"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run([*command, "--output", str(output)], check=True, cwd=tmp_path, env=environment)
    text = output.read_text()
    assert text.startswith(gpu_check.MARK)
    assert "| losses | mse, in torch fp32: error of loss, gradient |" in text
    assert "* commit: " in text


@pytest.mark.parametrize("name", programs.COMMANDS)
def test_commands_of_the_programs_are_right(name):
    script, *argv = f"{programs.COMMANDS[name][0]} {programs.RUN}".split()
    flags = (parse_prune if script == "prune.py" else parse_train)(argv, 1)
    assert (ROOT / script).exists()
    if script != "prune.py":
        arch = replace(engine.LLAMA, hidden_size=96, ffn_hidden_size=192, kv_channels=32)
        arch = replace(arch, num_attention_heads=4, num_query_groups=4)
        tokens = flags.batch.micro_batch_size * flags.batch.seq_length
        check_models(flags.fp8, arch, arch, flags.parallel, tokens=tokens, has_weights=True)


def test_the_document_says_that_nothing_ran():
    text = (ROOT / "docs/gpu.md").read_text()
    head, _, results = text.partition(gpu_check.MARK)
    assert ("has run on a GPU yet" in head) == (not results.strip())
    assert all(f"| `{part}` |" in head for part in gpu_check.PARTS)

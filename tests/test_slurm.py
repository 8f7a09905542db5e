"""Ranks of a program that srun starts without torchrun."""

import os

import pytest
import torch

from megatron_ext.runtime import platform
from megatron_ext.runtime.errors import USAGE, UserError, run_main
from megatron_ext.runtime.slurm import first_host, rank_variables

TASK = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
TORCHRUN = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "24567",
}


def test_slurm_says_what_torchrun_would():
    assert rank_variables(TASK) == TORCHRUN
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert rank_variables(TASK | chosen) == TORCHRUN | chosen


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ()),  # torchrun's ranks inside of a task
        ({"SLURM_NTASKS": "1"}, ()),
        ({}, ("SLURM_STEP_ID",)),  # the batch script itself, or the shell of salloc
    ],
)
def test_others_are_left_alone(more, less):
    environ = {name: value for name, value in (TASK | more).items() if name not in less}
    assert rank_variables(environ) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("n[12,14-20]", "n12"),
        ("rack[2-3]-n[07-08]-ib,x", "rack2-n07-ib"),
        ("a1,n[03-05]", "a1"),
    ],
)
def test_first_of_a_list_of_hosts(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SLURM_PROCID", "SLURM_PROCID is not set"),
        ("SLURM_LOCALID", "SLURM_LOCALID is not set"),
        ("SLURM_JOB_ID", "SLURM_JOB_ID is not set"),
        ("SLURM_STEP_NODELIST", "SLURM_STEP_NODELIST or SLURM_NODELIST or SLURM_JOB_NODELIST is"),
    ],
)
def test_a_variable_that_is_missing_is_named(name, said, monkeypatch, capsys):
    for variable in (*TORCHRUN, *TASK):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in TASK.items():
        if variable != name:
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SLURM_PROCID", "0") if name != "SLURM_PROCID" else None
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: 0)
    assert ended.value.code == USAGE
    stderr = capsys.readouterr().err
    assert stderr.startswith("ERROR: srun started 16 tasks (SLURM_NTASKS), but ")
    assert said in stderr
    assert stderr.count("\n") == 1


def test_a_program_finds_its_rank(monkeypatch):
    for variable, value in TASK.items():
        monkeypatch.setenv(variable, value)
    found = {}
    with pytest.raises(SystemExit):
        run_main(lambda: found.update({name: os.environ.pop(name) for name in TORCHRUN}))
    assert found == TORCHRUN


@pytest.mark.parametrize("name", TORCHRUN)
def test_a_part_of_a_rank_is_refused(name, monkeypatch):
    assert not torch.distributed.is_initialized()
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"^{name} is not set, but ") as caught:
        platform.initialize(device="cpu")
    assert caught.value.code == USAGE

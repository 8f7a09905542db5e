"""A failure of one rank is one of all ranks, and none of them waits."""

import pytest
import torch

from megatron_ext.runtime.collective_errors import gather, on_all_ranks, on_first_rank
from megatron_ext.runtime.errors import INTERRUPTED, UserError, run_main
from tests.ranks import run_ranks


def _fail_on_rank_1():
    rank = torch.distributed.get_rank()

    def action():
        if rank == 1:
            raise UserError("seven", 4)
        return rank

    try:
        on_all_ranks(action)
    except UserError as error:
        return str(error), error.code
    return None


def _first_rank_only(fails):
    def action():
        if fails:
            raise OSError(28, "full")
        return torch.distributed.get_rank() + 10

    try:
        return on_first_rank(action)
    except OSError as error:
        return error.errno


def _gather_ranks():
    return gather(torch.distributed.get_rank() * 2), on_all_ranks(torch.distributed.get_rank)


def test_one_failing_rank_fails_all():
    assert run_ranks(3, _fail_on_rank_1) == [("seven", 4)] * 3


def test_first_rank_acts_for_all():
    assert run_ranks(2, _first_rank_only, False) == [10, 10]
    assert run_ranks(2, _first_rank_only, True) == [28, 28]


def test_gather():
    assert run_ranks(2, _gather_ranks) == [([0, 2], 0), ([0, 2], 1)]


def test_alone_without_torch_distributed():
    assert gather(5) == [5]
    assert on_first_rank(lambda: 6) == 6
    with pytest.raises(ValueError, match="eight"):
        on_all_ranks(lambda: _raise("eight"))


def _raise(text):
    raise ValueError(text)


@pytest.mark.parametrize("file", ["code", "missing/code"])
def test_the_code_of_a_run_is_its_own(file, tmp_path, monkeypatch, capsys):
    """Regression: a file of EXIT_CODE_FILE that cannot be written gave a traceback and 1."""
    monkeypatch.setenv("EXIT_CODE_FILE", str(tmp_path / file))
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: INTERRUPTED)
    assert caught.value.code == INTERRUPTED
    if file == "code":
        assert (tmp_path / file).read_text() == "75\n"
    else:
        assert capsys.readouterr().err.startswith(f"WARNING: EXIT_CODE_FILE {tmp_path}/missing")

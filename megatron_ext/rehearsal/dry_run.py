"""--dry-run: the plan of a run, checked as far as its files are there, and what it costs.

A run meets data and device after its ranks have joined; here is what takes the place of those that
are not there yet.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from megatron_ext.cli.programs import TrainFlags
from megatron_ext.convert.fit import export_note
from megatron_ext.data import data_check
from megatron_ext.data.vocabulary import absent_files
from megatron_ext.model import cuda_graphs
from megatron_ext.model.fp8 import check_fp8_layers, fp8_settings
from megatron_ext.pruning.jobs import check_outputs
from megatron_ext.rehearsal import cost_report as report
from megatron_ext.rehearsal.run_plan import (
    PrunePlan,
    TrainPlan,
    check_tokenizers,
    check_tokens,
    count_tokens,
)
from megatron_ext.runtime.errors import USAGE, UserError
from megatron_ext.runtime.gpus import GPUS


def train(plan: TrainPlan) -> int:
    """Print what a run of ``pretrain_distill.py`` will do and take; returns the exit code."""
    check_layers_there(plan.flags)
    absent = check_data_there(plan, plan.student.arch.vocab_size, partial(check_tokens, plan))
    store = plan.flags.distill.kd_teacher_store
    if store is not None and not Path(store).exists():
        absent.append(f"stored teacher {store}")
    text, needs = report.of_training(plan)
    return finish([text, report.whole_run(plan)], needs, absent, plan.flags.dry.gpu)


def check_layers_there(flags: TrainFlags) -> None:
    """Refuse what layers or device do not have, as the program does, or --gpu does not."""
    device = flags.parallel.device or "cuda"
    engine = "local" if device == "cpu" else "transformer_engine"
    impl = flags.parallel.transformer_impl or engine
    cuda_graphs.check_machine(flags.graphs, device=device, transformer_impl=impl)
    check_fp8_layers(flags.fp8, impl)
    if GPUS[flags.dry.gpu].fp8 is None:
        for typed in fp8_settings(flags.fp8):
            raise UserError(f"{typed}: --gpu {flags.dry.gpu} has no FP8.", USAGE)


def prune(plan: PrunePlan) -> int:
    """Print what a run of ``prune.py`` will do and take; returns the exit code."""
    flags, source = plan.flags, plan.source
    check_outputs(flags, plan.jobs, plan.found)
    scores, absent = flags.prune.scores, []
    if None in plan.plans and scores and Path(scores).exists():
        from megatron_ext.pruning.scores_file import check_scores, load_scores  # with torch

        check_scores(load_scores(scores), source.arch)
    if plan.is_measured:
        check = partial(check_tokenizers, [source], flags.data)
        absent = check_data_there(plan, source.arch.vocab_size, check)
    notes = [export_note(target.arch, source.arch, source.origin) for target in plan.targets]
    text, needs = report.of_pruning(plan)
    lines = [f"NOTE: {note}" for note in notes if note]
    return finish([*lines, text], needs, absent, flags.dry.gpu)


def finish(texts: Sequence[str], needs: Mapping[str, int], absent: Sequence[str], gpu: str) -> int:
    """Print a report, refuse what does not fit ``gpu``, and say OK; returns the exit code."""
    print("\n".join([*texts, *(f"{'not checked':12}{what}: not there" for what in absent)]))
    report.check_memory(needs, gpu)
    print("OK")
    return 0


def check_data_there(
    plan: TrainPlan | PrunePlan, vocab_size: int, check: Callable[[int], None]
) -> list[str]:
    """Check tokenizer and data as far as they are there; return what is not.

    Args:
        plan: says which data are read.
        vocab_size: tokens of the model that reads them.
        check: refuses a number of tokens that is not that of the models.

    Raises:
        UserError: as ``check``, ``count_tokens`` and ``data_check.check_data``.
    """
    options, num_samples = plan.flags.data, plan.num_samples
    absent = [f"tokenizer {name}" for name in absent_files(options)]
    num_tokens = count_tokens(options, is_dry=True)
    if num_tokens is not None:
        check(num_tokens)
        vocab_size = min(vocab_size, num_tokens)
    if options.mock_data or not any(num_samples):
        return absent
    for prefix in data_check.all_prefixes(data_check.sources(options, num_samples)):
        if any(Path(f"{prefix}.{end}").exists() for end in ("idx", "bin")):
            data_check.check_token_ids(prefix, vocab_size)
        else:
            absent.append(f"data {prefix}")
    if not absent:
        data_check.check_data(
            options,
            seq_length=plan.flags.batch.seq_length,
            num_samples=num_samples,
            vocab_size=vocab_size,
        )
    return absent

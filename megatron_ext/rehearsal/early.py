"""Refusals before torch and megatron-core are imported, beside a plan: files of data.

The run looks at all of them again, where it has the model, its groups and its tokenizer at hand.
"""

from megatron_ext.data import data_check
from megatron_ext.data.vocabulary import check_tokenizer_file
from megatron_ext.rehearsal.run_plan import PrunePlan, TrainPlan


def check_files(plan: TrainPlan | PrunePlan) -> None:
    """Refuse a tokenizer or indexed data that are not there.

    Indexed data only for a process that is alone: of several, the run's first rank looks, and all
    fail together.
    """
    data = plan.flags.data
    check_tokenizer_file(data)
    if data.mock_data or plan.world_size > 1 or not any(plan.num_samples):
        return
    for prefix in data_check.all_prefixes(data_check.sources(data, plan.num_samples)):
        data_check.check_index(prefix)

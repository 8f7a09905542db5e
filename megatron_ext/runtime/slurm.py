"""Ranks of SLURM's tasks: torchrun's variables from SLURM's, for programs that srun starts.

srun --ntasks-per-node 8 python pretrain_distill.py ...         one task per GPU, no torchrun
"""

import re
from collections.abc import Mapping

FIRST_PORT, PORTS = 20000, 10000
NODES = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torchrun would have set; none where they are set or not needed.

    Needed in a step of several tasks: SLURM_NTASKS above 1 and SLURM_STEP_ID, which a batch script
    does not have. MASTER_ADDR and MASTER_PORT stay if they are set.

    Raises:
        ValueError: naming the variable that SLURM should have set and has not.
    """
    if "WORLD_SIZE" in environ or "RANK" in environ or "SLURM_STEP_ID" not in environ:
        return {}
    num_tasks = environ.get("SLURM_NTASKS", "1")
    if num_tasks == "1":
        return {}

    def needed(*names: str) -> str:
        for name in names:
            if environ.get(name):
                return environ[name]
        raise ValueError(
            f"srun started {num_tasks} tasks (SLURM_NTASKS), but {' or '.join(names)} is not set: "
            "pass SLURM's variables on to the task (into the container), or use torchrun."
        )

    found = {
        "RANK": needed("SLURM_PROCID"),
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": needed("SLURM_LOCALID"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(needed(*NODES)),
    }
    found["MASTER_PORT"] = environ.get("MASTER_PORT") or port_of(needed("SLURM_JOB_ID"))
    return found


def first_host(nodes: str) -> str:
    """Return the first of a list of hosts as SLURM writes it: ``n[03-05,9],m1`` gives ``n03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is no list of nodes.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def port_of(job_id: str) -> str:
    """Return a port that jobs on the same node do not share, unless 10000 apart."""
    return str(FIRST_PORT + int(job_id) % PORTS)

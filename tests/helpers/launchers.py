"""The variables that launchers set for a rank, as seen (torchrun, Open MPI, Slurm) or documented (MPICH, MVAPICH)."""

import os

PREFIXES = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "OMPI_", "MV2_", "PMI", "MPI_", "SLURM_")


def without_launcher():
    """Return the environment of a process started without a launcher."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}


def torchrun(rank, ranks=2):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return dict(zip(names, map(str, (rank, ranks, rank, ranks)), strict=True))


def mpirun(rank, ranks=2, local_ranks=2):
    """Return the variables of Open MPI 4.1 and 5."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = (rank, ranks, rank % local_ranks, local_ranks)
    own = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in zip(names, values, strict=True)}
    return {**own, "PMIX_NAMESPACE": "488439809", "PMIX_RANK": str(rank)}


def mvapich(rank, ranks=2):
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    values = map(str, (rank, ranks, rank, ranks))
    return {f"MV2_COMM_WORLD_{name}": value for name, value in zip(names, values, strict=True)}


def mpich(rank, ranks=2):
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    return dict(zip(names, map(str, (rank, ranks, rank, ranks)), strict=True))


def srun(rank, ranks=2, tasks_per_node="2", nodes="localhost", node=0, local_rank=None, job=7):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NODEID": str(node),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank if local_rank is None else local_rank),
    }

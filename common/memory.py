"""How much memory this process took at its peak."""

import resource

import torch


def peak_memory_gib() -> float:
    """GiB: of the GPU's allocator where there is one, else of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB

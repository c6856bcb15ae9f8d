"""Where a process of train.py computes: alone, or as one of several that torchrun started."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from extras.files import pick_device


class Place:
    """Where this process computes: its rank of size, device, and the autocast of its forward passes."""

    def __init__(self, device, dtype):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = pick_device(device)
        self.device = torch.device(name)
        if name == "cuda":
            self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.dtype = getattr(torch, dtype or ("bfloat16" if name == "cuda" else "float32"))
        if self.size > 1 and not dist.is_initialized():    # the others may wait long while rank 0 tokenises
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=6))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def mean(self, *numbers):
        """The numbers averaged over all ranks: the same floats on every rank."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def wait(self):
        if self.size > 1:
            dist.barrier()

"""Where a process computes: alone, or as one of several that torchrun started."""
import contextlib
import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import UserError


def pick_device(name=None):
    """The name of a device that this machine has: `name`, or without one cuda, else cpu."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or ("cuda" if here["cuda"] else "cpu")
    if not here[name]:
        raise UserError(f"PyTorch finds no {name} here\npass --device cpu")
    if name == "mps":
        print("warning: PyTorch has computed wrong results on mps before: compare a few numbers with --device cpu")
    return name


class Place:
    """This process's rank among `size`, its device, and the dtype of its forward passes."""

    def __init__(self, device, dtype):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = pick_device(device)
        self.device = torch.device(name)
        if name == "cuda":
            self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        fast = name == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)    # from Ampere on
        self.dtype = getattr(torch, dtype or ("bfloat16" if fast else "float32"))
        if name == "cuda" and self.dtype == torch.bfloat16:    # attention multiplies in float32:
            torch.set_float32_matmul_precision("high")         # TF32 is faster, and rounds finer than bfloat16
        if self.size > 1 and not dist.is_initialized():    # the others may wait long while rank 0 tokenises
            dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=6),
                                    device_id=self.device if name == "cuda" else None)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def mean(self, *numbers):
        """The numbers averaged over all ranks: the same floats on every rank."""
        if self.size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def any(self, here):
        """Is `here` true on any rank?"""
        return self.mean(bool(here))[0] > 0

    @contextlib.contextmanager
    def ctrl_c(self):
        """A list that gets its first entry at Ctrl-C, so that a step can end. A second Ctrl-C stops at once."""
        pressed, before = [], signal.getsignal(signal.SIGINT)

        def note(*_):
            pressed.append(True)
            signal.signal(signal.SIGINT, before)
            if self.rank == 0:
                os.write(2, b"\nthis step ends, then the run is saved\n")    # print may not be called here

        signal.signal(signal.SIGINT, note)
        try:
            yield pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def wait(self):
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self):
        """All leave together: one that goes first may abort the others."""
        self.wait()
        if self.size > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def rank_0_first(self):
        """The other ranks enter the block when rank 0 has left it, and find there what it has downloaded."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

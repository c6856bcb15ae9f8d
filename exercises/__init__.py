"""Exercises that check themselves. README.md here says how."""
import torch


def same(found, expected, hint, **tolerance):
    """Tensors that must be equal up to rounding; if they are not, comes the hint, and then torch says where."""
    torch.testing.assert_close(found, expected, msg=lambda text: f"{hint}\n{text}", **tolerance)

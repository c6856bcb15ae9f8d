"""Exercises that check themselves. README.md here says how."""
import torch


def same(found, expected, hint, **tolerance):
    """Tensors that must be equal up to rounding; if they are not, torch says where, and then comes the hint."""
    torch.testing.assert_close(found, expected, msg=lambda text: f"{text}\nHint: {hint}", **tolerance)

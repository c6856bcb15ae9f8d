"""Exercises that check themselves. README.md here says how."""
import torch

from model import GPT, GPTConfig


def same(found, expected, hint, **tolerance):
    """Tensors that must be equal up to the rounding of the coarser one; if they are not, comes the hint, and then torch
    says where."""
    __tracebackhide__ = True    # pytest names the line of the check, not this one
    torch.testing.assert_close(found, expected, check_dtype=False, msg=lambda text: f"{hint}\n{text}", **tolerance)


def tiny(gated):
    """A random GPT in float64, with gates or without: 2 layers of 3 heads."""
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12, gated=gated, gate_bias=-1.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate_bias" not in name:
                p.normal_(1 if "ln_" in name and "weight" in name else 0, 0.4)
    return model.double().eval()


def pairs():
    """Five clean sentences, five corrupted ones, (5,6) each, and a metric of the last position's logits."""
    clean, corrupt = torch.randint(11, (2, 5, 6))
    weights = torch.randn(11, dtype=torch.float64)
    return clean, corrupt, lambda logits: torch.tanh(logits[:, -1] @ weights)

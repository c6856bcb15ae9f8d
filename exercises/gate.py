"""1. A gate that is exactly 0 or 1 and still has a gradient (20 minutes)

An edge's gate A is 1 with probability sigmoid(g). Drawing a bit has no gradient, so g could never be learned. The way
out (binary Gumbel-softmax with a straight-through gradient): draw u ~ U(0, 1), turn it into logistic noise
n = log(u / (1 - u)), and use
    forward    A = 1 if g + n > 0, else 0
    backward   the gradient of sigmoid(g + n), as if that had been the output

Questions to think about before you write: why is P(g + n > 0) = sigmoid(g)? Detaching a tensor keeps its value and
drops its gradient: how do you add and subtract such tensors to get one with a hard value and a soft gradient? What
would happen at u = 0, or at u = 1, which rounding may give?
"""
import torch


def sample_gates(g, sample):
    """Gates, exactly 0.0 or 1.0, shaped like g, with the gradient of sigmoid(g + n).

    sample: draw the noise n with torch.rand_like(g) (True), or take none, so that A = [g > 0] (False). A g of -inf is a
    gate that is always closed, inf one that is always open. Nothing may become nan, whatever is drawn.
    """
    raise NotImplementedError

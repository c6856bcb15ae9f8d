"""Is one draw of the gates good enough? The straight-through gradient against the exact one, by enumeration.

    python -m exercises.open.estimator [--layers 5] [--batches 256] [--out runs/estimator]

A layer of 4 positions has 10 edges, so there are 2^10 settings of its gates. The exact gradient with respect to the
gates' logits g (10) is that of the expected loss sum_A P(A) loss(A). Training takes the gradient of one draw from
`gates.sample_gates` instead.

    bias    |mean of the estimates - exact| / |exact|
    noise   sqrt(mean |estimate - mean of the estimates|^2) / |exact|

The loss is the cross-entropy of a random readout, or the squared distance to a random target. The second is special: a
gate's estimate tends to the mean of the loss's slopes at 0 and at 1 as the temperature falls, which for a square is
exactly their difference quotient. Prints a table of both losses; estimator.png shows the cross-entropy.
"""
import argparse
import itertools
import os

import numpy as np
import torch

from extras.figures import picture
from extras.sweep import mean_and_range
from gates import sample_gates
from support.files import between, make_folder, run_command

T, D = 4, 8
EDGES = T * (T + 1) // 2
ALL = torch.tensor(list(itertools.product([0.0, 1.0], repeat=EDGES)), dtype=torch.float64)    # (1024,10)
TEMPERATURES = 0.1, 0.3, 1.0, 3.0
COUNTS = 1, 4, 16, 64, 256    # draws that are averaged
STYLES = ":", "--", "-", "-."
LOSSES = "cross-entropy", "square"


def random_layer(seed, kind):
    """Logits of the gates g (10), and the loss of gates A, (N,10) -> (N)."""
    generator = torch.Generator().manual_seed(seed)
    scores, values, target = (torch.randn(T, n, generator=generator, dtype=torch.float64) for n in (T, D, D))
    readout = 2 * torch.randn(D, D, generator=generator, dtype=torch.float64)
    row, column = torch.tril_indices(T, T)
    weights = torch.softmax(scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf), -1)[row, column]    # (10)

    def loss(gates):
        y = torch.zeros(len(gates), T, D, dtype=torch.float64)
        y = y.index_add(1, row, (gates * weights)[..., None] * values[column])                   # (N,T,D)
        if kind == "square":
            return (y - target).square().sum((1, 2))
        return -(y @ readout).log_softmax(-1)[:, torch.arange(T), target.argmax(-1)].sum(1)
    return scores[row, column], loss


def exact_gradient(g, loss):
    """Of the expected loss: every setting of the gates counts with its probability."""
    g = g.clone().requires_grad_()
    p = torch.sigmoid(g)
    return torch.autograd.grad(((ALL * p + (1 - ALL) * (1 - p)).prod(1) * loss(ALL)).sum(), g)[0]


def estimates(g, loss, temperature, draws):
    """The straight-through gradients (draws,10), one for each draw of the gates."""
    torch.manual_seed(0)
    found = []
    for some in torch.arange(draws).split(4096):
        g_of_draw = g.expand(len(some), EDGES).clone().requires_grad_()
        found += torch.autograd.grad(loss(sample_gates(g_of_draw, True, temperature)).sum(), g_of_draw)
    return torch.cat(found)


def measure(seed, kind, temperature, draws):
    """Bias, noise, and for each n of COUNTS the mean cosine between the mean of n draws and the exact gradient."""
    g, loss = random_layer(seed, kind)
    exact, found = exact_gradient(g, loss), estimates(g, loss, temperature, draws)
    bias, noise = (found.mean(0) - exact).norm(), (found - found.mean(0)).square().sum(1).mean().sqrt()
    cosines = [torch.cosine_similarity(found.unflatten(0, (-1, n)).mean(1), exact[None]).mean() for n in COUNTS]
    return torch.stack([bias / exact.norm(), noise / exact.norm(), *cosines]).tolist()


def run(args):
    make_folder(args.out)
    draws = args.batches * COUNTS[-1]
    print(f"{args.layers} random layers of {EDGES} edges, {draws:,} draws each: mean (range over the layers)\n\n"
          f"| loss | temperature | bias | noise of a draw | cosine, 1 draw | {COUNTS[-1]} draws |\n" + "|---" * 6 + "|")
    title = "Straight-through gradients: a single draw is noisy, the mean of many a little wrong"
    with picture(os.path.join(args.out, "estimator.png"), title, 1, 1, (7, 4.5)) as axes:
        for kind, (temperature, style) in itertools.product(LOSSES, zip(TEMPERATURES, STYLES)):
            found = np.array([measure(seed, kind, temperature, draws) for seed in range(args.layers)])    # (layers,7)
            cells = [mean_and_range(found[:, n], ".2f") for n in (0, 1, 2, -1)]
            print(f"| {kind} | {temperature} | {' | '.join(cells)} |")
            if kind == LOSSES[0]:
                axes[0, 0].plot(COUNTS, found[:, 2:].mean(0), style, color="black", label=f"temperature {temperature}")
        axes[0, 0].set(xscale="log", ylim=(0, 1), xlabel="draws that are averaged",
                       ylabel="cosine to the exact gradient")
        axes[0, 0].set_xticks(COUNTS, COUNTS)
        axes[0, 0].legend()


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.estimator [options]",
                                     description="The straight-through gradient against the exact one.")
    parser.add_argument("--layers", type=between(int, 1, 1000), default=5, help="random layers (default 5)")
    parser.add_argument("--batches", type=between(int, 2, 10**4), default=256,
                        help=f"of {COUNTS[-1]} draws of the gates (default 256)")
    parser.add_argument("--out", default="runs/estimator", help="folder for the picture (default runs/estimator)")
    run_command(parser, run)


if __name__ == "__main__":
    main()

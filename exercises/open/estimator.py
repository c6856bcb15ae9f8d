"""Is one draw of the gates good enough? The straight-through gradient against the exact one, by enumeration.

    python -m exercises.open.estimator [--layers 5] [--batches 256] [--out runs/estimator]

A layer of 4 positions has 10 edges, so 2^10 settings of its gates. The exact gradient, by the gates' logits g (10), is
that of the expected loss sum_A P(A) loss(A). Training takes the gradient of one draw from `gates.sample_gates` instead.

    bias    |mean of the estimates - exact| / |exact|
    noise   sqrt(mean |estimate - mean of the estimates|^2) / |exact|

The loss is a squared distance to a random target. Prints a table and draws estimator.png.
"""
import argparse
import itertools
import os

import numpy as np
import torch

from extras.figures import picture
from extras.sweep import spread
from gates import sample_gates
from support.files import between, make_folder, run_command

T, D = 4, 8
EDGES = T * (T + 1) // 2
ALL = torch.tensor(list(itertools.product([0.0, 1.0], repeat=EDGES)), dtype=torch.float64)    # (1024,10)
TEMPERATURES = 0.1, 0.3, 1.0, 3.0
COUNTS = 1, 4, 16, 64, 256    # draws that are averaged
STYLES = ":", "--", "-", "-."


def random_layer(seed):
    """Logits of the gates g (10), and the loss of gates A, (N,10) -> (N)."""
    generator = torch.Generator().manual_seed(seed)
    scores, values, target = (torch.randn(T, n, generator=generator, dtype=torch.float64) for n in (T, D, D))
    row, column = torch.tril_indices(T, T)
    weights = torch.softmax(scores.masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf), -1)[row, column]    # (10)

    def loss(gates):
        y = torch.zeros(len(gates), T, D, dtype=torch.float64)
        return (y.index_add(1, row, (gates * weights)[..., None] * values[column]) - target).square().sum((1, 2))
    return scores[row, column], loss


def exact_gradient(g, loss):
    """Of the expected loss: every setting of the gates counts with its probability."""
    g = g.clone().requires_grad_()
    p = torch.sigmoid(g)
    return torch.autograd.grad(((ALL * p + (1 - ALL) * (1 - p)).prod(1) * loss(ALL)).sum(), g)[0]


def estimates(g, loss, temperature, draws):
    """The straight-through gradients (draws,10), one for each draw of the gates."""
    torch.manual_seed(0)
    g = g.expand(draws, EDGES).clone().requires_grad_()
    return torch.autograd.grad(loss(sample_gates(g, True, temperature)).sum(), g)[0]


def measure(seed, temperature, draws):
    """Bias, noise, and for each of COUNTS the mean cosine between the mean of so many draws and the exact gradient."""
    g, loss = random_layer(seed)
    exact, found = exact_gradient(g, loss), estimates(g, loss, temperature, draws)
    bias, noise = (found.mean(0) - exact).norm(), (found - found.mean(0)).square().sum(1).mean().sqrt()
    cosines = [torch.cosine_similarity(found.unflatten(0, (-1, n)).mean(1), exact[None]).mean() for n in COUNTS]
    return torch.stack([bias / exact.norm(), noise / exact.norm(), *cosines]).tolist()


def run(args):
    make_folder(args.out)
    draws = args.batches * COUNTS[-1]
    print(f"{args.layers} random layers of {EDGES} edges, {draws:,} draws each: mean (range over the layers)\n\n"
          f"| temperature | bias | noise of a draw | cosine, 1 draw | {COUNTS[-1]} draws |\n|---|---|---|---|---|")
    title = "Straight-through gradients: a single draw is noisy, the mean of many a little wrong"
    with picture(os.path.join(args.out, "estimator.png"), title, 1, 1, (7, 4.5)) as axes:
        for temperature, style in zip(TEMPERATURES, STYLES):
            found = np.array([measure(seed, temperature, draws) for seed in range(args.layers)])    # (layers,7)
            cells = [spread(found[:, n], ".2f") for n in (0, 1, 2, -1)]
            print(f"| {temperature} | {' | '.join(cells)} |")
            axes[0, 0].plot(COUNTS, found[:, 2:].mean(0), style, color="black", label=f"temperature {temperature}")
        axes[0, 0].set(xscale="log", ylim=(0, 1), xlabel="draws that are averaged",
                       ylabel="cosine to the exact gradient")
        axes[0, 0].set_xticks(COUNTS, COUNTS)
        axes[0, 0].legend()


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.estimator [options]",
                                     description="The straight-through gradient against the exact one.")
    parser.add_argument("--layers", type=between(int, 1, 1000), default=5, help="random layers (default 5)")
    parser.add_argument("--batches", type=between(int, 2, 10**5), default=256,
                        help=f"of {COUNTS[-1]} draws of the gates (default 256)")
    parser.add_argument("--out", default="runs/estimator", help="folder for the picture (default runs/estimator)")
    run_command(parser, run)


if __name__ == "__main__":
    main()

"""Where is dense or far attention needed, and what breaks first as tau loosens?

    python -m exercises.open.far [--seeds 3] [--out runs/far]

A small GPT reads windows of 128 bytes, a third of each kind: docstrings; copies, where n = 4, 8, 16 or 32 random
characters repeat to the end of the window, so that the nearest copy is an edge of length n - 1; and tosses of a coin
whose bias is drawn anew for every window, so the mean of all tosses before predicts the next one. After dense training
a copy of the model gets gates and trains on, for each of three taus. Printed for each: CE, edges, CE of docstrings and
of tosses (best: that of the guess (heads + 1) / (tosses + 2), to which the last answer, the first token of the next
window, adds 0.01), share of characters of the second copy that are right, and, in windows with n = 32, the share of the
allowed edges that are open, by distance. far.png shows what is lost.
"""
import argparse
import copy
import os

import numpy as np
import torch

from exercises.open import two_phases
from extras.figures import draw_arms
from model import GPT, GPTConfig
from support.data import byte_encoding, load_data, spread
from support.files import make_folder, run_command
from support.options import defaults
from support.place import Place
from train import add_gates, evaluate, fit

T = 128
PERIODS = 4, 8, 16, 32
KINDS = 4 * ["text"] + 4 * ["tosses"] + list(PERIODS)    # a third each
BANDS = (1, 7), (8, 15), (16, 31), (32, 126)
ROOMS = 0.05, 0.2, 0.6    # tau above the dense model's CE, nats


def windows(text, count, kinds, rng):
    """(count,T) tokens, each window of one of the kinds, drawn at random: "text", "tosses", or a period."""
    rows = []
    for kind in rng.choice(np.array(kinds, object), count):
        if kind == "text":
            start = rng.integers(len(text) - T)
            rows.append(text[start:start + T])
        elif kind == "tosses":
            rows.append(48 + (rng.random(T) < rng.random()))
        else:
            rows.append(np.resize(rng.integers(33, 127, kind), T))
    return np.stack(rows).astype(np.uint16)


@torch.no_grad()
def right(model, rows, n):
    """Share of the second n tokens of a window, but for the first of these, that the model foresees."""
    rows = torch.from_numpy(rows.astype(np.int64))
    return (model.eval()(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:])[:, n:2 * n - 1].double().mean().item()


def best_ce(rows):
    """The least mean CE of tosses: that of Laplace's rule, right if every bias of a coin is equally likely."""
    heads = rows == 49
    p = (np.cumsum(heads, 1) - heads + 1) / (np.arange(T) + 2)    # of heads, before each toss
    return -np.log(np.where(heads, p, 1 - p)).mean()


def open_by_distance(model, rows):
    """Share of the allowed edges that are open in each of BANDS."""
    is_open = (model.attention_maps(torch.from_numpy(rows[:, :-1].astype(np.int64))) > 0).double().mean((0, 1, 2))
    distance = torch.arange(T - 1)[:, None] - torch.arange(T - 1)
    return [is_open[(distance >= low) & (distance <= high)].mean().item() for low, high in BANDS]


def run(args):
    text, rng = load_data("stdlib", byte_encoding()), np.random.default_rng(0)
    data = [windows(part, count, KINDS, rng).flatten() for part, count in zip(text, (15_000, 321, 1_000))]
    probes = {kind: windows(text[1], 321, [kind], rng) for kind in ("text", "tosses", *PERIODS)}
    place, drawn = Place("cpu", "float32"), []
    titles = ["seed", "tau", "CE", "active edges", "CE of text", f"of tosses (best {best_ce(probes['tosses']):.3f})",
              *(f"right, n = {n}" for n in PERIODS), *(f"open at distance {low} to {high}" for low, high in BANDS)]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for seed in range(args.seeds):
        options = defaults("scratch") | {"seed": seed}    # Ctrl-C, then the same command: goes on
        dense = GPT(GPTConfig(T, 257, n_layer=4, n_head=4, n_embd=128), generator=torch.Generator().manual_seed(seed))
        learn = argparse.Namespace(**options | {"steps": args.dense_steps, "lr": 2e-3})
        fit(dense, data, folder(args, seed, "dense"), place, learn)
        val, constraint = (spread(part, T, learn.eval_windows) for part in data[1:])
        base, seen = (evaluate(dense, split, place, learn)[0] for split in (val, constraint))
        prune = argparse.Namespace(**options | {"steps": args.steps, "rate": 0.05})    # windows differ much in CE
        for room in (None, *ROOMS):
            model = copy.deepcopy(dense)
            if room is not None:
                fit(model, data, folder(args, seed, f"sparse-{room}-{args.steps}"), place, prune,
                    add_gates(model, base + room, prune), shift=seen - base)
            ce, active = evaluate(model, val, place, prune)
            parts = [evaluate(model, spread(probes[kind].flatten(), T, prune.eval_windows), place, prune)[0]
                     for kind in ("text", "tosses")]
            copied, arm = [right(model, probes[n], n) for n in PERIODS], "dense" if room is None else f"+{room}"
            cells = [f"{seed}", arm, f"{ce:.3f}", f"{active.mean():.2%}",
                     *(f"{part:.3f}" for part in parts), *(f"{share:.0%}" for share in copied),
                     *(f"{share:.2%}" for share in open_by_distance(model, probes[PERIODS[-1]][:100]))]
            print(f"| {' | '.join(cells)} |", flush=True)
            drawn.append((arm, *parts, *(100 * share for share in copied)))
    draw_arms(drawn, ("CE of text, nats", "CE of tosses, nats", *(f"copies right, n = {n}, %" for n in PERIODS)),
              "What is lost as tau loosens: dense, and tau above the dense CE", os.path.join(args.out, "far.png"))


def folder(args, seed, name):
    """Of a training, which goes on there if it was stopped."""
    path = os.path.join(args.out, f"{seed}-{args.dense_steps}-{name}")
    make_folder(path)
    return path


def main():
    run_command(two_phases("far", "Copies and means: what goes first as tau loosens?", 6000, 2000), run)


if __name__ == "__main__":
    main()

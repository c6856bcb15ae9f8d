"""Where is dense or far attention needed, and what breaks first as tau loosens?

    python -m exercises.open.far [--seeds 3] [--out runs/far]

A small GPT reads docstrings, 128 bytes to a window. In a third of the windows the last bytes are d random letters shown
twice, "qkz|qkz|", with d from 4 to 48: a letter of the second copy must be read off the first, d + 1 places back. In
another third they are five ballots, each of 15 votes and the winner, "011010001110101=1": a mean over all votes. After
dense training a copy of the model gets gates and trains on, for each of three taus. Printed for each: CE, edges, CE of
the windows of text alone, share of copied letters and of winners that are right, and, where the copies are 48 letters
long, the share of the allowed edges that are open, by distance.
"""
import copy
import os

import numpy as np
import torch

from exercises.open import two_phases
from model import GPT, GPTConfig
from support.data import byte_encoding, load
from support.files import make_folder, run_command
from support.options import parser as train_options
from support.place import Place
from train import add_gates, evaluate, fit

T, VOTES, BALLOTS = 128, 15, 5
DISTANCES = 4, 12, 24, 48
BANDS = (1, 4), (5, 16), (17, 48), (49, 126)
ROOMS = 0.05, 0.2, 0.6    # tau above the dense model's CE, nats


def windows(text, count, kinds, rng):
    """(count,T) tokens: docstrings that end in what `kinds` has, drawn at random: 0 nothing, "votes", or a distance."""
    rows = []
    for kind in rng.choice(np.array(kinds, object), count):
        probe = []
        if kind == "votes":
            for votes in rng.integers(0, 2, (BALLOTS, VOTES)):
                probe += [*(48 + votes), ord("="), 48 + (2 * votes.sum() > VOTES)]
        elif kind:
            letters = rng.integers(97, 123, kind)
            probe = [*letters, ord("|"), *letters, ord("|")]
        start = rng.integers(len(text) - T)
        rows.append(np.concatenate([text[start:start + T - len(probe)], probe]).astype(np.uint16))
    return np.stack(rows)


@torch.no_grad()
def right(model, rows, asked):
    """Share of the tokens at `asked`, a slice of a window, that the model foresees."""
    rows = torch.from_numpy(rows.astype(np.int64))
    return (model.eval()(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:])[:, asked].double().mean().item()


def open_by_distance(model, rows):
    """Share of the allowed edges that are open in each of BANDS."""
    is_open = (model.attention_maps(torch.from_numpy(rows[:, :-1].astype(np.int64))) > 0).double().mean((0, 1, 2))
    distance = torch.arange(T - 1)[:, None] - torch.arange(T - 1)
    return [is_open[(distance >= low) & (distance <= high)].mean().item() for low, high in BANDS]


def run(args):
    text, rng = load("stdlib", byte_encoding()), np.random.default_rng(0)
    kinds = 4 * [0] + 4 * ["votes"] + list(DISTANCES)    # a third each
    data = [windows(part, count, kinds, rng).flatten() for part, count in zip(text, (15_000, 321, 1_000))]
    plain = windows(text[1], 321, [0], rng).flatten()
    probes = {kind: windows(text[1], 200, [kind], rng) for kind in (*DISTANCES, "votes")}
    options = train_options(argv=["--init", "scratch"]).parse_args([])    # out is None: no run to resume
    place = Place("cpu", "float32")
    print(f"{'seed':5}{'tau':>9}{'CE':>8}{'edges':>9}{'CE of text':>12}   right: "
          + "".join(f"{f'd = {d}':>8}" for d in DISTANCES) + f"{'votes':>8}   open at distance "
          + ", ".join(f"{low}-{high}" for low, high in BANDS))
    for seed in range(args.seeds):
        options.seed = seed
        config = GPTConfig(block_size=T, vocab_size=257, n_layer=4, n_head=4, n_embd=128)
        dense = GPT(config, generator=torch.Generator().manual_seed(seed))
        fit(dense, data, folder(args, seed, "dense"), place, options, args.dense_steps, 2e-3)
        base, seen = (evaluate(dense, part, place, options)[0] for part in data[1:])
        for room in (None, *ROOMS):
            model = copy.deepcopy(dense)
            if room is not None:
                fit(model, data, folder(args, seed, f"sparse-{room}-{args.steps}"), place, options, args.steps, 1e-3,
                    add_gates(model, base + room, options), shift=seen - base)
            ce, active = evaluate(model, data[1], place, options)
            found = [right(model, probes[d], slice(-d, -1)) for d in DISTANCES]    # all letters but the first
            found.append(right(model, probes["votes"], slice(-1 - (BALLOTS - 1) * (VOTES + 2), None, VOTES + 2)))
            bands = ", ".join(f"{share:.2%}" for share in open_by_distance(model, probes[48]))
            print(f"{seed:<5}{'dense' if room is None else f'+{room}':>9}{ce:8.3f}{active.mean():9.2%}"
                  f"{evaluate(model, plain, place, options)[0]:12.3f}" + " " * 10
                  + "".join(f"{x:8.0%}" for x in found) + f"   {bands}", flush=True)


def folder(args, seed, name):
    """Of a training, which goes on there if it was stopped."""
    path = os.path.join(args.out, f"{seed}-{args.dense_steps}-{name}")
    make_folder(path)
    return path


def main():
    parser = two_phases("far", "Copies and votes: what goes first as tau loosens?", dense_steps=4000, steps=2000)
    run_command(parser, run)


if __name__ == "__main__":
    main()

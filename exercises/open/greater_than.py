"""Does greater-than need more heads after sparse training? Under a global ranking the paper's did.

    python -m exercises.open.greater_than [--seeds 3] [--out runs/greater-than]

A small GPT (4 layers, 4 heads) learns sentences "The war lasted from the year 17 32 to the year 17" -> any later year,
a token a word and two for a year. Then it gets gates, under CE <= its dense CE + 0.02, with the loops of the toy. In
the corrupted sentence the first year ends in 01. k heads of a clean run are kept; all others write what they wrote in
the corrupted run. *Live* MLPs work on what they read, *corrupted* ones write what they wrote in the corrupted run.
Printed for both models: the heads needed for 0.9 of the effect, and the effect of 1, 2, 4 and all 16. The first line
gives the CE of a model that gives all later years the same probability. Draws greater_than.png.
"""
import copy
import functools
import itertools
import os

import numpy as np
import torch

import patching as P
import toy_addition as toy
from exercises.open import two_phases
from extras.figures import draw_arms
from extras.tasks import NOUNS, later_years
from geco import Geco
from model import GPT, GPTConfig, allowed_edges
from support.files import make_folder, run_command
from support.weights import save_checkpoint

THINGS = NOUNS.split()[:3]
WORDS = [f"{n:02d}" for n in range(100)] + "The lasted from the year to".split() + THINGS
PAIRS, SOME = 100, (1, 2, 4, 16)    # pairs of sentences; numbers of heads whose effect is printed
SENTENCE = "The {noun} lasted from the year {century} {year} to the year {century}"


def sentences():
    """All of them, each with four later years at random, so that memorising is hard: tokens and targets (N,T), -1
    but for the last, and years (N)."""
    rng, rows = np.random.default_rng(0), []
    for noun, century, year in itertools.product(THINGS, range(11, 20), range(1, 99)):
        words = SENTENCE.format(noun=noun, century=century, year=f"{year:02d}").split()
        rows += [[*map(WORDS.index, words), later] for later in rng.integers(year + 1, 100, 4)]
    rows = torch.tensor(np.array(rows))
    targets = torch.full_like(rows[:, :-1], -1)
    targets[:, -1] = rows[:, -1]
    return rows[:, :-1], targets, rows[:, 7]


@torch.no_grad()
def kept_without_mlps(model, clean, corrupt, metric, order):
    """As P.metric_of_kept_heads, (N,L*H+1), but the MLPs too write what they wrote in the corrupted run."""
    theirs, rank, found = P.outputs(model, corrupt)[0], P.rank_of(order, model.config)[0], []
    for k in range(len(order) + 1):
        def write(n, out):
            if out.ndim == 3:    # the embedding, or an MLP
                return theirs[n.start] if n.start else out
            kept = rank[P.layer_of(n.start, model.config), :, None, None] < k
            return torch.where(kept, out, theirs[n.start])
        found.append(metric(P.forward(model, clean, write=write)))
    return torch.stack(found, 1)


def run(args):
    make_folder(args.out)
    idx, targets, years = sentences()
    later = (years > 1).nonzero()[:, 0].numpy()
    rows = torch.from_numpy(np.random.default_rng(1).choice(later, PAIRS, replace=False))
    clean, corrupt = idx[rows], idx[rows].clone()
    corrupt[:, 7] = 1
    metric = functools.partial(later_years, numbers=torch.arange(100).expand(len(rows), -1), year=years[rows])
    drawn = []
    print(f"CE of an even guess {torch.log(99.0 - years).mean():.4f}; heads kept for 0.9 of the effect, and that of "
          f"{', '.join(map(str, SOME))}\n{'seed':6}{'model':8}{'CE':>8}{'edges':>9}{'m, clean and 01':>18}"
          f"{'MLPs live':>38}{'corrupted':>38}")
    for seed in range(args.seeds):
        config = GPTConfig(block_size=len(idx[0]), vocab_size=len(WORDS), n_layer=4, n_head=4, n_embd=64)
        dense = GPT(config, generator=torch.Generator().manual_seed(seed))
        toy.train_dense(dense, idx, targets, args.dense_steps, seed)
        ce = toy.evaluate(dense, idx, targets)["hard_ce"]
        sparse = copy.deepcopy(dense)
        sparse.set_gates(True, 0.0)
        toy.train_sparse(sparse, idx, targets, args.steps, Geco(ce + 0.02, rate=5.0, decay=0.6), seed)
        for name, model in (("dense", dense), ("sparse", sparse)):
            found = toy.evaluate(model, idx, targets)
            order = P.head_scores(model, clean, corrupt, metric).mean(0).flatten().argsort(descending=True)
            curves = [measure(model, clean, corrupt, metric, order).mean(0).numpy()
                      for measure in (P.metric_of_kept_heads, kept_without_mlps)]
            high, low = curves[0][-1], curves[1][0]    # the clean run, and the corrupted one
            shares = [(curve - low) / (high - low) for curve in curves]
            kept = [f"{P.first_reaching(share)} ({', '.join(f'{share[k]:.2f}' for k in SOME)})" for share in shares]
            print(f"{seed:<6}{name:8}{found['hard_ce']:8.4f}{found['active'] / allowed_edges(model.config):9.2%}"
                  f"{f'{high:.2f}, {low:.2f}':>18}{kept[0]:>38}{kept[1]:>38}", flush=True)
            drawn.append((name, found["hard_ce"], P.first_reaching(shares[0]), shares[0][1]))
            save_checkpoint(model, os.path.join(args.out, f"{seed}-{name}.pt"))
    draw_arms(drawn, ("CE, nats", "heads kept for 0.9 of the effect", "effect of 1 head"), "Greater-than: heads needed",
              os.path.join(args.out, "greater_than.png"))


def main():
    run_command(two_phases("greater_than", "Heads of greater-than, dense beside sparse.", 2000, 3000), run)


if __name__ == "__main__":
    main()

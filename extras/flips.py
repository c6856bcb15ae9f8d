"""Gate flips: what opening or closing one attention edge would do to a task, for all edges at once.

    python -m extras.flips --model runs/addition/sparse.pt --task addition [--pairs 100] [--flips 500]

Here an edge is an attention edge (i, j): query i may read key j. A hard gate has no gradient, so attribution patching
does not see an effect that runs through a gate that opens or closes. But a flip is a step of known size in what a head
mixes: z_i changes by + p_ij v_j if the gate opens, by - p_ij v_j if it closes, with p = softmax(s_i). So

    change of m when gate (i, j) flips  =  about  dm/dz_i . (+- p_ij v_j)                              (21)

exact in the gate, first order in all that follows; one backward pass scores every edge. Beside it stand true flips, one
forward pass each: of all edges, or of --flips random ones. m is the task's metric on its clean sentences.
Shapes: N sentences, T positions, D head size, H heads, L layers.
"""
import argparse

import numpy as np
import torch
from tqdm import tqdm

from extras.circuits import spearman
from extras.llama import load_model
from extras.tasks import TASKS, make_pairs
from patching import forward, pattern
from support.files import UserError, between, run_command

SHOWN = 5    # rows of the table


def flipped(model, tokens, flip=None, write=None):
    """Logits of a run with hard gates, and of each layer z (N,H,T,D), p, gates (N,H,T,T) and v (N,H,T,D).

    flip: an edge (layer, head, i, j), whose gate is turned over in every sentence. write: of patching.forward.
    """
    layers = []

    def attend(attn, q, k, v):
        p, gates = pattern(attn, q, k)
        if flip and flip[0] == len(layers):
            gates[:, *flip[1:]] = 1 - gates[:, *flip[1:]]
        layers.append(((gates * p) @ v, p, gates, v))
        return layers[-1][0]

    return forward(model, tokens, write=write, attend=attend), layers


def flip_scores(model, tokens, metric):
    """(21) for every edge, in the units of metric(logits) -> (N), 0 for those that the causal mask hides; and which are
    open: (N,L,H,T,T) each."""
    def write(n, out):    # gradients begin at the embedding: weights may need none
        return out if n.start else out.detach().requires_grad_()

    with torch.enable_grad():
        logits, layers = flipped(model, tokens, write=write)
        slopes = torch.autograd.grad(metric(logits).sum(), [z for z, *_ in layers])
    found = [(1 - 2 * gates) * p * (dz @ v.mT) for dz, (_, p, gates, v) in zip(slopes, layers)]
    return torch.stack(found, 1).detach(), torch.stack([gates for _, _, gates, _ in layers], 1)


@torch.no_grad()
def true_flips(model, tokens, metric, edges):
    """What flipping each of the edges (n,4) really does to the metric: (n,N)."""
    before = metric(flipped(model, tokens)[0])
    return torch.stack([metric(flipped(model, tokens, edge)[0]) - before for edge in tqdm(edges, desc="flips")])


def run(args):
    model = load_model(args.model).requires_grad_(False)
    if not model.config.gated:
        raise UserError(f"{args.model} has no gates to flip\ntake a sparse model")
    tokens, _, metric = make_pairs(args.task, args.pairs, args.seed, model, template=args.template)
    T, rng = tokens.shape[1], np.random.default_rng(args.seed)
    allowed = [(l, h, i, j) for l in range(model.config.n_layer) for h in range(model.config.n_head)
               for i in range(T) for j in range(i + 1 if model.config.causal else T)]
    edges = [allowed[n] for n in sorted(rng.permutation(len(allowed))[:args.flips])]
    print(f"{args.task}: {len(tokens)} sentences of {T} tokens, {len(edges):,} of {len(allowed):,} edges flipped, seed "
          f"{args.seed}")
    scores, gates = flip_scores(model, tokens, metric)                               # (N,L,H,T,T)
    estimated, true = torch.stack([scores[:, *edge] for edge in edges]), true_flips(model, tokens, metric, edges)
    size, guess = true.abs().mean(1), estimated.abs().mean(1)                        # (n)
    print(f"\n{'edge':32}{'open':>7}{'change of m':>15}{'estimate':>11}{'its rank':>10}")
    for n in size.argsort(descending=True)[:SHOWN].tolist():
        l, h, i, j = edges[n]
        name = f"layer {l}, head {h}: {i} reads {j}"
        rank = (guess > guess[n]).sum() + 1
        print(f"{name:32}{gates[:, l, h, i, j].mean():7.1%}{size[n]:15.3f}{guess[n]:11.3f}{rank:10}")
    agreement = spearman(estimated.flatten().numpy(), true.flatten().numpy())
    found = "none, as one of them is constant" if agreement is None else f"{agreement:.2f}"
    print("\nmean |change| over the sentences; rank correlation of the estimate with true flips, over all sentences "
          f"and edges: {found}")


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.flips --model M --task T [options]",
                                     description="What would a task's answer be if one gate flipped?")
    parser.add_argument("--model", required=True, help="a checkpoint with gates")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--template", choices=("ours", "paper"), help="see extras.circuits")
    parser.add_argument("--pairs", type=between(int, 1, 1000), default=100,
                        help="of sentences, all in memory at once (default 100)")
    parser.add_argument("--flips", type=between(int, 2, 10**6), default=500, help="random edges (default 500)")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of sentences and edges (default 0)")
    run_command(parser, run)


if __name__ == "__main__":
    main()

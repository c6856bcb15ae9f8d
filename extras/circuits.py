"""One task, two models: a table and three pictures of their circuits (Figures 3 to 5 of the paper).

    python -m extras.circuits --dense A --sparse B --task ioi [--pairs 100] [--out runs/patching-ioi]

A and B: GPT-2 names, paths, or checkpoints of ours. Prints a table; writes heads.png, edges.png, circuit.png and
scores.json. patching.py says what is measured. Metric and accuracy (the share of sentences with m > 0) are means over
all pairs, every other row only over the pairs that both models can use. Attribution is ranked against true patching, of
all heads and of EDGE_SAMPLE random edges.
Shapes: N pairs, H heads, L layers, S sources and as many destinations.
"""
import argparse
import os

import numpy as np
import torch
from tqdm import tqdm

import patching as P
from extras.figures import draw_circuits, draw_edges, draw_head_effects
from extras.llama import load_model
from extras.tasks import TASKS, make_pairs, select
from support.files import UserError, between, make_folder, run_command, write_json
from support.place import pick_device

USABLE = 0.1       # least m(clean) - m(corrupt) of a pair that has an effect to explain, in the metric's units
FAILS = 0.8        # a model that is right in a smaller share of the clean sentences does not do the task
BATCH = 25         # pairs at a time: with every source's output held, 1 GB for GPT-2 small and 40 positions
EVERY_HEAD = 32    # up to here each number of heads is tried, then steps of about a tenth
EDGE_SAMPLE = 30   # edges that are also patched for real
KINDS = ("per sentence", "global")    # a ranking for each pair, or one by the mean score over all pairs


def model_options(parser):
    for name in ("--dense", "--sparse"):
        parser.add_argument(name, required=True, help="a GPT-2 name, a path, or a checkpoint of ours")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda if there is one, else cpu")


def load_models(args):
    """{"dense": model, "sparse": model} on the device: two of one shape, but for the length that they read at most."""
    args.device = pick_device(args.device)
    models = {name: load_model(getattr(args, name)).to(args.device).requires_grad_(False)
              for name in ("dense", "sparse")}
    check_same_shape(models, f"{args.dense} and {args.sparse}")
    return models


def check_same_shape(models, who):
    """A UserError if the dense and the sparse model differ in more than their gates and the length that they read. who:
    their names, for the message."""
    dense, sparse = ({**vars(model.config), "family": type(model).__name__,
                      "their layout of sums": model.notes.get("layout")} for model in models.values())
    differ = [f"{key} {dense.get(key)} and {sparse.get(key)}" for key in sorted(dense.keys() | sparse.keys())
              if key not in ("block_size", "gated", "gate_bias", "temperature") and dense.get(key) != sparse.get(key)]
    if differ:
        raise UserError(f"{who} differ in {', '.join(differ)}\ncompare two models of one shape")


# ---- What is measured

@torch.no_grad()
def batched(function, model, pairs, *rowwise, **options):
    """function(model, clean, corrupt, metric, *rowwise, **options) for BATCH pairs at a time, joined: (N,...).
    rowwise: tensors with one row a pair."""
    return torch.cat([function(model, *select(*pairs, rows), *(t[rows] for t in rowwise), **options).cpu()
                      for rows in torch.arange(len(pairs[0])).split(BATCH)])


def plain_metrics(model, clean, corrupt, metric):
    """(N,2): m(clean) and m(corrupt)."""
    return torch.stack([metric(P.forward(model, tokens)) for tokens in (clean, corrupt)], 1)


def measure(model, pairs, m_clean, m_corrupt, points, seed):
    """All that is shown of one model, on pairs that have an effect, as {what: number, list or tensor}.
    m_clean, m_corrupt (N): the metric of the plain runs; points: of edge_scores."""
    heads = batched(P.head_scores, model, pairs)                                      # (N,L,H)
    edges = batched(P.edge_scores, model, pairs, points=points)                       # (N,S,S)
    changes = heads * (m_clean - m_corrupt)[:, None, None]                            # (N,L,H) m(patched) - m(corrupt)
    counts = head_counts(heads[0].numel())
    found = {"head scores": heads.mean(0), "edge scores": edges.mean(0), "numbers of heads": counts}
    for kind in KINDS:
        by_head, by_edge = changes, edges
        if kind == "global":    # a mean of changes: pairs of little effect count little
            by_head, by_edge = (scores.mean(0, keepdim=True).expand_as(scores) for scores in (changes, edges))
        order = by_head.flatten(1).argsort(descending=True)
        restored, explained = (P.share_of_effect(batched(measured, model, pairs, order, counts=counts), m_clean)
                               for measured in (P.metric_of_restored_heads, P.metric_of_kept_heads))
        shares = P.cumulative(by_edge).mean(0)[:1 + len(P.edge_names(model.config))]
        needed = P.first_reaching(shares)
        ranks = P.edge_ranks(by_edge if kind != "global" else by_edge[:1], model.config).expand_as(by_edge)
        nodes, between_heads = size(ranks < (needed or 0), model.config)

        def effect_alone(n):    # of the n best edges, as far as they have a score at all
            m = batched(P.kept_circuit, model, pairs, (ranks < n) & (by_edge != 0))
            return P.share_of_effect(torch.stack((m_corrupt, m), 1), m_clean)[1].item()

        by_number, enough = kept_circuits(effect_alone, len(shares) - 1, needed or 1)
        few, kept = (n if n is None else counts[n] for n in map(P.first_reaching, (restored, explained)))
        found |= {f"restored effect, {kind}": restored, f"heads restored, {kind}": few,
                  f"explained effect, {kind}": explained, f"heads kept, {kind}": kept,
                  f"share of scores, {kind}": shares, f"edges, {kind}": needed, f"nodes of these edges, {kind}": nodes,
                  f"from head to head, {kind}": between_heads, f"kept circuit, {kind}": by_number,
                  f"effect of these edges alone, {kind}": by_number.get(needed),
                  f"edges that alone have {P.SHARE:.0%} of the effect, {kind}": enough}
    one = edges if points == 1 else batched(P.edge_scores, model, pairs)
    return found | agreement(model, pairs, changes, {1: one, points: edges}, seed)


def head_counts(most):
    """The numbers of heads that are restored or kept, from none to all `most`."""
    return sorted({*range(min(most, EVERY_HEAD) + 1), *(round(n) for n in np.geomspace(1, most, 60))})


def size(edges, config):
    """Of a circuit (N,S,S), means over pairs: heads and MLPs that hold an edge of it; edges from a head to a head."""
    inner = edges[:, 1:, :-1]    # without embedding and logits
    is_head = torch.arange(inner.shape[1]) % (config.n_head + 1) < config.n_head    # heads, then an MLP, layer by layer
    holds = edges[:, 1:].any(2) | edges[:, :, :-1].any(1)    # (N,S-1): as source, as destination
    between_heads = inner & is_head[:, None] & is_head
    return holds.sum(1).double().mean().item(), between_heads.sum((1, 2)).double().mean().item()


def kept_circuits(effect_alone, most, needed):
    """{n: effect of the n best edges alone} on a grid from 1 to `most`; and an n where it reaches SHARE and n - 1 does
    not, or None. If the effect grows with n this n is the first. A crossing between two grid points may be missed."""
    grid = {round(n) for n in np.geomspace(1, most, 24)} | {needed}
    kept = {n: effect_alone(n) for n in tqdm(sorted(grid), desc="circuits", leave=False)}
    reached = [n for n in kept if kept[n] >= P.SHARE]
    if not reached:
        return kept, None
    enough = min(reached)
    too_few = max((n for n in kept if n < enough), default=0)
    while enough - too_few > 1:
        n = (too_few + enough) // 2
        kept[n] = effect_alone(n)
        if kept[n] >= P.SHARE:
            enough = n
        else:
            too_few = n
    return dict(sorted(kept.items())), enough


def agreement(model, pairs, changes, edges, seed):
    """Attribution against truth: rank correlations over all (pair, head) and all (pair, sampled edge).
    changes (N,L,H): m(patched) - m(corrupt) of heads; edges {points: edge_scores (N,S,S)}."""
    names, found = P.edge_names(model.config), {}
    sample = np.random.default_rng(seed).permutation(len(names))[:EDGE_SAMPLE]
    exact = torch.stack([batched(P.exact_edge_score, model, pairs, source=names[i][0], destination=names[i][1])
                         for i in tqdm(sample, desc="edges", leave=False)], 1)        # (N,EDGE_SAMPLE)
    for points, scores in edges.items():
        of_heads = scores[:, 1:].sum(-1).unflatten(1, (model.config.n_layer, -1))[..., :-1]    # (N,L,H)
        of_sample = scores[:, P.edge_mask(model.config)][:, sample]                   # (N,EDGE_SAMPLE)
        key = f"rank correlation with patching, gradient at {points} point{'s' * (points > 1)}"
        found |= {f"{key}, heads": spearman(of_heads.flatten(), changes.flatten()),
                  f"{key}, edges": spearman(of_sample.flatten(), exact.flatten())}
    return found


def spearman(x, y):
    """Rank correlation of two equally long sequences of numbers; None if one of them is constant."""
    def ranks(values):    # equal values share the mean of their ranks
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[group]
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


# ---- What is shown

def gates_of(model):
    """The b of a model's gates in words."""
    if not model.config.gated:
        return "no gates"
    low, high = (round(b.item(), 3) for b in torch.cat([block.attn.gate_bias for block in model.h]).aminmax())
    return f"gates with b = {low}" + f" to {high}" * (high > low)


def print_table(found):
    print(f"\n{'':62}    dense   sparse   dense / sparse")
    for what in found["dense"]:
        values = [f[what] for f in found.values()]
        if any(isinstance(x, (int, float)) for x in values):
            text = "".join(f"{'--' if x is None else x if isinstance(x, int) else f'{x:.3f}':>9}" for x in values)
            ratio = what.startswith(("heads", "edges")) and all(values)
            print(f"{what:62}{text}" + (f"{values[0] / values[1]:10.1f}x" if ratio else ""))


def compare(args):
    args.out = args.out or f"runs/patching-{args.task}"
    models = load_models(args)
    shorter = min(models.values(), key=lambda model: model.config.block_size)    # what it can read, both can
    pairs = make_pairs(args.task, args.pairs, args.seed, shorter, corruption=args.corruption, template=args.template)
    config = shorter.config
    make_folder(args.out)
    total = len(P.edge_names(config))
    print(f"{args.task}: {args.pairs} pairs of {pairs[0].shape[1]} tokens, {config.n_layer} layers of "
          f"{config.n_head} heads, {total:,} edges, {args.device}, seed {args.seed}, output in {args.out}")
    metrics = {name: batched(plain_metrics, model, pairs).T for name, model in models.items()}   # (2,N) each
    usable = torch.stack([m[0] - m[1] >= USABLE for m in metrics.values()])                      # (2,N)
    both, skipped = usable.all(0), (~usable).sum(1).tolist()
    if not both.any():
        raise UserError(f"no usable pair: in none is m(clean) - m(corrupt) at least {USABLE} in both models\n"
                        f"too small in {skipped[0]} (dense) and {skipped[1]} (sparse) of {args.pairs}: take another "
                        "--task, or models that do this one")
    found, notes = {}, []
    for (name, m), few in zip(metrics.items(), skipped):
        mean, right = m.mean(1).tolist(), (m > 0).double().mean(1).tolist()
        found[name] = {"metric, clean": mean[0], "metric, corrupted": mean[1], "accuracy, clean": right[0],
                       "accuracy, corrupted": right[1], "pairs skipped": few,
                       **measure(models[name], select(*pairs, both), *m[:, both], args.points, args.seed)}
        notes.append(f"{name}: {getattr(args, name)}, {gates_of(models[name])}; {few} pairs skipped, where "
                     f"m(clean) - m(corrupt) < {USABLE}")
        if right[0] < FAILS:
            notes.append(f"{name} fails the task: accuracy {right[0]:.0%}. Its circuit, if smaller, is not simpler")
    notes.append(f"measured on the {both.sum()} pairs that both models can use")
    print_table(found)
    print("\n".join(notes))
    write_json(os.path.join(args.out, "scores.json"), indent=None, content={
        **vars(args), "notes": notes, "sources": P.nodes(config)[:-1], "destinations": P.nodes(config)[1:], **found})
    draw(found, config, f"{args.task}, {both.sum()} pairs, dense beside sparse", args.out)


def draw(found, config, title, out):
    """heads.png and edges.png, and in circuit.png the edges that hold SHARE of the mean |scores|."""
    draw_head_effects(found, KINDS, P.SHARE, title, os.path.join(out, "heads.png"))
    draw_edges(found, KINDS, P.SHARE, title, os.path.join(out, "edges.png"))
    scores = {name: f["edge scores"] * (P.edge_ranks(f["edge scores"], config) < (f["edges, global"] or 0))
              for name, f in found.items()}                                                      # (S,S) each
    title = f"{title}: edges with {P.SHARE:.0%} of the mean |scores|; width by |score|, dashed below 0"
    draw_circuits(scores, config.n_layer, config.n_head, len(P.edge_names(config)), title,
                  os.path.join(out, "circuit.png"))


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.circuits --dense A --sparse B --task T [options]",
                                     description="Circuits of a task, dense beside sparse: Figures 3 to 5.")
    model_options(parser)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--pairs", type=between(int, 1, 1000), default=100, help="of sentences (default 100)")
    parser.add_argument("--points", type=between(int, 1, 1000), default=10,
                        help="at which an edge's gradient is taken; 1: attribution patching (default 10)")
    parser.add_argument("--corruption", choices=("abc", "swap"),
                        help="of ioi and ioi-long: three fresh names (default), or the second subject swapped")
    parser.add_argument("--template", choices=("ours", "paper"),
                        help="of ioi, ioi-long and greater-than: sentences of ours (default), or of the tasks' papers")
    parser.add_argument("--out", help="folder for pictures and scores.json (default runs/patching-TASK)")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of sentences and edges (default 0)")
    run_command(parser, compare)


if __name__ == "__main__":
    main()

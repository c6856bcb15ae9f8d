"""What `python patching.py` does: one task, two models, a table and three pictures (Figures 3 to 5 of the paper).

A model's numbers are measured on the pairs that both models can use, in batches, and each shortcut is shown beside
the real thing. Accuracy is the share of sentences with m > 0.
"""
import argparse
import dataclasses
import os

import numpy as np
import torch
from tqdm import tqdm

from extras.figures import draw_circuits, draw_effects
from extras.files import UserError, between, make_folder, pick_device, write_json
from extras.tasks import TASKS, make_pairs, select
from model import GPT
from patching import (SHARE, cumulative, edge_names, edge_scores, edges_needed, exact_edge_score, head_scores,
                      heads_needed, kept_circuit, metric_of_first_heads, nodes, run, share_of_effect, top_edges)

USABLE = 0.1       # least m(clean) - m(corrupt) of a pair that has an effect to explain, in the metric's units
FAILS = 0.8        # a model that is right in a smaller share of the clean sentences does not do the task
BATCH = 25         # pairs at a time: with every source's output held, 1 GB for GPT-2 small and 40 positions
EDGE_SAMPLE = 30   # edges that are also patched for real
KINDS = ("per sentence", "global")    # a ranking for each pair, or one by the mean score over all pairs


def spearman(x, y):
    """Rank correlation of two equally long sequences of numbers; None if one of them is constant."""
    def ranks(values):    # equal values share the mean of their ranks
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[group]
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


@torch.no_grad()
def batched(function, model, pairs, *rowwise, **options):
    """function(model, clean, corrupt, metric, *rowwise, **options) for BATCH pairs at a time, joined: (N,...).
    rowwise: tensors with one row a pair."""
    return torch.cat([function(model, *select(*pairs, rows), *(t[rows] for t in rowwise), **options).cpu()
                      for rows in torch.arange(len(pairs[0])).split(BATCH)])


def both_metrics(model, clean, corrupt, metric):
    """(N,2): m(clean) and m(corrupt)."""
    return torch.stack([metric(run(model, tokens)[0]) for tokens in (clean, corrupt)], 1)


def measure(model, pairs, m_clean, m_corrupt, seed):
    """All that is shown of one model, on pairs that have an effect, as {what: number, list or tensor}.
    m_clean, m_corrupt (N): the metric of the plain runs."""
    config, found = model.config, {}
    effect = m_clean - m_corrupt
    heads = batched(head_scores, model, pairs)                                    # (N,L,H)
    edges = {"off": batched(edge_scores, model, pairs)}                           # (N,S,S), gate gradient off
    if config.gated:
        edges["on"] = batched(edge_scores, model, pairs, gate_gradient=True)
    found["head scores"], found["edge scores"] = heads.mean(0), edges["off"].mean(0)
    for kind in KINDS:
        by_head, by_edge = heads, edges["off"]
        if kind == "global":    # by the mean of m(patched) - m(corrupt): pairs of little effect count little
            by_head, by_edge = ((scores * size).mean(0, keepdim=True).expand_as(scores) for scores, size in (
                (by_head, effect[:, None, None]), (by_edge, 1)))
        m = batched(metric_of_first_heads, model, pairs, by_head.flatten(1).argsort(descending=True))
        curve = share_of_effect(m, m_clean)
        found[f"explained effect, {kind}"], found[f"heads, {kind}"] = curve, heads_needed(curve)
        curve = cumulative(by_edge).mean(0)[:1 + len(edge_names(config))]
        found[f"share of scores, {kind}"], found[f"edges, {kind}"] = curve, edges_needed(curve)

        def effect_alone(n):    # of the n best edges, as far as they have a score at all
            m = batched(lambda model, *batch: kept_circuit(model, batch[-1], *batch[:-1]), model, pairs,
                        top_edges(by_edge, n, config) & (by_edge != 0))
            return ((m - m_corrupt).mean() / effect.mean()).item()

        points = {round(n) for n in np.geomspace(1, len(curve) - 1, 24)} | {edges_needed(curve) or 1}
        kept = {n: effect_alone(n) for n in tqdm(sorted(points), desc="circuits", leave=False)}
        enough = next((n for n, share in kept.items() if share >= SHARE), None)
        few = max((n for n in kept if enough and n < enough), default=0)
        while enough and enough - few > 1:    # between two points: halve
            n = (few + enough) // 2
            kept[n] = effect_alone(n)
            few, enough = (few, n) if kept[n] >= SHARE else (n, enough)
        found[f"kept circuit, {kind}"] = dict(sorted(kept.items()))
        found[f"effect of these edges alone, {kind}"] = kept.get(edges_needed(curve))
        found[f"edges that alone have {SHARE:.0%} of the effect, {kind}"] = enough

    # Attribution against truth, over all (pair, head) and all (pair, sampled edge).
    names, sample = nodes(config), edge_names(config)
    sample = [sample[i] for i in np.random.default_rng(seed).permutation(len(sample))[:EDGE_SAMPLE]]
    exact = torch.stack([batched(exact_edge_score, model, pairs, source=s, destination=d)
                         for s, d in tqdm(sample, desc="edges", leave=False)], 1)
    at = [names.index(s) for s, _ in sample], [names.index(d) - 1 for _, d in sample]
    for gate, s in edges.items():
        of_heads = s[:, 1:].sum(-1).unflatten(1, (config.n_layer, -1))[..., :-1]  # (N,L,H)
        key = f"rank correlation with patching, gate gradient {gate}"
        found[key + ", heads"] = spearman(of_heads.flatten(), (heads * effect[:, None, None]).flatten())
        found[key + ", edges"] = spearman(s[:, at[0], at[1]].flatten(), exact.flatten())
    return found


def model_options(parser):
    for name in ("--dense", "--sparse"):
        parser.add_argument(name, required=True, help="a GPT-2 name, a path, or a checkpoint of ours")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda if there is one, else cpu")


def load_models(args):
    """{"dense": model, "sparse": model} on the device, two of one shape; a longer one is cropped to the other."""
    args.device = pick_device(args.device)
    paths = {"dense": args.dense, "sparse": args.sparse}
    models = {name: GPT.from_pretrained(path) for name, path in paths.items()}
    shortest = min(model.config.block_size for model in models.values())
    for name, model in models.items():
        if model.config.block_size > shortest:
            models[name] = GPT.from_pretrained(paths[name], block_size=shortest)
        models[name].to(args.device)
    layouts = {model.notes.get("layout") for model in models.values()}
    dense, sparse = ({"family": type(model).__name__, **dataclasses.asdict(model.config)} for model in models.values())
    differ = [f"{key} {dense.get(key)} and {sparse.get(key)}" for key in {**dense, **sparse}.keys()
              - {"gated", "gate_bias"} if dense.get(key) != sparse.get(key)]
    differ += ["their layout of sums"] * (len(layouts) > 1)
    if differ:
        raise UserError(f"{args.dense} and {args.sparse} differ in {', '.join(sorted(differ))}\n"
                        "compare two models of one shape")
    return models


def print_table(found):
    print(f"\n{'':58}    dense   sparse   dense / sparse")
    for what in dict.fromkeys([*found["dense"], *found["sparse"]]):    # a model without gates lacks some rows
        values = [f.get(what) for f in found.values()]
        if any(isinstance(x, (int, float)) for x in values):
            text = "".join(f"{'--' if x is None else x if isinstance(x, int) else f'{x:.3f}':>9}" for x in values)
            ratio = what.startswith(("heads", "edges")) and all(values)
            print(f"{what:58}{text}" + (f"{values[0] / values[1]:10.1f}x" if ratio else ""))


def compare(args):
    models = load_models(args)
    config = models["dense"].config
    if args.corruption and args.task != "ioi":
        raise UserError("--corruption is a choice of --task ioi\nleave it out")
    options = {"corruption": args.corruption} if args.corruption else {}
    pairs = make_pairs(args.task, args.pairs, args.seed, models["dense"], **options)
    make_folder(args.out)
    print(f"{args.task}: {args.pairs} pairs of {pairs[0].shape[1]} tokens, {config.n_layer} layers of "
          f"{config.n_head} heads, {len(edge_names(config)):,} edges, {args.device}, seed {args.seed}, "
          f"output in {args.out}")
    found, notes, usable = {}, [], torch.ones(args.pairs, dtype=torch.bool)
    metrics = {name: batched(both_metrics, model, pairs).T for name, model in models.items()}    # (2,N) each
    for name, (m_clean, m_corrupt) in metrics.items():
        small = m_clean - m_corrupt < USABLE
        usable &= ~small
        accuracy = (m_clean > 0).double().mean().item()
        found[name] = {"metric, clean": m_clean.mean().item(), "metric, corrupted": m_corrupt.mean().item(),
                       "accuracy, clean": accuracy, "accuracy, corrupted": (m_corrupt > 0).double().mean().item(),
                       "pairs skipped": int(small.sum())}
        own = models[name].config
        gates = f"gates with b = {own.gate_bias}" if own.gated else "no gates"
        notes.append(f"{name}: {getattr(args, name)}, {gates}; {small.sum()} pairs skipped, where "
                     f"m(clean) - m(corrupt) < {USABLE}")
        if accuracy < FAILS:
            notes.append(f"{name} fails the task: accuracy {accuracy:.0%}. Its circuit, if smaller, is not simpler")
    notes.append(f"measured on the {usable.sum()} pairs that both models can use")
    if not usable.any():
        raise UserError(f"no usable pair: in none is m(clean) - m(corrupt) at least {USABLE} in both models\n"
                        f"too small in {found['dense']['pairs skipped']} (dense) and "
                        f"{found['sparse']['pairs skipped']} (sparse) of {args.pairs}: they do not do this task")
    for name, model in models.items():
        found[name] |= measure(model, select(*pairs, usable), *metrics[name][:, usable], args.seed)
    print_table(found)
    print("\n".join(notes))

    title = f"{args.task}, {usable.sum()} pairs, dense beside sparse"
    for of in ("heads", "edges"):
        draw_effects(found, of, KINDS, SHARE, title, os.path.join(args.out, f"{of}.png"))
    circuits = {}
    for name, f in found.items():    # the edges that hold SHARE of the mean |scores|
        scores = f["edge scores"]
        chosen = top_edges(scores, f["edges, global"] or 0, config).nonzero().tolist()
        circuits[name] = [(s, d + 1, scores[s, d].item()) for s, d in chosen]
    draw_circuits(circuits, config.n_layer, config.n_head, len(edge_names(config)),
                  f"{title}: edges with {SHARE:.0%} of the mean |scores|; width by |score|, dashed below 0",
                  os.path.join(args.out, "circuit.png"))
    write_json(os.path.join(args.out, "scores.json"), indent=None, content={
        **vars(args), "notes": notes, "sources": nodes(config)[:-1], "destinations": nodes(config)[1:], **found})


def main():
    parser = argparse.ArgumentParser(usage="python patching.py --dense A --sparse B --task T [options]",
                                     description="Circuits of a task, dense beside sparse: Figures 3 to 5.")
    model_options(parser)
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--pairs", type=between(int, 1, 1000), default=100, help="of sentences (default 100)")
    parser.add_argument("--corruption", choices=("abc", "swap"),
                        help="of ioi: three fresh names (default), or the second subject swapped")
    parser.add_argument("--out", help="folder for pictures and scores.json (default runs/patching-TASK)")
    parser.add_argument("--seed", type=between(int, 0, 2**31), default=0, help="of the sentences and sampled edges")
    args = parser.parse_args()
    args.out = args.out or f"runs/patching-{args.task}"
    try:
        compare(args)
    except (UserError, OSError) as error:
        parser.error(str(error))

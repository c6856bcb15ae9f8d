"""The command of extras/attribution.py, dense beside sparse: how many heads and keys carry what acts across positions?

    python -m extras.attribute --dense A --sparse B [--prompts 50] [--out runs/attribution]

A and B are folders of extras/transcoder.py: of a dense control and of a sparse model of its shape, trained alike. A
prompt is a piece of validation text whose next token both models get right. For sums it is a sum, cut after the tens
slot, and the token is the tens digit. extras/attribution.py makes a graph of each prompt. We take the 20 edges across
positions that count most for the token, and split each into what every head carries from every key to every query:

    c_mh(i,j), i != j        edge = its sum over h, i and j at a layer m + what stays at its position there     (20)

An edge that moves at two layers is counted at both. How many heads hold 80 % of the sum of |c|? For heads, c is first
summed over i and j, for pairs of head and key over i. Three arms:

    dense    the control
    sparse   the sparse model
    cut      the control with its largest attention weights only: at each layer and query as many as the sparse model
             has open edges there: does training matter, or only the number? (Its transcoder is the control's.)

The check is an intervention in the live model: some pairs of head and key are closed to all queries, and all that comes
after is computed anew, MLPs too. If the five that carry most matter, the log-probability of the token falls further
than with five others that are in use. Compare this within an arm only: a closed gate is nothing new to the sparse
model.
Shapes: L layers, H heads, T positions, E edges of a graph, S nodes, N prompts.
"""
import argparse
import os

import numpy as np
import torch
from tqdm import tqdm

from extras.attribution import Frozen, importance, prune
from extras.circuits import check_same_shape
from extras.figures import draw_carriers, draw_graphs
from extras.llama import load_model
from extras.tokenizer import encoding_of
from extras.transcoder import FREE, load_transcoder, mlp_sites
from patching import cumulative, first_reaching, forward
from support.data import load_data, spread
from support.files import UserError, between, make_folder, read_json, run_command, write_json
from toy_addition import addition_data, split as split_sums

EDGES = 20       # of each prompt
ABLATED = 5      # pairs of head and key that are closed at a time
DRAWS = 5        # of random ones
DRAWN = 40       # edges in a picture of a graph
POOL = 2000      # pieces of text from which the prompts are chosen
PLACES = ("a tens", "a units", "+", "b tens", "b units", "=", "units slot", "tens slot")    # of a sum
UNITS = {"heads": lambda c: c.sum((-2, -1)).abs(), "(head, key)": lambda c: c.sum(-2).abs(), "attention edges": abs}


# ---- Prompts

@torch.no_grad()
def prompts_of(models, data, count, length, seed):
    """Prompts (N,T) and their answers (N), which all models get right: the next token; of a sum the tens digit."""
    some = models[0]
    if data == "addition":
        if some.notes["layout"] != "reversed":
            raise UserError("the paper's layout is not read from left to right: a sum cannot be cut at the tens slot\n"
                            "train the toy with --layout reversed")
        (idx, targets), (_, held_out) = addition_data(), split_sums()
        idx, targets = idx[held_out, :-1], targets[held_out, -2]
    else:
        val_tokens = load_data(data, encoding_of(some))[1]
        if not length <= min(some.config.block_size, len(val_tokens) - 1):
            raise UserError(f"--length {length} is too long: the model reads {some.config.block_size} tokens, the "
                            f"validation text has {len(val_tokens)}\npass a smaller --length")
        idx, targets = spread(val_tokens, length, POOL)
        targets = targets[:, -1]
    right = torch.ones(len(idx), dtype=torch.bool)
    for model in models:
        right &= torch.cat([likeliest(model, rows) for rows in idx.split(100)]) == targets
    if right.sum() < count:
        raise UserError(f"both models get the next token of only {right.sum()} of {len(idx)} prompts right\n"
                        f"pass fewer --prompts{'' if data == 'addition' else ', or another --length'}")
    chosen = np.random.default_rng(seed).choice(right.nonzero()[:, 0].numpy(), count, replace=False)
    return idx[chosen], targets[chosen]


def likeliest(model, idx):
    return model.unembed(mlp_sites(model, idx).last[:, -1:])[:, 0].argmax(-1)        # (N)


@torch.no_grad()
def largest_weights(model, tokens, counts):
    """keep (L,H,T,T), 0 or 1: in layer l query i keeps the counts[l,i] largest weights that it has in all heads, after
    the layers before have been cut so. tokens (T), counts (L,T)."""
    T, keep = len(tokens), []

    def attend(attn, q, k, v):
        weights = attn.weights(q, k)                                                 # (1,H,T,T)
        by_query = weights[0].transpose(0, 1).flatten(1)                             # (T,H*T)
        rank = by_query.argsort(1, descending=True).argsort(1)
        keep.append((rank < counts[len(keep)][:, None]).view(T, -1, T).transpose(0, 1).to(weights))
        return (keep[-1] * weights) @ v

    forward(model, tokens[None], attend=attend)
    return torch.stack(keep)


# ---- What is measured

def carriers(frozen, graph):
    """Of the EDGES edges across positions that count most for the logit, fewer if there are fewer: what each head
    carries of them from each key to each query, (E,L,H,T,T), by how much each counts, (E), and their share of all that
    crosses positions."""
    position = torch.tensor([node.position for node in graph.nodes])
    counts = importance(graph.edges) * (position[:, None] != position)      # (S,S)
    best = counts.flatten().topk(EDGES)
    chosen = best.indices[best.values > 0].tolist()
    c = frozen.patterns.new_zeros(len(chosen), *frozen.patterns.shape)
    for row, n in zip(c, chosen):
        source, target = (graph.nodes[i] for i in divmod(n, len(graph.nodes)))
        for m, (carried, _) in frozen.split(source, target).items():
            row[m] = carried - torch.diag_embed(carried.diagonal(dim1=1, dim2=2))    # what crosses positions
    return c, best.values[:len(chosen)], (best.values.sum() / counts.sum().clamp(min=1e-30)).item()


def parts(c, counts):
    """{unit: (shares (E,n), shares (1,n))}: what part of each edge each unit carries, and the mean of these over the
    edges, weighted by `counts`."""
    found = {}
    for unit, of in UNITS.items():
        share = of(c).flatten(1)
        share = share / share.sum(1, keepdim=True).clamp(min=1e-30)
        found[unit] = share, (counts[:, None] * share).sum(0, keepdim=True) / counts.sum().clamp(min=1e-30)
    return found


def mean_curve(share):
    """(N,n) shares -> (n+1): held by none, by the largest, by the two largest, ...; mean of the rows that hold any."""
    share = share[share.any(1)]
    return cumulative(share[:, None]).sum(0) / max(len(share), 1)


@torch.no_grad()
def log_p(model, tokens, keep):
    return model.unembed(mlp_sites(model, tokens[None], keep=keep).last[:, -1:])[0, 0].log_softmax(-1)


def falls(model, tokens, target, keep, patterns, mass, rng):
    """By how much log p of the target falls when the pairs of head and key of largest mass (L,H,T) are closed; and the
    mean of DRAWS random choices of as many other pairs in use. ABLATED pairs, fewer if there are fewer of either kind;
    (None, None) if there are none."""
    order = mass.flatten().argsort(descending=True).tolist()
    used = (patterns.sum(2) > 0).flatten()                                           # (L*H*T) read by some query
    top = [n for n in order[:ABLATED] if mass.flatten()[n] > 0]
    others = [n for n in order if used[n] and n not in top]
    few, whole = min(len(top), len(others)), log_p(model, tokens, keep)

    def fall(chosen):
        closed = torch.ones(mass.numel())
        closed[torch.as_tensor(chosen)] = 0
        left = log_p(model, tokens, keep * closed.view_as(mass)[:, :, None])
        return (whole - left)[target].item()

    if not few:
        return None, None
    return fall(top[:few]), np.mean([fall(rng.choice(others, few, replace=False)) for _ in range(DRAWS)])


def measure(model, transcoder, tokens, target, keep, most, rng):
    """One prompt in one arm: its graph, what `parts` says, and numbers by name."""
    frozen = Frozen(model, transcoder, tokens, target, keep=keep)
    graph = frozen.graph(most)
    c, counts, held = carriers(frozen, graph)
    found = parts(c, counts)
    _, _, replacement, completeness = prune(graph)
    logs = log_p(model, tokens, keep)
    top, others = falls(model, tokens, target, keep, frozen.patterns,
                        found["(head, key)"][1].view(frozen.patterns.shape[:3]), rng)
    return graph, found, {
        "edges open": float((frozen.patterns > 0).sum()), "the token is the likeliest": float(logs.argmax() == target),
        "log p of the token": logs[target].item(), "replacement": replacement, "completeness": completeness,
        "edges of the graph that are split": float(len(c)), "their share of what crosses positions": held,
        "fall without the pairs that carry most": top, "fall without as many others": others}


# ---- What is shown

def summary(found, numbers):
    """Of one arm: the mean of each number over its prompts; for each unit the mean cumulative curve, and how many units
    hold 80 and 90 %."""
    rows = {name: [n[name] for n in numbers if n[name] is not None] for name in numbers[0]}
    made = {name: float(np.mean(values)) if values else None for name, values in rows.items()}
    for unit in UNITS:
        for what, shares_of in zip(("an edge", "a prompt"), zip(*(f[unit] for f in found))):
            curve = mean_curve(torch.cat(shares_of))
            made[f"curve: {unit} of {what}"] = curve.tolist()
            for share in (0.8, 0.9):
                made[f"{unit} for {share:.0%} of {what}"] = first_reaching(curve, share)
    return made


def print_table(found):
    print(f"\n{'':42}" + "".join(f"{arm:>10}" for arm in found))
    for name, value in found["dense"].items():
        if not isinstance(value, list):
            values = (arm[name] for arm in found.values())
            print(f"{name:42}" + "".join(f"{'--' if x is None else f'{x:.2f}' if isinstance(x, float) else x:>10}"
                                         for x in values))


def print_sums(by_arm, prompts, L, H):
    """Of sums: the mean share of each (layer, head, key), of sums with a carry from the units and of those without."""
    carry = prompts[:, 1] + prompts[:, 4] >= 10                                      # (N)
    for arm, found in by_arm.items():
        share = torch.cat([f["(head, key)"][1] for f in found]).view(len(prompts), L, H, -1)        # (N,L,H,T)
        with_carry, without = (share[rows].sum(0) / rows.sum().clamp(min=1) for rows in (carry, ~carry))
        print(f"\n{arm + ', carried by':42}with carry   without")
        for n in (with_carry + without).flatten().argsort(descending=True)[:6].tolist():
            place = layer, head, key = np.unravel_index(n, with_carry.shape)
            if with_carry[place] + without[place] > 0:
                name = f"layer {layer}, head {head}, key {PLACES[key]}"
                print(f"{name:42}{with_carry[place]:10.1%}{without[place]:10.1%}")


def strongest(graph):
    """The edges of a picture, [(source, target, count, with the edge's sign), ...], after pruning."""
    counts = importance(graph.edges) * prune(graph)[1]
    best = counts.flatten().topk(min(DRAWN, counts.numel()))
    pairs = [divmod(n, len(graph.nodes)) for n in best.indices[best.values > 0].tolist()]
    return [(graph.nodes[s], graph.nodes[t], (counts[s, t] * graph.edges[s, t].sign()).item()) for s, t in pairs]


def compare(args):
    folders = {"dense": args.dense, "sparse": args.sparse}
    runs = {name: read_json(os.path.join(folder, "args.json")) for name, folder in folders.items()}
    for name, run in runs.items():
        if "model" not in run:
            raise UserError(f"{folders[name]} is no folder of extras.transcoder\npass one that it made")
    differ = [name for name in runs["dense"] if name not in ("model", *FREE)
              and runs["dense"][name] != runs["sparse"].get(name)]
    if differ:
        raise UserError(f"{args.dense} and {args.sparse} were trained with other {', '.join(differ)}\n"
                        "compare two transcoders that were trained alike")
    models = {name: load_model(run["model"]).requires_grad_(False) for name, run in runs.items()}
    check_same_shape(models, f"the models of {args.dense} and {args.sparse}")
    transcoders = {name: load_transcoder(folders[name], model) for name, model in models.items()}
    quality = {name: read_json(os.path.join(folder, "summary.json")) for name, folder in folders.items()}
    data, config = runs["dense"]["data"], models["dense"].config
    prompts, targets = prompts_of(list(models.values()), data, args.prompts, args.length, args.seed)
    make_folder(args.out)
    arms = {"dense": "dense", "sparse": "sparse", "cut": "dense"}    # whose weights
    found, numbers, graphs = {arm: [] for arm in arms}, {arm: [] for arm in arms}, {}
    rng = np.random.default_rng(args.seed)
    for tokens, target in zip(tqdm(prompts, desc="prompts"), targets.tolist()):
        is_open = models["sparse"].attention_maps(tokens[None])[:, 0] > 0            # (L,H,T,T)
        keep = dict.fromkeys(arms, torch.ones(is_open.shape))
        keep["cut"] = largest_weights(models["dense"], tokens, is_open.sum((1, 3)))
        for arm, of in arms.items():
            graph, shared, named = measure(models[of], transcoders[of], tokens, target, keep[arm], args.most, rng)
            found[arm].append(shared)
            numbers[arm].append(named)
            graphs.setdefault(arm, graph)    # of the first prompt, for the picture
    table = {}
    for arm, of in arms.items():
        table[arm] = {"explained variance": float(np.mean(quality[of]["explained"])),
                      "recovered": quality[of]["recovered"]} | summary(found[arm], numbers[arm])
    print_table(table)
    if data == "addition":
        print_sums(found, prompts, config.n_layer, config.n_head)
    encoding = None if data == "addition" else encoding_of(models["dense"])
    labels = [repr(encoding.decode([t]))[1:-1] for t in prompts[0].tolist()] if encoding else PLACES
    write_json(os.path.join(args.out, "attribution.json"), {"options": vars(args), **table})
    title = f"{args.prompts} prompts of {prompts.shape[1]} tokens, their {EDGES} strongest edges across positions"
    draw_carriers(table, UNITS, title, os.path.join(args.out, "carriers.png"))
    draw_graphs({arm: strongest(graphs[arm]) for arm in ("dense", "sparse")}, labels, config.n_layer,
                "What the next token comes from: the edges that count most", os.path.join(args.out, "graph.png"))
    print(f"\nattribution.json, carriers.png and graph.png are in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.attribute --dense A --sparse B [options]",
                                     description="Attention attribution: which heads and keys carry what?")
    for name in ("--dense", "--sparse"):
        parser.add_argument(name, required=True, help="a folder of python -m extras.transcoder")
    for name, kind, default, about in (
        ("--prompts", between(int, 1, 10**5), 50, "how many"),
        ("--length", between(int, 2, 10**5), 32, "tokens of a prompt; of sums, always up to the tens slot"),
        ("--most", between(int, 1, 10**6), 100, "features of a layer that get their edges: those that count most"),
        ("--seed", between(int, 0, 2**31), 0, "of the prompts and the random ablations"),
        ("--out", str, "runs/attribution", "folder of attribution.json and the pictures"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{about} (default {default})")
    run_command(parser, compare)


if __name__ == "__main__":
    main()

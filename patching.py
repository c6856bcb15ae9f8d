"""Circuits, dense beside sparse: which heads and edges carry a task (Figures 3 to 5 of the paper).

    python patching.py --dense A --sparse B --task ioi [--pairs 100] [--out runs/patching-ioi]

A and B: GPT-2 names, paths, or checkpoints of ours. Prints a table; writes heads.png, edges.png, circuit.png and
scores.json. Every shortcut stands beside the real thing: edge_scores beside exact_edge_score, cumulative beside
kept_circuit.

A task gives pairs of sentences and a metric m, which is high where the model answers rightly:

    clean    After Anna and Paul came to the park, Paul passed the key to    m = logit(Anna) - logit(Paul), about 3
    corrupt  After Lucy and Mark came to the park, Jane passed the key to    the same m, about 0

Direction: the model runs on the corrupted sentence, and clean outputs are patched in (denoising).
Sign: a score above 0 moves m towards the clean run. All patches act at all positions.

    head score             (m(patched) - m(corrupt)) / (m(clean) - m(corrupt)), one head patched       (1)
    explained effect EE(k)  the same with the first k heads patched, as a ratio of means over pairs     (2)
    edge score s(u,v)       sum over positions of (out_u(clean) - out_u(corrupt)) . dm/d(in_v)          (3)
    cumulative share C(n)   sum of the n largest |s(u,v)| / sum of all                                  (4)

The graph has embedding, heads and MLPs as sources u, and heads, MLPs and logits as destinations v; q, k and v of a
head read through one input. A head's output is its z times its rows of the output projection, whose bias belongs to
no head. in_v is the residual stream as v reads it, before its LayerNorm; its gradient on the corrupted run is taken
through v only. (3) is in the metric's units: a first-order estimate of what exact_edge_score measures.

Shapes: N pairs, B batch, T positions, C width, H heads, D head size, L layers, V vocabulary, S = 1 + L (H+1)
sources and as many destinations.
"""
import contextlib
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from extras.files import UserError
from extras.tasks import addition, copy, docstring, greater_than, ioi, select    # for whoever imports this file

SHARE = 0.9    # of the effect that a circuit must explain


# ---- The graph

def nodes(config):
    """embed, a0.h0 ... m0, a1.h0 ... m1, ..., logits. Sources: all but the last; destinations: all but the first."""
    layers = [[f"a{l}.h{h}" for h in range(config.n_head)] + [f"m{l}"] for l in range(config.n_layer)]
    return ["embed", *sum(layers, []), "logits"]


def edge_mask(config):
    """(S,S) bool: does destination d read source s? A head feeds its own layer's MLP, but none of its heads."""
    H, S = config.n_head, 1 + config.n_layer * (config.n_head + 1)
    mask = torch.zeros(S, S, dtype=torch.bool)
    for d in range(S):
        n = d % (H + 1)                       # head n of its layer, H: the MLP; 0 for the logits
        mask[:1 + (d if n == H else d - n), d] = True
    return mask


def edge_names(config):
    """(source, destination) of every edge, in the order of scores[..., edge_mask(config)]."""
    names = nodes(config)
    return [(names[s], names[d + 1]) for s, d in edge_mask(config).nonzero().tolist()]


# ---- Running a model with other activations in it

@contextlib.contextmanager
def instrumented(model, tap=None, attend=None):
    """Eval mode, `tap(place, layer, x)` where nodes read and write, and `attend(attn)` instead of attn.attend;
    all of it undone at the end, also after an error."""
    with contextlib.ExitStack() as undo:
        def before(module, place, layer):
            hook = module.register_forward_pre_hook(lambda _, inputs: tap(place, layer, *inputs))
            undo.callback(hook.remove)

        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for l, block in enumerate(model.h):
            if tap:
                before(block.ln_1, "heads_in", l)               # (N,T,C)
                before(block.attn.c_proj, "heads_out", l)       # (N,T,H*D) heads side by side: z
                before(block.ln_2, "mlp_in", l)                 # (N,T,C)
                hook = block.mlp.register_forward_hook(lambda _, inputs, y, l=l: tap("mlp_out", l, y))
                undo.callback(hook.remove)
            if attend:    # the instance's own attribute hides the method until it is taken away
                block.attn.attend = attend(block.attn)
                undo.callback(delattr, block.attn, "attend")
        if tap:
            before(model.ln_f, "logits_in", len(model.h))
        yield


def run(model, tokens, tap=None, attend=None):
    """Logits (N,T,V), and what passed each place: {(place, layer): x}. tap(place, layer, x) returns x or its
    replacement. The embedding's output is what the heads of layer 0 read."""
    seen = {}

    def keep(place, layer, x):
        seen[place, layer] = x = tap(place, layer, x) if tap else x
        return x

    with instrumented(model, keep, attend):
        return model(tokens.to(model.wte.weight.device)).logits, seen


def run_with_heads(model, tokens, source, chosen):
    """Logits on tokens with the z of the chosen heads (1 or N, L, H) taken from `source`, what another run saw."""
    def tap(place, layer, x):
        if place != "heads_out" or not chosen[:, layer].any():
            return x
        D = x.shape[-1] // chosen.shape[-1]
        columns = chosen[:, layer].repeat_interleave(D, -1)[:, None]              # (1 or N,1,H*D)
        return torch.where(columns, source[place, layer], x)                      # (N,T,H*D)
    return run(model, tokens, tap)[0]


# ---- Heads

@torch.no_grad()
def head_scores(model, clean, corrupt, metric):
    """(N,L,H): the effect of every head, each patched for real (1). Dimensionless, 1 is the whole effect.

    clean, corrupt (N,T) tokens; metric: logits (N,T,V) -> (N). A pair without any effect has scores in the metric's
    units, 0 if its sentences are equal. Costs L H + 2 runs.
    """
    L, H = model.config.n_layer, model.config.n_head
    logits, seen = run(model, clean)
    m_corrupt = metric(run(model, corrupt)[0])                                    # (N)
    effect = metric(logits) - m_corrupt
    effect[effect == 0] = 1
    heads = torch.eye(L * H, dtype=torch.bool, device=logits.device).view(L * H, 1, L, H)
    m = m_corrupt.new_empty(len(effect), L * H)    # copied into: a metric may return a view of all its logits
    for n, head in enumerate(tqdm(heads, desc="heads", leave=False)):
        m[:, n] = metric(run_with_heads(model, corrupt, seen, head))
    return ((m - m_corrupt[:, None]) / effect[:, None]).view(-1, L, H)


@torch.no_grad()
def metric_of_first_heads(model, clean, corrupt, metric, order):
    """(N,L*H+1): the metric with the first k heads of `order` patched together, k = 0 ... L*H.

    order: heads l*H + h, best first, one ranking (L*H) for all pairs or one a pair (N,L*H).
    """
    L, H = model.config.n_layer, model.config.n_head
    logits, seen = run(model, clean)
    rank = order.to(logits.device).view(-1, L * H).argsort(-1).view(-1, L, H)     # argsort inverts a permutation
    m = logits.new_empty(len(logits), L * H + 1)
    for k in tqdm(range(L * H + 1), desc="heads together", leave=False):
        m[:, k] = metric(run_with_heads(model, corrupt, seen, rank < k))
    return m


def explained_effect(model, clean, corrupt, metric, order):
    """(L*H+1): EE(k) (2), arguments as above. EE(L*H) is 1 only where the clean and the corrupted sentence share the
    tokens at which m is read."""
    with torch.no_grad():
        m_clean = metric(run(model, clean)[0]).mean()
    return share_of_effect(metric_of_first_heads(model, clean, corrupt, metric, order), m_clean)


def share_of_effect(m, m_clean):
    """(2) from what was measured: m (N,K), column 0 unpatched; m_clean (N) or their mean. Equal sentences: 0."""
    m = m.mean(0)
    effect = m_clean.mean() - m[0]
    return (m - m[0]) / (effect if effect else 1)


def heads_needed(curve, share=SHARE):
    """The first k with curve[k] >= share; None if there is none. Curves start at k = 0 with value 0."""
    reached = (torch.as_tensor(curve) >= share).nonzero()
    return int(reached[0]) if len(reached) else None


edges_needed = heads_needed    # the same question to a curve of `cumulative`


# ---- Edges

def to_stream(attn, z):
    """What every head writes: z (N,T,H*D) -> (N,H,T,C), without the projection's bias."""
    H = attn.config.n_head
    return torch.einsum("nthd,chd->nhtc", z.unflatten(-1, (H, -1)), attn.c_proj.weight.unflatten(1, (H, -1)))


def source_differences(model, seen, reference):
    """out_u in one run minus out_u in another, (N,S,T,C), from what the two runs saw."""
    difference = {at: seen[at] - reference[at] for at in seen}
    parts = [difference["heads_in", 0][:, None]]
    for l, block in enumerate(model.h):
        parts += [to_stream(block.attn, difference["heads_out", l]), difference["mlp_out", l][:, None]]
    return torch.cat(parts, 1)


def frozen_gates_attention(q, k, v, gate_bias, causal):
    """gates.py's equation (3) with A a constant: the same value in eval mode, but no gradient through a gate."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])                     # (B,H,T,T)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return ((scores + gate_bias > 0) * torch.softmax(scores, -1)) @ v             # (B,H,T,D)


@torch.no_grad()
def edge_scores(model, clean, corrupt, metric, gate_gradient=False):
    """(N,S,S) s(source, destination) by attribution (3), in the metric's units; pairs that are no edge hold 0.

    gate_gradient: let sample_gates' straight-through gradient through the gates. A hard gate itself has none, so
    that an edge which acts by opening or shutting one scores 0 by default. Summed over destinations, a row is the
    attribution of the source node. Costs two runs, a backward pass and one product with each head's Jacobian.
    """
    config, qkv = model.config, {}
    L, H = config.n_layer, config.n_head

    def tap(place, layer, x):    # every reader gets a name of its own for the stream: the gradient through it alone
        return x.requires_grad_().view_as(x) if place.endswith("_in") else x

    def attend(attn):
        original = attn.attend

        def keep_qkv(q, k, v):
            qkv[attn] = q, k, v
            if gate_gradient or not config.gated:
                return original(q, k, v)
            y = frozen_gates_attention(q, k, v, config.gate_bias, config.causal)
            return y, y.new_ones(y.shape[:2]), y.new_ones(y.shape[:2])    # shares of edges, not used here
        return keep_qkv

    clean_seen = run(model, clean)[1]
    with torch.enable_grad():
        logits, seen = run(model, corrupt, tap, attend)
        m = metric(logits).sum()
    inputs = [seen["mlp_in", l] for l in range(L)] + [seen["logits_in", L]]
    grads = torch.autograd.grad(m, inputs + [t for block in model.h for t in qkv[block.attn]], retain_graph=True,
                                materialize_grads=True)
    differences = source_differences(model, clean_seen, seen)                     # (N,S,T,C)
    S = differences.shape[1]
    scores = differences.new_zeros(len(logits), S, S)
    one_head = torch.eye(H, dtype=logits.dtype, device=logits.device).view(H, 1, H, 1, 1)

    def fill(first, grad):    # grad (n,N,T,C) of the n destinations from `first` on: they read first + 1 sources
        block = torch.einsum("nstc,dntc->nsd", differences[:, :first + 1], grad)
        scores[:, :first + 1, first:first + len(grad)] = block

    for l, block in enumerate(model.h):
        # From q, k, v back to the heads' common input, once for every head with the gradients of that head alone.
        apart = [one_head * grad for grad in grads[L + 1 + 3 * l:][:3]]           # (H,N,H,T,D) each
        fill(l * (H + 1), torch.autograd.grad(qkv[block.attn], seen["heads_in", l], apart,
                                              retain_graph=True, is_grads_batched=True)[0])
        fill(l * (H + 1) + H, grads[l][None])
    fill(L * (H + 1), grads[L][None])
    return scores


@torch.no_grad()
def exact_edge_score(model, clean, corrupt, metric, source, destination):
    """(N) the edge patched for real (path patching): m(patched) - m(corrupt). Slow; `source` and `destination` are
    names of `nodes`.

    The destination reads the corrupted stream with the source's clean output in place of its corrupted one; all that
    comes after follows, all else is as corrupted. Of a head's layer only that head's q, k and v see the change.
    """
    if (source, destination) not in edge_names(model.config):
        raise UserError(f"no edge from {source} to {destination} in this model\nedge_names(config) lists them")
    H, names = model.config.n_head, nodes(model.config)
    layer, n = divmod(names.index(destination) - 1, H + 1)
    place = "logits_in" if destination == "logits" else "mlp_in" if n == H else "heads_in"
    logits, seen = run(model, corrupt)
    change = source_differences(model, run(model, clean)[1], seen)[:, names.index(source)]         # (N,T,C)

    def tap(at, l, x):
        return x + change if (at, l) == (place, layer) else x

    patched, seen = run(model, corrupt, tap)
    if place == "heads_in":    # the tap changed what all heads of the layer read: keep the one's z of that run
        head = F.one_hot(torch.tensor([layer * H + n]), model.config.n_layer * H).view(1, -1, H)
        patched = run_with_heads(model, corrupt, seen, head.bool().to(patched.device))
    return metric(patched) - metric(logits)


def cumulative(scores):
    """C(n) (4), n = 0 ... S*S: scores (S,S) -> (S*S+1), or (N,S,S) -> (N,S*S+1). All-zero scores: 0 throughout.

    Per sentence: cumulative(scores).mean(0). Global, one ranking for all: cumulative(scores.mean(0)).
    """
    size = scores.flatten(-2).abs().sort(descending=True).values.double()
    share = size.cumsum(-1) / size.sum(-1, keepdim=True).clamp(min=1e-300)
    return F.pad(share, (1, 0))


def top_edges(scores, n, config):
    """The n edges of largest |score|: (...,S,S) -> bool (...,S,S)."""
    size = scores.abs().masked_fill(~edge_mask(config).to(scores.device), -1).flatten(-2)    # 0 still beats no edge
    return (size.argsort(descending=True, stable=True).argsort(-1) < n).view(scores.shape)


@torch.no_grad()
def kept_circuit(model, edges, clean, corrupt, metric):
    """(N) the metric when only the chosen edges (S,S) or (N,S,S) carry the clean signal: is the circuit faithful?

    The embedding's output turns clean; every node reads the corrupted stream plus, over its chosen edges, what their
    sources write now minus what they wrote in the corrupted run. All edges give m(clean), none m(corrupt).
    """
    H, before = model.config.n_head, run(model, corrupt)[1]
    change = (run(model, clean)[1]["heads_in", 0] - before["heads_in", 0])[:, None]    # (N,sources so far,T,C)
    edges = (edges.cpu() & edge_mask(model.config)).to(change).expand(len(change), -1, -1)

    def read(stream, first, count=1):    # (N,T,C) -> (N,count,T,C): as destinations first, first + 1, ... read it
        chosen = edges[:, :change.shape[1], first:first + count]
        return stream[:, None] + torch.einsum("nsd,nstc->ndtc", chosen, change)

    with instrumented(model):
        for l, block in enumerate(model.h):
            x = block.ln_1(read(before["heads_in", l], l * (H + 1), H))                # (N,H,T,C)
            # Every head from every head's input (N*H,H,T,D); the diagonal is each head from its own.
            q, k, v = (t.unflatten(0, (-1, H)).diagonal(dim1=1, dim2=2).movedim(-1, 1)
                       for t in block.attn.heads(x.flatten(0, 1)))                     # (N,H,T,D)
            z = block.attn.attend(q, k, v)[0].transpose(1, 2).flatten(2)               # (N,T,H*D)
            change = torch.cat((change, to_stream(block.attn, z - before["heads_out", l])), 1)
            y = block.mlp(block.ln_2(read(before["mlp_in", l], l * (H + 1) + H)))      # (N,1,T,C)
            change = torch.cat((change, y - before["mlp_out", l][:, None]), 1)
        x = read(before["logits_in", len(model.h)], len(model.h) * (H + 1))[:, 0]      # (N,T,C)
        return metric(model.unembed(x))


if __name__ == "__main__":
    from extras.compare import main    # it imports this file
    main()

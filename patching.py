"""Circuits: which heads and edges carry a task (Figures 3 to 5 of the paper). extras/circuits.py is the command.

A task gives pairs of sentences and a metric m, which is high where the model answers rightly:

    clean    After Anna and Paul came to the park, Paul passed the key to    m = logit(Anna) - logit(Paul), about 3
    corrupt  After Lucy and Mark came to the park, Jane passed the key to    the same m, about 0

Direction: the model runs on the corrupted sentence, and clean outputs are patched in (denoising). Only EE goes the
other way, and kept_circuit starts from the clean embedding.
Sign: a head score above 0 moves m towards the clean run, an edge score above 0 raises m. All patches act at all
positions. Gates are hard.

    head score             (m(patched) - m(corrupt)) / (m(clean) - m(corrupt)), one head patched       (6)
    restored effect RE(k)   the same with the k heads patched that a ranking puts first, a ratio of means   (7)
    explained effect EE(k)  the same in the clean run, with all heads but these k as in the corrupted one;
                            m of k = 0 in place of m(corrupt)
    edge score s(u,w)       sum over positions of (out_u(clean) - out_u(corrupt)) . dm/d(in_w)          (8)
    cumulative share C(n)   sum of the n largest |s(u,w)| / sum of all                                  (9)

The graph has embedding, heads and MLPs as sources u, and heads, MLPs and logits as destinations w; q, k and v of a
head read through one input. A head's output is its z, the mixture of values, times its rows of the output projection,
whose bias belongs to no head. in_w is the residual stream as w reads it, before its LayerNorm. The gradient goes
through w only, on the corrupted run, or as a mean over runs on the way to the clean one. (8) is in the metric's units:
a first-order estimate of what exact_edge_score measures. RE and EE are two questions: one head that copies a name to
the end may restore nearly all, while to keep it alone keeps little. The paper's figures show EE, as we read them.

Every function below that runs the model calls `forward`, the model's pass written out.
Shapes: N pairs, T positions, C width, H heads, D head size, L layers, V vocabulary, S = 1 + L (H+1) sources and as
many destinations.
"""
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from support.files import UserError

SHARE = 0.9    # of the effect that a circuit must explain


# ---- The graph

def nodes(config):
    """embed, a0.h0 ... m0, a1.h0 ... m1, ..., logits. Sources: all but the last; destinations: all but the first."""
    layers = [[f"a{l}.h{h}" for h in range(config.n_head)] + [f"m{l}"] for l in range(config.n_layer)]
    return ["embed", *sum(layers, []), "logits"]


def edge_mask(config):
    """(S,S) bool: does destination d, nodes[d + 1], read source s, nodes[s]? A head feeds its layer's MLP, but no head
    of it."""
    H, S = config.n_head, 1 + config.n_layer * (config.n_head + 1)
    d = torch.arange(S)                       # with H = 2:   0 1 2  3 4 5  6    (two heads and an MLP, twice; logits)
    n = d % (H + 1)                           #               0 1 2  0 1 2  0    its number in the layer
    last = torch.where(n < H, d - n, d)       #               0 0 2  3 3 5  6    the last source that d reads
    return torch.arange(S)[:, None] <= last


def layer_of(n, config):
    """The layer of a head or an MLP, by its number in nodes(config)."""
    return (n - 1) // (config.n_head + 1)


def edge_names(config):
    """(source, destination) of every edge, in the order of scores[..., edge_mask(config)]."""
    names = nodes(config)
    return [(names[s], names[d + 1]) for s, d in edge_mask(config).nonzero().tolist()]


# ---- The pass, written out

def live(attn, q, k, v):
    """z (N,H,T,D) of a layer's heads, as the model has it."""
    return attn.attend(q, k, v)[0]


def frozen(attn, q, k, v):
    """The same z, but a gradient goes through the softmax only. In `live` it goes through the gates too, as in training
    (straight-through)."""
    p, gates = pattern(attn, q, k)
    return (gates * p) @ v


def pattern(attn, q, k):
    """Softmax weights p, and hard gates A without a gradient, (N,H,T,T) each."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])                                       # (N,H,T,T)
    if attn.config.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    is_open = scores > -math.inf if attn.gate_bias is None else scores + attn.gate_bias[:, None, None] > 0
    return torch.softmax(scores, -1), is_open.to(scores.dtype)


def forward(model, tokens, read=None, write=None, attend=live):
    """Logits (N,T,V) of a run with hard gates that can be looked into and changed on its way.

    n is a slice of nodes(config), the heads of a layer together; read is called before they read, write afterwards:
    read(n, x)     the stream x (N,T,C) -> (N,m,T,C), a copy for each of the m = n.stop - n.start nodes
    write(n, out)  what they wrote, embedding and MLPs (N,T,C), heads their z (N,H,T,D) -> what goes on, shaped like out
    attend(attn, q, k, v)    what the heads of a layer make of q, k and v: `live`, `frozen` or another
    """
    H = model.config.n_head
    write = write or (lambda n, out: out)
    x = write(slice(0, 1), model.embed(tokens.to(model.wte.weight.device)))          # (N,T,C)
    for l, block in enumerate(model.h):
        first = 1 + l * (H + 1)
        heads, mlp = slice(first, first + H), slice(first + H, first + H + 1)
        q, k, v = block.attn.heads(block.ln_1(read(heads, x) if read else x))        # (N,H,T,D)
        x = x + block.attn.project(write(heads, attend(block.attn, q, k, v)))
        x = x + write(mlp, block.mlp(block.ln_2(read(mlp, x)[:, 0] if read else x)))
    return model.unembed(read(slice(mlp.stop, mlp.stop + 1), x)[:, 0] if read else x)


def outputs(model, tokens, read=None, attend=live):
    """Of a run: {n.start: what the sources n write, as `write` of forward gets it}, and the logits (N,T,V)."""
    found = {}

    def write(n, out):
        found[n.start] = out
        return out

    return found, forward(model, tokens, read, write, attend)


def copies(n, x):
    """The plainest `read`: x (N,T,C) -> (N,m,T,C), the same for each."""
    return x[:, None].repeat(1, n.stop - n.start, 1, 1)


def to_stream(model, start, out):
    """What `write` gets for the sources from `start` on -> (N,m,T,C), as it enters the stream."""
    if out.ndim == 3:
        return out[:, None]
    weight = model.h[layer_of(start, model.config)].attn.c_proj.weight               # (C,H*D)
    return torch.einsum("nhtd,chd->nhtc", out, weight.unflatten(1, (out.shape[1], -1)))


# ---- Heads

def run_with_heads(model, tokens, z, chosen):
    """Logits on tokens with the z of the chosen heads (1 or N, L, H) taken from `z`, the outputs of another run."""
    def write(n, out):
        if out.ndim == 3:    # embedding, MLP
            return out
        return torch.where(chosen[:, layer_of(n.start, model.config), :, None, None], z[n.start], out)    # (N,H,T,D)

    return forward(model, tokens, write=write)


def effects(model, source, tokens, metric, choices):
    """(N,K): the metric on tokens, where the heads of each choice (1 or N, L, H) have their z of the run on source.
    And m(source) (N)."""
    z, logits = outputs(model, source)
    m_source = metric(logits)
    m = m_source.new_empty(len(m_source), len(choices))    # a copy: what metric returns may hold on to all logits
    for i, chosen in enumerate(tqdm(choices, desc="heads", leave=False)):
        m[:, i] = metric(run_with_heads(model, tokens, z, chosen.to(m.device)))
    return m, m_source


@torch.no_grad()
def head_scores(model, clean, corrupt, metric):
    """(N,L,H): the effect of every head, each patched for real (6). Dimensionless, 1 is the whole effect.

    clean, corrupt (N,T) tokens; metric: logits (N,T,V) -> (N). Drop pairs of small effect first: scores are divided by
    it. Where it is 0, scores are left in the metric's units: 0 if the sentences are equal. Costs L H + 2 runs.
    """
    L, H = model.config.n_layer, model.config.n_head
    number = torch.arange(L * H).view(1, L, H)
    m, m_clean = effects(model, clean, corrupt, metric, [number == n for n in range(-1, L * H)])    # -1: no head
    effect = m_clean - m[:, 0]
    effect[effect == 0] = 1
    return ((m[:, 1:] - m[:, :1]) / effect[:, None]).view(-1, L, H)


@torch.no_grad()
def metric_of_restored_heads(model, clean, corrupt, metric, order, counts=None):
    """(N,K): the metric on the corrupted run with the z of the first k heads of `order` restored, for the K values of
    counts, or for k = 0 ... L*H.

    order: heads l*H + h, best first, one ranking (L*H) for all pairs or one a pair (N,L*H).
    """
    rank = rank_of(order, model.config)
    return effects(model, clean, corrupt, metric, [rank < k for k in counts or range(order.shape[-1] + 1)])[0]


@torch.no_grad()
def metric_of_kept_heads(model, clean, corrupt, metric, order, counts=None):
    """(N,K): the other direction, the metric on the clean run with only the first k heads of `order` kept: the z of all
    others comes from the corrupted run. k = L*H is m(clean). k = 0 is m(corrupt) where both sentences share the tokens
    at which m is read: only heads move anything between positions."""
    rank = rank_of(order, model.config)
    return effects(model, corrupt, clean, metric, [rank >= k for k in counts or range(order.shape[-1] + 1)])[0]


def rank_of(order, config):
    """(1 or N, L, H): the place of every head in a ranking."""
    return order.view(-1, order.shape[-1]).argsort(-1).view(-1, config.n_layer, config.n_head)    # inverts it


def share_of_effect(m, m_clean):
    """RE (7) or EE from what was measured: m (N,K), column 0 without any head; m_clean (N) -> (K). Equal sentences: 0.
    RE(L*H) is 1 only where both sentences share the tokens at which m is read: embeddings are not patched."""
    m = m.mean(0)
    effect = m_clean.mean() - m[0]
    return (m - m[0]) / (effect if effect else 1)


def first_reaching(curve, share=SHARE):
    """The first k with curve[k] >= share, or None. A curve of heads, or of edges, begins with curve[0] = 0."""
    reached = (torch.as_tensor(curve) >= share).nonzero()
    return int(reached[0]) if len(reached) else None


# ---- Edges

@torch.no_grad()
def edge_scores(model, clean, corrupt, metric, points=1):
    """(N,S,S) s(source, destination) by attribution (8), in the metric's units; pairs that are no edge hold 0.

    points: the gradient is the mean over this many runs. In run p = 0 ... points - 1 the embedding is the corrupted one
    plus p / points of the way to the clean one, and all else follows (integrated gradients: EAP-IG, Hanna et al. 2024,
    arXiv 2403.17806). Run 0 is the corrupted run, so 1 point is attribution patching. No gradient goes through a gate:
    with 1 point an edge whose effect runs through a gate that is shut there scores 0. On the way the gate opens, and
    the edge gets some of its due. Summed over destinations, a row is the attribution of the source node. Costs
    1 + points runs and `points` backward passes.
    """
    attend = frozen if model.config.gated else live
    after = outputs(model, clean, copies, attend)[0]
    for point in range(points):
        written, destinations, inputs = {}, [], []

        def write(n, out):    # gradients begin at the embedding: weights may need none
            written[n.start] = out.detach()
            return out if n.start else torch.lerp(written[0], after[0], point / points).requires_grad_()

        def read(n, x):    # a copy for each destination: its gradient is the one through that destination alone
            destinations.append(n)
            inputs.append(copies(n, x))                                              # (N,m,T,C)
            return inputs[-1]

        with torch.enable_grad():
            m = metric(forward(model, corrupt, read, write, attend)).sum()
        if point == 0:    # the corrupted run, rounded like the clean one: equal sentences give 0
            change = torch.cat([to_stream(model, start, after[start] - written[start]) for start in after], 1)
            N, S = change.shape[:2]                                                  # of (N,S,T,C)
            scores = change.new_zeros(N, S, S)
        for n, grad in zip(destinations, torch.autograd.grad(m, inputs, materialize_grads=True)):
            found = torch.einsum("nstc,ndtc->nsd", change[:, :n.start], grad)        # of the sources before n
            scores[:, :n.start, n.start - 1:n.stop - 1] += found / points    # destination d is nodes[d + 1]
    return scores


@torch.no_grad()
def exact_edge_score(model, clean, corrupt, metric, source, destination):
    """(N) the edge patched for real (path patching): m(patched) - m(corrupt). Slow; `source` and `destination` are
    names of `nodes`.

    The destination reads the corrupted stream with the source's clean output in place of its corrupted one; all that
    comes after follows, all else is as corrupted.
    """
    if (source, destination) not in edge_names(model.config):
        raise UserError(f"no edge from {source} to {destination} in this model\nedge_names(config) lists them")
    names = nodes(model.config)
    s, d = names.index(source), names.index(destination)
    (before, logits), (after, _) = (outputs(model, tokens, copies) for tokens in (corrupt, clean))
    start = max(n for n in before if n <= s)    # of the source's slice
    change = to_stream(model, start, after[start] - before[start])[:, s - start]     # (N,T,C)

    def read(n, x):
        x = copies(n, x)
        if n.start <= d < n.stop:
            x[:, d - n.start] += change
        return x

    return metric(forward(model, corrupt, read)) - metric(logits)


def cumulative(scores):
    """C(n) (9), n = 0 ... S*S: scores (S,S) -> (S*S+1), or (N,S,S) -> (N,S*S+1). All-zero scores: 0 throughout.

    Per sentence: cumulative(scores).mean(0). Global, one ranking for all: cumulative(scores.mean(0)).
    """
    size = scores.flatten(-2).abs().sort(descending=True).values.double()
    share = size.cumsum(-1) / size.sum(-1, keepdim=True).clamp(min=1e-300)
    return F.pad(share, (1, 0))


def edge_ranks(scores, config):
    """The place of every edge by |score|, the largest at 0: (...,S,S) -> int (...,S,S). Pairs that are no edge are
    last."""
    size = scores.abs().masked_fill(~edge_mask(config).to(scores.device), -1).flatten(-2)    # any edge beats none
    return size.argsort(descending=True, stable=True).argsort(-1).view(scores.shape)


@torch.no_grad()
def kept_circuit(model, clean, corrupt, metric, edges):
    """(N) the metric when only the chosen edges, bool (S,S) or (N,S,S), carry the clean signal: is it faithful?

    The embedding's output turns clean; every node reads the corrupted stream plus, over its chosen edges, what their
    sources write now minus what they wrote in the corrupted run. All edges give m(clean), none m(corrupt).
    """
    streams = {}

    def keep(n, x):
        streams[n.start] = x[:, None]
        return copies(n, x)

    before = outputs(model, corrupt, keep)[0]
    N, S = len(corrupt), max(streams)    # the logits come after all sources
    change = before[0].new_zeros(N, S, *before[0].shape[1:])                         # (N,S,T,C)
    edges = (edges.cpu() & edge_mask(model.config)).to(change).expand(N, -1, -1)

    def read(n, _):
        into = edges[:, :n.start, n.start - 1:n.stop - 1]                            # of the sources before n
        return streams[n.start] + torch.einsum("nsd,nstc->ndtc", into, change[:, :n.start])

    def write(n, out):
        change[:, n] = to_stream(model, n.start, out - before[n.start])
        return out

    return metric(forward(model, clean, read, write))

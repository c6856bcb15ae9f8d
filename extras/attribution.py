"""Attention attribution: through which heads and keys does one feature act on another (a later part of the paper).

A cross-layer transcoder (extras/transcoder.py) replaces all MLPs by sparse features. Hold fixed, as they are on one
prompt, the attention A * softmax, the scales of the norms, and which features are active. What is left is linear: each
node writes vectors into the residual stream, and what any feature reads, its pre-activation, is a sum over nodes.

    nodes    token embedding, position embedding, active features, and what the transcoder misses of each MLP (error)
    edge     s -> t: the part of t's pre-activation that is there because of s, exact                            (18)
    bias     what is left of it when no node writes anything: biases of all layers
    so       edges.sum(0) + bias = value                                                                         (19)

An edge that leaves its position runs through attention. At a layer m it splits exactly into what each head h carries
from each key j to each query i, and what does not pass through these heads: the stream, and what is written later:

    c_mh(i,j) = gamma_m(i) . W_O P_h(i,j) W_V N sigma_m(j)                                                       (20)

sigma_m: the source's signal in the stream before the attention; gamma_m: the gradient of the target behind it; N: the
frozen norm; P = A * softmax. (The paper's own formulas are not known to us; these are checked by their sums.)
Shapes: T positions, C width, H heads, D head size, L layers, S nodes, the target logit among them as the last.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn

from extras.transcoder import mlp_sites

LINEAR, WITH_BIAS = False, True


class Node(NamedTuple):
    kind: str        # embedding, position, feature, error or logit
    layer: int
    position: int
    index: int       # of the token, the position, the feature, the logit's token; 0 of an error


class Graph(NamedTuple):
    nodes: list             # S of Node
    edges: torch.Tensor     # (S,S) from row to column; the columns of tokens, positions and errors are 0
    bias: torch.Tensor      # (S)
    value: torch.Tensor     # (S) pre-activation of a feature, the logit; 0, like edges and bias, for features that
                            # `most` of Frozen.graph leaves out


class Frozen:
    """A run of a model on tokens (T), linear in the stream, as all else is frozen; and the nodes that write into it."""

    def __init__(self, model, transcoder, tokens, target=None, against=None, keep=None):
        """target: the logit node is that of this token (default: the likeliest), minus that of the token `against`
        or the mean logit. keep (L,H,T,T): of mlp_sites."""
        self.model, self.transcoder = model.eval(), transcoder
        L, C, T = model.config.n_layer, model.config.n_embd, len(tokens)
        with torch.no_grad():
            sites = mlp_sites(model, tokens[None], keep=keep)
            heads = [block.attn.heads(block.ln_1(x)) for block, x in zip(model.h, sites.before)]
            weights = torch.cat([block.attn.weights(q, k) for block, (q, k, _) in zip(model.h, heads)])
            self.patterns = weights if keep is None else keep * weights              # (L,H,T,T)
            self.scale_1 = [scale_of(block.ln_1, x[0]) for block, x in zip(model.h, sites.before)]       # L of (T,1)
            self.scale_2 = [scale_of(block.ln_2, x[0]) for block, x in zip(model.h, sites.between)]
            self.scale_f = scale_of(model.ln_f, sites.last[0])
            features = [transcoder.encode(l, x[0]) for l, x in enumerate(sites.inputs)]          # (T,F) each
            errors = torch.stack(sites.outputs)[:, 0] - torch.stack(transcoder.decode(features))           # (L,T,C)
            positions = model.wpe.weight[:T] if hasattr(model, "wpe") else None
            head = getattr(model, "lm_head", model.wte).weight                       # (V,C)
            target = model.unembed(sites.last[0, -1]).argmax().item() if target is None else target
            self.unembedding = head[target] - (head.mean(0) if against is None else head[against])
            self.nodes, writes = [], []

            def add(node, sites_and_vectors):
                written = head.new_zeros(L + 1, C)
                for site, vector in sites_and_vectors:
                    written[site] = vector
                self.nodes.append(node)
                writes.append(written)

            for t, token in enumerate(tokens.tolist()):
                add(Node("embedding", 0, t, token), [(0, model.wte.weight[token])])
            for t in range(T if positions is not None else 0):
                add(Node("position", 0, t, t), [(0, positions[t])])
            for l, active in enumerate(features):
                for t, f in active.nonzero().tolist():
                    add(Node("feature", l, t, f), [(m + 1, active[t, f] * vector) for m, vector in
                                                   enumerate(transcoder.vectors(l, f), start=l)])
                for t in range(T):
                    add(Node("error", l, t, 0), [(l + 1, errors[l, t])])
            add(Node("logit", L, T - 1, target), [])
            self.writes = torch.stack(writes)                                        # (S,L+1,C)
            self.constant = head.new_zeros(L + 1, T, C)    # what the decoders' biases write
            self.constant[1:] = torch.stack([transcoder.constant(m) for m in range(L)])[:, None]

    def written(self, chosen):
        """What the chosen nodes write into the stream: (L+1,T,C), before layer 0 and in place of each MLP."""
        total = torch.zeros_like(self.constant)
        for n in chosen:
            total[:, self.nodes[n].position] += self.writes[n]
        return total

    def heads(self, l, x, bias):
        """q, k and v of layer l, (N,H,T,D) each, from the stream x (...,T,C)."""
        block = self.model.h[l]
        y = frozen_norm(block.ln_1, self.scale_1[l], x, bias).reshape(-1, *x.shape[-2:])                    # (N,T,C)
        found = block.attn.heads(y)
        return found if bias else [t - zero for t, zero in zip(found, block.attn.heads(torch.zeros_like(y[:1])))]

    def attention(self, l, x, bias):
        """What layer l's attention adds to the stream x (...,T,C), through the frozen pattern."""
        attn, z = self.model.h[l].attn, self.patterns[l] @ self.heads(l, x, bias)[2]                       # (N,H,T,D)
        out = attn.project(z)
        return (out if bias else out - attn.project(torch.zeros_like(z))).view(x.shape)

    def run(self, written, bias, until=None):
        """The linear run: written (L+1,...,T,C) -> what the encoders read, L of (...,T,C); what the output head reads;
        the stream before each attention, and at the end; what each attention adds. until: stop before this layer."""
        x, reads, before, added = written[0], [], [], []
        for l, block in enumerate(self.model.h[:until]):
            before.append(x)
            added.append(self.attention(l, x, bias))
            x = x + added[-1]
            reads.append(frozen_norm(block.ln_2, self.scale_2[l], x, bias))
            x = x + written[l + 1]
        before.append(x)
        return reads, frozen_norm(self.model.ln_f, self.scale_f, x, bias), before, added

    def value(self, node, reads, last, bias):
        """What a feature or the logit makes of a run: its pre-activation."""
        if node.kind == "logit":
            return last[node.position] @ self.unembedding
        direction, constant = self.transcoder.reader(node.layer, node.index)
        return reads[node.layer][node.position] @ direction + (constant if bias else 0)

    def graph(self, most=None):
        """The Graph: one backward pass for each active feature, and one for the logit.

        most: of each layer only this many features get their edges, those that count most for the logit."""
        S, L = len(self.nodes), self.model.config.n_layer
        graph = Graph(self.nodes, *(self.writes.new_zeros(shape) for shape in ((S, S), S, S)))
        position = torch.tensor([node.position for node in self.nodes])
        layer = torch.tensor([node.layer if node.kind in ("feature", "logit") else -1 for node in self.nodes])
        with torch.no_grad():
            of_bias = self.run(self.constant, WITH_BIAS)[:2]
        with torch.enable_grad():
            written = (self.written(range(S)) + self.constant).requires_grad_()
            reads, last = self.run(written, WITH_BIAS)[:2]
            for l in range(L, -1, -1):    # later layers first: then all that a feature acts on has its edges
                targets = (layer == l).nonzero()[:, 0]
                counts = influence(graph.edges)[targets]
                for n in targets[counts.argsort(descending=True)[:most]].tolist():
                    value = self.value(self.nodes[n], reads, last, WITH_BIAS)
                    gradient, = torch.autograd.grad(value, written, retain_graph=True)           # (L+1,T,C)
                    graph.edges[:, n] = torch.einsum("slc,lsc->s", self.writes, gradient[:, position])     # (18)
                    graph.value[n] = value.detach()
                    graph.bias[n] = self.value(self.nodes[n], *of_bias, WITH_BIAS).detach()
        return graph

    def split(self, source, target):
        """(20) for one edge of the graph: {layer: (carried (H,T,T) from key j to query i at [h,i,j], bypass, a number)}
        for each layer between the two nodes. carried.sum() + bypass is the edge."""
        s, found = self.nodes.index(source), {}
        with torch.enable_grad():
            written = self.written([s]).requires_grad_()
            reads, last, before, added = self.run(written, LINEAR)
            value = self.value(target, reads, last, LINEAR)
            grads = torch.autograd.grad(value, [written, *added], materialize_grads=True)
        gradient, behind = grads[0], grads[1:]                                       # (L+1,T,C), L of (T,C)
        later = (gradient * written).sum((1, 2)).detach()                            # (L+1) what each write adds
        first = source.layer + (source.kind in ("feature", "error"))
        for m in range(first, min(target.layer + 1, self.model.config.n_layer)):
            sigma, gamma = before[m].detach(), behind[m]
            v = self.heads(m, sigma, LINEAR)[2][0]                                   # (H,T,D)
            g = (gamma @ self.model.h[m].attn.c_proj.weight).unflatten(1, (len(v), -1)).transpose(0, 1)    # (H,T,D)
            found[m] = carried(self.patterns[m], v, g).detach(), ((gamma * sigma).sum() + later[m + 1:].sum()).item()
        return found


def carried(pattern, v, gradient):
    """(20): (H,T,T), what each head carries from key j to query i, at [h,i,j]. pattern (H,T,T); v (H,T,D); gradient
    (H,T,D) of a number by z = pattern @ v."""
    return pattern * torch.einsum("hid,hjd->hij", gradient, v)


def scale_of(norm, x):
    """By what a norm multiplies x (T,C): (T,1)."""
    if isinstance(norm, nn.LayerNorm):
        return (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    return (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()


def frozen_norm(norm, scale, x, bias):
    """A norm with its scale (T,1) held fixed: linear in x (...,T,C) but for its bias."""
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x * scale if norm.weight is None else x * scale * norm.weight
    return x + norm.bias if bias and getattr(norm, "bias", None) is not None else x


@torch.no_grad()
def score_split(model, transcoder, tokens, layer, head, i, j):
    """Which pair of nodes opens an edge: the score s_ij of a head as a sum over (S,S). Entry (a,b) is the part of node
    a at the query and node b at the key. Last row and column: biases, in place of the logit, which writes nothing."""
    frozen = Frozen(model, transcoder, tokens)
    S = len(frozen.nodes)
    written = torch.stack([frozen.written([n]) for n in range(S - 1)], 1)            # (L+1,S-1,T,C)
    sides = []
    for signal, bias in ((written, LINEAR), (frozen.constant[:, None], WITH_BIAS)):
        q, k, _ = frozen.heads(layer, frozen.run(signal, bias, layer)[2][-1], bias)  # (N,H,T,D)
        sides.append((q[:, head, i], k[:, head, j]))
    q, k = (torch.cat(side) for side in zip(*sides))                                 # (S,D)
    return q @ k.T / math.sqrt(q.shape[1])


def shares(edges):
    """(S,S): by how much each node counts for each other among all that act on it; a column adds up to 1, or 0."""
    return edges.abs() / edges.abs().sum(0).clamp(min=1e-30)


def influence(edges):
    """(S): by how much each node counts for the logit, the last one, over all paths. Edges run to later nodes only."""
    share, weight = shares(edges), edges.new_zeros(len(edges))
    weight[-1] = 1
    for n in range(len(edges) - 1, -1, -1):    # from the last on: the weight of all that a node acts on is known
        weight += share[:, n] * weight[n]
    return weight


def importance(edges):
    """(S,S): by how much each edge counts for the logit, over all paths that it is on."""
    return shares(edges) * influence(edges)


def prune(graph, node_share=0.8, edge_share=0.95):
    """The few nodes with node_share of all that counts for the logit, and among them the few edges with edge_share.

    Returns (nodes (S) bool, edges (S,S) bool, replacement, completeness). Replacement: how much of the logit comes from
    tokens and positions, not from errors or from features without edges of their own. Completeness: the share of all
    inputs, by how much they count, that are not errors."""
    share, weight = shares(graph.edges), influence(graph.edges)
    kinds = [node.kind for node in graph.nodes]
    error = torch.tensor([kind == "error" for kind in kinds])
    origin = torch.tensor([kind in ("embedding", "position") for kind in kinds])
    fed = graph.edges.abs().sum(0) > 0
    nodes = largest(weight * torch.tensor([kind != "logit" for kind in kinds]), node_share)
    nodes[-1] = True
    flow = share * weight * nodes[:, None] * nodes
    return (nodes, largest(flow.flatten(), edge_share).view_as(flow),
            weight[origin].sum().item(),    # of 1, the logit's, which arrives as a whole
            ((1 - share[error].sum(0)) * weight)[fed].sum().item() / weight[fed].sum().item())


def largest(values, share):
    """(N) bool: the fewest of values (N, >= 0) that add up to this share of all."""
    order = values.argsort(descending=True)
    before = values[order].cumsum(0) - values[order]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[before < share * values.sum()]] = True
    return chosen

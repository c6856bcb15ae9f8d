"""7. Attribution patching: scores from one gradient, true effects, and the hard gate at which they part (60 minutes)

Patching every edge for real costs a run each. Attribution patching takes the first-order estimate instead: for a head,
    s(head) = sum over positions of (z(clean) - z(corrupt)) . dm/dz, the gradient taken on the corrupted run.
This costs two runs and one backward pass for all heads together. Part one: write it.

Part two: where it fails. A head whose output opens a gate elsewhere has an effect, but a hard gate has no gradient.
(The straight-through gradient of exercise 1 is for training; `patching.edge_scores` takes gates as constants.) Find the
edges that attribution misses: `patching.edge_scores` gives the estimates, `patching.exact_edge_score` the truth,
`patching.edge_names` the edges. With names = `patching.nodes(model.config)`, scores[n, s, d] is the edge from names[s]
to names[d + 1]. Try it with small = 0.01 on `tiny(True)` and `pairs()` of the module `exercises`, after
`torch.manual_seed(2)`. Does the estimate miss edges that matter, or name edges that do not? Would more sentences help?
Would it help to take gradients at ten points between the two sentences (`points=10` of edge_scores)? Why?
"""


def head_attribution(model, clean, corrupt, metric):
    """(N,L,H): s(head) of a dense GPT in eval mode. clean, corrupt (N,T) tokens; metric: logits (N,T,V) -> (N).

    z is what `model.h[l].attn.c_proj` reads, (N,T,H*D), heads side by side: a forward pre-hook sees it. Leave no hook.
    """
    raise NotImplementedError


def missed_edges(model, clean, corrupt, metric, small):
    """The set of edges (source, destination), by name, whose mean |score| is below small, but whose mean |change of the
    metric|, when they are patched for real, is above 10 times small. Means are over the N pairs. The model has gates,
    or none."""
    raise NotImplementedError

import torch

import patching
from exercises import pairs, same, tiny

SMALL = 1e-2


def test_attribution_is_the_slope_of_patching_a_little(answer):
    """z moved by a hundred-thousandth of the way to its clean value: m moves by as much of the score."""
    model, (clean, corrupt, metric) = tiny(False), pairs()
    scores, step, z = answer.head_attribution(model, clean, corrupt, metric), 1e-5, {}
    assert not any(block.attn.c_proj._forward_pre_hooks for block in model.h), "a hook is left: handle.remove()"
    names = patching.nodes(model.config)
    with torch.no_grad():
        patching.forward(model, clean, write=lambda s, out: z.setdefault(s.start, out))
        before = metric(model(corrupt).logits)
        for l in range(2):
            for h in range(3):
                first = names.index(f"a{l}.h0")    # where the heads of this layer start

                def nudge(s, out):
                    if s.start == first:    # (N,H,T,D)
                        out = out.clone()
                        out[:, h] += step * (z[first] - out)[:, h]
                    return out

                slope = (metric(patching.forward(model, corrupt, write=nudge)) - before) / step
                same(scores[:, l, h], slope, f"layer {l}, head {h}: (z(clean) - z(corrupt)) . dm/dz, over positions; "
                     "is the gradient that of the corrupted run, for each sentence by itself (of m.sum(), not of "
                     "m.mean())? Do later layers still depend on this z?", rtol=1e-3, atol=1e-5)
    assert scores.abs().max() > 1e-2, "all scores are nearly 0: is the gradient that of z, in the metric's units?"


def test_equal_sentences_score_nothing(answer):
    model, (clean, _, metric) = tiny(False), pairs()
    assert answer.head_attribution(model, clean, clean, metric).eq(0).all(), "z(clean) - z(corrupt) is 0 here"


def test_edges_that_open_a_gate_are_missed(answer):
    """Every edge that is named must truly be missed, and no missed one left out."""
    torch.manual_seed(2)    # a model in which one edge's effects have different signs
    model, (clean, corrupt, metric) = tiny(True), pairs()
    named = answer.missed_edges(model, clean, corrupt, metric, SMALL)
    scores, names = patching.edge_scores(model, clean, corrupt, metric).abs().mean(0), patching.nodes(model.config)
    missed = set()
    for source, destination in patching.edge_names(model.config):
        exact = patching.exact_edge_score(model, clean, corrupt, metric, source, destination).abs().mean()
        if scores[names.index(source), names.index(destination) - 1] < SMALL and exact > 10 * SMALL:
            missed.add((source, destination))
    assert missed
    forgotten, wrong = len(missed - named), len(named - missed)
    assert forgotten == 0, f"{forgotten} edges are missed that you do not name: destination d is names[d + 1], " \
        "points is 1, and absolute values come before the mean"
    assert wrong == 0, f"you name {wrong} that are not missed: the mean of |estimates| is small, that of |changes| " \
        "large; absolute values come before the mean"


def test_a_dense_model_has_none_of_them(answer):
    model, (clean, corrupt, metric) = tiny(False), pairs()
    assert answer.missed_edges(model, clean, corrupt, metric, SMALL) == set(), "without gates the estimate is close"

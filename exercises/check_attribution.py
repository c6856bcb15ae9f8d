import pytest
import torch

import patching
from model import GPT, GPTConfig

SMALL = 1e-2


def tiny(gated):
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12, gated=gated, gate_bias=-1.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "ln_" in name and "weight" in name else 0, 0.4)
    return model.double().eval()


def pairs():
    clean, corrupt = torch.randint(11, (2, 5, 6))
    weights = torch.randn(11, dtype=torch.float64)
    return clean, corrupt, lambda logits: torch.tanh(logits[:, -1] @ weights)


def test_attribution_is_the_slope_of_patching_a_little(answer):
    """z moved by a hundred-thousandth of the way to its clean value: m moves by as much of the score."""
    model, (clean, corrupt, metric) = tiny(False), pairs()
    scores, step = answer.head_attribution(model, clean, corrupt, metric), 1e-5
    with torch.no_grad():
        seen, before = patching.run(model, clean)[1], patching.run(model, corrupt)
        for l in range(2):
            for h in range(3):
                part = slice(4 * h, 4 * h + 4)

                def nudge(place, layer, x):
                    if (place, layer) == ("heads_out", l):
                        x = x.clone()
                        x[..., part] += step * (seen[place, l] - before[1][place, l])[..., part]
                    return x

                slope = (metric(patching.run(model, corrupt, nudge)[0]) - metric(before[0])) / step
                torch.testing.assert_close(scores[:, l, h], slope, rtol=1e-3, atol=1e-5)
    assert scores.abs().max() > 1e-2


def test_equal_sentences_score_nothing(answer):
    model, (clean, _, metric) = tiny(False), pairs()
    assert (answer.head_attribution(model, clean, clean, metric) == 0).all()


def test_edges_that_open_a_gate_are_missed(answer):
    """Every edge that is named must truly be missed, and no missed one left out."""
    model, (clean, corrupt, metric) = tiny(True), pairs()
    named = answer.missed_edges(model, clean, corrupt, metric, SMALL)
    scores, names = patching.edge_scores(model, clean, corrupt, metric).abs().mean(0), patching.nodes(model.config)
    missed = set()
    for source, destination in patching.edge_names(model.config):
        exact = patching.exact_edge_score(model, clean, corrupt, metric, source, destination).abs().mean()
        if scores[names.index(source), names.index(destination) - 1] < SMALL and exact > 10 * SMALL:
            missed.add((source, destination))
    assert missed and named == missed


def test_a_dense_model_has_none_of_them(answer):
    model, (clean, corrupt, metric) = tiny(False), pairs()
    assert answer.missed_edges(model, clean, corrupt, metric, SMALL) == set()

"""patching.py against a GPT written out node by node, finite differences, counts and text."""
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import patching as P
from extras import compare, tasks
from extras.encodings import byte_encoding
from extras.files import UserError
from model import GPT, GPTConfig, SelfAttention, save_checkpoint
from toy_addition import ALPHABET, toy_config

ROOT = Path(P.__file__).parent
VOCABULARY = ROOT.parent / "shared" / "tiktoken"    # GPT-2's, where it was put beside the checkout


def tiny(gated=False, **fields):
    """A random GPT in float64 with weights large enough that every node matters and gates are open and shut."""
    config = GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12, gated=gated,
                       gate_bias=0.2, **fields)
    model = GPT(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "ln_" in name and "weight" in name else 0, 0.3)
    return model


def some_pairs(N=3, T=6):
    clean, corrupt = torch.randint(11, (2, N, T))
    corrupt[:, -1] = clean[:, -1]
    weights = torch.randn(11, dtype=torch.float64)
    return clean, corrupt, lambda logits: torch.tanh(logits[:, -1] @ weights) + logits[:, 2, 3]


def by_hand(model, tokens, read=lambda node, x: x, write=lambda node, y: y, gate_gradient=False):
    """GPT one node at a time. read(node, stream): what it reads, for heads once each for a0.h0.q, .k and .v;
    write(node, output): what the others get of it. Returns the logits and every node's own output."""
    config, T, out = model.config, tokens.shape[1], {}
    H, D = config.n_head, config.n_embd // config.n_head

    def emit(node, y):
        out[node] = y
        return write(node, y)

    stream = emit("embed", model.wte(tokens) + model.wpe.weight[:T])
    for l, block in enumerate(model.h):
        weight, bias = block.attn.c_attn.weight.view(3, H, D, -1), block.attn.c_attn.bias.view(3, H, D)
        written = 0
        for h in range(H):
            q, k, v = (block.ln_1(read(f"a{l}.h{h}.{part}", stream)) @ weight[n, h].T + bias[n, h]
                       for n, part in enumerate("qkv"))
            s = q @ k.mT / math.sqrt(D)
            future = torch.ones(T, T).triu(1) > 0 if config.causal else torch.zeros(T, T) > 0
            pattern = s.masked_fill(future, -math.inf).softmax(-1)
            if config.gated:
                soft = torch.sigmoid(s + config.gate_bias)
                pattern = pattern * ((s + config.gate_bias > 0) + gate_gradient * (soft - soft.detach()))
            written = written + emit(f"a{l}.h{h}", pattern @ v @ block.attn.c_proj.weight[:, h * D:(h + 1) * D].T)
        stream = stream + written + block.attn.c_proj.bias
        stream = stream + emit(f"m{l}", block.mlp(block.ln_2(read(f"m{l}", stream))))
    return model.ln_f(read("logits", stream)) @ model.wte.weight.T, out


def merged(node):
    return re.sub(r"\.[qkv]$", "", node)


def outputs_apart(model, clean, corrupt):
    """{node: out(clean) - out(corrupt)}"""
    a, b = by_hand(model, clean)[1], by_hand(model, corrupt)[1]
    return {node: (a[node] - b[node]).detach() for node in a}


def by_name(scores, config):
    """(N,S,S) -> {(source, destination): (N)}"""
    return dict(zip(P.edge_names(config), scores[:, P.edge_mask(config)].T))


# ---- The graph

def test_the_graph_of_gpt2_small_by_counting():
    edges = P.edge_names(GPTConfig())
    assert len(edges) == len(set(edges)) == 11_611 == P.edge_mask(GPTConfig()).sum()
    kinds = Counter((s[0], d[0]) for s, d in edges)
    assert kinds["a", "a"] == 9_504 == 12 * 12 * 66
    assert sum(n * (3 if d == "a" else 1) for (_, d), n in kinds.items()) == 32_491    # q, k and v apart


def test_the_order_of_nodes_and_what_reads_what():
    config = GPTConfig(n_layer=2, n_head=2)
    assert P.nodes(config) == ["embed", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits"]
    reads = {d: [s for s, t in P.edge_names(config) if t == d] for d in P.nodes(config)[1:]}
    assert reads["a0.h0"] == reads["a0.h1"] == ["embed"]
    assert reads["m0"] == ["embed", "a0.h0", "a0.h1"]
    assert reads["a1.h1"] == ["embed", "a0.h0", "a0.h1", "m0"]
    assert reads["logits"] == P.nodes(config)[:-1]


# ---- Heads

@pytest.mark.parametrize("gated", [False, True])
def test_head_scores_and_explained_effect_by_hand(gated):
    model, (clean, corrupt, metric) = tiny(gated), some_pairs()
    good = by_hand(model, clean)[1]
    m_clean, m_corrupt = (metric(by_hand(model, tokens)[0]) for tokens in (clean, corrupt))

    def patched(chosen):    # chosen(node) -> (N) bool
        return metric(by_hand(model, corrupt, write=lambda node, y: torch.where(
            chosen(node)[:, None, None], good[node], y))[0])

    names = [f"a{l}.h{h}" for l in range(2) for h in range(3)]
    scores = P.head_scores(model, clean, corrupt, metric)
    for n, name in enumerate(names):
        expected = (patched(lambda node: torch.full((3,), node == name)) - m_corrupt) / (m_clean - m_corrupt)
        torch.testing.assert_close(scores.flatten(1)[:, n], expected, atol=1e-9, rtol=0)
    assert scores.abs().min() > 1e-6    # or the comparison would say little

    each = torch.stack([torch.randperm(6) for _ in range(3)])
    for order in (torch.tensor([4, 1, 0, 5, 3, 2]), each):
        curve = P.explained_effect(model, clean, corrupt, metric, order)
        for k in range(7):
            first = order.expand(3, 6)[:, :k]
            m = patched(lambda node: (first == names.index(node)).any(1) if node in names else torch.zeros(3) > 0)
            expected = (m - m_corrupt).mean() / (m_clean - m_corrupt).mean()
            torch.testing.assert_close(curve[k], expected, atol=1e-9, rtol=0)


def test_all_heads_explain_everything_where_the_last_token_is_shared():
    model, (clean, corrupt, _) = tiny(), some_pairs()
    curve = P.explained_effect(model, clean, corrupt, lambda logits: logits[:, -1, 4], torch.randperm(6))
    assert curve[0] == 0 and curve[-1].item() == pytest.approx(1, abs=1e-12)


def test_heads_needed():
    assert P.heads_needed([0, 0.3, 0.95, 0.7, 1.0], 0.9) == 2
    assert P.heads_needed(torch.tensor([0, 0.3, 0.5]), 0.9) is None


# ---- Edges

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gated, gate_gradient", [(False, False), (True, False), (True, True)])
def test_edge_scores_are_merged_q_k_and_v_and_add_up_to_node_scores(gated, gate_gradient, causal):
    model, (clean, corrupt, metric) = tiny(gated, causal=causal), some_pairs()
    scores = P.edge_scores(model, clean, corrupt, metric, gate_gradient)
    assert scores[:, ~P.edge_mask(model.config)].eq(0).all()
    difference, reads = outputs_apart(model, clean, corrupt), {}

    def read(node, x):
        reads[node] = x.view_as(x)
        return reads[node]

    logits, out = by_hand(model, corrupt, read, gate_gradient=gate_gradient)
    m = metric(logits).sum()
    at_reads = dict(zip(reads, torch.autograd.grad(m, list(reads.values()), retain_graph=True)))
    at_nodes = dict(zip(out, torch.autograd.grad(m, list(out.values()))))
    named = by_name(scores, model.config)
    for (s, d), ours in named.items():
        expected = sum((difference[s] * grad).sum((1, 2)) for node, grad in at_reads.items() if merged(node) == d)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
    for n, node in enumerate(P.nodes(model.config)[:-1]):
        torch.testing.assert_close(scores[:, n].sum(1), (difference[node] * at_nodes[node]).sum((1, 2)),
                                   atol=1e-9, rtol=0)
    if gated:    # the choice must matter
        assert (P.edge_scores(model, clean, corrupt, metric, not gate_gradient) - scores).abs().max() > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_finite_differences_along_the_patch_agree(gated):
    model, (clean, corrupt, metric) = tiny(gated), some_pairs()
    difference = outputs_apart(model, clean, corrupt)
    for (s, d), score in by_name(P.edge_scores(model, clean, corrupt, metric), model.config).items():
        up, down = (metric(by_hand(model, corrupt, lambda node, x: x + e * difference[s] * (merged(node) == d))[0])
                    for e in (1e-6, -1e-6))
        torch.testing.assert_close(score, ((up - down) / 2e-6).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_exact_edge_scores_by_hand(gated):
    model, (clean, corrupt, metric) = tiny(gated), some_pairs()
    difference = outputs_apart(model, clean, corrupt)
    m_corrupt, sizes = metric(by_hand(model, corrupt)[0]), []
    for s, d in P.edge_names(model.config):
        m = metric(by_hand(model, corrupt, lambda node, x: x + difference[s] * (merged(node) == d))[0])
        ours = P.exact_edge_score(model, clean, corrupt, metric, s, d)
        torch.testing.assert_close(ours, m - m_corrupt, atol=1e-9, rtol=0)
        sizes.append(ours.abs().max().item())
    assert np.median(sizes) > 1e-3
    with pytest.raises(UserError, match="no edge from a0.h1 to a0.h0"):
        P.exact_edge_score(model, clean, corrupt, metric, "a0.h1", "a0.h0")


class Linear(GPT):
    """No LayerNorm, linear MLPs, attention patterns that never change: the logits are linear in every node."""
    def __init__(self, config):
        super().__init__(config)
        self.ln_f = torch.nn.Identity()
        for block in self.h:
            block.ln_1 = torch.nn.Identity()
            block.ln_2 = torch.nn.Identity()
            block.mlp = torch.nn.Linear(config.n_embd, config.n_embd)
            block.attn.__class__ = FrozenPattern
            block.attn.pattern = torch.rand(config.n_head, 6, 6, dtype=torch.float64).tril()


class FrozenPattern(SelfAttention):
    def attend(self, q, k, v):
        return self.pattern @ v, q.new_ones(q.shape[:2]), q.new_ones(q.shape[:2])


def test_in_a_linear_model_attribution_is_patching():
    model = Linear(tiny().config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    clean, corrupt, _ = some_pairs()
    pairs = clean, corrupt, lambda logits: logits[:, -1] @ torch.arange(11.0, dtype=torch.float64)
    scores = P.edge_scores(model, *pairs)
    for edge, score in by_name(scores, model.config).items():
        torch.testing.assert_close(score, P.exact_edge_score(model, *pairs, *edge), atol=1e-9, rtol=0)
    m_clean, m_corrupt = (pairs[2](model(tokens).logits) for tokens in pairs[:2])
    of_heads = scores[:, 1:].sum(-1).view(3, 2, 4)[:, :, :3]
    exact = P.head_scores(model, *pairs) * (m_clean - m_corrupt)[:, None, None]
    torch.testing.assert_close(of_heads, exact.detach(), atol=1e-9, rtol=0)
    assert of_heads.abs().min() > 1e-3


def test_a_closed_edge_has_no_effect():
    """Head 1 of layer 1 has scores far below -b: all its gates are shut, in both runs and in between."""
    model, pairs = tiny(gated=True), some_pairs()
    with torch.no_grad():
        for n, value in ((4, 1e3), (12 + 4, -1e3)):    # first entry of the head's q and k
            model.h[1].attn.c_attn.weight[n], model.h[1].attn.c_attn.bias[n] = 0, value
    scores = by_name(P.edge_scores(model, *pairs), model.config)
    for edge in P.edge_names(model.config):
        exact = P.exact_edge_score(model, *pairs, *edge)
        if "a1.h1" in edge:
            assert exact.eq(0).all() and scores[edge].eq(0).all()
        else:
            assert exact.ne(0).any() and scores[edge].ne(0).any()
    assert P.head_scores(model, *pairs)[:, 1, 1].eq(0).all()


def test_equal_sentences_have_scores_of_zero():
    model, (clean, _, metric) = tiny(gated=True), some_pairs()
    assert P.head_scores(model, clean, clean, metric).eq(0).all()
    assert P.explained_effect(model, clean, clean, metric, torch.arange(
        model.config.n_layer * model.config.n_head)).eq(0).all()
    assert P.edge_scores(model, clean, clean, metric, True).eq(0).all()
    assert P.exact_edge_score(model, clean, clean, metric, "embed", "m1").eq(0).all()
    assert P.cumulative(torch.zeros(2, 3, 3)).eq(0).all()


@pytest.mark.parametrize("gated", [False, True])
def test_kept_circuit_of_nothing_everything_and_random_edges(gated):
    model, (clean, corrupt, metric) = tiny(gated), some_pairs()
    m_clean, m_corrupt = (metric(model.eval()(tokens).logits) for tokens in (clean, corrupt))
    every = torch.ones_like(P.edge_mask(model.config))
    for edges, m in ((every, m_clean), (~every, m_corrupt)):
        kept = P.kept_circuit(model, edges, clean, corrupt, metric)
        torch.testing.assert_close(kept, m.detach(), atol=1e-9, rtol=0)

    chosen = torch.rand(3, *every.shape) < 0.6                                    # another circuit for every pair
    streams, now, names, embed = {}, {}, P.nodes(model.config), by_hand(model, clean)[1]["embed"]
    reference = by_hand(model, corrupt, lambda node, x: streams.setdefault(node, x))[1]

    def read(node, _):
        d = names.index(merged(node)) - 1
        return streams[node] + sum(chosen[:, names.index(s), d, None, None] * (now[s] - reference[s]) for s in now
                                   if (s, merged(node)) in P.edge_names(model.config))

    def write(node, y):
        now[node] = embed if node == "embed" else y
        return y

    m = metric(by_hand(model, corrupt, read, write)[0])
    kept = P.kept_circuit(model, chosen, clean, corrupt, metric)
    torch.testing.assert_close(kept, m.detach(), atol=1e-9, rtol=0)
    assert ((m - m_corrupt).abs() > 1e-3).all() and ((m - m_clean).abs() > 1e-3).all()


def test_curves_per_sentence_and_global_differ_where_the_top_edges_do():
    scores = torch.tensor([[[8.0, 0], [0, -2]], [[-2.0, 0], [0, 8]]])
    curves = P.cumulative(scores)
    torch.testing.assert_close(curves.mean(0), torch.tensor([0, 0.8, 1, 1, 1]).double())
    torch.testing.assert_close(P.cumulative(scores.mean(0)), torch.tensor([0, 0.5, 1, 1, 1]).double())
    assert P.edges_needed(curves.mean(0), 0.7) == 1 and P.edges_needed(P.cumulative(scores.mean(0)), 0.7) == 2


def test_top_edges_takes_edges_of_score_zero_before_pairs_that_are_none():
    config = tiny().config
    scores = torch.randn(2, 9, 9) * (torch.rand(2, 9, 9) < 0.3) * P.edge_mask(config)
    for n in (0, 1, 5, 30, 39):    # of 39
        chosen = P.top_edges(scores, n, config)
        assert chosen.sum((1, 2)).tolist() == [n, n] and not (chosen & ~P.edge_mask(config)).any()
        for c, s in zip(chosen, scores.abs()):
            assert n == 0 or s[c].min() >= s[~c].max()


# ---- What is left behind

@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_also_after_an_error(fails):
    model, (clean, corrupt, metric) = tiny(gated=True).train(), some_pairs()
    model.h[1].eval()
    model.wpe.weight.requires_grad_(False)
    model.wte.weight.grad = torch.ones_like(model.wte.weight)

    def state():
        return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
                [p.grad is not None and p.grad.sum().item() for p in model.parameters()],
                [(len(m._forward_hooks), len(m._forward_pre_hooks), "attend" in vars(m)) for m in model.modules()],
                torch.is_grad_enabled(), [p.sum().item() for p in model.parameters()])

    class Stop(Exception):
        pass

    def stop_at(n):
        calls = []

        def stopping(logits):
            calls.append(1)
            if fails and len(calls) == n:
                raise Stop
            return metric(logits)
        return stopping

    before = state()
    functions = [P.head_scores, P.edge_scores, partial(P.exact_edge_score, source="m0", destination="a1.h2"),
                 partial(P.explained_effect, order=torch.arange(6)),
                 lambda model, *pairs: P.kept_circuit(model, P.edge_mask(model.config), *pairs)]
    for function in functions:
        with pytest.raises(Stop) if fails else pytest.MonkeyPatch.context():
            function(model, clean, corrupt, stop_at(1))
        assert state() == before
    if fails:    # in the middle of a layer, with all the hooks in place
        model.h[1].mlp.c_fc.register_forward_hook(lambda *_: (_ for _ in ()).throw(Stop()))
        before = state()
        for function in functions:
            with pytest.raises(Stop):
                function(model, clean, corrupt, metric)
            assert state() == before


def test_frozen_weights_and_no_grad_change_no_score():
    model, pairs = tiny(gated=True), some_pairs()
    expected = P.edge_scores(model, *pairs)
    with torch.no_grad():
        torch.testing.assert_close(P.edge_scores(model.requires_grad_(False), *pairs), expected, atol=0, rtol=0)
    assert not expected.requires_grad


def test_how_many_runs_it_costs():
    model, pairs, runs = tiny(), some_pairs(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    for function, most in ((P.head_scores, 6 * 1.2 + 1), (P.edge_scores, 2)):
        runs.clear()
        function(model, *pairs)
        assert len(runs) <= most


# ---- Tasks

@pytest.fixture
def gpt2(monkeypatch):
    if not VOCABULARY.is_dir():
        pytest.skip("GPT-2's vocabulary is not here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    return tasks.gpt2_encoding()


def texts(encoding, tokens):
    return [encoding.decode(row) for row in tokens.tolist()]


def logits_of(row, tokens_and_values, V=50257):
    """Logits (1,T,V) whose last position has these values; elsewhere, at earlier positions, they are noise."""
    logits = torch.randn(1, 4, V)
    logits[0, -1] = 0
    for token, value in tokens_and_values.items():
        logits[0, -1, token] = value
    return logits


@pytest.mark.parametrize("corruption", ["abc", "swap"])
def test_ioi(gpt2, corruption):
    clean, corrupt, metric = P.ioi(200, 0, corruption=corruption)
    orders, openings = set(), set()
    sentence = re.compile(r"(\w+) (\w+) and (\w+) .*, (\w+) (\w+) the (\w+) to$")
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        opening, first, second, subject, *_ = sentence.match(good).groups()
        _, *others = sentence.match(bad).groups()[:4]
        answer = {first: second, second: first}[subject]
        orders.add(first == answer)
        openings.add(opening)
        if corruption == "swap":
            assert others == [first, second, answer]
        else:
            assert len({first, second, *others}) == 5
        assert good.replace(first, "").replace(second, "") == re.sub("|".join(others), "", bad)    # all else alike
        values = {gpt2.encode(" " + answer)[0]: 3.0, gpt2.encode(" " + subject)[0]: 1.0}
        one = P.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits_of(n, values)).item() == pytest.approx(2.0)
    assert orders == {True, False} and len(openings) >= 3
    assert clean.shape == corrupt.shape == (200, 14)
    again = P.ioi(200, 0, corruption=corruption)
    assert torch.equal(again[0], clean) and torch.equal(again[1], corrupt)
    assert not torch.equal(P.ioi(200, 1)[0], clean)


def test_greater_than(gpt2):
    clean, corrupt, metric = P.greater_than(200, 0)
    assert clean.shape == corrupt.shape == (200, 14)
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        century, year, again = re.search(r"year (\d\d)(\d\d) .* year (\d\d)$", good).groups()
        assert century == again and 2 <= int(year) <= 98 and bad == good.replace(century + year, century + "01")
        assert [gpt2.decode([t]) for t in clean[n].tolist()].count(year) == 1    # the year is a token
        logits = logits_of(n, {gpt2.encode(f"{y:02d}")[0]: 0.1 * y for y in range(100)})
        p = logits[0, -1].double().softmax(0)
        expected = sum((1 if y > int(year) else -1) * p[gpt2.encode(f"{y:02d}")[0]].item() for y in range(100))
        one = P.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits).item() == pytest.approx(expected, abs=1e-5)
    assert len({good.split()[0] for good in texts(gpt2, clean)}) == 3


def test_docstring(gpt2):
    clean, corrupt, metric = P.docstring(50, 0)
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        args, others = (re.search(r"\(self, (.*)\):", text)[1].split(", ") for text in (good, bad))
        assert len({*args, *others}) == 8
        assert re.findall(r":param (\w+):", good) == args[:2] and good.endswith(":param")
        assert bad == good.replace(", ".join(args), ", ".join(others))
        values = {gpt2.encode(" " + name)[0]: i for i, name in enumerate([*args, *others])}
        one = P.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits_of(n, values)).item() == pytest.approx(2 - 7)    # the third name against the last
        compile(good.split(":param")[0] + '"""', "docstring", "exec")
    assert len({text.partition("(")[0] for text in texts(gpt2, clean)}) == 3    # templates


def test_copy():
    clean, corrupt, metric = P.copy(100, 0, vocab_size=257, length=7)
    assert clean.shape == (100, 13) and clean.max() < 256
    assert torch.equal(clean[:, :6], clean[:, 7:])
    assert (clean != corrupt).nonzero().tolist() == [[n, 6] for n in range(100)]
    assert all(len(set(row)) == 7 for row in clean.tolist())
    logits = torch.randn(100, 13, 257)
    expected = [logits[n, -1, clean[n, 6]] - logits[n, -1, corrupt[n, 6]] for n in range(100)]
    torch.testing.assert_close(metric(logits), torch.stack(expected))
    with pytest.raises(UserError, match="different tokens to copy"):
        P.copy(1, 0, vocab_size=8, length=7)


@pytest.mark.parametrize("layout", ["reversed", "paper"])
def test_addition(layout):
    clean, corrupt, metric = P.addition(200, 0, layout)
    logits = torch.randn(200, clean.shape[1], 13)
    values = metric(logits)
    for n, rows in enumerate(zip(clean.tolist(), corrupt.tolist())):
        sums = []
        for row in rows:
            a, b = "".join(ALPHABET[t] for t in row).rstrip("?=").split("+")
            sums.append((int(a), int(b)))
        (a, b), (c, d) = sums
        assert (a // 10, b // 10) == (c // 10, d // 10) and (a % 10 + b % 10 > 9) != (c % 10 + d % 10 > 9)
        tens = [(a + b) // 10 % 10, (c + d) // 10 % 10]
        assert (tens[0] - tens[1]) % 10 in (1, 9)
        assert values[n].item() == pytest.approx((logits[n, -2, tens[0]] - logits[n, -2, tens[1]]).item())


def test_select_takes_the_metric_along():
    clean, corrupt, metric = P.addition(40, 0)
    logits, rows = torch.randn(40, 9, 13), torch.tensor([31, 2, 2, 17])
    part = P.select(clean, corrupt, metric, rows)
    torch.testing.assert_close(part[2](logits[rows]), metric(logits)[rows])
    assert torch.equal(part[0], clean[rows]) and torch.equal(part[1], corrupt[rows])


def test_words_and_sentences_are_checked(gpt2):
    byte_level = byte_encoding()
    for task in (P.ioi, P.docstring):
        with pytest.raises(UserError, match="only 0 of the words .* are one token in the vocabulary bytes"):
            task(2, 0, encoding=byte_level)
    with pytest.raises(UserError, match="do not split"):
        P.greater_than(2, 0, encoding=byte_level)
    with pytest.raises(UserError, match="not equally long"):
        tasks.encode([" key", " key key"], gpt2)


def test_spearman_by_counting_ranks():
    x, y = [3.0, 1, 1, 7, 5, 0], [2.0, 2, 0, 9, 4, 2]
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
    centred = np.array(ranks) - 3.5
    expected = centred[0] @ centred[1] / math.sqrt(centred[0] @ centred[0] * (centred[1] @ centred[1]))
    assert compare.spearman(torch.tensor(x), y) == pytest.approx(expected)
    assert compare.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert compare.spearman([1, 2], [1, 1]) is None


# ---- The command

def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["patching.py", *map(str, arguments)])
    try:
        compare.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return (code, *capsys.readouterr())


def two_heads(layout, **fields):
    return dataclasses.replace(toy_config(layout, **fields), n_head=2)


def toys(folder, layout="reversed"):
    """Untrained checkpoints as toy_addition.py writes them; large weights, so that the pairs differ."""
    paths = []
    for gated in (False, True):
        model = GPT(two_heads(layout, gated=gated), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(12 if p.ndim == 2 else 1)
        paths.append(str(folder / f"{layout}-{gated}.pt"))
        save_checkpoint(model, paths[-1], layout=layout)
    return paths


@pytest.mark.parametrize("layout", ["reversed", "paper"])
def test_the_command_writes_what_it_promises(layout, tmp_path, monkeypatch, capsys):
    dense, sparse = toys(tmp_path, layout=layout)
    out = tmp_path / "new" / "folder"
    code, stdout, stderr = command(monkeypatch, capsys, "--dense", dense, "--sparse", sparse, "--task", "addition",
                                   "--pairs", 30, "--out", out)
    assert code == 0, stderr
    for picture in ("heads.png", "edges.png", "circuit.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "scores.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    pairs = P.addition(30, 0, layout)
    models = {"dense": GPT.from_pretrained(dense), "sparse": GPT.from_pretrained(sparse)}
    m = {name: [pairs[2](model(tokens).logits).detach() for tokens in pairs[:2]] for name, model in models.items()}
    usable = torch.stack([a - b >= compare.USABLE for a, b in m.values()]).all(0)
    assert f"measured on the {usable.sum()} pairs" in stdout and 0 < usable.sum() < 30
    for name, model in models.items():
        f, part = found[name], P.select(*pairs, usable)
        accuracy = (m[name][0] > 0).double().mean().item()
        assert (f"{name} fails the task: accuracy {accuracy:.0%}" in stdout) == (accuracy < 0.8)
        assert f["metric, clean"] == pytest.approx(m[name][0].mean().item(), rel=1e-4)
        assert f["accuracy, clean"] == pytest.approx(accuracy)
        assert f["pairs skipped"] == (m[name][0] - m[name][1] < compare.USABLE).sum()
        heads, edges = P.head_scores(model, *part), P.edge_scores(model, *part)
        np.testing.assert_allclose(f["head scores"], heads.mean(0), atol=1e-3)
        np.testing.assert_allclose(f["edge scores"], edges.mean(0), atol=1e-3)
        assert f["edges, per sentence"] == P.edges_needed(P.cumulative(edges).mean(0))
        assert f["edges, global"] == P.edges_needed(P.cumulative(edges.mean(0)))
        change = heads * (m[name][0] - m[name][1])[usable][:, None, None]    # of m itself: small effects count little
        assert f["heads, global"] == P.heads_needed(P.explained_effect(
            model, *part, change.mean(0).flatten().argsort(descending=True)))
        effect, m_corrupt = (m[name][0] - m[name][1])[usable], m[name][1][usable]
        for kind, ranked in (("per sentence", edges), ("global", edges.mean(0).expand_as(edges))):
            def alone(n):    # the effect of the n best edges, chosen pair by pair; an edge without a score is no choice
                chosen = torch.zeros_like(ranked, dtype=torch.bool)
                for pair, scores in enumerate(ranked.abs().flatten(1)):
                    best = [i for i in scores.argsort(descending=True)[:n].tolist() if scores[i] > 0]
                    chosen[pair].view(-1)[best] = True
                return ((P.kept_circuit(model, chosen, *part) - m_corrupt).mean() / effect.mean()).item()

            kept, n = f[f"kept circuit, {kind}"], f[f"edges that alone have 90% of the effect, {kind}"]
            for tried in ("1", "8", "26"):
                assert kept[tried] == pytest.approx(alone(int(tried)), abs=1e-3)
            if n is None:
                assert max(kept.values()) < 0.9
            else:
                assert alone(n) >= 0.9 and (n == 1 or alone(n - 1) < 0.9)
            assert f[f"effect of these edges alone, {kind}"] == kept[str(f[f"edges, {kind}"])]
        everywhere = [P.exact_edge_score(model, *part, *edge) for edge in P.edge_names(model.config)]    # fewer than 30
        mask = P.edge_mask(model.config)
        for gate in ("off", "on") if model.config.gated else ("off",):
            s = P.edge_scores(model, *part, gate_gradient=gate == "on")
            of_heads = torch.stack([s[:, node].sum(-1) for node in (1, 2, 4, 5)], 1)    # after embed; 3 is m0
            key = f"rank correlation with patching, gate gradient {gate}, "
            assert f[key + "edges"] == pytest.approx(compare.spearman(
                s[:, mask].flatten(), torch.stack(everywhere, 1).flatten()), abs=0.01)
            assert f[key + "heads"] == pytest.approx(compare.spearman(
                of_heads.flatten(), (heads.flatten(1) * effect[:, None]).flatten()), abs=0.01)
    assert "rank correlation" in stdout and "1.0x" in stdout


def test_the_same_command_gives_the_same_scores(tmp_path, monkeypatch, capsys):
    dense, sparse = toys(tmp_path)
    for picture in ("draw_effects", "draw_circuits"):    # seconds, and not looked at here
        monkeypatch.setattr(compare, picture, lambda *_: None)
    contents = []
    for n in range(2):
        torch.rand(n + 3)    # what others drew must not matter
        assert command(monkeypatch, capsys, "--dense", dense, "--sparse", sparse, "--task", "copy", "--pairs", 5,
                       "--out", tmp_path)[0] == 0
        contents.append((tmp_path / "scores.json").read_text())
    assert contents[0] == contents[1]


def test_a_users_mistake_gets_three_lines_and_exit_code_2(tmp_path, monkeypatch, capsys):
    dense, sparse = toys(tmp_path)
    paper = toys(tmp_path, layout="paper")[1]

    def checkpoint(name, **fields):
        path = tmp_path / f"{name}.pt"
        save_checkpoint(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=4, **fields)), path)
        return path

    bytes_, words = checkpoint("bytes", vocab_size=257, block_size=32), checkpoint("words", block_size=8)
    with torch.no_grad():    # a model that always says the same has no pair with an effect
        flat = GPT(two_heads("reversed"))
        for p in flat.parameters():
            p.zero_()
    save_checkpoint(flat, tmp_path / "flat.pt", layout="reversed")
    (tmp_path / "no.pt").write_text("nothing")
    cases = [
        ((dense, sparse, "ioi"), r"ioi is written in GPT-2's 50257 tokens, this model has 13"),
        ((bytes_, bytes_, "greater-than"), r"has 257 \(bytes\): no name or year is one token\ntake --task copy"),
        ((bytes_, bytes_, "addition"), "addition needs checkpoints of toy_addition.py"),
        ((dense, bytes_, "copy"), "differ in n_embd 64 and 4, n_layer 2 and 1, .*vocab_size 13 and 257"),
        ((dense, paper, "addition"), "differ in .*their layout of sums"),
        ((tmp_path / "flat.pt", sparse, "addition"), r"no usable pair: (.|\n)* 10 \(dense\) and \d+ \(sparse\)"),
        ((tmp_path / "missing.pt", sparse, "addition"), "no such file or folder: .*missing.pt"),
        ((tmp_path / "no.pt", sparse, "addition"), "is truncated"),
        ((dense, sparse, "sorting"), "invalid choice: 'sorting'"),
        ((dense, sparse, "copy", "--pairs", "0"), "argument --pairs: 0 is not between 1 and"),
        ((dense, sparse, "copy", "--out", ROOT / "model.py" / "x"), "cannot write to"),
        ((dense, sparse, "copy", "--device", "mps"), "this machine has no mps\npass --device cpu"),
    ]
    if VOCABULARY.is_dir():
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
        cases.append(((words, words, "ioi"), "ioi has sentences of 14 tokens, the model reads at most 8"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for (a, b, task, *rest), message in cases:
        code, stdout, stderr = command(monkeypatch, capsys, "--dense", a, "--sparse", b, "--task", task,
                                       "--pairs", 10, "--out", tmp_path / "out", *rest)
        assert code == 2 and re.search(message, stderr), (message, stderr)
        assert len(stderr.splitlines()) <= 3 and "Traceback" not in stderr and "dense" not in stdout


def test_without_the_vocabulary_the_message_says_where_to_put_it(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="cannot download GPT-2's vocabulary: no network\n.*TIKTOKEN_CACHE_DIR"):
        P.ioi(2, 0)

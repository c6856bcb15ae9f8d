"""patching.py against a GPT written out node by node, finite differences and counts."""
import math
import re
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest
import torch

import patching as P
from model import GPT, GPTConfig, SelfAttention
from support.files import UserError

ONE, EACH = [[0.2] * 3] * 2, [[-0.4, 0.2, 0.8], [0.5, -0.2, 0.0]]    # thresholds b (L,H): one for all heads, or many
BOTH = pytest.mark.parametrize("b", [None, ONE, EACH], ids=["dense", "gated", "a threshold for each head"])


def tiny(b=None, **fields):
    """A random GPT in float64 with weights large enough that every node matters and gates are open and shut.
    b: thresholds (L,H), None: a dense model."""
    config = GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12, gated=b is not None, **fields)
    model = GPT(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1 if "ln_" in name and "weight" in name else 0, 0.3)
        for block, thresholds in zip(model.h, b or ()):
            block.attn.gate_bias.copy_(torch.tensor(thresholds))
    return model


def some_pairs(N=3, T=6):
    clean, corrupt = torch.randint(11, (2, N, T))
    corrupt[:, -1] = clean[:, -1]
    weights = torch.randn(11, dtype=torch.float64)
    return clean, corrupt, lambda logits: torch.tanh(logits[:, -1] @ weights) + logits[:, 2, 3]


def by_hand(model, tokens, read=lambda node, x: x, write=lambda node, y: y):
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
                pattern = pattern * (s + block.attn.gate_bias[h] > 0)
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

@BOTH
def test_head_scores_and_restored_heads_by_hand(b):
    model, (clean, corrupt, metric) = tiny(b), some_pairs()
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
        curve = P.share_of_effect(P.metric_of_restored_heads(model, clean, corrupt, metric, order), m_clean)
        for k in range(7):
            first = order.expand(3, 6)[:, :k]
            m = patched(lambda node: (first == names.index(node)).any(1) if node in names else torch.zeros(3) > 0)
            expected = (m - m_corrupt).mean() / (m_clean - m_corrupt).mean()
            torch.testing.assert_close(curve[k], expected, atol=1e-9, rtol=0)


@BOTH
def test_kept_heads_by_hand(b):
    """The other direction: the clean run, and heads beyond the first k as in the corrupted one."""
    model, (clean, corrupt, metric) = tiny(b), some_pairs()
    bad, names = by_hand(model, corrupt)[1], [f"a{l}.h{h}" for l in range(2) for h in range(3)]
    for order in (torch.tensor([4, 1, 0, 5, 3, 2]), torch.stack([torch.randperm(6) for _ in range(3)])):
        m = P.metric_of_kept_heads(model, clean, corrupt, metric, order)
        for k in range(7):
            rest = order.expand(3, 6)[:, k:]
            expected = metric(by_hand(model, clean, write=lambda node, y: torch.where(
                (rest == names.index(node)).any(1)[:, None, None], bad[node], y) if node in names else y)[0])
            torch.testing.assert_close(m[:, k], expected.detach(), atol=1e-9, rtol=0)
        assert (m[:, 0] - m[:, -1]).abs().min() > 1e-6
        assert torch.equal(P.metric_of_kept_heads(model, clean, corrupt, metric, order, [0, 2, 5]), m[:, [0, 2, 5]])
        every, some = (P.metric_of_restored_heads(model, clean, corrupt, metric, order, counts)
                       for counts in (None, [0, 2, 5]))
        assert torch.equal(some, every[:, [0, 2, 5]])


def test_all_heads_restore_everything_where_the_last_token_is_shared():
    model, (clean, corrupt, _) = tiny(), some_pairs()
    m = P.metric_of_restored_heads(model, clean, corrupt, lambda logits: logits[:, -1, 4], torch.randperm(6))
    curve = P.share_of_effect(m, model(clean).logits[:, -1, 4])
    assert curve[0] == 0 and curve[-1].item() == pytest.approx(1, abs=1e-12)


def test_the_first_that_reaches_a_share():
    assert P.first_reaching([0, 0.3, 0.95, 0.7, 1.0], 0.9) == 2
    assert P.first_reaching(torch.tensor([0, 0.3, 0.5]), 0.9) is None


# ---- Edges

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("b, points", [(None, 1), (ONE, 1), (ONE, 3), (EACH, 1), (EACH, 3)])
def test_edge_scores_are_merged_q_k_and_v_and_add_up_to_node_scores(b, points, causal):
    """With 3 points: a mean over embeddings that stand at none, one and two thirds of the way."""
    model, (clean, corrupt, metric) = tiny(b, causal=causal), some_pairs()
    scores = P.edge_scores(model, clean, corrupt, metric, points)
    assert scores[:, ~P.edge_mask(model.config)].eq(0).all()
    difference, at_reads, at_nodes = outputs_apart(model, clean, corrupt), defaultdict(float), defaultdict(float)
    for point in range(points):
        reads, writes = {}, {}

        def read(node, x):
            reads[node] = x.view_as(x)
            return reads[node]

        def write(node, y):
            writes[node] = y + point / points * difference["embed"] if node == "embed" else y.view_as(y)
            return writes[node]

        m = metric(by_hand(model, corrupt, read, write)[0]).sum()
        for found, at in ((reads, at_reads), (writes, at_nodes)):
            for node, grad in zip(found, torch.autograd.grad(m, list(found.values()), retain_graph=True)):
                at[node] += grad / points
    named = by_name(scores, model.config)
    for (s, d), ours in named.items():
        expected = sum((difference[s] * grad).sum((1, 2)) for node, grad in at_reads.items() if merged(node) == d)
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)
    for n, node in enumerate(P.nodes(model.config)[:-1]):
        torch.testing.assert_close(scores[:, n].sum(1), (difference[node] * at_nodes[node]).sum((1, 2)),
                                   atol=1e-9, rtol=0)
    assert (P.edge_scores(model, clean, corrupt, metric, 4 - points) - scores).abs().max() > 1e-3    # it matters


@torch.no_grad()
def test_behind_a_gate_that_is_shut_an_edge_scores_only_on_the_way():
    """One head whose gates follow the embedding: shut in the corrupted run, open in the clean one."""
    model = GPT(GPTConfig(1, 3, 1, 1, 4, gated=True, gate_bias=-1.0)).double().eval()
    for p in model.parameters():
        if p.requires_grad:
            p.zero_()
    model.h[0].ln_1, model.ln_f = torch.nn.Identity(), torch.nn.Identity()
    model.wte.weight[1] = torch.tensor([0.0, 1, 0, 0])          # the corrupted token
    model.wte.weight[2] = torch.tensor([3.0, 1, 0, 0])          # the clean one: score 9 / 2 > 1 = -b
    model.h[0].attn.c_attn.weight[0, 0] = model.h[0].attn.c_attn.weight[4, 0] = 1     # q and k read the first entry
    model.h[0].attn.c_attn.weight[8:] = torch.eye(4)            # v is the embedding
    model.h[0].attn.c_proj.weight.copy_(torch.eye(4))
    clean, corrupt, metric = torch.tensor([[2]]), torch.tensor([[1]]), lambda logits: logits[:, 0, 2]
    pairs, names = (clean, corrupt, metric), P.nodes(model.config)
    head = names.index("a0.h0") - 1
    assert P.exact_edge_score(model, *pairs, "embed", "a0.h0").item() == 10    # (3, 1) . (3, 1)
    # at 0, 1/4, 1/2, 3/4 of the way the score is 0, 0.28, 1.13, 2.53: the gate is open at two points of four, where
    # the slope of the logit along the way is 3 * 3
    assert P.edge_scores(model, *pairs)[0, 0, head] == 0
    assert P.edge_scores(model, *pairs, 4)[0, 0, head].item() == pytest.approx(4.5)


@BOTH
def test_finite_differences_along_the_patch_agree(b):
    model, (clean, corrupt, metric) = tiny(b), some_pairs()
    difference = outputs_apart(model, clean, corrupt)
    for (s, d), score in by_name(P.edge_scores(model, clean, corrupt, metric), model.config).items():
        up, down = (metric(by_hand(model, corrupt, lambda node, x: x + e * difference[s] * (merged(node) == d))[0])
                    for e in (1e-6, -1e-6))
        torch.testing.assert_close(score, ((up - down) / 2e-6).detach(), atol=1e-4, rtol=1e-4)


@BOTH
def test_exact_edge_scores_by_hand(b):
    model, (clean, corrupt, metric) = tiny(b), some_pairs()
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
    def attend(self, q, k, v, sample=False):
        return self.pattern @ v, q.new_ones(q.shape[:2]), q.new_ones(q.shape[:2])


def test_in_a_linear_model_attribution_is_patching():
    model = Linear(tiny().config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    clean, corrupt, _ = some_pairs()
    pairs = clean, corrupt, lambda logits: logits[:, -1] @ torch.arange(11.0, dtype=torch.float64)
    scores = P.edge_scores(model, *pairs)    # without gates: through the model's own `attend`
    for edge, score in by_name(scores, model.config).items():
        torch.testing.assert_close(score, P.exact_edge_score(model, *pairs, *edge), atol=1e-9, rtol=0)
    m_clean, m_corrupt = (pairs[2](model(tokens).logits) for tokens in pairs[:2])
    of_heads = scores[:, 1:].sum(-1).view(3, 2, 4)[:, :, :3]
    exact = P.head_scores(model, *pairs) * (m_clean - m_corrupt)[:, None, None]
    torch.testing.assert_close(of_heads, exact.detach(), atol=1e-9, rtol=0)
    assert of_heads.abs().min() > 1e-3


def test_a_closed_edge_has_no_effect():
    """Head 1 of layer 1 has scores far below -b: all its gates are shut, in both runs and in between."""
    model, pairs = tiny(ONE), some_pairs()
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
    model, (clean, _, metric) = tiny(ONE), some_pairs()
    assert P.head_scores(model, clean, clean, metric).eq(0).all()
    for measured in (P.metric_of_restored_heads, P.metric_of_kept_heads):
        m = measured(model, clean, clean, metric, torch.arange(6))
        assert P.share_of_effect(m, metric(model(clean).logits)).eq(0).all()
    assert P.edge_scores(model, clean, clean, metric, 3).eq(0).all()
    assert P.exact_edge_score(model, clean, clean, metric, "embed", "m1").eq(0).all()
    assert P.cumulative(torch.zeros(2, 3, 3)).eq(0).all()


@BOTH
def test_kept_circuit_of_nothing_everything_and_random_edges(b):
    model, (clean, corrupt, metric) = tiny(b), some_pairs()
    m_clean, m_corrupt = (metric(model.eval()(tokens).logits) for tokens in (clean, corrupt))
    every = torch.ones_like(P.edge_mask(model.config))
    for edges, m in ((every, m_clean), (~every, m_corrupt)):
        kept = P.kept_circuit(model, clean, corrupt, metric, edges)
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
    kept = P.kept_circuit(model, clean, corrupt, metric, chosen)
    torch.testing.assert_close(kept, m.detach(), atol=1e-9, rtol=0)
    assert ((m - m_corrupt).abs() > 1e-3).all() and ((m - m_clean).abs() > 1e-3).all()


def test_curves_per_sentence_and_global_differ_where_the_top_edges_do():
    scores = torch.tensor([[[8.0, 0], [0, -2]], [[-2.0, 0], [0, 8]]])
    curves = P.cumulative(scores)
    torch.testing.assert_close(curves.mean(0), torch.tensor([0, 0.8, 1, 1, 1]).double())
    torch.testing.assert_close(P.cumulative(scores.mean(0)), torch.tensor([0, 0.5, 1, 1, 1]).double())
    assert P.first_reaching(curves.mean(0), 0.7) == 1 and P.first_reaching(P.cumulative(scores.mean(0)), 0.7) == 2


def test_edge_ranks_put_edges_of_score_zero_before_pairs_that_are_none():
    config = tiny().config
    scores = torch.randn(2, 9, 9) * (torch.rand(2, 9, 9) < 0.3) * P.edge_mask(config)
    ranks = P.edge_ranks(scores, config)
    for n in (0, 1, 5, 30, 39):    # of 39
        chosen = ranks < n
        assert chosen.sum((1, 2)).tolist() == [n, n] and not (chosen & ~P.edge_mask(config)).any()
        for c, s in zip(chosen, scores.abs()):
            assert n == 0 or s[c].min() >= s[~c].max()


# ---- What is left behind

def test_the_model_is_left_as_it_was():
    model, (clean, corrupt, metric) = tiny(ONE).train(), some_pairs()
    model.h[1].eval()
    model.wpe.weight.requires_grad_(False)
    model.wte.weight.grad = torch.ones_like(model.wte.weight)

    def state():
        return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
                [p.grad is not None and p.grad.sum().item() for p in model.parameters()],
                [p.sum().item() for p in model.parameters()], torch.is_grad_enabled())

    before = state()
    for function in (P.head_scores, P.edge_scores, partial(P.exact_edge_score, source="m0", destination="a1.h2"),
                     partial(P.metric_of_kept_heads, order=torch.arange(6)),
                     partial(P.kept_circuit, edges=P.edge_mask(model.config))):
        function(model, clean, corrupt, metric)
        assert state() == before


def test_frozen_weights_and_no_grad_change_no_score():
    model, pairs = tiny(ONE), some_pairs()
    expected = P.edge_scores(model, *pairs)
    with torch.no_grad():
        torch.testing.assert_close(P.edge_scores(model.requires_grad_(False), *pairs), expected, atol=0, rtol=0)
    assert not expected.requires_grad


def test_gates_are_hard_whatever_the_models_mode():
    model, pairs = tiny(ONE), some_pairs()
    for function in (P.head_scores, P.edge_scores, partial(P.edge_scores, points=3)):
        assert torch.equal(function(model.train(), *pairs), function(model.eval(), *pairs))


def test_how_many_runs_it_costs(monkeypatch):
    model, pairs, runs, forward = tiny(), some_pairs(), [], P.forward
    monkeypatch.setattr(P, "forward", lambda *args, **options: (runs.append(1), forward(*args, **options))[1])
    for function, cost in ((P.head_scores, 6 + 2), (P.edge_scores, 2), (partial(P.edge_scores, points=4), 5)):
        runs.clear()
        function(model, *pairs)
        assert len(runs) == cost

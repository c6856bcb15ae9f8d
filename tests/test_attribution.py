"""extras/attribution.py in float64 on tiny random models, where every sum can be checked to the last digits."""
import math

import pytest
import torch

from extras import attribution as A
from extras.llama import Llama, LlamaConfig
from extras.transcoder import Transcoder, mlp_sites
from model import GPT, GPTConfig

SIZE = dict(block_size=8, vocab_size=11, n_layer=3, n_head=2, n_embd=12, gated=True, gate_bias=0.2)
MODELS = {"gpt": lambda: GPT(GPTConfig(**SIZE)),
          "llama": lambda: Llama(LlamaConfig(**SIZE, n_kv_head=1, n_hidden=20, tied=False)),
          "olmo": lambda: Llama(LlamaConfig(**SIZE, n_kv_head=2, n_hidden=20, norm="layer"))}
TOKENS = torch.tensor([3, 7, 1, 10, 3])
ALL = pytest.mark.parametrize("kind", MODELS)


def example(kind, activation="topk", cross=True):
    """A model and a transcoder with random weights, large enough that norms, gates and biases matter."""
    torch.manual_seed(5)
    model = MODELS[kind]().double().eval().requires_grad_(False)
    transcoder = Transcoder(3, 12, features=9, k=3, activation=activation, cross=cross).double().requires_grad_(False)
    for p in [*model.parameters(), *transcoder.parameters()]:
        p.add_(0.4 * torch.randn_like(p))
    transcoder.in_scale.uniform_(0.5, 2)
    transcoder.out_scale.uniform_(0.5, 2)
    return model, transcoder


def pre_activations(model, transcoder):
    """{(layer, position, feature): its pre-activation} of the active ones, from the true run."""
    found = {}
    for l, x in enumerate(mlp_sites(model, TOKENS[None]).inputs):
        a, h = transcoder.encode(l, x[0]), transcoder.pre_activations(l, x[0])
        found |= {(l, t, f): h[t, f].item() for t, f in a.nonzero().tolist()}
    return found


@ALL
@pytest.mark.parametrize("activation, cross", [("topk", True), ("jump", True), ("topk", False)])
def test_what_enters_a_node_adds_up_to_its_value(kind, activation, cross):
    model, transcoder = example(kind, activation, cross)
    graph = A.Frozen(model, transcoder, TOKENS, 4).graph()
    logits = model(TOKENS[None]).logits[0, -1]
    expected = pre_activations(model, transcoder)
    seen = {(n.layer, n.position, n.index): graph.value[i].item() for i, n in enumerate(graph.nodes)
            if n.kind == "feature"}
    assert seen == pytest.approx(expected, abs=1e-9) and len(seen) > 20
    assert graph.value[-1].item() == pytest.approx((logits[4] - logits.mean()).item(), abs=1e-9)
    reads = torch.tensor([n.kind in ("feature", "logit") for n in graph.nodes])
    torch.testing.assert_close(graph.edges.sum(0) + graph.bias, graph.value, atol=1e-9, rtol=0)
    assert graph.edges[:, ~reads].eq(0).all() and graph.edges[-1].eq(0).all() and graph.bias[reads].abs().min() > 1e-6
    kinds = [n.kind for n in graph.nodes]
    assert kinds.count("embedding") == 5 and kinds.count("error") == 15
    assert kinds.count("position") == (5 if kind == "gpt" else 0)
    assert A.Frozen(model, transcoder, TOKENS).graph().nodes[-1].index == logits.argmax()
    pair = A.Frozen(model, transcoder, TOKENS, 4, against=9).graph()
    assert pair.value[-1].item() == pytest.approx((logits[4] - logits[9]).item(), abs=1e-9)


@ALL
def test_all_nodes_together_are_the_model(kind):
    """And each alone moves each target by its edge, in a run from which its vectors are taken away."""
    model, transcoder = example(kind)
    graph = A.Frozen(model, transcoder, TOKENS, 4).graph()
    frozen = A.Frozen(model, transcoder, TOKENS, 4)
    everything = frozen.written(range(len(graph.nodes))) + frozen.constant
    last = frozen.run(everything, A.WITH_BIAS)[1]
    head = getattr(model, "lm_head", model.wte).weight
    torch.testing.assert_close(last @ head.T, model(TOKENS[None]).logits[0], atol=1e-9, rtol=0)
    targets = [i for i, n in enumerate(graph.nodes) if n.kind in ("feature", "logit")]
    for s in range(0, len(graph.nodes), 4):
        reads, last = frozen.run(everything - frozen.written([s]), A.WITH_BIAS)[:2]
        for t in targets:
            without = frozen.value(graph.nodes[t], reads, last, A.WITH_BIAS)
            assert (graph.value[t] - without).item() == pytest.approx(graph.edges[s, t].item(), abs=1e-9)


@ALL
def test_heads_keys_and_bypass_add_up_to_the_edge(kind):
    model, transcoder = example(kind)
    graph = A.Frozen(model, transcoder, TOKENS, 4).graph()
    maps, checked = model.attention_maps(TOKENS[None])[:, 0], 0
    chosen = [(s, t) for s, t in graph.edges.abs().gt(1e-6).nonzero().tolist()
              if graph.nodes[s].position < graph.nodes[t].position][::7]
    for s, t in chosen + [(0, len(graph.nodes) - 1)]:
        source, target = graph.nodes[s], graph.nodes[t]
        split = A.Frozen(model, transcoder, TOKENS, 4).split(source, target)
        for m, (carried, bypass) in split.items():
            assert carried.shape == (2, 5, 5) and carried[maps[m] == 0].eq(0).all()    # a closed gate, or a later key
            assert carried.sum().item() + bypass == pytest.approx(graph.edges[s, t].item(), abs=1e-9)
            checked += carried.abs().max().item() > 1e-6
        first = source.layer + (source.kind in ("feature", "error"))
        assert list(split) == list(range(first, min(target.layer, 2) + 1)) and split
        assert any(carried.abs().sum() > 0 for carried, _ in split.values())    # it crosses positions: through heads
    assert checked > 10


def test_with_every_gate_shut_all_passes_by():
    """Then no edge leaves its position, and no head carries anything."""
    model, transcoder = example("gpt")
    for block in model.h:
        block.attn.gate_bias.fill_(-1e9)
    closed = A.Frozen(model, transcoder, TOKENS, 4).graph()
    s = next(i for i, n in enumerate(closed.nodes) if n.kind == "feature" and n.layer == 0)
    for t, node in enumerate(closed.nodes):
        if node.kind == "feature" and node.layer > 0:
            for carried, bypass in A.Frozen(model, transcoder, TOKENS, 4).split(closed.nodes[s], node).values():
                assert carried.eq(0).all() and bypass == pytest.approx(closed.edges[s, t].item(), abs=1e-9)
            assert node.position == closed.nodes[s].position or closed.edges[s, t] == 0


@ALL
def test_the_split_of_a_score_sums_to_it(kind):
    model, transcoder = example(kind)
    x = mlp_sites(model, TOKENS[None]).before
    for layer, head, i, j in ((0, 1, 3, 1), (1, 0, 4, 4), (2, 1, 4, 0)):
        block = model.h[layer]
        q, k, _ = block.attn.heads(block.ln_1(x[layer]))
        score = (q[0, head, i] @ k[0, head, j] / math.sqrt(6)).item()
        split = A.score_split(model, transcoder, TOKENS, layer, head, i, j)
        nodes = A.Frozen(model, transcoder, TOKENS).nodes
        assert split.shape == (len(nodes), len(nodes)) and split.sum().item() == pytest.approx(score, abs=1e-9)
        late = [n for n, node in enumerate(nodes[:-1]) if node.kind in ("feature", "error") and node.layer >= layer]
        assert split[late].eq(0).all() and split[:, late].eq(0).all() and late
        elsewhere = [n for n, node in enumerate(nodes[:-1]) if node.position > i]
        assert split[elsewhere].eq(0).all()


def test_pruning_by_counting_paths():
    """Four nodes in a row of known shares: 0 -> 1 -> 3, 2 -> 3 (an error), and 0 -> 3."""
    nodes = [A.Node(kind, layer, 0, index) for kind, layer, index in (
        ("embedding", 0, 5), ("feature", 0, 1), ("error", 0, 0), ("logit", 1, 2))]
    edges = torch.zeros(4, 4, dtype=torch.float64)
    edges[0, 1], edges[1, 3], edges[2, 3], edges[0, 3] = -2.0, 3.0, -1.0, 4.0
    graph = A.Graph(nodes, edges, torch.zeros(4), torch.zeros(4))
    assert A.influence(edges).tolist() == pytest.approx([4 / 8 + 3 / 8, 3 / 8, 1 / 8, 1])
    kept, few, replacement, completeness = A.prune(graph, 0.8, 0.95)
    assert replacement == pytest.approx((7 / 8) / (7 / 8 + 1 / 8))
    assert completeness == pytest.approx((1 * (1 - 1 / 8) + 3 / 8 * 1) / (1 + 3 / 8))    # of the logit and the feature
    assert kept.tolist() == [True, True, False, True]    # 7/8 + 3/8 of 11/8 in all
    assert few.nonzero().tolist() == [[0, 1], [0, 3], [1, 3]]
    assert A.largest(torch.tensor([1.0, 5.0, 3.0, 1.0]), 0.8).tolist() == [False, True, True, False]
    assert A.largest(torch.tensor([1.0, 5.0, 3.0, 1.0]), 0.81).sum() == 3

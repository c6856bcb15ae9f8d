"""extras/attribute.py: its parts against loops on tiny models, and the command on a text and on sums."""
import json
import re

import numpy as np
import pytest
import torch

import toy_addition as toy
from extras import attribute as B
from extras import attribution as A
from extras import transcoder as X
from model import GPT, GPTConfig
from support.weights import save_checkpoint
from tests.test_attribution import TOKENS, example


def live_logits(model, keep):
    """Of the last position, in a run written with loops over heads, in which keep (L,H,T,T) multiplies the weights."""
    x = model.wte(TOKENS) + model.wpe.weight[:len(TOKENS)]                           # (T,C)
    for l, block in enumerate(model.h):
        q, k, v = (t[0] for t in block.attn.heads(block.ln_1(x)[None]))              # (H,T,D)
        z = []
        for h in range(len(q)):
            scores = q[h] @ k[h].T / q.shape[-1]**0.5
            weights = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1)
            z.append((weights * (scores + block.attn.gate_bias[h] > 0) * keep[l, h]) @ v[h])
        x = x + block.attn.c_proj(torch.cat(z, 1))
        x = x + block.mlp(block.ln_2(x))
    return model.ln_f(x[-1]) @ model.wte.weight.T


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_edges_that_are_not_kept_are_closed_gates(kind):
    """Without its gates, but with only the edges that they leave open, a gated model has the graph that it had."""
    model, transcoder = example(kind)
    graph = A.Frozen(model, transcoder, TOKENS, 4).graph()
    keep = (model.attention_maps(TOKENS[None])[:, 0] > 0).double()
    model.set_gates(False)
    assert 0.2 < keep.mean() / 0.6 < 0.9    # 0.6 of 5 x 5 are allowed
    again = A.Frozen(model, transcoder, TOKENS, 4, keep=keep).graph()
    assert again.nodes == graph.nodes
    torch.testing.assert_close(again.edges, graph.edges, atol=1e-9, rtol=0)


def test_the_intervention_by_hand():
    model, transcoder = example("gpt")
    frozen = A.Frozen(model, transcoder, TOKENS, 4)
    keep, rng = torch.ones_like(frozen.patterns), np.random.default_rng(0)
    keep[1, 0] = 0
    mass = frozen.patterns.sum(2) * torch.rand(3, 2, 5)
    top, others = B.falls(model, TOKENS, 4, keep, frozen.patterns, mass, rng)
    whole = live_logits(model, keep).log_softmax(-1)
    torch.testing.assert_close(B.log_p(model, TOKENS, keep), whole, atol=1e-9, rtol=0)
    best = sorted(range(30), key=lambda n: -mass.flatten()[n])[:5]
    for n in best:
        keep[n // 10, n // 5 % 2, :, n % 5] = 0
    fall = (whole - live_logits(model, keep).log_softmax(-1))[4].item()
    assert top == pytest.approx(fall, abs=1e-9) and others != top
    used, mass = torch.zeros(3, 2, 5, 5), torch.zeros(3, 2, 5)
    used[0, 1, 4, 2] = used[0, 0, 4, 1] = mass[0, 1, 2] = 1    # one that carries, one that does not
    keep = torch.ones_like(frozen.patterns)
    falls = B.falls(model, TOKENS, 4, keep, used, mass, rng)
    for fall, (h, j) in zip(falls, ((1, 2), (0, 1))):
        closed = keep.clone()
        closed[0, h, :, j] = 0
        expected = live_logits(model, keep).log_softmax(-1) - live_logits(model, closed).log_softmax(-1)
        assert fall == pytest.approx(expected[4].item(), abs=1e-9)
    assert B.falls(model, TOKENS, 4, keep, used, torch.zeros(3, 2, 5), rng) == (None, None)


def test_only_the_features_that_count_most_get_their_edges():
    model, transcoder = example("gpt")
    whole, few = (A.Frozen(model, transcoder, TOKENS, 4).graph(most) for most in (None, 2))
    done = few.edges.abs().sum(0) > 0
    assert torch.equal(few.edges[:, done], whole.edges[:, done]) and torch.equal(few.value[done], whole.value[done])
    last = [n for n, node in enumerate(whole.nodes) if node.kind == "feature" and node.layer == 2]
    best = sorted(last, key=lambda n: -whole.edges[n, -1].abs())[:2]
    assert sorted(n for n in last if done[n]) == sorted(best) and done.sum() == 7 and len(last) > 5
    everything = A.Frozen(model, transcoder, TOKENS, 4).graph(10**6)
    assert torch.equal(everything.edges, whole.edges)


def test_what_the_strongest_edges_are_carried_by():
    model, transcoder = example("gpt")
    frozen = A.Frozen(model, transcoder, TOKENS, 4)
    graph = frozen.graph()
    c, weights, held = B.carriers(frozen, graph)                                     # (E,L,H,T,T), (E)
    share = graph.edges.abs() / graph.edges.abs().sum(0).clamp(min=1e-30)
    counts = {(s, t): (share[s, t] * A.influence(graph.edges)[t]).item() for s, t in graph.edges.nonzero().tolist()
              if graph.nodes[s].position != graph.nodes[t].position}
    best = sorted(counts, key=lambda edge: -counts[edge])[:20]
    assert c.shape == (20, 3, 2, 5, 5) and weights.tolist() == pytest.approx([counts[edge] for edge in best])
    assert held == pytest.approx(sum(weights.tolist()) / sum(counts.values()))
    for row, (s, t) in zip(c, best):
        split = frozen.split(graph.nodes[s], graph.nodes[t])
        for m, h, i, j in np.ndindex(3, 2, 5, 5):
            expected = split[m][0][h, i, j].item() if m in split and i != j else 0
            assert row[m, h, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_shares_and_curves_by_hand():
    """Two edges, one layer, two heads, two positions: c[e,0,h,i,j]."""
    c = torch.tensor([[[[[3.0, -1], [1, 0]], [[0, 0], [0, 1]]]], [[[[0, 2], [0, -2]], [[4, 2], [0, 0]]]]])
    found = B.parts(c, torch.tensor([0.3, 0.1]))
    heads, pairs, edges = (found[unit] for unit in B.UNITS)
    assert torch.allclose(heads[0], torch.tensor([[0.75, 0.25], [0, 1]]))
    assert torch.allclose(heads[1], torch.tensor([[0.75 * 0.75, 0.75 * 0.25 + 0.25]]))
    assert torch.allclose(pairs[0], torch.tensor([[4, 1, 0, 1], [0, 0, 4, 2]]) / 6)
    assert torch.allclose(edges[0], torch.tensor([[0.5, 1 / 6, 1 / 6, 0, 0, 0, 0, 1 / 6],
                                                  [0, 0.2, 0, 0.2, 0.4, 0.2, 0, 0]]))
    share = torch.tensor([[0.2, 0.8, 0], [0.5, 0.1, 0.4], [0, 0, 0]])
    assert B.mean_curve(share).tolist() == pytest.approx([0, 0.65, 0.95, 1])
    assert B.mean_curve(torch.zeros(2, 3)).tolist() == [0, 0, 0, 0]
    made = B.summary([found, found], [{"edges open": 3, "fall": None}, {"edges open": 4, "fall": None}])
    assert made["edges open"] == 3.5 and made["fall"] is None
    assert made["curve: heads of an edge"] == pytest.approx([0, 0.875, 1])
    assert [made[f"heads for {p} of an edge"] for p in ("80%", "90%")] == [1, 2]
    assert made["(head, key) for 80% of a prompt"] == 3 and made["(head, key) for 90% of a prompt"] == 4


def test_a_sum_is_cut_at_the_tens_slot(monkeypatch):
    def tens(model, rows):    # of 10 rows[0] + rows[1] + 10 rows[3] + rows[4]
        return (rows[:, 0] + rows[:, 3] + (rows[:, 1] + rows[:, 4] >= 10)) % 10

    model, other = (GPT(toy.toy_config()) for _ in range(2))
    model.notes["layout"] = "reversed"
    monkeypatch.setattr(B, "likeliest", lambda asked, rows: tens(asked, rows) + (asked is other) * (rows[:, 0] < 5))
    prompts, answers = B.prompts_of([model, other], "addition", 50, 32, 0)
    assert prompts.shape == (50, len(B.PLACES)) and len(prompts.unique(dim=0)) == 50
    assert torch.equal(answers, tens(model, prompts))    # else no prompt would be right
    assert (prompts[:, 0] >= 5).all()    # the other model is wrong on the rest


def test_sums_with_and_without_a_carry_are_told_apart(capsys):
    """19 + 12 has a carry and reads the units slot, 11 + 12 has none and reads a tens digit."""
    sums, shares = torch.tensor([[1, 9, 10, 1, 2], [1, 1, 10, 1, 2]]), torch.zeros(2, 1, 1, len(B.PLACES))
    shares[0, 0, 0, -2], shares[1, 0, 0, 0] = 0.75, 0.5
    B.print_sums({"sparse": [{"(head, key)": (None, share)} for share in shares]}, sums, 1, 1)
    printed = capsys.readouterr().out
    assert re.search(rf"key {B.PLACES[-2]} +75.0% +0.0%\n", printed)
    assert re.search(rf"key {B.PLACES[0]} +0.0% +50.0%\n", printed)


def test_the_cut_keeps_the_largest_weights_of_each_query():
    """As many as asked for, over both heads, judged in a run in which the layers below are cut already."""
    model, _ = example("gpt")
    model.set_gates(False)
    counts = torch.tensor([[1, 2, 2, 0, 4], [2, 1, 3, 5, 1], [1, 1, 1, 1, 1]])
    keep = B.largest_weights(model, TOKENS, counts)
    assert torch.equal(keep.sum((1, 3)), counts.float())
    for l, block in enumerate(model.h):
        x = X.mlp_sites(model, TOKENS[None], keep=keep).before[l]
        q, k, _ = block.attn.heads(block.ln_1(x))
        weights = block.attn.weights(q, k)[0]
        for i, n in enumerate(counts[l].tolist()):
            assert weights[:, i][keep[l, :, i] > 0].sum().item() == pytest.approx(
                sum(sorted(weights[:, i].flatten().tolist())[10 - n:]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Transcoders, hardly trained, of a GPT on bytes and of an untrained toy, dense and gated."""
    folder = tmp_path_factory.mktemp("attribute")
    (folder / "text.txt").write_text("\n\n\n".join(f"{n} " + "a" * 60 for n in range(400)))
    sizes = dict(block_size=24, vocab_size=257, n_layer=2, n_head=2, n_embd=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "home"))
        for name, gated in (("dense", False), ("sparse", True)):
            text = GPT(GPTConfig(**sizes), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():    # whatever it reads, an "a" comes next
                text.wte.weight[97] += text.ln_f.weight
                text.ln_f.bias += 0.1
            sums = GPT(toy.toy_config(), generator=torch.Generator().manual_seed(1))
            for kind, model, data in (("text", text, folder / "text.txt"), ("sums", sums, "addition")):
                model.set_gates(gated, 0.0)
                notes = {"layout": "reversed"} if kind == "sums" else {}
                save_checkpoint(model, folder / f"{kind}-{name}.pt", **notes)
                patch.setattr("sys.argv", ["transcoder", "--model", str(folder / f"{kind}-{name}.pt"), "--data",
                                           str(data), "--features", "20", "--k", "3", "--steps", "3", "--windows", "4",
                                           "--device", "cpu", "--out", str(folder / f"{kind}-{name}")])
                X.main()
    return folder


def command(folder, monkeypatch, *more, kind="text"):
    monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
    monkeypatch.setattr("sys.argv", ["attribute", "--dense", str(folder / f"{kind}-dense"), "--sparse",
                                     str(folder / f"{kind}-sparse"), "--prompts", "3", "--length", "12", *more])
    B.main()


@pytest.mark.parametrize("kind", ["text", "sums"])
def test_the_command(kind, folder, tmp_path, monkeypatch, capsys):
    sums = toy.addition_data()[0][[123, 5678, 9012], :-1]
    if kind == "sums":    # an untrained toy gets no sum right: ask for what it says
        monkeypatch.setattr(B, "prompts_of", lambda models, *_: (sums, B.likeliest(models[0], sums)))
    command(folder, monkeypatch, "--out", str(tmp_path), kind=kind)
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "attribution.json").read_text())
    assert {"carriers.png", "graph.png"} <= {path.name for path in tmp_path.iterdir()}
    assert found["dense"]["edges open"] == (2 * 2 * 78 if kind == "text" else 2 * 36)
    assert found["cut"]["edges open"] == found["sparse"]["edges open"] < found["dense"]["edges open"]
    assert f"{found['sparse']['replacement']:.2f}" in printed and found["options"]["prompts"] == 3
    assert ("key units slot" in printed) == (kind == "sums")


@pytest.mark.parametrize("kind, more, told", [
    ("text", ("--length", "25"), "--length 25 is too long: the model reads 24 tokens, the validation text has"),
    ("text", ("--prompts", "100000"), "pass fewer --prompts, or another --length"),
    ("text", ("--dense", "FOLDER/nowhere"), "nowhere/args.json: No such file"),
    ("text", ("--dense", "FOLDER/sums-dense"), "were trained with other data\n"),
])
def test_mistakes_are_told_in_three_lines(kind, more, told, folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(folder, monkeypatch, *(part.replace("FOLDER", str(folder)) for part in more), "--out",
                str(tmp_path / "out"), kind=kind)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and told in error and "Traceback" not in error
    assert len(error[error.index("error: "):].strip().splitlines()) <= 3 and not (tmp_path / "out").exists()

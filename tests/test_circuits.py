"""extras/circuits.py: what its command prints, draws and writes, against the library; and what it says to a mistake."""
import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import patching as P
from extras import circuits, tasks
from model import GPT, GPTConfig
from support.weights import save_checkpoint
from toy_addition import toy_config

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = ROOT.parent / "shared" / "tiktoken"    # GPT-2's, if it lies beside the checkout


def test_spearman_by_counting_ranks():
    x, y = [3.0, 1, 1, 7, 5, 0], [2.0, 2, 0, 9, 4, 2]
    ranks = [[sum(b < a for b in v) + (sum(b == a for b in v) + 1) / 2 for a in v] for v in (x, y)]
    centred = np.array(ranks) - 3.5
    expected = centred[0] @ centred[1] / math.sqrt(centred[0] @ centred[0] * (centred[1] @ centred[1]))
    assert circuits.spearman(torch.tensor(x), y) == pytest.approx(expected)
    assert circuits.spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert circuits.spearman([1, 2], [1, 1]) is None


def test_the_first_number_of_edges_that_is_enough():
    for reached in (1, 2, 17, 743, 1000):
        kept, enough = circuits.kept_circuits(lambda n: 0.9 if n >= reached else 0.1, 1000, 500)
        assert enough == reached and kept[500] == (0.9 if reached <= 500 else 0.1) and len(kept) < 40
        assert list(kept) == sorted(kept) and all(share == (0.9 if n >= reached else 0.1) for n, share in kept.items())
    assert circuits.kept_circuits(lambda n: 0.1, 1000, 500)[1] is None


# ---- The command

def command(monkeypatch, capsys, *arguments):
    device = () if "--device" in arguments else ("--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["circuits", *map(str, arguments), *device])
    try:
        circuits.main()
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


def test_every_small_number_of_heads_is_tried_and_no_large_one_is_far():
    for most in (1, 4, 32, 33, 144, 270, 1200):
        counts = circuits.head_counts(most)
        assert counts[0] == 0 and counts[-1] == most and counts[:33] == list(range(min(most, 32) + 1))
        assert all(b > a and (b - a) / b < (0.12 if most < 300 else 0.15) for a, b in zip(counts[32:], counts[33:]))


def test_the_size_of_a_circuit_by_names():
    config = GPTConfig(n_layer=3, n_head=2)
    edges = P.edge_mask(config) & (torch.rand(4, 10, 10, generator=torch.Generator().manual_seed(0)) < 0.1)
    nodes, between = 0, 0
    for chosen in edges[:, P.edge_mask(config)]:
        named = [edge for edge, yes in zip(P.edge_names(config), chosen.tolist()) if yes]
        nodes += len({node for edge in named for node in edge} - {"embed", "logits"})
        between += sum(s[0] == d[0] == "a" for s, d in named)
    assert circuits.size(edges, config) == (nodes / 4, between / 4) and nodes > 12 and between > 0


@pytest.mark.parametrize("layout", ["reversed", "paper"])
def test_the_command_writes_what_it_promises(layout, tmp_path, monkeypatch, capsys):
    dense, sparse = toys(tmp_path, layout=layout)
    out = tmp_path / "new" / "folder"
    monkeypatch.setattr(circuits, "head_counts", lambda most: [0, 2, 4])    # as in a large model: not every number
    code, stdout, stderr = command(monkeypatch, capsys, "--dense", dense, "--sparse", sparse, "--task", "addition",
                                   "--pairs", 30, "--out", out)
    assert code == 0, stderr
    for picture in ("heads.png", "edges.png", "circuit.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    found = json.loads((out / "scores.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    pairs = tasks.addition(30, 0, layout)
    models = {"dense": GPT.from_pretrained(dense), "sparse": GPT.from_pretrained(sparse)}
    m = {name: [pairs[2](model(tokens).logits).detach() for tokens in pairs[:2]] for name, model in models.items()}
    usable = torch.stack([a - b >= circuits.USABLE for a, b in m.values()]).all(0)
    assert f"measured on the {usable.sum()} pairs" in stdout and 0 < usable.sum() < 30
    for name, model in models.items():
        f, part = found[name], tasks.select(*pairs, usable)
        accuracy = (m[name][0] > 0).double().mean().item()
        assert (f"{name} fails the task: accuracy {accuracy:.0%}" in stdout) == (accuracy < 0.8)
        assert f["metric, clean"] == pytest.approx(m[name][0].mean().item(), rel=1e-4)
        assert f["accuracy, clean"] == pytest.approx(accuracy)
        assert f["pairs skipped"] == (m[name][0] - m[name][1] < circuits.USABLE).sum()
        heads, edges = P.head_scores(model, *part), P.edge_scores(model, *part, 10)
        np.testing.assert_allclose(f["head scores"], heads.mean(0), atol=1e-3)
        np.testing.assert_allclose(f["edge scores"], edges.mean(0), atol=1e-3)
        assert f["edges, per sentence"] == P.first_reaching(P.cumulative(edges).mean(0))
        assert f["edges, global"] == P.first_reaching(P.cumulative(edges.mean(0)))
        change = heads * (m[name][0] - m[name][1])[usable][:, None, None]    # of m itself: small effects count little
        for kind, ranked in (("per sentence", change), ("global", change.mean(0, keepdim=True))):
            order = ranked.flatten(1).argsort(descending=True)
            for curve, size, measured in (("restored effect", "heads restored", P.metric_of_restored_heads),
                                          ("explained effect", "heads kept", P.metric_of_kept_heads)):
                shares = measured(model, *part, order).mean(0)
                shares = (shares - shares[0]) / (m[name][0][usable].mean() - shares[0])
                np.testing.assert_allclose(f[f"{curve}, {kind}"], shares[[0, 2, 4]], atol=1e-3)
                assert f[f"{size}, {kind}"] == next((k for k in (0, 2, 4) if shares[k] >= 0.9), None)
        effect, m_corrupt = (m[name][0] - m[name][1])[usable], m[name][1][usable]
        for kind, ranked in (("per sentence", edges), ("global", edges.mean(0).expand_as(edges))):
            def alone(n):    # the effect of the n best edges, chosen pair by pair; an edge without a score is no choice
                chosen = torch.zeros_like(ranked, dtype=torch.bool)
                for pair, scores in enumerate(ranked.abs().flatten(1)):
                    best = [i for i in scores.argsort(descending=True)[:n].tolist() if scores[i] > 0]
                    chosen[pair].view(-1)[best] = True
                return ((P.kept_circuit(model, *part, chosen) - m_corrupt).mean() / effect.mean()).item()

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
        for points in (1, 10):
            s = P.edge_scores(model, *part, points)
            of_heads = torch.stack([s[:, node].sum(-1) for node in (1, 2, 4, 5)], 1)    # after embed; 3 is m0
            key = f"rank correlation with patching, gradient at {points} point{'s' if points > 1 else ''}, "
            assert f[key + "edges"] == pytest.approx(circuits.spearman(
                s[:, mask].flatten(), torch.stack(everywhere, 1).flatten()), abs=0.01)
            assert f[key + "heads"] == pytest.approx(circuits.spearman(
                of_heads.flatten(), (heads.flatten(1) * effect[:, None]).flatten()), abs=0.01)
    assert "rank correlation" in stdout and " 1.0x" in stdout
    assert f"dense: {dense}, no gates; " in stdout and f"sparse: {sparse}, gates with b = 2.0; " in stdout


def test_thresholds_in_words():
    model = GPT(two_heads("reversed", gated=True))
    assert circuits.gates_of(model) == "gates with b = 2.0"
    model.h[1].attn.gate_bias.data[:] = torch.tensor([-0.25, 0.1])
    assert circuits.gates_of(model) == "gates with b = -0.25 to 2.0"
    model.set_gates(False)
    assert circuits.gates_of(model) == "no gates"


def test_the_sentences_fit_the_model_that_reads_less(tmp_path, monkeypatch, capsys):
    """Two checkpoints of the same shape but for the positions that they read."""
    paths = []
    for length in (32, 7):
        model = GPT(GPTConfig(block_size=length, vocab_size=20, n_layer=1, n_head=2, n_embd=8))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(12)
        paths.append(tmp_path / f"{length}.pt")
        save_checkpoint(model, paths[-1])
    code, stdout, stderr = command(monkeypatch, capsys, "--dense", paths[0], "--sparse", paths[1], "--task", "copy",
                                   "--pairs", 20, "--out", tmp_path / "out")
    assert code == 0 and "copy: 20 pairs of 7 tokens" in stdout, stderr


def test_the_same_command_gives_the_same_scores(tmp_path, monkeypatch, capsys, one_thread):
    dense, sparse = toys(tmp_path)
    for picture in ("draw_head_effects", "draw_edges", "draw_circuits"):    # seconds, and not looked at here
        monkeypatch.setattr(circuits, picture, lambda *_: None)
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
        ((bytes_, bytes_, "greater-than"), r"has 257\ntake --task copy"),
        ((bytes_, bytes_, "addition"), "addition needs checkpoints of toy_addition.py"),
        ((dense, bytes_, "copy"), "differ in n_embd 64 and 4, n_layer 2 and 1, .*vocab_size 13 and 257"),
        ((dense, paper, "addition"), "differ in .*their layout of sums"),
        ((tmp_path / "flat.pt", sparse, "addition"), r"no usable pair: (.|\n)* 10 \(dense\) and \d+ \(sparse\)"),
        ((tmp_path / "missing.pt", sparse, "addition"), "no such file or folder: .*missing.pt"),
        ((tmp_path / "no.pt", sparse, "addition"), "is truncated"),
        ((dense, sparse, "copy", "--corruption", "swap"), "--corruption is a choice of --task ioi, ioi-long\nleave"),
        ((dense, sparse, "docstring", "--template", "paper"), "--template is a choice of --task ioi, ioi-long, great"),
        ((dense, sparse, "sorting"), "invalid choice: 'sorting'"),
        ((dense, sparse, "copy", "--pairs", "0"), "argument --pairs: 0 is not between 1 and"),
        ((dense, sparse, "copy", "--out", ROOT / "model.py" / "x"), "cannot write to"),
        ((dense, sparse, "copy", "--device", "mps"), "PyTorch finds no mps here\npass --device cpu"),
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

"""extras/distance.py against a loop over single tokens, and on a model whose memory is known."""
import json
import math
import types

import numpy as np
import pytest
import torch

from extras import distance
from model import GPT, GPTConfig
from support.data import byte_encoding, load_data
from support.weights import save_checkpoint


def test_losses_and_rows_by_hand():
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=1, n_head=2, n_embd=8, gated=True),
                generator=torch.Generator().manual_seed(0)).eval()
    tokens = np.random.default_rng(0).integers(0, 11, 60).astype(np.uint16)
    ends = np.array([20, 33, 59])
    for n in (2, 4):
        by_context, by_copy = [], []
        for end in ends.tolist():
            shown = torch.from_numpy(tokens[end - n:end].astype(np.int64))
            log_p = model(shown[None]).logits[0, -1].log_softmax(-1)
            by_context.append(-log_p[int(tokens[end])].item())
            twice = torch.cat((shown, shown))
            log_p = model(twice[None, :-1]).logits[0].log_softmax(-1)
            by_copy.append(np.mean([-log_p[i - 1, twice[i]].item() for i in range(n + 1, 2 * n)]))
        for values, rows, count in ((by_context, distance.rows_of_context(tokens, ends, n), 1),
                                    (by_copy, distance.rows_of_copy(tokens, ends, n), n - 1)):
            mean, error = distance.mean_and_error(distance.losses(model, rows, count))
            assert mean == pytest.approx(np.mean(values), abs=1e-5)
            assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3), abs=1e-5)


def test_idle_edges_are_closed_and_no_others(monkeypatch):
    """Closing those below 0 closes none, below 2 all: then z is 0 and attention adds its bias. In between, layer by
    layer, by hand."""
    model = GPT(GPTConfig(12, 11, 2, 2, 8, gated=True, gate_bias=0.0), torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(1))
    found = {}
    for limit in (0, 0.1, 2):
        monkeypatch.setattr(distance, "IDLE", limit)
        with torch.no_grad():
            x = model.embed(tokens)
            for block in model.h:
                q, k, v = block.attn.heads(block.ln_1(x))
                weights = block.attn.weights(q, k)
                x = x + block.attn.project((weights * (weights >= limit)) @ v)
                x = x + block.mlp(block.ln_2(x))
            found[limit] = distance.without_idle(model, tokens)
        torch.testing.assert_close(found[limit], model.unembed(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0], model(tokens).logits, atol=1e-5, rtol=0)
    assert (found[0.1] - found[0]).abs().max() > 0.01 < (found[0.1] - found[2]).abs().max()


def test_idle_edges_by_counting():
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=8, gated=True, gate_bias=0.0),
                generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight.mul_(300)    # sharp: many an open edge weighs little
    rows, open_, idle = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(1)), [0, 0], [0, 0]
    for layer, maps in enumerate(model.attention_maps(rows).detach()):
        for weight in maps.flatten().tolist():
            open_[layer] += weight > 0
            idle[layer] += 0 < weight < distance.IDLE
    shares, of_these = distance.idle_edges(model, rows)
    assert shares.tolist() == pytest.approx([n / (3 * 2 * 12 * 13 / 2) for n in open_])
    assert of_these.tolist() == pytest.approx([a / b for a, b in zip(idle, open_)]) and 0 < min(of_these) < 1


class Remembers(torch.nn.Module):
    """Sure that the next token is the one that came `back` tokens before it, if that was shown."""

    def __init__(self, back):
        super().__init__()
        self.back, self.wte = back, torch.nn.Embedding(11, 1)

    def forward(self, idx):
        logits = torch.zeros(*idx.shape, 11)
        if idx.shape[1] >= self.back:
            logits[:, self.back - 1:].scatter_(2, idx[:, :idx.shape[1] - self.back + 1, None], 50.0)
        return types.SimpleNamespace(logits=logits)


def test_a_model_that_remembers_four_back_copies_from_four_back_only():
    tokens = np.random.default_rng(0).integers(0, 11, 3000)
    ends = np.arange(100, 2900, 28)
    ce = {d: distance.losses(Remembers(4), distance.rows_of_copy(tokens, ends, d), d - 1).mean() for d in (2, 4, 8)}
    assert ce[4] == pytest.approx(0, abs=1e-6) and ce[8] > 10 and ce[2] == pytest.approx(math.log(11), abs=1e-6)
    periodic = np.tile([1, 5, 7, 2], 750)
    ce = {c: distance.losses(Remembers(4), distance.rows_of_context(periodic, ends, c), 1).mean() for c in (2, 4, 8)}
    assert ce[2] == pytest.approx(math.log(11)) and ce[4] == ce[8] == pytest.approx(0, abs=1e-6)


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"the cat sat on mat {n} and saw {n} hats" for n in range(400)))
    for name in ("dense", "sparse"):
        config = GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=8, gated=name == "sparse")
        save_checkpoint(GPT(config, generator=torch.Generator().manual_seed(1)), tmp_path / f"{name}.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    arguments = ["distance.py", "--dense", str(tmp_path / "dense.pt"), "--sparse", str(tmp_path / "sparse.pt"),
                 "--data", str(tmp_path / "text.txt"), "--windows", "8", "--out", str(tmp_path / "out"), "--device",
                 "cpu"]
    monkeypatch.setattr("sys.argv", arguments)
    assert distance.IDLE == 0.01
    monkeypatch.setattr(distance, "IDLE", 0.08)    # of the 16 edges of a last row about half
    distance.main()
    found = json.loads((tmp_path / "out" / "distance.json").read_text())
    assert [list(found[q]["sparse"]) for q in ("context", "copy")] == [["1", "2", "4", "8", "16"], ["2", "4", "8"]]
    printed = capsys.readouterr().out
    for question in ("context", "copy"):
        for n, (ce, error) in found[question]["dense"].items():
            assert f"{ce:.3f} +- {error:.3f}" in printed
        for n in found[question]["dense"]:
            dense, sparse, apart = (found[question][name][n][0] for name in ("dense", "sparse", "sparse - dense"))
            assert apart == pytest.approx(sparse - dense, abs=1e-6)
    assert "of these, < 0.08    sparse, 8 rows of 16" in printed and len(found["idle"]) == 2
    model = GPT.from_pretrained(tmp_path / "sparse.pt")
    tokens = load_data(str(tmp_path / "text.txt"), byte_encoding())[1]
    rows = distance.rows_of_context(tokens, np.linspace(16, len(tokens) - 1, 8).astype(int), 16)
    plain, closed = (distance.losses(model, rows, 16, *run).mean().item() for run in ((), (distance.without_idle,)))
    assert found["cost of idle edges"][0] == pytest.approx(closed - plain, abs=1e-8) and abs(closed - plain) > 1e-6
    assert (tmp_path / "out" / "distance.png").stat().st_size > 10_000
    (tmp_path / "text.bin").write_bytes(bytes(2 * 150))    # 142 zeros to train on, 8 to validate
    monkeypatch.setattr("sys.argv", [arg.replace("text.txt", "text.bin") for arg in arguments])
    with pytest.raises(SystemExit) as stopped:
        distance.main()
    assert stopped.value.code == 2
    assert "has too few validation tokens for a context of 16\npass more text" in capsys.readouterr().err

"""extras/flips.py against patching's pass, which is handed the step of a flip by hand."""
import math
import sys

import numpy as np
import pytest
import torch

import toy_addition as toy
from extras import flips
from model import GPT, GPTConfig
from patching import forward
from support.weights import save_checkpoint


@pytest.fixture(params=[True, False], ids=["causal", "both ways"])
def model(request):
    """Scores large enough that gates are open and closed."""
    gpt = GPT(GPTConfig(6, 11, 2, 2, 8, request.param, True, -0.2), torch.Generator().manual_seed(4)).double().eval()
    with torch.no_grad():
        for p in gpt.parameters():
            if p.ndim == 2:
                p.mul_(20)
    return gpt


TOKENS = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(5))


def metric(logits):
    return logits[:, -1, 2] - logits[:, -1, 7] + logits[:, 3, 1].square()


def step(model, layer, head, i, j):
    """What a flip adds to z_i, (N,D), in numpy: p_ij v_j, or minus that if the gate is open."""
    seen = []
    hook = model.h[layer].attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    q, k, v = (seen[0].numpy()[..., start + 4 * head:start + 4 * head + 4] for start in (0, 8, 16))
    s = q[:, i:i + 1] @ k.swapaxes(1, 2) / math.sqrt(4)                              # (N,1,T)
    s = s[:, 0, :i + 1] if model.config.causal else s[:, 0]
    p = np.exp(s[:, j]) / np.exp(s).sum(1)
    return torch.from_numpy(np.where(s[:, j] - 0.2 > 0, -p, p)[:, None] * v[:, j])


def metric_with(model, edge, part):
    """The metric, if this part of the flip's step is added."""
    layer, head, i, j = edge

    def write(s, out):
        if s.start == 1 + 3 * layer and out.ndim == 4:
            out = out.clone()
            out[:, head, i] += part * step(model, *edge)
        return out
    with torch.no_grad():
        return metric(forward(model, TOKENS, write=write))


EDGES = [(0, 0, 2, 1), (0, 1, 5, 0), (1, 0, 3, 3), (1, 1, 5, 4), (1, 0, 0, 0)]


def test_flips_are_their_steps_and_scores_their_slopes(model):
    torch.testing.assert_close(flips.flipped(model, TOKENS)[0], model(TOKENS).logits)
    (scores, gates), true = flips.flip_scores(model, TOKENS, metric), flips.true_flips(model, TOKENS, metric, EDGES)
    torch.testing.assert_close(gates, (model.attention_maps(TOKENS) > 0).double().transpose(0, 1))
    assert scores.shape == (3, 2, 2, 6, 6) and true.shape == (5, 3)
    for n, edge in enumerate(EDGES):
        before = metric_with(model, edge, 0.0)
        torch.testing.assert_close(true[n], metric_with(model, edge, 1.0) - before)
        slope = (metric_with(model, edge, 1e-6) - metric_with(model, edge, -1e-6)) / 2e-6
        torch.testing.assert_close(scores[:, *edge], slope, rtol=1e-5, atol=1e-7)
    assert (true[1].abs() > 1e-3).all()
    if model.config.causal:
        assert scores.triu(1).eq(0).all()
    opened = torch.stack([step(model, *edge).norm(dim=1) for edge in EDGES]) > 0
    assert opened.all()    # open or closed, every flip is a step


def test_the_command(tmp_path, monkeypatch, capsys):
    gpt = GPT(toy.toy_config(gated=True, gate_bias=0.0), torch.Generator().manual_seed(3))
    save_checkpoint(gpt, tmp_path / "sparse.pt", layout="reversed")
    gpt.set_gates(False)
    save_checkpoint(gpt, tmp_path / "dense.pt", layout="reversed")
    options = "--task", "addition", "--pairs", "5", "--model", str(tmp_path / "sparse.pt")
    monkeypatch.setattr(sys, "argv", ["flips", *options])
    flips.main()
    printed = capsys.readouterr().out
    assert "addition: 5 sentences of 9 tokens, 90 of 90 edges flipped, seed 0" in printed
    assert printed.count("layer") == flips.SHOWN and "rank correlation of the estimate with true flips" in printed
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / "dense.pt")])
    with pytest.raises(SystemExit) as stopped:
        flips.main()
    assert stopped.value.code == 2 and "has no gates to flip\ntake a sparse model" in capsys.readouterr().err

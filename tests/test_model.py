"""model.py against a numpy GPT-2, and every way in and out of a file."""
import copy
import json
import math
import struct

import numpy as np
import pytest
import torch

from gates import sparse_attention
from model import GPT, GPTConfig
from support import weights as weights_in
from support.files import UserError
from support.losses import cross_entropy, divergence
from support.weights import save_checkpoint
from tests.watch import Watch

TINY = dict(block_size=12, vocab_size=31, n_layer=2, n_head=3, n_embd=24)
CONFIG_JSON = {"model_type": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 24, "n_positions": 12, "vocab_size": 31,
               "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}


def gpt2_weights(L=2, C=24, T=12, V=31, seed=0):
    """Random weights in Hugging Face's layout: names without prefix, Conv1D matrices (in, out)."""
    rng = np.random.default_rng(seed)
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for n in range(L):
        for name, shape in {"ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (C, 3 * C),
                            "attn.c_attn.bias": (3 * C,), "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,),
                            "ln_2.weight": (C,), "ln_2.bias": (C,), "mlp.c_fc.weight": (C, 4 * C),
                            "mlp.c_fc.bias": (4 * C,), "mlp.c_proj.weight": (4 * C, C),
                            "mlp.c_proj.bias": (C,)}.items():
            shapes[f"h.{n}.{name}"] = shape
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_gpt2(w, tokens, n_head=3, b=None):
    """GPT-2's forward pass in float64 for one sequence; w as from gpt2_weights. Returns logits (T,V), the weights that
    every layer uses (L,H,T,T), and sigmoid(score + b) (L,H,T,T). b (L,H): thresholds, with which an edge is cut unless
    its score + b is above 0."""
    w, maps, p_open = {name: array.astype(np.float64) for name, array in w.items()}, [], []
    T, L = len(tokens), sum(name.endswith("ln_1.bias") for name in w)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[at + ".weight"] + w[at + ".bias"]

    def conv1d(x, at):
        return x @ w[at + ".weight"] + w[at + ".bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for n in range(L):
        q, k, v = np.split(conv1d(norm(x, f"h.{n}.ln_1"), f"h.{n}.attn.c_attn"), 3, axis=-1)
        heads = []
        for h, (qh, kh, vh) in enumerate(zip(*(np.split(t, n_head, axis=-1) for t in (q, k, v)))):
            scores = np.where(np.tri(T) > 0, qh @ kh.T / math.sqrt(qh.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
            if b is not None:
                weights = weights * (scores + b[n][h] > 0)
                p_open.append(1 / (1 + np.exp(-scores - b[n][h])))
            maps.append(weights)
            heads.append(weights @ vh)
        x = x + conv1d(np.concatenate(heads, -1), f"h.{n}.attn.c_proj")
        u = conv1d(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv1d(u, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T, *(np.reshape(t, (L, -1, T, T)) for t in (maps, p_open))


def write_safetensors(path, weights):
    """The format by its own description; the odd-length header leaves every offset unaligned."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in weights.items():
        raw = array.tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_bin(path, weights):
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)


def as_published(weights, prefix):
    """With what real files also hold: a prefix, the tied head, the causal masks."""
    extra = {"lm_head.weight": weights["wte.weight"]} if prefix else {}
    masks = {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 12, 12), np.float32)) for n in range(2)}
    masks |= {"h.0.attn.masked_bias": np.float32([-1e4])}
    return {prefix + name: array for name, array in {**weights, **masks}.items()} | extra


TOKENS = [3, 1, 4, 15, 9, 26, 5, 30, 0, 7, 7, 2]


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("name, write", [("model.safetensors", write_safetensors), ("pytorch_model.bin", write_bin)])
@pytest.mark.parametrize("how", ["folder", "file", "file without config.json", "sharded"])
def test_logits_are_those_of_a_numpy_gpt2(tmp_path, how, name, write, prefix):
    weights, overrides, path = gpt2_weights(), {}, tmp_path
    published = as_published(weights, prefix)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    if how == "sharded":
        names = sorted(published)
        weight_map = {n: f"part-{i % 2}.{name.split('.')[-1]}" for i, n in enumerate(names)}
        for shard in set(weight_map.values()):
            write(tmp_path / shard, {n: published[n] for n in names if weight_map[n] == shard})
        (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        write(tmp_path / name, published)
        if how != "folder":
            path = tmp_path / name
        if how == "file without config.json":
            (tmp_path / "config.json").unlink()
            overrides = dict(n_head=3)
    gpt = GPT.from_pretrained(path, **overrides).eval()
    assert gpt.config == GPTConfig(**TINY)
    expected, _, _ = numpy_gpt2(weights, TOKENS)
    logits = gpt(torch.tensor([TOKENS])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    in_float64 = gpt.double()(torch.tensor([TOKENS])).logits[0].detach().numpy()
    np.testing.assert_allclose(in_float64, expected, atol=1e-10)


def test_loss_is_nats_per_counted_position():
    gpt = GPT(GPTConfig(**TINY))
    targets = TOKENS[1:] + [8]
    targets[2] = targets[5] = -1
    out = gpt(torch.tensor([TOKENS]), torch.tensor([targets]))
    logits = out.logits[0].detach().double().numpy()
    nats = [np.log(np.exp(row).sum()) - row[t] for row, t in zip(logits, targets) if t != -1]
    assert out.loss.item() == pytest.approx(np.mean(nats), rel=1e-6)


@pytest.mark.parametrize("cells", [1, 21, 69, 1000])    # one row a part, three rows, nine, all ten
def test_loss_in_parts_is_the_loss(cells, monkeypatch):
    monkeypatch.setattr("support.losses.CELLS", cells)
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    targets[0, 1] = -1
    wide = logits.detach().double().requires_grad_()
    log_p = wide - wide.exp().sum(-1, keepdim=True).log()                # written out, in float64
    exact = -log_p[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    exact.backward()
    sizes = []
    with Watch(lambda t: sizes.append(t.numel() * (t.dtype == torch.float32))):
        loss = cross_entropy(logits, targets)
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-3, rtol=1e-2)    # rounded to bfloat16
    assert max(sizes) <= max(cells, 7)                              # no float32 copy of all 70 logits


@pytest.mark.parametrize("cells", [1, 21, 69, 1000])
def test_divergence_is_kullback_leibler_also_in_parts(cells, monkeypatch):
    """Against the sum written out in numpy, and its gradient (softmax(logits) - softmax(wanted)) / (B T)."""
    monkeypatch.setattr("support.losses.CELLS", cells)
    logits = (2 * torch.randn(2, 5, 7)).requires_grad_()
    wanted = 2 * torch.randn(2, 5, 7)
    q, p = (np.exp(t.detach().double().numpy()) for t in (logits, wanted))
    q, p = (t / t.sum(-1, keepdims=True) for t in (q, p))
    found = divergence(logits, wanted)
    found.backward()
    assert found.item() == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-6)
    np.testing.assert_allclose(logits.grad, (q - p) / 10, atol=1e-7)
    assert divergence(wanted, wanted).item() == pytest.approx(0, abs=1e-7)
    assert divergence(logits, wanted) != divergence(wanted, logits)    # it has a direction
    narrow, sizes = logits.detach().bfloat16().requires_grad_(), []    # as under autocast: summed in float32
    with Watch(lambda t: sizes.append(t.numel() * (t.dtype == torch.float32))):
        rounded = divergence(narrow, wanted.bfloat16())
        rounded.backward()
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(found.item(), rel=0.02)
    np.testing.assert_allclose(narrow.grad.float(), (q - p) / 10, atol=1e-3)
    assert 7 <= max(sizes) <= max(cells, 7)                         # no float32 copy of all 70 logits


def test_gpt2s_initialisation():
    config = GPTConfig(block_size=256, vocab_size=500, n_layer=6, n_head=4, n_embd=128)
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all()
        elif "ln_" in name:
            assert p.eq(1).all()
        else:
            std = 0.01 if name == "wpe.weight" else 0.02 / math.sqrt(12) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_parameter_names_and_count_of_gpt2():
    with torch.device("meta"):
        gpt, gated = GPT(GPTConfig()), GPT(GPTConfig(gated=True))
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808
    assert set(gpt.state_dict()) == set(gpt2_weights(L=12))
    thresholds = {name: p for name, p in gated.named_parameters() if name not in gpt.state_dict()}
    assert set(thresholds) == {f"h.{n}.attn.gate_bias" for n in range(12)}
    assert all(p.shape == (12,) and not p.requires_grad for p in thresholds.values())


def pair(**fields):
    """The same weights dense and gated in float64, scaled up so that attention is far from uniform."""
    dense = GPT(GPTConfig(**{**TINY, **fields})).double()
    with torch.no_grad():
        for p in dense.parameters():
            if p.ndim == 2:
                p.mul_(12)
    gated = copy.deepcopy(dense)
    gated.set_gates(True, 100.0)
    return dense, gated


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_all_gates_open_is_the_dense_model(causal, training):
    dense, gated = pair(causal=causal)
    idx = torch.randint(31, (4, 12))
    outs = [m.train(training)(idx, idx) for m in (dense, gated)]
    torch.testing.assert_close(outs[1].logits, outs[0].logits, atol=1e-6, rtol=0)
    for out in outs:
        out.loss.backward()
        assert out.active_edges.shape == out.expected_edges.shape == (2, 3)
        assert out.active_edges.eq(1).all()
        torch.testing.assert_close(out.expected_edges, torch.ones(2, 3).double())
    theirs = dict(gated.named_parameters())
    for name, p in dense.named_parameters():
        torch.testing.assert_close(theirs[name].grad, p.grad, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_expected_edges_are_sums_of_sigmoids_and_differentiable(training):
    gated = pair()[1].train(training)
    gated.set_gates(True, 0.3)
    seen = []
    for block in gated.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out.detach().numpy()))
    out = gated(torch.randint(31, (4, 12)))
    for layer, qkv in enumerate(seen):
        for head in range(3):
            q, k = (qkv[..., start:start + 8] for start in (8 * head, 24 + 8 * head))
            p = 1 / (1 + np.exp(-(q @ k.transpose(0, 2, 1) / math.sqrt(8) + 0.3)))
            by_hand = (p * np.tri(12)).sum((1, 2)).mean() / 78
            assert out.expected_edges[layer, head].item() == pytest.approx(by_hand, rel=1e-9)
    out.expected_edges.sum().backward()
    assert all(block.attn.c_attn.weight.grad.abs().max() > 0 for block in gated.h)
    assert not out.active_edges.requires_grad


def test_gates_behave_like_dropout():
    gated = GPT(GPTConfig(**TINY, gated=True, gate_bias=0.0))
    idx = torch.randint(31, (2, 12))
    assert not torch.equal(gated.train()(idx).active_edges, gated(idx).active_edges)
    assert torch.equal(gated.eval()(idx).active_edges, gated(idx).active_edges)
    torch.manual_seed(5)
    first = gated.train()(idx).logits
    torch.manual_seed(5)
    assert torch.equal(gated(idx).logits, first)


def test_the_temperature_acts_on_gradients_only(monkeypatch):
    """In eval mode, where gates have no noise: against the definition, which is handed the temperature here."""
    gpt = pair()[1].eval()
    gpt.set_gates(True, 0.1)
    idx = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(1))

    def loss_and_slope():
        gpt.zero_grad()
        loss = gpt(idx[:, :-1], idx[:, 1:]).loss
        loss.backward()
        return loss.detach(), gpt.h[0].attn.c_attn.weight.grad[:48]    # of q and k

    usual = loss_and_slope()
    gpt.config.temperature = 0.4
    ours = loss_and_slope()
    monkeypatch.setattr("model.blockwise_attention", lambda *args: sparse_attention(*args[:6], 0.4))
    torch.testing.assert_close(ours, loss_and_slope())
    assert ours[0] == usual[0] and (ours[1] - usual[1]).abs().max() > 0.1 * usual[1].abs().max()


@pytest.mark.parametrize("gated", [True, False])
def test_attention_maps_are_what_the_layers_use(gated):
    """Rebuild each layer's output from its map: the map times the values is what c_proj receives."""
    gpt = pair()[gated].eval()
    gpt.set_gates(gated, 0.0)
    idx = torch.randint(31, (2, 12))
    seen = []
    for block in gpt.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out))
        block.attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    out = gpt(idx)
    qkv, mixed = seen[0::2], seen[1::2]
    maps = gpt.attention_maps(idx)
    assert maps.shape == (2, 2, 3, 12, 12) and maps.triu(1).eq(0).all()
    for A, layer_qkv, layer_mixed in zip(maps, qkv, mixed):
        v = layer_qkv[..., 48:].view(2, 12, 3, 8)
        torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", A, v).flatten(2), layer_mixed)
    torch.testing.assert_close((maps > 0).double().sum((3, 4)).mean(1) / 78, out.active_edges)
    if not gated:
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 3, 12).double())
    torch.manual_seed(1)    # hard gates, whatever the mode, and no draw is taken
    assert torch.equal(gpt.train().attention_maps(idx), maps) and gpt.training
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)


# ---- thresholds: b of every head, in the model and in a file

THRESHOLDS = [[-0.5, 0.25, 1.5], [0.125, -2.0, 3.0]]    # (L,H), exact in float32


def with_thresholds(gpt, values):
    with torch.no_grad():
        for block, b in zip(gpt.h, values):
            block.attn.gate_bias.copy_(torch.tensor(b, dtype=torch.float64))
    return gpt


def thresholds(gpt):
    return [block.attn.gate_bias.tolist() for block in gpt.h]


@pytest.mark.parametrize("b", [THRESHOLDS, [[0.1] * 3] * 2])
def test_thresholds_act_in_evaluation_in_maps_and_in_expected_edges(tmp_path, b):
    weights = gpt2_weights()
    write_safetensors(tmp_path / "model.safetensors", weights)
    gpt = with_thresholds(GPT.from_pretrained(tmp_path, n_head=3, gated=True).double(), b)
    logits, maps, p_open = numpy_gpt2(weights, TOKENS, b=b)
    out = gpt(torch.tensor([TOKENS]))
    np.testing.assert_allclose(out.logits[0].detach(), logits, atol=1e-10)
    np.testing.assert_allclose(out.expected_edges.detach(), p_open.sum((2, 3)) / 78, atol=1e-12)
    np.testing.assert_allclose(out.active_edges, (maps > 0).sum((2, 3)) / 78, atol=1e-12)
    np.testing.assert_allclose(gpt.attention_maps(torch.tensor([TOKENS]))[:, 0], maps, atol=1e-12)
    assert 0.2 < (maps > 0).sum() / (6 * 78) < 0.9    # open and closed edges are both there


def test_trained_thresholds_get_the_gradient_of_the_expected_edges():
    gpt = with_thresholds(pair()[1].eval(), THRESHOLDS)
    for block in gpt.h:
        block.attn.gate_bias.requires_grad_()
    idx = torch.randint(31, (4, 12))
    gpt(idx).expected_edges[1].sum().backward()    # of the last layer: its own b acts smoothly
    for head in range(3):
        shares = []
        for step in (-1e-6, 1e-6):
            moved = copy.deepcopy(THRESHOLDS)
            moved[1][head] += step
            shares.append(with_thresholds(gpt, moved)(idx).expected_edges[1].sum().item())
        assert gpt.h[1].attn.gate_bias.grad[head].item() == pytest.approx((shares[1] - shares[0]) / 2e-6, rel=1e-5)
    before = GPT(GPTConfig(**TINY, gated=True))
    before(idx).expected_edges.sum().backward()
    assert all(block.attn.gate_bias.grad is None for block in before.h)    # not trained unless asked for


def test_set_gates_keeps_thresholds_unless_a_bias_is_given():
    gpt = pair()[0]
    assert gpt.config.gated is False and all(block.attn.gate_bias is None for block in gpt.h)
    gpt.set_gates(True)
    assert thresholds(gpt) == [[2.0] * 3] * 2 and gpt.config.gated    # GPTConfig's own gate_bias
    assert all(b.dtype == torch.float64 and not b.requires_grad for b in (block.attn.gate_bias for block in gpt.h))
    with_thresholds(gpt, THRESHOLDS)
    gpt.h[0].attn.gate_bias.requires_grad_()
    gpt.set_gates(True)
    assert thresholds(gpt) == THRESHOLDS and gpt.h[0].attn.gate_bias.requires_grad
    gpt.set_gates(True, -1.5)
    assert thresholds(gpt) == [[-1.5] * 3] * 2 and gpt.config.gate_bias == -1.5
    gpt.set_gates(True, 0)    # 0 is a bias too
    assert thresholds(gpt) == [[0.0] * 3] * 2 and gpt.config.gate_bias == 0
    gpt.set_gates(False)
    assert not gpt.config.gated and not any("gate_bias" in name for name in gpt.state_dict())
    gpt.set_gates(True)
    assert thresholds(gpt) == [[0.0] * 3] * 2


def test_thresholds_are_saved_and_read(tmp_path):
    gated = with_thresholds(GPT(GPTConfig(**TINY, gated=True, gate_bias=1.5)), THRESHOLDS)
    path = tmp_path / "model.pt"
    save_checkpoint(gated, path)
    saved = torch.load(path, weights_only=True)["model"]
    assert [saved[f"h.{n}.attn.gate_bias"].tolist() for n in range(2)] == THRESHOLDS
    again = GPT.from_pretrained(path)
    assert thresholds(again) == thresholds(gated) and again.config.gate_bias == 1.5
    idx = torch.tensor([TOKENS])
    assert torch.equal(again(idx).logits, gated.eval()(idx).logits)
    assert torch.equal(again(idx).active_edges, gated(idx).active_edges)
    assert thresholds(GPT.from_pretrained(path, gated=True, block_size=5)) == thresholds(gated)
    other = GPT.from_pretrained(path, gate_bias=-0.25)
    assert thresholds(other) == [[-0.25] * 3] * 2 and other.config.gate_bias == -0.25
    dense = GPT.from_pretrained(path, gated=False)
    assert set(dense.state_dict()) == set(gpt2_weights()) and not dense.config.gated
    assert dense(idx).active_edges.eq(1).all()


def test_a_checkpoint_without_thresholds_takes_those_of_its_config(tmp_path):
    gated = GPT(GPTConfig(**TINY, gated=True, gate_bias=0.75))
    save_checkpoint(gated, tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    content["model"] = {name: t for name, t in content["model"].items() if "gate_bias" not in name}
    torch.save(content, tmp_path / "old.pt")
    old = GPT.from_pretrained(tmp_path / "old.pt")
    assert thresholds(old) == [[0.75] * 3] * 2 and old.config == gated.config
    assert thresholds(GPT.from_pretrained(tmp_path / "old.pt", gate_bias=3)) == [[3.0] * 3] * 2
    assert not any("gate_bias" in name for name in GPT.from_pretrained(tmp_path / "old.pt", gated=False).state_dict())
    idx = torch.tensor([TOKENS])
    assert torch.equal(old(idx).logits, gated.eval()(idx).logits)
    save_checkpoint(pair()[0].float(), tmp_path / "dense.pt")    # gates on a dense one: those of its config, or as told
    assert thresholds(GPT.from_pretrained(tmp_path / "dense.pt", gated=True)) == [[2.0] * 3] * 2
    assert thresholds(GPT.from_pretrained(tmp_path / "dense.pt", gated=True, gate_bias=-4)) == [[-4.0] * 3] * 2


def test_thresholds_that_do_not_fit_are_named(tmp_path):
    gated = GPT(GPTConfig(**TINY, gated=True))
    save_checkpoint(gated, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)

    def changed(**tensors):
        torch.save({**content, "model": {**content["model"], **tensors}}, tmp_path / "bad.pt")
        return tmp_path / "bad.pt"

    for shape in ((4,), (1,), ()):
        refused(r"h.0.attn.gate_bias has shape \(.*\) instead of \(3,\)", GPT.from_pretrained,
                changed(**{"h.0.attn.gate_bias": torch.zeros(shape)}))
    refused("h.2.attn.gate_bias is not a GPT tensor", GPT.from_pretrained,
            changed(**{"h.2.attn.gate_bias": torch.zeros(3)}))


# ---- the parts of an attention

def test_heads_of_copies_are_the_heads_of_each_copy():
    attn = pair()[0].h[0].attn
    torch.nn.init.normal_(attn.c_attn.bias)
    copies = torch.randn(2, 3, 5, 24, dtype=torch.float64)                           # (B,H,T,C)
    found = attn.heads(copies)
    assert isinstance(found, tuple) and len(found) == 3
    for head in range(3):
        alone = attn.heads(copies[:, head])                                          # the head's copy for all heads
        assert isinstance(alone, tuple) and len(alone) == 3
        for one, each in zip(alone, found):
            assert one.shape == each.shape == (2, 3, 5, 8)
            torch.testing.assert_close(each[:, head], one[:, head])
    W, b = attn.c_attn.weight.detach().numpy(), attn.c_attn.bias.detach().numpy()
    for part, name in enumerate("qkv"):    # against numpy, with the rows of c_attn counted by hand
        for head in range(3):
            rows = slice(24 * part + 8 * head, 24 * part + 8 * head + 8)
            np.testing.assert_allclose(found[part][:, head].detach(), copies[:, head].numpy() @ W[rows].T + b[rows],
                                       atol=1e-12, err_msg=name)


def test_the_forward_pass_is_heads_then_attend_then_project():
    gpt = pair()[1].eval()
    gpt.set_gates(True, 0.2)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    attn = gpt.h[1].attn
    z, expected, active = attn.attend(*attn.heads(x))
    y, share, open_share = attn(x)
    assert torch.equal(attn.project(z), y) and z.shape == (2, 3, 5, 8)
    torch.testing.assert_close(share, expected.mean(0))
    torch.testing.assert_close(open_share, active.mean(0))
    W, b = attn.c_proj.weight, attn.c_proj.bias
    by_hand = sum(z[:, h] @ W[:, 8 * h:8 * h + 8].T for h in range(3)) + b    # heads side by side
    torch.testing.assert_close(y, by_hand)
    attn.train()    # forward samples then; attend does only as asked
    assert torch.equal(attn.attend(*attn.heads(x))[0], z)
    torch.manual_seed(2)
    drawn = attn(x)[0]
    torch.manual_seed(2)
    assert torch.equal(attn.project(attn.attend(*attn.heads(x), sample=True)[0]), drawn) and not torch.equal(drawn, y)


def test_a_compiled_model_has_the_same_values_and_gradients():
    """As train.py --compile traces it, with sampled gates, but for the last step, which needs a C++ compiler."""
    model = GPT(GPTConfig(**TINY, gated=True), generator=torch.Generator().manual_seed(0)).train()
    for block in model.h:
        block.attn.gate_bias.requires_grad_()
    idx, found = torch.randint(31, (2, 13)), []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(1)    # the same gates
        out = run(idx[:, :-1], idx[:, 1:])
        (out.loss + out.expected_edges.mean()).backward()
        found.append([out.loss, out.active_edges, *(p.grad.clone() for p in model.parameters())])
    for plain, compiled in zip(*found):
        torch.testing.assert_close(compiled, plain, atol=1e-6, rtol=1e-4)


def test_score_weights_are_views_of_the_rows_of_q_and_k():
    """Changing them changes queries and keys, and not one value."""
    attn = pair()[1].h[0].attn
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    before = [t.clone() for t in attn.heads(x)]
    rest = [p.detach()[48:].clone() for p in (attn.c_attn.weight, attn.c_attn.bias)]
    found = attn.score_weights()
    assert [tuple(p.shape) for p in found] == [(48, 24), (48,)]
    with torch.no_grad():
        for p in found:
            p.add_(torch.rand_like(p) + 0.5)
    q, k, v = attn.heads(x)
    assert (q != before[0]).all() and (k != before[1]).all() and torch.equal(v, before[2])
    assert all(torch.equal(p[48:], old) for p, old in zip((attn.c_attn.weight, attn.c_attn.bias), rest))
    attn.c_attn.bias.requires_grad_(False)    # frozen: not among them
    assert [tuple(p.shape) for p in attn.score_weights()] == [(48, 24)]


# ---- files

def test_checkpoints_round_trip(tmp_path):
    gated = GPT(GPTConfig(**TINY, gated=True, gate_bias=1.5, causal=False))
    path = tmp_path / "model.pt"
    save_checkpoint(gated, path, step=7, geco={"log_lam": 0.1})
    plain = torch.load(path, weights_only=True)
    assert plain["step"] == 7 and plain["geco"] == {"log_lam": 0.1} and plain["config"]["gate_bias"] == 1.5
    again = GPT.from_pretrained(path)
    assert again.config == gated.config and again.state_dict().keys() == gated.state_dict().keys()
    assert all(torch.equal(t, gated.state_dict()[name]) for name, t in again.state_dict().items())
    assert GPT.from_pretrained(path, gated=False).config.gated is False
    assert not again.training
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(pair()[0], path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(pair()[1], path, extra=lambda: None)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_message_and_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    save_checkpoint(pair()[0], tmp_path / "a.pt")
    before, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*a.pt: .*\nmake room on this disk"):
            save_checkpoint(pair()[0], tmp_path / "a.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize("dtype, name", [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float64, "F64")])
def test_safetensors_of_other_precisions(tmp_path, dtype, name):
    weights = {n: torch.from_numpy(a).to(dtype) for n, a in gpt2_weights().items()}
    header, data = {}, b""
    for n, tensor in weights.items():
        raw = bytes(tensor.view(torch.uint8).flatten().tolist())
        header[n] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    gpt = GPT.from_pretrained(tmp_path, n_head=3)
    assert torch.equal(gpt.wte.weight, weights["wte.weight"].float())
    assert torch.equal(gpt.h[1].mlp.c_fc.weight, weights["h.1.mlp.c_fc.weight"].float().t())
    header["wte.weight"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    refused("wte.weight has the unsupported type F8_E4M3", GPT.from_pretrained, tmp_path)


def test_a_smaller_block_size_crops_the_positions(tmp_path):
    dense = pair()[0].float()
    save_checkpoint(dense, tmp_path / "model.pt")
    short = GPT.from_pretrained(tmp_path / "model.pt", block_size=5)
    torch.testing.assert_close(short(torch.tensor([TOKENS[:5]])).logits, dense(torch.tensor([TOKENS[:5]])).logits)
    with pytest.raises(UserError, match="6 positions are more than the model's block_size=5"):
        short(torch.tensor([TOKENS[:6]]))


# ---- errors: each says what is wrong, in at most two lines

def load(tmp_path, weights, config=CONFIG_JSON, write=write_safetensors, **overrides):
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(tmp_path / "model.safetensors", weights)
    return GPT.from_pretrained(tmp_path, **overrides)


def refused(match, function, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        function(*args, **kwargs)
    assert len(str(caught.value).splitlines()) <= 2


def test_tensors_that_do_not_fit_are_named(tmp_path):
    weights = gpt2_weights()
    missing = {name: array for name, array in weights.items() if name != "h.1.ln_2.bias"}
    refused("h.1.ln_2.bias is missing", load, tmp_path, missing)
    refused("h.0.mlp.extra is not a GPT tensor", load, tmp_path, {**weights, "h.0.mlp.extra": weights["ln_f.bias"]})
    refused(r"h.0.attn.c_proj.bias has shape \(31, 24\) instead of \(24,\)", load, tmp_path,
            {**weights, "h.0.attn.c_proj.bias": weights["wte.weight"]})
    refused("wpe.weight is missing", load, tmp_path, {n: a for n, a in weights.items() if n != "wpe.weight"})
    refused("an output head of its own", load, tmp_path, {**weights, "lm_head.weight": weights["wte.weight"] + 1})
    refused("reads at most 12 positions, not 13", load, tmp_path, weights, block_size=13)
    refused("GPTConfig has no field gate_biass", load, tmp_path, weights, gate_biass=1)
    refused("n_embd=24 is not a multiple of n_head=5", load, tmp_path, weights, n_head=5)
    refused("no GPT has these sizes: .*n_layer=0", GPT, GPTConfig(n_layer=0))
    refused("h.1.ln_1.weight is missing", load, tmp_path, {n: a for n, a in weights.items() if "h.1." not in n})
    refused("activation_function=relu", load, tmp_path, weights, {**CONFIG_JSON, "activation_function": "relu"})
    refused("the number of heads is unknown", load, tmp_path, weights, {})


def test_truncated_and_foreign_files(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", gpt2_weights())
    write_bin(tmp_path / "pytorch_model.bin", gpt2_weights())
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole = (tmp_path / name).read_bytes()
        for content in (whole[:-100], whole[:200], whole[:5], b"", b"hello, I am no checkpoint at all", b"\xff" * 64):
            (tmp_path / "cut").mkdir(exist_ok=True)
            (tmp_path / "cut" / name).write_bytes(content)
            refused("is truncated, or", GPT.from_pretrained, tmp_path / "cut" / name)
    torch.save([1, 2], tmp_path / "list.bin")
    refused("holds no tensors by name", GPT.from_pretrained, tmp_path / "list.bin")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    refused("no safetensors file", GPT.from_pretrained, tmp_path / "model.safetensors")
    for text in ("{", "[]"):
        (tmp_path / "broken.index.json").write_text(text)
        refused("cannot read .*broken.index.json", GPT.from_pretrained, tmp_path / "broken.index.json")
    torch.save({"model": {"w": torch.ones(2)}, "config": {"out_dir": "out"}}, tmp_path / "other.pt")
    refused("is the checkpoint of another program", GPT.from_pretrained, tmp_path / "other.pt")
    (tmp_path / "gone.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "shard-7.safetensors"}}))
    refused("no such file or folder: .*shard-7.safetensors", GPT.from_pretrained, tmp_path / "gone.index.json")


def test_missing_paths(tmp_path):
    refused("no such file or folder: gpt3\nexpected a path, or one of gpt2, gpt2-medium", GPT.from_pretrained, "gpt3")
    refused("no weights in the folder", GPT.from_pretrained, tmp_path)


def test_downloads_once_checks_the_hash_and_says_what_to_do_without_network(tmp_path, monkeypatch):
    """The real download code on file:// addresses."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights = gpt2_weights(C=64)
    (tmp_path / "gpt2").mkdir()
    write_safetensors(tmp_path / "gpt2" / "model.safetensors", weights)
    monkeypatch.setattr(weights_in, "GPT2_URL", tmp_path.as_uri() + "/{}/model.safetensors")
    refused("(?s)invalid hash value.*pass its path instead", GPT.from_pretrained, "gpt2")
    assert not list((tmp_path / "hub").rglob("*.*"))
    refused("(?s)cannot download .*gpt2-xl.*pass its path instead of 'gpt2-xl'", GPT.from_pretrained, "gpt2-xl")
    monkeypatch.setitem(weights_in.GPT2_SHA256, "gpt2", None)
    gpt = GPT.from_pretrained("gpt2", gated=True)
    assert gpt.config.n_head == 1 and gpt.config.gated
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    again = GPT.from_pretrained("gpt2")    # from the cache
    assert torch.equal(again.wte.weight, torch.from_numpy(weights["wte.weight"]))

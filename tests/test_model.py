"""model.py against a numpy GPT-2, and every way in and out of a file."""
import json
import math
import struct

import numpy as np
import pytest
import torch
from extras import files
from extras.files import UserError
from model import GPT, GPTConfig, cross_entropy, load_checkpoint, save_checkpoint
from watch import Watch

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


def numpy_gpt2(w, tokens, n_head=3):
    """GPT-2's forward pass in float64 for one sequence; w as from gpt2_weights. Returns logits (T,V)."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
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
        for qh, kh, vh in zip(*(np.split(t, n_head, axis=-1) for t in (q, k, v))):
            scores = np.where(np.tri(T) > 0, qh @ kh.T / math.sqrt(qh.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ vh)
        x = x + conv1d(np.concatenate(heads, -1), f"h.{n}.attn.c_proj")
        u = conv1d(norm(x, f"h.{n}.ln_2"), f"h.{n}.mlp.c_fc")
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv1d(u, f"h.{n}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


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
    expected = numpy_gpt2(weights, TOKENS)
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
def test_loss_in_parts_is_the_loss(cells):
    logits = torch.randn(2, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(7, (2, 5))
    targets[0, 1] = -1
    wide = logits.detach().double().requires_grad_()
    log_p = wide - wide.exp().sum(-1, keepdim=True).log()                # written out, in float64
    exact = -log_p[targets >= 0].gather(1, targets[targets >= 0][:, None]).mean()
    exact.backward()
    sizes = []
    with Watch(lambda t: sizes.append(t.numel() * (t.dtype == torch.float32))):
        loss = cross_entropy(logits, targets, cells)
        loss.backward()
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-3, rtol=1e-2)    # rounded to bfloat16
    assert max(sizes) <= max(cells, 7)                              # no float32 copy of all 70 logits


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
        gpt = GPT(GPTConfig())
    assert sum(p.numel() for p in gpt.parameters()) == 124_439_808
    assert set(gpt.state_dict()) == set(gpt2_weights(L=12))


def pair(**fields):
    """The same weights dense and gated in float64, scaled up so that attention is far from uniform."""
    dense = GPT(GPTConfig(**{**TINY, **fields})).double()
    gated = GPT(GPTConfig(**{**TINY, **fields}, gated=True, gate_bias=100.0)).double()
    with torch.no_grad():
        for p in dense.parameters():
            if p.ndim == 2:
                p.mul_(12)
    gated.load_state_dict(dense.state_dict())
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
    for (name, a), b in zip(dense.named_parameters(), gated.parameters()):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_expected_edges_are_sums_of_sigmoids_and_differentiable(training):
    gated = pair()[1].train(training)
    gated.config.gate_bias = 0.3
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


@pytest.mark.parametrize("gated", [True, False])
def test_attention_maps_are_what_the_layers_use(gated):
    """Rebuild each layer's output from its map: the map times the values is what c_proj receives."""
    gpt = pair()[gated].eval()
    gpt.config.gate_bias = 0.0
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


def test_generate_is_greedy_or_drawn_from_the_top_k():
    gpt = pair()[0].eval()
    idx = torch.tensor([TOKENS[:4]])
    tokens = idx
    for _ in range(20):    # runs past block_size: only the last 12 tokens are read
        tokens = torch.cat((tokens, gpt(tokens[:, -12:]).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(gpt.generate(idx, 20, temperature=0), tokens)
    assert torch.equal(gpt.generate(idx, 20, top_k=1), tokens)
    logits = gpt(idx).logits[0, -1]
    draws = gpt.generate(idx.expand(4000, -1), 1, top_k=3, generator=torch.Generator().manual_seed(0))[:, -1]
    p = torch.softmax(logits.topk(3).values, 0)
    share = torch.stack([(draws == t).float().mean() for t in logits.topk(3).indices])
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt()).all()
    draws = gpt.generate(idx.expand(4000, -1), 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    p = torch.softmax(2 * logits, 0)
    share = torch.bincount(draws, minlength=31) / 4000
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()


def test_checkpoints_round_trip(tmp_path):
    gated = GPT(GPTConfig(**TINY, gated=True, gate_bias=1.5, causal=False))
    path = tmp_path / "model.pt"
    save_checkpoint(gated, path, step=7, geco={"log_lam": 0.1})
    plain = torch.load(path, weights_only=True)
    assert plain["step"] == 7 and plain["geco"] == {"log_lam": 0.1} and plain["config"]["gate_bias"] == 1.5
    again = load_checkpoint(path)
    assert again.config == gated.config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), gated.state_dict().values()))
    assert load_checkpoint(path, gated=False).config.gated is False
    assert not again.training
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(pair()[0], path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(pair()[1], path, extra=lambda: None)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


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
    monkeypatch.setattr(files, "GPT2_URL", tmp_path.as_uri() + "/{}/model.safetensors")
    refused("(?s)invalid hash value.*pass its path instead", GPT.from_pretrained, "gpt2")
    assert not list((tmp_path / "hub").rglob("*.*"))
    refused("(?s)cannot download .*gpt2-xl.*pass its path instead of 'gpt2-xl'", GPT.from_pretrained, "gpt2-xl")
    monkeypatch.setitem(files.GPT2_SHA256, "gpt2", None)
    gpt = GPT.from_pretrained("gpt2", gated=True)
    assert gpt.config.n_head == 1 and gpt.config.gated
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    again = GPT.from_pretrained("gpt2")    # from the cache
    assert torch.equal(again.wte.weight, torch.from_numpy(weights["wte.weight"]))

"""extras/export.py: what it writes is read again, by our loader and by hand, with the same logits."""
import json

import numpy as np
import pytest
import torch

from extras import export
from extras.llama import Llama, LlamaConfig, load_model
from model import GPT, GPTConfig
from support.files import UserError
from support.weights import save_checkpoint

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SIZE = dict(block_size=12, vocab_size=31, n_layer=2, n_head=4, n_embd=24)
MODELS = {
    "gpt2": lambda: GPT(GPTConfig(**SIZE)),
    "llama": lambda: Llama(LlamaConfig(**SIZE, n_kv_head=2, n_hidden=40, rope_scaling=LLAMA3, rope_theta=100.0)),
    "untied": lambda: Llama(LlamaConfig(**SIZE, n_kv_head=4, n_hidden=40, tied=False, norm_eps=0.01)),
    "olmo": lambda: Llama(LlamaConfig(**SIZE, n_kv_head=4, n_hidden=40, norm="layer")),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_what_was_exported_computes_the_same(kind, gated, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.set_gates(gated, 0.0)
        for block in model.h if gated else ():
            block.attn.gate_bias.normal_()
    (tmp_path / "tokenizer.json").write_text('{"some": "tokenizer"}')
    model.notes["tokenizer"] = str(tmp_path / "tokenizer.json")
    save_checkpoint(model.eval(), tmp_path / "model.pt", tokenizer=model.notes["tokenizer"])
    out = tmp_path / "new" / "out"
    monkeypatch.setattr("sys.argv", ["export", str(tmp_path / "model.pt"), str(out)])
    export.main()
    idx = torch.randint(31, (3, 12))
    again = export.load_exported(str(out))
    torch.testing.assert_close(again(idx).logits, model(idx).logits, atol=1e-6, rtol=0)
    assert torch.equal(again.attention_maps(idx) > 0, model.attention_maps(idx) > 0)
    assert (out / "tokenizer.json").read_text() == '{"some": "tokenizer"}'
    assert (out / "gate_bias.json").exists() == gated and not list(out.glob("tmp-*"))
    plain = load_model(str(out))    # another program knows nothing of gates
    model.set_gates(False)
    assert not plain.config.gated
    torch.testing.assert_close(plain(idx).logits, model(idx).logits, atol=1e-6, rtol=0)
    assert "is gone" not in capsys.readouterr().out
    (tmp_path / "tokenizer.json").unlink()
    export.export(model, str(tmp_path / "more"))
    assert "tokenizer.json is gone: no tokenizer.json is written\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        export.main()
    assert stopped.value.code == 2 and "is not empty\npass an empty folder" in capsys.readouterr().err


def test_a_model_without_a_causal_mask_is_refused(tmp_path):
    """GPT-2's config.json could not say so, and the model that is read would be another."""
    with pytest.raises(UserError, match="causal mask\npass a causal one"):
        export.export(GPT(GPTConfig(**SIZE, causal=False)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, names, shapes", [
    ("gpt2", ["wte.weight", "wpe.weight", "h.1.attn.c_attn.weight", "h.0.mlp.c_fc.bias", "ln_f.bias"],
     [(31, 24), (12, 24), (24, 72), (96,), (24,)]),
    ("untied", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight",
                "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight",
                "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"],
     [(31, 24), (24, 24), (31, 24), (24, 24), (24, 40), (24,), (24,), (24,)]),
])
def test_the_file_holds_hugging_faces_names(kind, names, shapes, tmp_path):
    """Read by hand: header, offsets, and the numbers where the header says."""
    model = MODELS[kind]()
    model.set_gates(True, 1.5)
    export.export(model, str(tmp_path))
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:8 + length]), raw[8 + length:]
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"} and "gate_bias" not in str(header)
    for name, shape in zip(names, shapes):
        assert tuple(header[name]["shape"]) == shape and header[name]["dtype"] == "F32"
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data) and all(a[1] == b[0] for a, b in zip(spans, spans[1:]))
    begin, end = header[names[0]]["data_offsets"]
    np.testing.assert_array_equal(np.frombuffer(data[begin:end], "<f4").reshape(shapes[0]), model.wte.weight.detach())
    assert sum(end - begin for begin, end in spans) == 4 * sum(
        t.numel() for name, t in model.state_dict().items() if "gate_bias" not in name)
    assert json.loads((tmp_path / "gate_bias.json").read_text()) == {"gate_bias": [[1.5] * 4] * 2}

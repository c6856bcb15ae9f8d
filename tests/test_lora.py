"""extras/lora.py: what is trained, and that merging gives the same model."""
import pytest
import torch

from extras.llama import Llama, LlamaConfig, load_model
from extras.lora import add_adapters, merged
from model import GPT, GPTConfig
from support.files import UserError
from support.weights import save_checkpoint

CONFIG = GPTConfig(block_size=12, vocab_size=31, n_layer=2, n_head=3, n_embd=24, gated=True)


def trained(everything, dtype=torch.float32, steps=3):
    model = add_adapters(GPT(CONFIG), 4, everything, dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    idx = torch.randint(31, (4, 13))
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        (out.loss + out.expected_edges.mean()).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("everything", [False, True])
def test_only_the_adapters_change_and_merging_keeps_the_function(tmp_path, everything):
    torch.manual_seed(0)
    before = GPT(CONFIG).state_dict()
    torch.manual_seed(0)
    model, optimizer = trained(everything)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(name.endswith((".a", ".b")) for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == len(names)
    per_layer = {False: 4 * (24 + 48), True: 4 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)}[everything]    # r (in + out)
    assert sum(p.numel() for name, p in model.named_parameters() if name in names) == 2 * per_layer
    idx = torch.randint(31, (2, 12))
    expected = model.eval()(idx).logits
    after = merged(model.state_dict())
    assert torch.equal(model(idx).logits, expected)    # what was merged is a copy
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("c_attn.weight",) if not everything else ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    assert changed == {name for name in before if name.endswith(kinds)}
    if not everything:    # v's rows stay
        assert torch.equal(before["h.0.attn.c_attn.weight"][48:], after["h.0.attn.c_attn.weight"][48:])

    save_checkpoint(model, tmp_path / "adapted.pt")
    plain = load_model(tmp_path / "adapted.pt")
    torch.testing.assert_close(plain(idx).logits, expected, atol=1e-5, rtol=1e-5)
    save_checkpoint(plain, tmp_path / "plain.pt")    # an ordinary checkpoint
    assert torch.load(tmp_path / "plain.pt", weights_only=True)["model"].keys() == before.keys()


def test_of_an_adapter_the_scores_weights_are_the_rows_of_b():
    model = add_adapters(GPT(CONFIG), 4)
    assert [[tuple(p.shape) for p in block.attn.score_weights()] for block in model.h] == 2 * [[(48, 4)]]


def test_it_starts_as_the_model_that_it_adapts():
    model, idx = GPT(CONFIG).eval(), torch.randint(31, (2, 12))
    expected = model(idx).logits
    assert torch.equal(add_adapters(model, 4, everything=True)(idx).logits, expected)


def linear_bytes(model):
    """Of all that is in a linear layer, without adapters."""
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return sum(p.nbytes for module in linear for p in module.parameters())


def test_frozen_weights_in_bfloat16_take_half_the_memory():
    model, _ = trained(False, torch.bfloat16)
    assert linear_bytes(model) * 2 == linear_bytes(GPT(CONFIG))
    for name, p in model.named_parameters():
        assert p.requires_grad == name.endswith((".a", ".b"))
        if p.requires_grad or name.startswith(("wte", "wpe", "ln")):
            assert p.dtype == torch.float32    # what is trained or added up is not rounded


def test_a_rank_above_the_width_is_refused():
    add_adapters(GPT(CONFIG), 24)
    with pytest.raises(UserError, match="rank 25 .* width 24\npass a lower rank"):
        add_adapters(GPT(CONFIG), 25)


def test_a_small_adapter_is_not_lost_in_bfloat16():
    """Added to the bfloat16 matrix, most of a change of a ten-thousandth would be rounded away. Merging keeps it."""
    model = add_adapters(GPT(CONFIG), 4, dtype=torch.bfloat16)
    layer = model.h[0].attn.c_attn
    with torch.no_grad():
        layer.linear.weight.normal_(0, 0.5)
        layer.b.normal_(0, 1e-4)
    change, base = (16 / 4 * layer.b @ layer.a).double(), layer.linear.weight.double()    # (48,24), (72,24)
    kept = merged(model.state_dict())["h.0.attn.c_attn.weight"]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept[:48].double() - base[:48], change, rtol=0, atol=1e-6)
    rounded = (base[:48] + change).bfloat16().double() - base[:48]
    assert (rounded - change).abs().mean() > 0.5 * change.abs().mean() > 1e-5
    assert all(t.dtype == torch.float32 for t in merged(model.state_dict()).values())


@pytest.mark.parametrize("everything", [False, True])
def test_a_llama_with_adapters(tmp_path, everything):
    """Its q and k get one each, whose b is what moves its scores. Its head gets none."""
    config = LlamaConfig(12, 31, 2, 6, 24, gated=True, n_kv_head=2, n_hidden=40, tied=False)
    model = add_adapters(Llama(config), 4, everything)
    adapted = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".a")}
    more = {"v_proj", "c_proj", "gate_proj", "up_proj", "down_proj"} if everything else set()
    assert adapted == {"q_proj", "k_proj"} | more
    attn = model.h[0].attn
    expected = [attn.q_proj.b, attn.k_proj.b]
    assert [id(p) for p in attn.score_weights()] == [id(p) for p in expected]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.normal_(0, 0.3)
    idx = torch.randint(31, (2, 12))
    save_checkpoint(model, tmp_path / "adapted.pt")
    plain = load_model(tmp_path / "adapted.pt")
    assert type(plain) is Llama and plain.state_dict().keys() == Llama(config).state_dict().keys()
    torch.testing.assert_close(plain(idx).logits, model.eval()(idx).logits, atol=1e-5, rtol=1e-5)

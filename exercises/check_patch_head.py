import pytest
import torch
import torch.nn.functional as F

from exercises import same
from model import GPT, GPTConfig


@pytest.fixture
def model():
    return GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12)).double().eval()


def by_hand(model, tokens, patches):
    """The forward pass written out. patches: {(layer, head): z (N,T,D)}. Returns logits and every head's z."""
    x, found = model.embed(tokens), {}
    for l, block in enumerate(model.h):
        z = F.scaled_dot_product_attention(*block.attn.heads(block.ln_1(x)), is_causal=True)    # (N,H,T,D)
        for h in range(z.shape[1]):
            found[l, h] = z[:, h]
        z = torch.stack([patches.get((l, h), z[:, h]) for h in range(z.shape[1])], 2)          # (N,T,H,D)
        x = x + block.attn.c_proj(z.flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return model.unembed(x), found


@pytest.mark.parametrize("layer, head", [(0, 0), (0, 2), (1, 1)])
def test_against_a_pass_written_out(answer, model, layer, head):
    clean, corrupt = torch.randint(11, (2, 4, 6))
    z = by_hand(model, clean, {})[1][layer, head]
    patched = answer.patch_head(model, clean, corrupt, layer, head)
    assert torch.is_tensor(patched), "return the logits, model(tokens).logits"
    assert (patched - model(corrupt).logits).abs().max() > 1e-6, "nothing changed: did the hook return its tuple?"
    same(patched, by_hand(model, corrupt, {(layer, head): z})[0], "the run is on corrupt. From clean come one head's D "
         "neighbouring numbers, at every position, before c_proj multiplies")


def test_equal_sentences_change_nothing(answer, model):
    tokens = torch.randint(11, (4, 6))
    same(answer.patch_head(model, tokens, tokens, 1, 0), model(tokens).logits, "clean = corrupt: nothing to patch")


def test_the_model_is_left_as_it_was(answer, model):
    clean, corrupt = torch.randint(11, (2, 4, 6))
    before, others = model(corrupt).logits, [block.attn.c_proj._forward_pre_hooks for block in model.h]
    for block in model.h:
        block.attn.c_proj.register_forward_pre_hook(lambda *_: None)    # somebody else's
    hooks = [dict(of_layer) for of_layer in others]
    answer.patch_head(model, clean, corrupt, 0, 1)
    assert torch.equal(model(corrupt).logits, before), "a hook is left: handle.remove()"
    assert [dict(of_layer) for of_layer in others] == hooks, \
        "remove each of your hooks, also one that only looks, and nobody else's"
    for errors, *wrong in (((RuntimeError, ValueError), clean, corrupt[:3]),    # the z of 4 sentences for 3
                           (IndexError, clean + 99, corrupt)):                  # tokens that are none
        with pytest.raises(errors):
            answer.patch_head(model, *wrong, 0, 1)
        assert [dict(of_layer) for of_layer in others] == hooks, "a hook is left after an error: try ... finally"

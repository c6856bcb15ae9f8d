"""5. Activation patching of one head (30 minutes)

Run the model on the corrupted sentence, but give one head the output z that it has on the clean sentence. What the
model answers then, compared with both plain runs, is that head's effect.

A head's z is its H-th part of what `model.h[layer].attn.c_proj` reads: (B, T, H * D), heads side by side. A forward
pre-hook on that module sees it, and can replace it by returning a tuple. Take the hook away again, also after an error:
what else would happen to the next run?
"""


def patch_head(model, clean, corrupt, layer, head):
    """Logits (N,T,V) of `model` on corrupt (N,T) with the z of one head taken, at all positions, from its run on clean.

    model: a GPT of model.py in eval mode. Afterwards it must be as before: no hook left.
    """
    raise NotImplementedError

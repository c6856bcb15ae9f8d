"""5. Activation patching of one head (30 minutes)

Run the model on the corrupted sentence, but give one head the output z (the y_i of exercise 3) that it has on the clean
sentence. What the model answers then, compared with both plain runs, is that head's effect.

`model.h[layer].attn.c_proj` reads (N, T, H * D), the z of all heads side by side: D numbers a head. A forward pre-hook
on that module (`handle = module.register_forward_pre_hook(function)`, where function(module, args) gets the inputs as a
tuple) sees it, and can replace it by returning a tuple. `model(tokens).logits` runs the model. Remove your own hooks,
also after an error, and leave all others: what else would happen to the next run?
"""


def patch_head(model, clean, corrupt, layer, head):
    """Logits (N,T,V) of `model` on corrupt (N,T) with the z of one head taken, at all positions, from its run on clean.

    model: a GPT of model.py in eval mode. Afterwards it must be as before: no hook left.
    """
    raise NotImplementedError

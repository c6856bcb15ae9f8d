"""8. Read the carry circuit of two-digit addition out of attention maps (30 minutes)

In `36+28=???` the tens digit of the answer depends on whether the units carry. A sparse model often solves this with
one edge: the tens slot reads a certain position, in a certain layer and head, if there is a carry, and does not
otherwise (or the other way round). Your program is to find that edge without looking at pictures.

`model.attention_maps(idx)` gives every weight, (L,N,H,T,T), an exact 0 where a gate is closed. A row of idx is a sum in
tokens, in which token d is the digit d: its units digits are at positions 1 and 4, and the tens slot is the last
position but one. `toy_addition.addition_data()` gives all sums, `toy_addition.split()` two sets of their rows. For
every (layer, head, key), compare how often the edge by which the tens slot reads that key is open with a carry and
without. Pick the edge on one set of sums, and report it on another: why?

Then train one (`python toy_addition.py`, 2 to 8 minutes), load runs/addition/sparse.pt with
`model.GPT.from_pretrained`, and look whether the edge that you find is the one in the picture. (About one run in 20 has
no such edge.)
"""


def find_carry_edge(model, idx, train_rows, held_out):
    """((layer, head, key), share of held_out sums with a carry in which it is open, the same without a carry).

    idx (M,T): sums in tokens; train_rows, held_out: indices into its rows. The edge is the one whose shares differ most
    on train_rows.
    """
    raise NotImplementedError

"""10. Restored or kept? Two directions of patching heads (40 minutes)

How much of a task do the k best heads carry? Two experiments answer, and their answers differ:
    restored   the corrupted run, in which k heads get the z that they have on the clean sentence
    kept       the clean run, in which all heads but k get the z that they have on the corrupted sentence

`found = patching.outputs(model, tokens)[0]` holds what a run writes, each head's z included.
`patching.run_with_heads(model, other, found, chosen)` runs the model on the tokens `other`. Heads where the bool tensor
`chosen`, (1,L,H) or (N,L,H), is True take their z from `found`. It returns the logits.

Before you write: the last head of a model copies a name to the output; earlier heads have found out which. Restore only
this head: what share of the effect comes back? Now keep only this head, while the heads it copies from are corrupted:
what share is left? Which experiment can tell a model that needs 5 heads from one that needs 100?
"""


def restored(model, clean, corrupt, metric, order):
    """(L*H+1): the share of the effect of the first k heads of order, k = 0 to all: (m_k - m_0) / (m_clean - m_0).

    m_k: the mean of metric(logits) over sentences in the corrupted run with k heads restored; m_clean: in the plain
    clean run. order: a list of head numbers l * H + h, best first. No gradient is needed.
    """
    raise NotImplementedError


def kept(model, clean, corrupt, metric, order):
    """(L*H+1): the same with k heads kept, all others corrupted in the clean run: (m_k - m_0) / (m_all - m_0).
    m_0 and m_all are those with no head kept and with all."""
    raise NotImplementedError

"""6. From scores to "how many edges": per sentence and global are two questions (20 minutes)

In this exercise and the next an edge joins two nodes of the network, such as a head and a later MLP, not two positions.
A score says how much an edge changes the answer (exercise 7 computes some). Given the score of every edge on every
sentence, let C(n) be the sum of the n largest |scores| over the sum of all |scores|.
    per sentence   rank the edges of each sentence by themselves, then average the curves
    global         average the scores over sentences first, then rank once

Think of two sentences that use one edge each, but not the same one. What is C(1) in either way? Which of the two
numbers would you call "the size of the circuit"? What does a sign do in the global mean?
"""


def curves(scores):
    """scores (N,S): S edges, N sentences -> (per sentence, global), each (S+1) with C(0) = 0.

    No sentence has zeros only, and the mean over the sentences is not 0 for every edge.
    """
    raise NotImplementedError


def needed(curve, share):
    """The first n with curve[n] >= share, or None."""
    raise NotImplementedError

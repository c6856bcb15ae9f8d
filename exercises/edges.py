"""2. The expected number of open edges, by hand and by code (10 minutes)

Training penalises the expected number of open gates, not the number that is open in one draw: the sum of sigmoid(s + b)
over all edges that the causal mask allows. As a share of those edges it means the same in every model.

First by hand: three positions, one head, q = k = 0, bias b = 0. How many edges are allowed? What is the expected share?
What is the share with b = log 3? Now the score of one edge is s = 5, first query and second key: what changes?
"""


def expected_edges(q, k, gate_bias):
    """The expected share of open edges (B,H) of causal attention: q, k (B,H,T,D), scores q . k / sqrt(D)."""
    raise NotImplementedError

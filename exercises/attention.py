"""3. The sparse attention layer (40 minutes)

    s_ij = q_i . k_j / sqrt(D)
    A_ij ~ Bernoulli(sigmoid(s_ij + b))         exercise 1: from exercises.gate import sample_gates
    y_i  = sum_j A_ij softmax_j(s_i) v_j

The softmax runs over all allowed keys, open or not. What is left after gating is not rescaled to sum to 1. With every
gate open the layer is ordinary softmax attention, so that a pretrained model starts as itself. With causal, query i may
read keys j <= i only; whatever stands at later keys must not change y_i.

Question: why is a closed edge different from an edge with a tiny weight? Which of them can you cut out of the graph?
"""


def sparse_attention(q, k, v, gate_bias, causal=True, sample=False):
    """q, k (B,H,T,D), v (B,H,T,any) -> y, as wide as v; expected share (B,H); active share (B,H): the open gates of
    this very pass.

    gate_bias: b, a number, or a tensor with one element. sample: that of sample_gates, False is A = [s + b > 0].
    """
    raise NotImplementedError

"""11. What does each edge carry? The sum rule of attention attribution (30 minutes)

Hold the attention pattern P = A * softmax fixed. Then a head is linear in its values: z_i = sum_j P_ij v_j. Let m be a
number that is computed later, such as a logit, and G_i = dm/dz_i. To first order the heads add to m what their edges
carry,
    c_ij = P_ij  G_i . v_j

Before you write: what does an edge with a closed gate carry? Why can one add up c over j, over i or over both, and get
what a query, a key or the head carries? What does this sum *not* see: what if a change opened a gate?
"""


def carried(pattern, v, gradient):
    """(H,T,T): what each head carries from key j to query i, at [h,i,j]. pattern (H,T,T), v and gradient (H,T,D)."""
    raise NotImplementedError


def strongest_key(pattern, v, gradient):
    """(head, key): the pair that carries most, by the absolute value of its sum over queries."""
    raise NotImplementedError

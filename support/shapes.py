"""What an attention of gates.py or support/blockwise.py takes, said once for both."""
import torch


def checked_bias(q, k, v, gate_bias):
    """gate_bias so that it broadcasts to scores (B,H,T,T): () or (H,1,1), on q's device, float32 or wider.

    Raises a ValueError with the shapes where q, k (B,H,T,D), v (B,H,T,any) and gate_bias () or (H) do not fit together.
    """
    if q.ndim != 4 or q.shape != k.shape or q.shape[:3] != v.shape[:3] or 0 in q.shape:
        raise ValueError("expected q and k (B,H,T,D) and v (B,H,T,any), none empty, got "
                         f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    dtype, H = torch.promote_types(q.dtype, torch.float32), q.shape[1]
    b = torch.as_tensor(gate_bias, dtype=dtype, device=q.device)
    if b.shape not in ((), (H,)):
        raise ValueError(f"expected gate_bias a number, or a tensor () or ({H},), one value for each of q's {H} heads, "
                         f"got {tuple(b.shape)}")
    return b.view(H, 1, 1) if b.ndim else b

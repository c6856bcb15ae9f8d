"""GPT-2 in one file, with a binary gate on every attention edge if asked for (config.gated).

Read it from the parts to the whole: config, attention, MLP, block, GPT. GPT-2 exactly: LayerNorm first, learned
positions, biases, tanh-GELU, tied head, and GPT-2's own parameter names, so that pretrained weights load by name.
Gates behave like dropout: `model.train()` samples them, `model.eval()` takes A = [g > 0].

    model = GPT.from_pretrained("gpt2", gated=True)      # in eval mode
    out = model(idx)              # out.logits (B,T,V), out.expected_edges (L,H), out.active_edges (L,H)

Shapes: B batch, T positions, C width, H heads, D = C/H head size, L layers, V vocabulary.
"""
import dataclasses
import math
import os
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from support.blockwise import blockwise_attention
from support.files import UserError
from support.losses import cross_entropy
from support.weights import GPT2_SHA256, fetch_gpt2, fill, from_gpt2_layout, make_config, read_weights


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024    # most positions of a sequence
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    causal: bool = True       # False: every position reads every position
    gated: bool = False       # False: ordinary dense attention
    gate_bias: float = 2.0    # b at the start; the values in use, one per head, are h.N.attn.gate_bias
    temperature: float = 1.0  # of the gates' gradient: see gates.sample_gates


def allowed_edges(config):
    """Edges of one sequence of block_size tokens, over all layers and heads, with every gate open."""
    T = config.block_size
    return config.n_layer * config.n_head * (T * (T + 1) // 2 if config.causal else T * T)


class Output(NamedTuple):
    """What a pass returns. The shares of edges are means over the batch."""
    logits: torch.Tensor            # (B,T,V)
    loss: Optional[torch.Tensor]    # cross-entropy in nats per counted token, None without targets
    expected_edges: torch.Tensor    # (L,H) sum of sigmoid(g) / allowed edges, differentiable; 1 without gates
    active_edges: torch.Tensor      # (L,H) open gates in this pass / allowed edges; 1 without gates


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)    # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.gate_bias = None                                        # b (H) of a gated model: see GPT.set_gates

    def heads(self, x):
        """x (B,T,C), or for patching.py (B,H,T,C), a copy for each head -> q, k, v, each (B,H,T,D)."""
        H = self.config.n_head
        if x.ndim == 3:
            return tuple(t.unflatten(2, (H, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=2))
        weight, bias = (t.unflatten(0, (3, H, -1)) for t in (self.c_attn.weight, self.c_attn.bias))
        return tuple(torch.einsum("bhtc,nhdc->nbhtd", x, weight) + bias[:, None, :, None])

    def attend(self, q, k, v, sample=False):
        """Each head's mixture of values z (B,H,T,D), and its expected and active share of edges (B,H)."""
        if self.gate_bias is not None:
            return blockwise_attention(q, k, v, self.gate_bias, self.config.causal, sample, self.config.temperature)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.config.causal)
        ones = torch.ones(q.shape[:2], device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        return z, ones, ones

    def weights(self, q, k):
        """Weight of every edge (B,H,T,T), A * softmax with hard gates: an exact 0 where a gate is closed.

        Attention applied to one-hot values returns its own weights, so no second definition is needed.
        """
        onehot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
        return self.attend(q, k, onehot)[0]

    def project(self, z):
        """Heads side by side, back into the residual stream: z (B,H,T,D) -> (B,T,C)."""
        return self.c_proj(z.transpose(1, 2).flatten(2))

    def forward(self, x):
        z, expected, active = self.attend(*self.heads(x), sample=self.training)
        return self.project(z), expected.mean(0), active.mean(0)     # (B,T,C), (H), (H)

    def score_weights(self):
        """The trained weights that make the scores, views of the rows of q and k: --score-lr moves them faster."""
        rows = 2 * self.config.n_embd    # an adapter's first matrix (rank,C) has fewer
        return [p[:rows] for p in self.c_attn.parameters() if p.requires_grad and len(p) >= rows]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))    # GPT-2's form of GELU


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = SelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x):
        y, expected, active = self.attn(self.ln_1(x))
        x = x + y                                                    # (B,T,C) the residual stream
        return x + self.mlp(self.ln_2(x)), expected, active


class GPT(nn.Module):
    Config = GPTConfig                              # another family of models replaces these two
    from_layout = staticmethod(from_gpt2_layout)

    def __init__(self, config, generator=None):
        """A model with GPT-2's random initial weights, drawn from `generator` (default: torch's global one)."""
        super().__init__()
        config = dataclasses.replace(config)    # its own: set_gates changes it
        sizes = config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd
        if min(sizes) < 1:
            raise UserError(f"no GPT has these sizes: {config}\nexpected all of them to be at least 1")
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}\n"
                            "change one of the two")
        self.config = config
        self.notes = {}           # text that checkpoints keep beside the weights, as the toy's layout
        self.recompute = False    # True: a block's activations are computed again in the backward pass, not kept
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)    # tokens; also the output head (tied)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)    # positions
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        # GPT-2: std 0.02, positions 0.01, and the two layers of a block that write to the residual
        # stream scaled down, so that the stream's variance does not grow with depth.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:
                std = 0.01 if name == "wpe.weight" else 0.02
                std = std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std
                nn.init.normal_(p, std=std, generator=generator)
        self.set_gates(config.gated)

    def set_gates(self, gated, gate_bias=None):
        """Switch the gates on or off. On: every head gets the number gate_bias as its b; without it a head keeps its b,
        or gets config.gate_bias. Off: all b are deleted. A gate opens where s > -b, so -b is the head's threshold.

        b is h.N.attn.gate_bias (H): saved with the weights, but not trained unless its requires_grad is set.
        """
        config = self.config
        config.gated = gated
        if gate_bias is not None:
            config.gate_bias = gate_bias
        for block in self.h:
            if not gated:
                block.attn.gate_bias = None
            elif block.attn.gate_bias is None or gate_bias is not None:
                b = self.wte.weight.new_full((config.n_head,), float(config.gate_bias))
                block.attn.gate_bias = nn.Parameter(b, requires_grad=False)

    def check_length(self, idx):
        if idx.shape[1] > self.config.block_size:
            raise UserError(f"{idx.shape[1]} positions are more than the model's block_size={self.config.block_size}\n"
                            "pass a shorter sequence")

    def embed(self, idx):
        """idx (B,T) -> what the first block reads, (B,T,C)."""
        self.check_length(idx)
        return self.wte(idx) + self.wpe.weight[:idx.shape[1]]

    def unembed(self, x):
        """What the last block writes (B,T,C) -> logits (B,T,V)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(self, idx, targets=None):
        """idx (B,T) tokens; targets (B,T) next tokens, -1 where a position does not count -> Output."""
        x, expected, active = self.embed(idx), [], []                # (B,T,C)
        again = self.recompute and self.training
        for block in self.h:
            x, e, a = checkpoint(block, x, use_reentrant=False) if again else block(x)
            expected.append(e)
            active.append(a)
        logits = self.unembed(x)                                     # (B,T,V)
        loss = None if targets is None else cross_entropy(logits, targets)
        return Output(logits, loss, torch.stack(expected), torch.stack(active))

    @torch.no_grad()
    def attention_maps(self, idx):
        """Weight of every edge (L,B,H,T,T), A * softmax with hard gates, also in train mode."""
        maps, x = [], self.embed(idx)                                                # (B,T,C)
        for block in self.h:
            q, k, v = block.attn.heads(block.ln_1(x))                                # (B,H,T,D)
            maps.append(block.attn.weights(q, k))                                    # (B,H,T,T)
            x = x + block.attn.project(maps[-1] @ v)
            x = x + block.mlp(block.ln_2(x))
        return torch.stack(maps)

    @classmethod
    def from_pretrained(cls, name_or_path, **config_overrides):
        """A model with trained weights, on the CPU, in float32, in eval mode.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once); a folder or file in Hugging
        Face's GPT-2 layout (safetensors or pytorch_model.bin, also sharded); or a checkpoint of ours.
        config_overrides: fields of GPTConfig, as gated=True; a smaller block_size crops the positions.
        """
        path = fetch_gpt2(name_or_path) if name_or_path in GPT2_SHA256 else os.fspath(name_or_path)
        return cls.from_tensors(*read_weights(path), path, **config_overrides)

    @classmethod
    def from_tensors(cls, tensors, meta, path, **config_overrides):
        """The same from what `read_weights` has read. path is for messages."""
        fields = meta.get("config")                                  # of a checkpoint of ours
        if not fields:
            hf, n_head = meta.get("config.json", {}), config_overrides.get("n_head")
            tensors, fields = cls.from_layout(tensors, hf, path, n_head)
        config = make_config(cls.Config, fields, config_overrides, path)
        has_gates = any(name.endswith("gate_bias") for name in tensors)
        with torch.device("meta"):                                   # shapes only: no second copy in memory
            model = cls(dataclasses.replace(config, gated=has_gates))    # as the file is; below as asked
        tensors = {name: t.float() for name, t in tensors.items()}
        if "wpe.weight" in tensors:
            tensors["wpe.weight"] = tensors["wpe.weight"][:config.block_size].clone()
        fill(model, tensors, path)
        model.set_gates(config.gated, config_overrides.get("gate_bias"))
        model.notes = {key: value for key, value in meta.items() if isinstance(value, str)}
        return model.eval()

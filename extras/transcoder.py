"""A cross-layer transcoder: sparse features in place of all MLPs (a later part of the paper; its losses are unknown).

    python -m extras.transcoder --model runs/scratch/best.pt --data stdlib [--out runs/transcoder]
    python -m extras.transcoder --model runs/addition/sparse.pt --data addition --out runs/transcoder-sums

At each layer l an encoder reads what the MLP reads and finds a few active features. Their decoders write in place of
this and all later MLPs, so that a feature that lives through many layers is found once:

    a_l = top k of relu(W_enc_l x_l + b_l)               features of layer l, x_l: what MLP l reads               (16)
    y_m ~ sum over l <= m of a_l W_dec_lm + b_m          the output of MLP m                                      (17)

    loss = sum over m of |y_m - (17)|^2 / Var(y_m), + HELP times the error of sleeping features that fit what is missed,
           + with JumpReLU, sparsity times the number of active features

Inputs and outputs are scaled to a mean square of 1 an entry. extras/attribution.py asks what acts on what.
Trains 2,000 steps of about 1,024 tokens, one window at least; goes on if --out holds a run that was stopped; then
prints how good it is.
Shapes: B batch, T positions, C width, L layers, F features a layer.
"""
import argparse
import math
import os
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from extras.llama import load_model
from extras.tokenizer import encoding_of
from support.data import batch, checked_source, load_data, spread
from support.files import (UserError, absolute, between, explained, make_folder, read_json, run_command, write_csv,
                           write_json)
from support.losses import cross_entropy
from support.place import pick_device
from support.weights import BAD_PICKLE, GPT2_SHA256, save
from toy_addition import ALPHABET, addition_data, split

SLEEPS = 100       # steps without being active after which a feature is helped
HELPERS = 64       # sleeping features that try to explain what is missed
HELP = 1 / 32      # weight of their loss
SAVE_EVERY = 100   # steps
AT_ONCE = 8192     # tokens of which the quality is measured at a time
FREE = ("out", "device", "windows")    # options that do not change what is learned
WIDTH_OF_JUMP = 0.1    # of the band around its threshold in which JumpReLU has a gradient for it


class Sites(NamedTuple):
    before: list           # L of (B,T,C): the stream before a layer's attention
    between: list          # L of (B,T,C): the stream before its MLP
    inputs: list           # L of (B,T,C): the same through the norm, what the MLP reads
    outputs: list          # L of (B,T,C): what it writes
    last: torch.Tensor     # (B,T,C): the stream before the last norm


@torch.no_grad()
def mlp_sites(model, idx, mlp=None, keep=None):
    """A run with hard gates on idx (B,T), looked at. mlp(l, x): what stands in for the MLP of layer l, where x is what
    that reads (patching.forward does not show it). keep (L,H,T,T): what the weights of all edges are multiplied by, 0
    or 1."""
    x = model.eval().embed(idx)
    sites = Sites([], [], [], [], x)
    for l, block in enumerate(model.h):
        sites.before.append(x)
        if keep is None:
            x = x + block.attn(block.ln_1(x))[0]
        else:
            q, k, v = block.attn.heads(block.ln_1(x))
            x = x + block.attn.project((keep[l] * block.attn.weights(q, k)) @ v)
        sites.between.append(x)
        sites.inputs.append(block.ln_2(x))
        sites.outputs.append(mlp(l, sites.inputs[-1]) if mlp else block.mlp(sites.inputs[-1]))
        x = x + sites.outputs[-1]
    return sites._replace(last=x)


class Jump(torch.autograd.Function):
    """[h > threshold], with a gradient for the threshold from the h near it (Rajamanoharan et al. 2024)."""

    @staticmethod
    def forward(ctx, h, threshold):
        ctx.save_for_backward(h, threshold)
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx, gradient):
        h, threshold = ctx.saved_tensors
        near = ((h - threshold).abs() < WIDTH_OF_JUMP / 2).to(h.dtype)
        return None, (-near / WIDTH_OF_JUMP * gradient).flatten(0, -2).sum(0)


def keep_largest(h, k):
    """h (...,F) -> the same where it is among the k largest of its row and above 0, else 0."""
    top = h.topk(min(k, h.shape[-1]))
    return torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())


class Transcoder(nn.Module):
    """(16) and (17). activation: "topk", k features a token and layer, or "jump", those above a learned threshold.
    cross: False lets a feature write to its own layer's output only, which makes it an ordinary transcoder a layer."""

    def __init__(self, layers, width, features=1024, k=16, activation="topk", cross=True, generator=None):
        super().__init__()
        self.options = dict(layers=layers, width=width, features=features, k=k, activation=activation, cross=cross)
        self.k, self.activation = k, activation
        decoders = torch.randn(layers, features, width, generator=generator) / math.sqrt(width)
        self.encoder = nn.Parameter(decoders.clone())                                # (L,F,C)
        self.encoder_bias = nn.Parameter(torch.zeros(layers, features))
        self.decoder = nn.ParameterList(    # of layer l: (L-l,F,C), to the layers l, l + 1, ..., or (1,F,C)
            decoders[l].repeat(layers - l if cross else 1, 1, 1) / layers for l in range(layers))
        self.decoder_bias = nn.Parameter(torch.zeros(layers, width))
        self.log_threshold = nn.Parameter(torch.full((layers, features), math.log(0.3)), activation == "jump")
        self.register_buffer("in_scale", torch.ones(layers))                         # inputs times this have size 1
        self.register_buffer("out_scale", torch.ones(layers))

    def pre_activations(self, l, x):
        """Pre-activations of layer l: x (...,C), what its MLP reads -> (...,F)."""
        return F.linear(x * self.in_scale[l], self.encoder[l], self.encoder_bias[l])

    def activate(self, l, h):
        """Pre-activations (...,F) -> features: 0 where they are not active."""
        if self.activation == "jump":
            threshold = self.log_threshold[l].exp()
            return h * Jump.apply(h, threshold)
        return keep_largest(h, self.k)

    def encode(self, l, x):
        """x (...,C), what MLP l reads -> features (...,F) of layer l."""
        return self.activate(l, self.pre_activations(l, x))

    def scaled_output(self, m, features):
        """(17) in units of out_scale, from features (...,F) of the layers up to m."""
        return self.decoder_bias[m] + sum(a @ self.decoder[l][m - l] for l, a in enumerate(features[:m + 1])
                                          if m - l < len(self.decoder[l]))

    def decode(self, features):
        """Features of all layers, L of (...,F) -> L of (...,C), what the MLPs write."""
        return [self.scaled_output(m, features) / self.out_scale[m] for m in range(len(features))]

    def reader(self, l, f):
        """Of a feature: the direction (C) and the constant that make its pre-activation: direction . x + constant."""
        return self.encoder[l, f] * self.in_scale[l], self.encoder_bias[l, f]

    def vectors(self, l, f):
        """What one unit of a feature adds to the outputs of the MLPs l, l + 1, ...: (L-l,C), or only of l: (1,C)."""
        written = self.decoder[l][:, f]
        return written / self.out_scale[l:l + len(written), None]

    def constant(self, m):
        """What is added to the output of MLP m without any feature: (C)."""
        return self.decoder_bias[m] / self.out_scale[m]


def loss_of(transcoder, sites, variance, asleep, sparsity):
    """The loss of one batch; and which features were active, (L,F) bool. variance (L), asleep (L,F) bool.

    sparsity: of JumpReLU, the price of an active feature."""
    L, features, pre = len(sites.inputs), [], []
    for l, x in enumerate(sites.inputs):
        pre.append(transcoder.pre_activations(l, x))
        features.append(transcoder.activate(l, pre[-1]))
    loss, any_asleep = 0.0, asleep.any()
    if any_asleep:
        helpers = [keep_largest(h.masked_fill(~asleep[l], -math.inf), HELPERS) for l, h in enumerate(pre)]
    for m in range(L):
        missed = sites.outputs[m] * transcoder.out_scale[m] - transcoder.scaled_output(m, features)
        loss = loss + missed.square().mean() / variance[m]
        if any_asleep:
            helped = transcoder.scaled_output(m, helpers) - transcoder.decoder_bias[m]
            loss = loss + HELP * (missed.detach() - helped).square().mean() / variance[m]
    if transcoder.activation == "jump":
        active = sum(Jump.apply(h, transcoder.log_threshold[l].exp()).sum(-1).mean() for l, h in enumerate(pre))
        loss = loss + sparsity * active
    return loss, torch.stack([(a > 0).flatten(0, -2).any(0) for a in features])


def fingerprint(model):
    """Tells one model's weights from another's, wherever they lie."""
    found = 0
    for t in model.state_dict().values():
        found = zlib.crc32(t.cpu().contiguous().view(torch.uint8).numpy(), found)
    return found


def material(args, model):
    """Tokens to learn from, an array that batch() cuts into windows, and what the quality is measured on: idx (N,T) and
    targets (N,T)."""
    T = model.config.block_size
    if args.data == "addition":
        if model.config.vocab_size != len(ALPHABET) or "layout" not in model.notes:
            raise UserError(f"{args.model} was not trained on sums\npass text as --data, or a checkpoint of "
                            "toy_addition.py as --model")
        (idx, targets), (rows, held_out) = addition_data(model.notes["layout"]), split()
        return np.append(idx[rows].numpy(), 0), idx[held_out], targets[held_out]    # a window is a sum
    train_tokens, val_tokens, _ = load_data(args.data, encoding_of(model))
    if min(len(train_tokens), len(val_tokens)) <= T:
        raise UserError(f"{args.data} has too few tokens for windows of {T}\npass more text")
    return train_tokens, *spread(val_tokens, T, args.windows)


def train(model, tokens, args):
    """Train a Transcoder, going on from args.out/last.pt if it is there. Leaves log.csv and last.pt."""
    T, path, of = model.config.block_size, os.path.join(args.out, "last.pt"), fingerprint(model)
    B = max(1, 1024 // T)
    transcoder = Transcoder(model.config.n_layer, model.config.n_embd, args.features, args.k, args.activation,
                            not args.per_layer, torch.Generator().manual_seed(args.seed)).to(args.device)
    optimizer = torch.optim.Adam(transcoder.parameters(), lr=args.lr, betas=(0.9, 0.99))
    sites = mlp_sites(model, batch(tokens, T, 0, 8 * B, args.seed)[0].to(args.device))
    with torch.no_grad():
        for l in range(model.config.n_layer):
            transcoder.in_scale[l] = sites.inputs[l].square().mean().rsqrt()
            transcoder.out_scale[l] = sites.outputs[l].square().mean().rsqrt()
        scaled = [y.flatten(0, 1) * scale for y, scale in zip(sites.outputs, transcoder.out_scale)]
        transcoder.decoder_bias.copy_(torch.stack([y.mean(0) for y in scaled]))
        variance = torch.stack([y.var(0).mean() for y in scaled])                    # (L)
    begun, rows, idle = 0, [], torch.zeros(model.config.n_layer, args.features, device=args.device)
    if os.path.exists(path):
        saved = read(path, model, args.device)
        transcoder.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begun, rows, idle, variance = (saved[name] for name in ("step", "rows", "idle", "variance"))
        write_csv(os.path.join(args.out, "log.csv"), rows)    # a run that was killed may have left an older one
    for step in tqdm(range(begun, args.steps), initial=begun, total=args.steps, desc="transcoder"):
        sites = mlp_sites(model, batch(tokens, T, step * B, B, args.seed)[0].to(args.device))
        loss, active = loss_of(transcoder, sites, variance, idle > SLEEPS, args.sparsity)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}\n"
                                     "start anew, in another --out, with a lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        idle = torch.where(active, 0.0, idle + 1)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            rows.append({"step": step + 1, "loss": loss.item(), "asleep": (idle > SLEEPS).float().mean().item()})
            save({"model": transcoder.state_dict(), "options": transcoder.options, "of": of, "step": step + 1,
                  "optimizer": optimizer.state_dict(), "rows": rows, "idle": idle, "variance": variance}, path)
            write_csv(os.path.join(args.out, "log.csv"), rows)    # last: it follows from last.pt
    return transcoder


def read(path, model, device):
    """What a run has left in its last.pt, if it was for this model."""
    names = "model", "options", "of", "step", "optimizer", "rows", "idle", "variance"
    with explained(f"{path} holds no transcoder", "pass a folder that python -m extras.transcoder made", *BAD_PICKLE):
        saved = torch.load(path, map_location=device, weights_only=True)
        saved = {name: saved[name] for name in names}
    if saved["of"] != fingerprint(model):
        raise UserError(f"{path} is the transcoder of a model with other weights\ntrain one for this model, in another "
                        "--out")
    return saved


def load_transcoder(folder, model):
    """The Transcoder of the model that a run has left in its folder."""
    saved = read(os.path.join(folder, "last.pt"), model, "cpu")
    transcoder = Transcoder(**saved["options"]).requires_grad_(False)
    transcoder.load_state_dict(saved["model"])
    return transcoder


@torch.no_grad()
def quality(model, transcoder, idx, targets):
    """How good it is on idx and targets (N,T). explained (L): share of the MLPs' variance; dead: share of features that
    are never active; active: features a token and layer; ce, ce_features, ce_means, nats a token: of the model, with
    features for MLPs, with means for MLPs; recovered: the share of ce_means - ce that features save."""
    L, C, at_once = model.config.n_layer, model.config.n_embd, max(1, AT_ONCE // idx.shape[1])
    parts = list(zip(idx.split(at_once), targets.split(at_once)))
    totals, squares, missed = (torch.zeros(L, C, dtype=torch.float64) for _ in range(3))    # on the CPU: mps has none
    used = torch.zeros(L, transcoder.encoder.shape[1], device=idx.device)            # how often is a feature active?
    for rows, _ in parts:
        sites = mlp_sites(model, rows)
        features = [transcoder.encode(l, x) for l, x in enumerate(sites.inputs)]
        for l, (y, guess) in enumerate(zip(sites.outputs, transcoder.decode(features))):             # (B,T,C) each
            y, guess = y.cpu().double(), guess.cpu().double()
            totals[l] += y.sum((0, 1))
            squares[l] += y.square().sum((0, 1))
            missed[l] += (y - guess).square().sum((0, 1))
            used[l] += (features[l] > 0).sum((0, 1))
    means, found = totals / idx.numel(), []
    variance = squares / idx.numel() - means.square()

    def features_for_mlp(l, x):
        if l == 0:    # new rows
            found.clear()
        found.append(transcoder.encode(l, x))
        return transcoder.scaled_output(l, found) / transcoder.out_scale[l]

    def ce(mlp):
        return sum(cross_entropy(model.unembed(mlp_sites(model, rows, mlp).last), answers).item() * len(rows)
                   for rows, answers in parts) / len(idx)

    ces = {"ce": ce(None), "ce_features": ce(features_for_mlp),
           "ce_means": ce(lambda l, x: means[l].to(x).expand_as(x))}
    return {"explained": (1 - missed.sum(1) / idx.numel() / variance.sum(1)).tolist(),
            "dead": (used == 0).float().mean().item(), "active": used.sum().item() / idx.numel() / L, **ces,
            "recovered": (ces["ce_means"] - ces["ce_features"]) / (ces["ce_means"] - ces["ce"])}


def run(args):
    make_folder(args.out)
    options, path = dict(vars(args)), os.path.join(args.out, "args.json")
    options["model"] = absolute(args.model, GPT2_SHA256)
    options["data"] = args.data if args.data == "addition" else checked_source(args.data)
    if os.path.exists(path):
        old = read_json(path)
        differ = [name for name in options if name not in FREE and old.get(name) != options[name]]
        if differ:
            raise UserError(f"{args.out} holds a run with other {', '.join(differ)}\npass another --out")
    args.device = pick_device(args.device)
    model = load_model(args.model).to(args.device).requires_grad_(False)
    tokens, *unseen = material(args, model)
    write_json(path, options)    # last: after an error above, the corrected command can use the same folder
    transcoder = train(model, tokens, args)
    found = quality(model, transcoder, *(t.to(args.device) for t in unseen))
    by_layer = "  ".join(f"{x:.3f}" for x in found["explained"])
    print(f"explained variance by layer    {by_layer}\n"
          f"active features                {found['active']:.1f} of {args.features} a token and layer, "
          f"{found['dead']:.1%} never\n"
          f"CE of the model                {found['ce']:.4f}\n"
          f"with features for its MLPs     {found['ce_features']:.4f}    "
          f"{found['recovered']:.1%} of the gap recovered\n"
          f"with their means for its MLPs  {found['ce_means']:.4f}")
    write_json(os.path.join(args.out, "summary.json"), found)


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.transcoder --model A --data stdlib [options]",
                                     description="A cross-layer transcoder: sparse features in place of all MLPs.")
    parser.add_argument("--model", required=True, help="a GPT-2 name, a path, or a checkpoint of ours")
    parser.add_argument("--data", required=True, help="as --data of train.py, or addition")
    for name, kind, default, about in (
        ("--out", str, "runs/transcoder", "folder of the run"),
        ("--features", between(int, 1, 2**20), 1024, "of each layer"),
        ("--k", between(int, 1, 2**20), 16, "features that are active for one token, with --activation topk"),
        ("--sparsity", between(float, 0.0, 1.0), 0.01, "with --activation jump: the price of an active feature"),
        ("--steps", between(int, 1, 10**7), 2000, "of about 1,024 tokens, one window at least"),
        ("--lr", between(float, 1e-9, 1.0), 2e-3, "peak learning rate"),
        ("--windows", between(int, 1, 10**6), 64, "validation windows that measure the quality; of sums all held-out"),
        ("--seed", between(int, 0, 2**31), 0, "of weights and batches"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{about} (default {default})")
    parser.add_argument("--per-layer", action="store_true", help="features write to their own layer only")
    parser.add_argument("--activation", choices=("topk", "jump"), default="topk",
                        help="active: topk, the --k largest features (default); jump, those above a learned threshold")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda if there is one, else cpu")
    run_command(parser, run)


if __name__ == "__main__":
    main()

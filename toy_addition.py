"""Two-digit addition: the whole method on a laptop, in minutes and without network (Figure 1 of the paper).

    python toy_addition.py [--seed 0] [--out runs/addition] [--layout reversed|paper]

A small GPT learns all sums of two two-digit numbers with ordinary, dense attention. The same weights then get
one binary gate per attention edge, and GECO closes as many gates as the loss allows. What is left is
close to an algorithm: the answer's digits look up the digits they need, and often one edge carries the carry.

One character is one token, and the answer is not fed back: its slots are `?` on the input side.
    reversed  36+28=???    answer 460: least significant digit first, so that a causal GPT can pass the carry on
    paper     36+28=?????  answer 00064: the paper's own, read without a causal mask
"""
import argparse
import copy
import math
import os
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from geco import Geco
from model import GPT, GPTConfig, allowed_edges
from support.figures import draw_attention, draw_training
from support.files import UserError, between, make_folder, write_csv, write_json
from support.weights import save_checkpoint

ALPHABET = "0123456789+=?"
SLOTS = {"reversed": 3, "paper": 5}
EXAMPLES = {"no carry": (53, 21), "one carry": (36, 28), "two carries": (43, 59)}    # those of Figure 1
MIN_ACCURACY = 0.999    # share of training sums that a sparse model must get right to be kept
ATTENTION_DECAY = {"dense": 0.1, "sparse": 3.0}    # weight decay of c_attn, which makes q, k and v


def encode(a, b, layout):
    """One sum as text -> (what the model reads, what it should answer in the slots)."""
    answer = f"{a + b:0{SLOTS[layout]}d}"
    return f"{a:02d}+{b:02d}=" + "?" * len(answer), answer[::-1] if layout == "reversed" else answer


def addition_data(layout="reversed"):
    """All 10,000 sums -> tokens (10000,T) and targets (10000,T), -1 outside the slots. Row 100 a + b holds a + b."""
    token = {c: n for n, c in enumerate(ALPHABET)}
    texts = [encode(a, b, layout) for a in range(100) for b in range(100)]
    idx = torch.tensor([[token[c] for c in question] for question, _ in texts])
    answers = torch.tensor([[token[c] for c in answer] for _, answer in texts])
    targets = torch.full_like(idx, -1)
    targets[:, -SLOTS[layout]:] = answers
    return idx, targets


def split():
    """Rows of the 8,000 training and the 2,000 held-out sums: the same for every seed."""
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(42))
    return order[:8000], order[8000:]


def toy_config(layout="reversed", **fields):
    """A small GPT. 2 layers: a carry must be computed before another slot can fetch it. 1 head: of two heads, each
    looks up some digits only, and both keep their gates open; a single head reads the mean of two digits."""
    return GPTConfig(block_size=6 + SLOTS[layout], vocab_size=len(ALPHABET), n_layer=2, n_head=1, n_embd=64,
                     causal=layout == "reversed", **fields)


@torch.no_grad()
def evaluate(model, idx, targets):
    """With hard gates: {CE in nats per digit, share of sums right in every digit, active and expected edges per sum}.
    And which sums are wrong, (N) bool."""
    out = model.eval()(idx, targets)
    right = ((out.logits.argmax(-1) == targets) | (targets == -1)).all(1)             # (N)
    edges = allowed_edges(model.config)
    return {"hard_ce": out.loss.item(), "accuracy": right.float().mean().item(),
            "active": out.active_edges.mean().item() * edges,
            "eval_expected": out.expected_edges.mean().item() * edges}, ~right


def meets_constraint(found, tau):
    """Is an evaluation good enough to keep? A mean over digits forgives some wrong sums, so these are counted too."""
    return found["hard_ce"] <= tau and found["accuracy"] >= MIN_ACCURACY


def adamw(model, phase, lr):
    """AdamW with a short memory of squared gradients, and with a decay of c_attn that is strong in the sparse phase.

    A gate that drops a needed edge makes a spike in the gradient. With a long memory these spikes would scale away the
    small, steady pull on the gates of idle edges. A gate that is sure has no gradient: it would stay open without need,
    or shut in error. The decay pulls scores back, so that a gate stays sure only while its edge is needed.
    """
    attention = [p for name, p in model.named_parameters() if name.endswith("c_attn.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("c_attn.weight")]
    groups = [{"params": attention, "weight_decay": ATTENTION_DECAY[phase]}, {"params": others, "weight_decay": 0.01}]
    # eps 1e-5 holds back weights that have almost no gradient, where Adam would make steps of pure noise.
    return torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), eps=1e-5 if phase == "sparse" else 1e-8, fused=True)


def train(model, idx, targets, steps, lr, seed=0, geco=None, batch_size=32, eval_every=250):
    """Minimise the cross-entropy or, given a Geco, the expected edges while the cross-entropy stays below tau.

    Returns the history, one dict per step: ce and, with a Geco, lam (the one this step used), c_bar, expected
    (edges per sum) and, every eval_every steps, what `evaluate` finds on all of idx. With a Geco, evaluations read
    the average of the weights over about 100 steps, where the noise of gates and batches cancels; the sums that are
    wrong there are seen more often until the next; and the model is left as the sparsest of them that met the
    constraint, or as the last if none did.
    """
    phase, edges = "sparse" if geco else "dense", allowed_edges(model.config)
    order = torch.Generator().manual_seed(seed)    # which sums come when
    torch.manual_seed(seed)                        # the gates (see sample_gates)
    optimizer = adamw(model, phase, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps)))    # warm-up, cosine down to a tenth
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))   # updated each tenth step
    history, fewest, weights, wrong = [], math.inf, None, []
    bar = tqdm(range(1, steps + 1), desc=f"{phase:6}", mininterval=0.5)
    model.train()
    for step in bar:
        rows = torch.randint(len(idx), (batch_size,), generator=order)
        if len(wrong):    # a quarter of them: a mean over all would let a small class of sums be given up for good
            rows[::4] = wrong[torch.randint(len(wrong), (len(rows[::4]),), generator=order)]
        out = model(idx[rows], targets[rows])
        row = {"step": step, "ce": out.loss.item()}
        if not math.isfinite(row["ce"]):
            raise FloatingPointError(f"the cross-entropy is {row['ce']} at {phase} step {step}\n"
                                     "take a larger --tau, or another --seed")
        share = out.expected_edges.mean()
        loss = geco.objective(share, out.loss) if geco else out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if geco:
            row |= geco.step(row["ce"], share.item() * edges)    # of this batch, wrong sums included
            if step % 10 == 0 or step == steps:
                averaged.update_parameters(model)
            if step % eval_every == 0 or step == steps:
                found, is_wrong = evaluate(averaged.module, idx, targets)
                row, wrong = row | found, is_wrong.nonzero()[:, 0]
                if meets_constraint(found, geco.tau) and found["active"] < fewest:
                    fewest, weights = found["active"], copy.deepcopy(averaged.module.state_dict())
        history.append(row)
        bar.set_postfix({name: f"{row[name]:.4g}" for name in ("ce", "lam", "expected") if name in row}, refresh=False)
    if geco:
        model.load_state_dict(weights or averaged.module.state_dict())
        if not weights:
            print(f"no evaluation met CE <= {geco.tau} with {MIN_ACCURACY:.1%} of the training sums right: "
                  "keeping the last average")
    return history


def toy_geco(tau, rate=0.01):
    """Edges are a share here: at lam = 1, an edge is worth 1 / allowed_edges nats. rate: Geco's, times tau, so that a
    small tau is not slow. Where C stays at tau, rate and gain together triple lam in about 40 steps. The ceiling is
    low: sampled gates keep lam there for thousands of steps, and with a larger one idle edges hardly go.
    """
    return Geco(tau, rate=rate / tau, decay=0.95, lam_range=(0.01, 1.0), gain=1 / tau, most=tau)


def find_carry_edge(model, idx, train_rows, held_out):
    """The edge out of the tens slot that knows most of the carry: how often is it open?

    Picked on the training sums, over all layers, heads and keys, by the difference between sums with and
    without a carry from the units. Returns ((layer, head, key), the share of held-out sums with a carry in which
    it is open, the same without a carry).
    """
    tens = idx.shape[1] - 2    # in both layouts: the second of three slots, the last but one of five

    def shares(rows):
        is_open = (model.attention_maps(idx[rows])[..., tens, :] > 0).float()         # (L,N,H,T)
        carry = idx[rows, 1] + idx[rows, 4] >= 10                                     # (N)
        return is_open[:, carry].mean(1), is_open[:, ~carry].mean(1)                  # (L,H,T) each

    model.eval()
    with_carry, without = shares(train_rows)
    edge = tuple(int(n) for n in torch.unravel_index((with_carry - without).abs().argmax(), without.shape))
    with_carry, without = shares(held_out)
    return edge, with_carry[edge].item(), without[edge].item()


def attention_rows(models, layout):
    """Figure 1, for draw_attention: the maps of three sums, a row each, dense beside sparse, every layer and head."""
    places = ["units", "tens", "hundreds", "thousands", "ten thousands"][:SLOTS[layout]]
    idx, rows = addition_data(layout)[0], []
    for name, (a, b) in EXAMPLES.items():
        question, panels = encode(a, b, layout)[0], []
        for kind, model in models.items():
            model.eval()
            one_sum, H = idx[100 * a + b][None], model.config.n_head
            digits = [ALPHABET[n] for n in model(one_sum).logits[0, -SLOTS[layout]:].argmax(-1)]
            slots = [f"{place} {digit}" for place, digit in zip(places[::1 if layout == "reversed" else -1], digits)]
            for n, weights in enumerate(model.attention_maps(one_sum)[:, 0].flatten(0, 1).numpy()):    # (T,T)
                panels.append((f"{kind}, layer {n // H}, head {n % H}", weights, [*question[:6], *slots], question,
                               kind == "sparse"))
        rows.append((f"{a} + {b} = {a + b}\n{name}\n\nreading position", panels))
    return rows


def run(args):
    started = time.time()
    make_folder(args.out)
    idx, targets = addition_data(args.layout)
    train_rows, held_out = split()
    config = toy_config(args.layout)
    edges = allowed_edges(config)
    dense = GPT(config, generator=torch.Generator().manual_seed(args.seed))
    print(f"{sum(p.numel() for p in dense.parameters()):,} parameters, {edges} allowed edges per "
          f"sum, tau {args.tau} nats per digit, seed {args.seed}, {torch.get_num_threads()} CPU threads, "
          f"output in {args.out}")
    training = idx[train_rows], targets[train_rows]
    dense_history = train(dense, *training, args.dense_steps, lr=3e-3, seed=args.seed, batch_size=128)
    sparse = copy.deepcopy(dense)
    sparse.set_gates(True, args.gate_bias)
    history = train(sparse, *training, args.steps, lr=1e-3, seed=args.seed, geco=toy_geco(args.tau, args.rate))

    models, evaluations = {"dense": dense, "sparse": sparse}, [row for row in history if "hard_ce" in row]
    dense_found, sparse_found = (evaluate(model, idx[held_out], targets[held_out])[0] for model in models.values())
    (layer, head, key), with_carry, without = find_carry_edge(sparse, idx, train_rows, held_out)
    carry_edge = f"layer {layer}, head {head}, tens slot to position {key}"
    for name, model in models.items():
        save_checkpoint(model, os.path.join(args.out, f"{name}.pt"), layout=args.layout)
    draw_attention(attention_rows(models, args.layout), config.causal, "Two-digit addition: where each position reads "
                   "from, dense beside sparse attention", os.path.join(args.out, "addition.png"))
    write_csv(os.path.join(args.out, "log.csv"), evaluations)
    draw_training(dense_history, history, args.tau, os.path.join(args.out, "training.png"))
    seconds = round(time.time() - started, 1)
    write_json(os.path.join(args.out, "summary.json"), {
        **vars(args), "dense_accuracy": dense_found["accuracy"], "sparse_accuracy": sparse_found["accuracy"],
        "dense_ce": dense_found["hard_ce"], "sparse_ce": sparse_found["hard_ce"], "allowed_edges": edges,
        "active_edges_per_example": sparse_found["active"], "active_share": sparse_found["active"] / edges,
        "expected_edges_per_example": sparse_found["eval_expected"], "carry_edge": carry_edge,
        "carry_edge_with_carry": with_carry, "carry_edge_without_carry": without,
        "constraint_met": any(meets_constraint(row, args.tau) for row in evaluations), "seconds": seconds})

    print(f"\non the {len(held_out)} held-out sums    dense     sparse (hard gates)")
    print(f"right in every digit       {dense_found['accuracy']:7.2%}   {sparse_found['accuracy']:7.2%}")
    print(f"cross-entropy, nats        {dense_found['hard_ce']:7.4f}   {sparse_found['hard_ce']:7.4f}")
    print(f"active edges per sum       {edges:7.2f}   {sparse_found['active']:7.2f}   "
          f"({sparse_found['active'] / edges:.1%} of {edges})")
    name = "carry edge" if abs(with_carry - without) > 0.5 else "no carry edge; the nearest to one"
    print(f"{name} ({carry_edge}): open in {with_carry:.1%} of the sums with a carry from the "
          f"units, in {without:.1%} of those without\n{seconds} s; pictures and checkpoints in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python toy_addition.py [options]    (--help lists them)",
                                     description="Two-digit addition, dense and then sparse: Figure 1 of the paper.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, kind, default, about in (
        ("--seed", between(int, 0, 2**31), 0, "of the initial weights, the batches and the gates"),
        ("--out", str, "runs/addition", "folder for pictures, checkpoints and summary.json"),
        ("--tau", between(float, 1e-6, 10.0), 0.03, "target cross-entropy, nats per answer digit"),
        ("--gate-bias", between(float, 0, 100.0), 2.0, "b: how far open the gates start"),
        ("--rate", between(float, 1e-6, 10.0), 0.01, "Geco's rate times tau: how fast lambda answers"),
        ("--dense-steps", between(int, 1, 10**7), 2500, "training steps without gates"),
        ("--steps", between(int, 1, 10**7), 12_000, "training steps with gates"),
    ):
        parser.add_argument(name, type=kind, default=default, help=about)
    parser.add_argument("--layout", choices=SLOTS, default="reversed", help="how a sum is written: see the file's top")
    args = parser.parse_args()
    try:
        run(args)
    except (UserError, FloatingPointError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

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
import sys
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from geco import Geco
from model import GPT, GPTConfig, allowed_edges
from support.figures import draw_attention, draw_film, draw_training
from support.files import between, make_folder, run_command, write_csv, write_json
from support.weights import save_checkpoint

ALPHABET = "0123456789+=?"
SLOTS = {"reversed": 3, "paper": 5}
EXAMPLES = {"no carry": (53, 21), "one carry": (36, 28), "two carries": (43, 59)}    # those of Figure 1


def as_text(a, b, layout):
    """One sum as text -> (what the model reads, what it should answer in the slots)."""
    answer = f"{a + b:0{SLOTS[layout]}d}"
    return f"{a:02d}+{b:02d}=" + "?" * len(answer), answer[::-1] if layout == "reversed" else answer


def addition_data(layout="reversed"):
    """All 10,000 sums -> tokens (10000,T) and targets (10000,T), -1 outside the slots. Row 100 a + b holds a + b."""
    token = {c: n for n, c in enumerate(ALPHABET)}
    texts = [as_text(a, b, layout) for a in range(100) for b in range(100)]
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
    """A small GPT. 2 layers: a carry must be computed before another slot can fetch it. 1 head: it reads the mean of
    two digits, which gives their sum. Of two heads each reads only some of the ten digits, and a gate does not see the
    other digit that is added, so both heads keep their gates open."""
    return GPTConfig(block_size=6 + SLOTS[layout], vocab_size=len(ALPHABET), n_layer=2, n_head=1, n_embd=64,
                     causal=layout == "reversed", **fields)


@torch.no_grad()
def evaluate(model, idx, targets):
    """With hard gates: hard_ce, nats per digit; accuracy, the share of sums right in every digit; active and
    eval_expected, edges per sum."""
    out = model.eval()(idx, targets)
    right = ((out.logits.argmax(-1) == targets) | (targets == -1)).all(1)             # (N)
    edges = allowed_edges(model.config)
    return {"hard_ce": out.loss.item(), "accuracy": right.float().mean().item(),
            "active": out.active_edges.mean().item() * edges,
            "eval_expected": out.expected_edges.mean().item() * edges}


def meets_constraint(found, tau):
    """Is a model good enough, by its evaluation? A mean over digits alone would hide a few wrong sums."""
    return found["hard_ce"] <= tau and found["accuracy"] == 1


def adamw(model, decay):
    """The optimiser of a phase. decay: of c_attn's weights, which make q, k and v.

    A gate whose probability is near 0 or 1 has almost no gradient, so by itself it would stay as it is, right or wrong.
    The decay pulls all scores towards 0: such a gate stays only where the loss holds it. In the dense phase the decay
    keeps attention spread over several keys: where it sits on one key, the gates later close wrong edges. With gates a
    decay of 4 is too strong: in some runs needed edges close.
    """
    attention = [p for name, p in model.named_parameters() if name.endswith("c_attn.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("c_attn.weight")]
    groups = [{"params": attention, "weight_decay": decay}, {"params": others, "weight_decay": 0.01}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def descend(objective, ce, optimizer, lr, where):
    """One step of the optimiser, at the learning rate lr. A cross-entropy that is no number ends the run."""
    if not math.isfinite(ce):
        raise FloatingPointError(f"the cross-entropy is {ce} at {where}\n"
                                 "take another --seed, or with gates a larger --tau")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    objective.backward()
    optimizer.step()


def averaging(model):
    """The model that a phase leaves: updated every 10th step, it averages the weights of the last 100 steps or so."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def train_dense(model, idx, targets, steps, seed=0):
    """Minimise the cross-entropy until every sum is right at five evaluations in a row, for at most `steps` steps.

    The learning rate stays high: given time, its noise spreads attention that sits on one key. The averaged weights,
    which `model` gets at the end, do not contain this noise.
    Returns the history, a dict for every step: ce, nats per digit, and at every 250th what `evaluate` finds on all of
    idx.
    """
    order = torch.Generator().manual_seed(seed)    # which sums come when
    optimizer, averaged, history = adamw(model, 4.0), averaging(model), []
    in_a_row = 0
    for step in tqdm(range(1, steps + 1), desc="dense ", mininterval=0.5):
        rows = torch.randint(len(idx), (128,), generator=order)
        loss = model.train()(idx[rows], targets[rows]).loss
        history.append({"step": step, "ce": loss.item()})
        descend(loss, history[-1]["ce"], optimizer, 2e-3 * min(step / 100, 1), f"dense step {step}")
        if step % 10 == 0 or step == steps:
            averaged.update_parameters(model)
        if step % 250 == 0:
            history[-1] |= evaluate(averaged.module, idx, targets)
            in_a_row = in_a_row + 1 if history[-1]["accuracy"] == 1 else 0
            if in_a_row == 5:
                break
    model.load_state_dict(averaged.module.state_dict())
    return history


def train_sparse(model, idx, targets, steps, geco, seed=0, watch=None):
    """Minimise the expected edges while the cross-entropy of the model that is kept stays below geco.tau.

    The gradient comes from sampled gates. The model that one keeps has neither their noise nor that of the batches: it
    has averaged weights and hard gates. So the constraint looks at this model, every 10th step, on 512 training sums.
    At the end `model` is the sparsest average that met tau with every sum right at an evaluation, or the last average.
    (The last one need not be right: late in a run needed edges may close all at once.)
    Returns the history, a dict for every 10th step and the last: ce (this batch, sampled gates, nats per digit), seen
    (what the constraint saw), lam (used in this step), c_bar, expected (edges per sum); at every 250th and the last
    also what `evaluate` finds on all of idx. watch(model) gets the averaged model then.
    """
    order, look = (torch.Generator().manual_seed(seed) for _ in range(2))    # rows to train, to look at: one stream
    torch.manual_seed(seed)                                                  # gates
    optimizer, averaged, history = adamw(model, 3.0), averaging(model), []
    edges, bar = allowed_edges(model.config), tqdm(range(1, steps + 1), desc="sparse", mininterval=0.5)
    fewest, kept = math.inf, averaged.module
    for step in bar:
        rows = torch.randint(len(idx), (32,), generator=order)
        out = model.train()(idx[rows], targets[rows])
        share, ce = out.expected_edges.mean(), out.loss.item()
        lr = 1e-3 * min(step / 100, 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps))    # down to a tenth
        descend(geco.objective(share, out.loss), ce, optimizer, lr, f"sparse step {step}")
        if step % 10 == 0 or step == steps:
            averaged.update_parameters(model)
            rows = torch.randint(len(idx), (512,), generator=look)
            seen = evaluate(averaged.module, idx[rows], targets[rows])["hard_ce"]
            used = geco.update(seen)
            row = {"step": step, "ce": ce, "seen": seen, "lam": used, "c_bar": geco.average,
                   "expected": share.item() * edges}
            if step % 250 == 0 or step == steps:
                row |= evaluate(averaged.module, idx, targets)
                if watch:
                    watch(averaged.module)
                if meets_constraint(row, geco.tau) and row["active"] < fewest:
                    fewest, kept = row["active"], copy.deepcopy(averaged.module)
            history.append(row)
            bar.set_postfix({name: f"{row[name]:.4g}" for name in ("seen", "lam", "expected")}, refresh=False)
    model.load_state_dict(kept.state_dict())
    return history


def toy_geco(tau, rate=0.1):
    """For both layouts; the numbers hold for the reversed one, of 90 edges. rate: how fast lam answers CE / tau.

    lam = 1       an edge costs 1/90 nat per digit
    lam < 0.04    closing all edges and guessing is cheaper
    lam = 0.5     the cheapest part of a sum, the carry into the hundreds (0.023 nats), is worth more than its edge
    lam > 10      edges hardly matter
    """
    return Geco(tau, rate=rate / tau, decay=0.6, lam_range=(0.5, 10.0))


def find_carry_edge(model, idx, train_rows, held_out):
    """Find the edge of the tens slot that depends most on the carry, and how often it is open.

    Picked on the training sums, over all layers, heads and keys, by the difference between sums with and
    without a carry from the units. Returns ((layer, head, key), the share of held-out sums with a carry in which
    it is open, the same without a carry).
    """
    tens = idx.shape[1] - 2    # in both layouts: the second of three slots, the last but one of five

    def shares(rows):
        is_open = (model.attention_maps(idx[rows])[..., tens, :] > 0).float()         # (L,N,H,T)
        carry = idx[rows, 1] + idx[rows, 4] >= 10                                     # (N)
        return is_open[:, carry].mean(1), is_open[:, ~carry].mean(1)                  # (L,H,T) each

    with_carry, without = shares(train_rows)
    edge = tuple(int(n) for n in torch.unravel_index((with_carry - without).abs().argmax(), without.shape))
    with_carry, without = shares(held_out)
    return edge, with_carry[edge].item(), without[edge].item()


def places(layout):
    """The names of the slots, in their order."""
    names = ["units", "tens", "hundreds", "thousands", "ten thousands"][:SLOTS[layout]]
    return names if layout == "reversed" else names[::-1]


def attention_rows(models, layout):
    """Figure 1, for draw_attention: the maps of three sums, a row each, dense beside sparse, every layer and head."""
    idx, rows = addition_data(layout)[0], []
    for name, (a, b) in EXAMPLES.items():
        question, panels = as_text(a, b, layout)[0], []
        for kind, model in models.items():
            model.eval()
            one_sum, H = idx[100 * a + b][None], model.config.n_head
            digits = [ALPHABET[n] for n in model(one_sum).logits[0, -SLOTS[layout]:].argmax(-1)]
            slots = [f"{place} {digit}" for place, digit in zip(places(layout), digits)]
            for n, weights in enumerate(model.attention_maps(one_sum)[:, 0].flatten(0, 1).numpy()):    # (T,T)
                panels.append((f"{kind}, layer {n // H}, head {n % H}", weights, [*question[:6], *slots], question,
                               kind == "sparse"))
        rows.append((f"{a} + {b} = {a + b}\n{name}\n\nreading position", panels))
    return rows


def run(args):
    """Both phases, and all that they leave in args.out. Returns whether the sparse model meets the constraint."""
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
    dense_history = train_dense(dense, *training, args.dense_steps, args.seed)
    sparse = copy.deepcopy(dense)
    sparse.set_gates(True, args.gate_bias)
    (a, b), frames = EXAMPLES["one carry"], []
    shown = idx[100 * a + b][None]
    history = train_sparse(sparse, *training, args.steps, toy_geco(args.tau, args.rate), args.seed,
                           watch=lambda model: frames.append(model.attention_maps(shown)[:, 0]))    # (L,H,T,T)

    models, evaluations = {"dense": dense, "sparse": sparse}, [row for row in history if "hard_ce" in row]
    met = any(meets_constraint(row, args.tau) for row in evaluations)
    dense_found, sparse_found = (evaluate(model, idx[held_out], targets[held_out]) for model in models.values())
    (layer, head, key), with_carry, without = find_carry_edge(sparse, idx, train_rows, held_out)
    carry_edge = f"layer {layer}, head {head}, tens slot to position {key}"
    for name, model in models.items():
        save_checkpoint(model, os.path.join(args.out, f"{name}.pt"), layout=args.layout)
    draw_attention(attention_rows(models, args.layout), config.causal, "Two-digit addition: where each position reads "
                   "from, dense beside sparse attention", os.path.join(args.out, "addition.png"))
    write_csv(os.path.join(args.out, "log.csv"), evaluations)
    draw_training(dense_history, history, args.tau, os.path.join(args.out, "training.png"))
    if not args.no_gif:
        question = as_text(a, b, args.layout)[0]
        draw_film(evaluations, frames, [*question[:6], *places(args.layout)], question, config.causal, args.tau,
                  f"{a} + {b}", os.path.join(args.out, "addition.gif"))
    seconds = round(time.time() - started, 1)
    write_json(os.path.join(args.out, "summary.json"), {
        **vars(args), "dense_accuracy": dense_found["accuracy"], "sparse_accuracy": sparse_found["accuracy"],
        "dense_ce": dense_found["hard_ce"], "sparse_ce": sparse_found["hard_ce"], "allowed_edges": edges,
        "active_edges_per_example": sparse_found["active"], "active_share": sparse_found["active"] / edges,
        "expected_edges_per_example": sparse_found["eval_expected"], "carry_edge": carry_edge,
        "carry_edge_with_carry": with_carry, "carry_edge_without_carry": without,
        "constraint_met": met, "dense_steps_taken": len(dense_history), "seconds": seconds})

    print(f"\non the {len(held_out)} held-out sums    dense     sparse (hard gates)")
    print(f"right in every digit       {dense_found['accuracy']:7.2%}   {sparse_found['accuracy']:7.2%}")
    print(f"cross-entropy, nats        {dense_found['hard_ce']:7.4f}   {sparse_found['hard_ce']:7.4f}")
    print(f"active edges per sum       {edges:7.2f}   {sparse_found['active']:7.2f}   "
          f"({sparse_found['active'] / edges:.1%} of {edges})")
    print(f"training steps             {len(dense_history):7}   {args.steps:7}")
    name = "carry edge" if abs(with_carry - without) >= 0.8 else "no carry edge; the nearest to one"
    print(f"{name} ({carry_edge}): open in {with_carry:.1%} of the sums with a carry from the "
          f"units, in {without:.1%} of those without\n{seconds} s; pictures and checkpoints in {args.out}")
    if not met:
        last = history[-1]
        print(f"the constraint is NOT met: on the training sums CE is {last['hard_ce']:.4f}, tau {args.tau}, and "
              f"{last['accuracy']:.2%} of them are right, where all must be\ntake more --steps, a larger --tau or "
              "another --seed")
    return met


def main():
    parser = argparse.ArgumentParser(usage="python toy_addition.py [options]    (--help lists them)",
                                     description="Two-digit addition, dense and then sparse: Figure 1 of the paper.")
    for name, kind, default, about in (
        ("--seed", between(int, 0, 2**31), 0, "of the initial weights, the batches and the gates"),
        ("--out", str, "runs/addition", "folder for pictures, checkpoints and summary.json"),
        ("--tau", between(float, 1e-6, 10.0), 0.003, "target cross-entropy, nats per answer digit"),
        ("--gate-bias", between(float, 0, 100.0), 0.0, "b: how far open the gates start"),
        ("--rate", between(float, 1e-6, 10.0), 0.1, "Geco's rate times tau: how fast lambda answers"),
        ("--dense-steps", between(int, 1, 10**7), 8000, "steps without gates at most: ends when all is right"),
        ("--steps", between(int, 1, 10**7), 8000, "training steps with gates"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{about} (default {default})")
    parser.add_argument("--no-gif", action="store_true", help="no addition.gif, which takes some seconds")
    parser.add_argument("--layout", choices=SLOTS, default="reversed", help="how a sum is written: see the file's top")
    if not run_command(parser, run):
        sys.exit(1)


if __name__ == "__main__":
    main()

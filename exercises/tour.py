"""A walk through the method on one sum, five minutes to read: each step with the line of code that it comes from.

    python toy_addition.py && python -m exercises.tour [--run runs/addition] [--a 36 --b 28]

Prints the scores of one attention row, its gates, sampled and hard, and what the row reads; the carry edge, with a
carry and without; and how lambda answered while the model was trained. Leaves tour.png, a picture of these steps.
"""
import argparse
import csv
import math
import os
from pathlib import Path

import torch

from gates import sample_gates, sparse_attention
from model import GPT
from patching import pattern
from support.figures import draw_attention
from support.files import UserError, between, read_json, run_command
from toy_addition import ALPHABET, addition_data, as_text, places, toy_geco

ROOT = Path(__file__).parent.parent
SLOT = 7    # the tens slot of the layout that is read from left to right


def quote(file, begins):
    """The line of a file that begins so, with its number, as '    gates.py:N    scores = ...'."""
    for n, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith(begins):
            return f"    {file}:{n}    {line.strip()}"
    raise LookupError(f"{file} has no line that begins with {begins}")


def say(title, *lines):
    print(f"\n{title}\n" + "\n".join(lines))


def row(name, values, form="{:8.2g}"):
    return f"    {name:12}" + "".join(form.format(v) for v in values)


def show_row(model, idx, keys):
    """The tens slot of layer 0: scores, gates, weights, output."""
    block = model.h[0]
    q, k, v = block.attn.heads(block.ln_1(model.embed(idx)))                             # (1,1,T,D) each
    b = block.attn.gate_bias
    scores = (q @ k.mT / math.sqrt(q.shape[-1]))[0, 0, SLOT, :SLOT + 1]                  # (T') keys up to itself
    g = scores + b[0]
    say("2. What does the tens slot look at? Its score for each key, in layer 0", row("key", keys, "{:>8}"),
        row("score s", scores, "{:8.2f}"), quote("gates.py", "scores = q.to"))
    torch.manual_seed(0)
    draws = torch.stack([sample_gates(g, sample=True) for _ in range(3)])
    agree = (draws == draws[0]).all(0).sum()
    say(f"3. Each edge has a gate, open with probability sigmoid(s + b), b = {b[0]:.2f}. Training draws it",
        row("probability", g.sigmoid()), *(row(f"draw {n}", draw) for n, draw in enumerate(draws, 1)),
        quote("gates.py", "g = g + torch.logit"),
        f"    The draws agree at {agree} of {len(g)} keys. A gate whose probability is near 0 or 1 is sure. Eight "
        "draws of one that is not, s + b = 0.5:",
        row("gate", sample_gates(torch.full((8,), 0.5), sample=True)),
        "    The gradient is the sigmoid's, although the value is a bit:", quote("gates.py", "return hard + "))
    hard = sample_gates(g, sample=False)
    say("4. Evaluation does not draw: open where s + b > 0", row("gate A", hard),
        quote("gates.py", "hard = "))
    weights = scores.softmax(0)
    y, expected, active = sparse_attention(q, k, v, b)
    by_hand = (hard * weights) @ v[0, 0, :SLOT + 1]
    say("5. The softmax runs over all keys, the gate multiplies: a closed edge is an exact 0", row("softmax", weights),
        row("A * softmax", hard * weights), quote("gates.py", "y = (gates"),
        f"    from these weights y begins {', '.join(f'{x:.3f}' for x in by_hand[:3])}; "
        f"gates.py says {', '.join(f'{x:.3f}' for x in y[0, 0, SLOT, :3])}",
        f"    of all {idx.shape[1] * (idx.shape[1] + 1) // 2} edges of this layer {active[0, 0]:.1%} are open; "
        f"expected were {expected[0, 0]:.1%}, and this is what training penalises:", quote("gates.py", "expected = "))


def show_carry(model, a, b):
    """The tens slot of layer 1, for this sum and for one whose units carry if these do not."""
    idx, other = addition_data()[0], b - b % 10 + (0 if a % 10 + b % 10 >= 10 else 9 if a % 10 else b % 10)
    lines = []
    for second in dict.fromkeys((b, other)):    # with a units digit of 0 no sum carries
        open_keys = model.attention_maps(idx[100 * a + second][None])[1, 0, 0, SLOT].nonzero()[:, 0].tolist()
        read = ", ".join("the units slot" if n == 6 else f"position {n}" for n in open_keys) or "nothing"
        carries = "carry" if a % 10 + second % 10 >= 10 else "do not carry"
        lines.append(f"    {a} + {second}: the units {carries}; in layer 1 the tens slot reads {read}")
    say("6. The carry. Most seeds have one edge in layer 1 that is open only with a carry, or only without", *lines,
        "    Exercise 8 finds it without a picture.", quote("toy_addition.py", "edge = tuple("))


def show_lambda(log, tau):
    """How lambda answered the constraint, from log.csv."""
    low, high = toy_geco(tau).lam_range
    with open(log, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = [*rows[:-1:max(1, len(rows) // 8)], rows[-1]]
    say("7. How it was trained. lambda rises while the CE of the averaged weights, with hard gates, is above tau, "
        f"{tau:g} nats, and falls below it; at the ends of its range, {low:g} and {high:g}, it stays",
        f"    {'step':>6}{'CE':>10}{'lambda':>10}{'edges per sum':>15}",
        *(f"    {r['step']:>6}{float(r['seen']):10.4f}{float(r['lam']):10.4f}{float(r['active']):15.2f}"
          for r in chosen),
        quote("geco.py", "self.average = self.decay"), quote("geco.py", "self.log_lam = min("),
        quote("geco.py", "return edges + "))


def draw(dense, sparse, idx, question, title, path):
    """The sparse model's layer 0, step by step, above the attention of both models."""
    block, labels = sparse.h[0], [*question[:6], *places("reversed")]
    q, k, _ = block.attn.heads(block.ln_1(sparse.embed(idx)))
    p, gates = pattern(block.attn, q, k)                                                 # (1,1,T,T)
    probability = (q @ k.mT / math.sqrt(q.shape[-1]) + block.attn.gate_bias[0]).sigmoid()
    steps = {"softmax": p, "3. sigmoid(s + b)": probability, "4. gate A": gates, "5. A * softmax": gates * p}
    rows = [("layer 0, sparse: reading position", [(name, t[0, 0].numpy(), labels, question, "A" in name)
                                                   for name, t in steps.items()])]
    rows.append(("reading position", [(f"{kind}, layer {l}", weights[0, 0].numpy(), labels, question, kind == "sparse")
                                      for kind, model in (("dense", dense), ("sparse", sparse))
                                      for l, weights in enumerate(model.attention_maps(idx))]))
    draw_attention(rows, True, title, path)


@torch.no_grad()
def tour(args):
    paths = [os.path.join(args.run, name) for name in ("dense.pt", "sparse.pt", "log.csv", "summary.json")]
    missing = [os.path.basename(path) for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(f"{args.run} lacks {', '.join(missing)}\nrun python toy_addition.py first, or name its folder "
                        "with --run")
    dense, sparse = (GPT.from_pretrained(path) for path in paths[:2])
    if sparse.notes.get("layout") != "reversed" or sparse.config.n_head != 1:
        raise UserError("this walk needs a toy of the layout reversed\ntrain one with python toy_addition.py")
    question, answer = as_text(args.a, args.b, "reversed")
    idx = addition_data()[0][100 * args.a + args.b][None]                                # (1,T)
    found = ["".join(ALPHABET[n] for n in model(idx).logits[0, -3:].argmax(-1)) for model in (dense, sparse)]
    say(f"1. The sum {args.a} + {args.b} is read as {question}; the answer goes backwards into the three slots",
        f"    {args.a} + {args.b} = {args.a + args.b}, three digits backwards: {answer}; the dense model says "
        f"{found[0]}, the sparse one {found[1]}",
        quote("toy_addition.py", "return f\"{a:02d}+"))
    show_row(sparse, idx, [*question[:6], "units", "tens"])
    show_carry(sparse, args.a, args.b)
    show_lambda(paths[2], read_json(paths[3])["tau"])
    path = os.path.join(args.run, "tour.png")
    draw(dense, sparse, idx, question, f"{args.a} + {args.b}: the gates of layer 0 (steps 3 to 5), and all attention "
         "before and after training with gates", path)
    print(f"\nSteps 3 to 5 and all attention of this sum are drawn in {path}, step 7 in training.png beside it.")


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.tour [options]",
                                     description="A walk through the method on one sum.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run", default="runs/addition", help="folder of toy_addition.py")
    parser.add_argument("--a", type=between(int, 0, 99), default=36, help="first number")
    parser.add_argument("--b", type=between(int, 0, 99), default=28, help="second number")
    run_command(parser, tour)


if __name__ == "__main__":
    main()

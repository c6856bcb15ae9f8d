"""The report of a run of train.py: a table, summary.json and three pictures (Figure 2)."""
import argparse
import csv
import os

import numpy as np
import torch

from extras.encodings import encoding_of
from extras.figures import draw_attention, draw_curve, draw_heads
from extras.files import UserError, first_line, read_json, write_json
from model import GPT, allowed_edges

PROMPT = "When Mary and John went to the store, John gave a drink to"
SHORT_PROMPT = "Return a list of the values"    # where every byte is a token


def read_log(run):
    """The evaluations in a run's log.csv, first to last, each a dict of numbers."""
    path = os.path.join(run, "log.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: int(x) if name in ("step", "tokens") else float(x) for name, x in row.items()}
                    for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("it holds no evaluation yet")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path}\n{first_line(error)}") from error
    return rows


def best_row(rows, tau):
    """The sparsest evaluation that meets the constraint, or None. Hard gates, validation loss."""
    return min((row for row in rows if row["val_ce"] <= tau), key=lambda row: row["active"], default=None)


SHARED = ("data", "steps", "seed", "block_size", "batch_size", "grad_accum", "processes", "eval_windows", "lr",
          "schedule", "warmup", "weight_decay", "lora_rank", "lora_all")


def check_control(args, control):
    """The last row of a finished --dense run that differs from ours in nothing else, or a UserError."""
    theirs = argparse.Namespace(**read_json(os.path.join(control, "args.json")))
    row = read_log(control)[-1]
    # (block_size may still be the model's own, and base_ce unmeasured, where ours has just begun)
    differ = [name for name in SHARED if getattr(args, name) not in (None, vars(theirs).get(name, getattr(args, name)))]
    if args.base_ce is not None and abs(theirs.base_ce - args.base_ce) > 1e-3:
        differ.append("untouched model")
    why = ("not --dense" if not theirs.dense else f"other {', '.join(differ)}" if differ else
           f"stopped at step {row['step']} of {theirs.steps}" if row["step"] < theirs.steps else None)
    if why:
        raise UserError(f"{control} is no control of {args.out}: {why}\na control is a finished --dense run with the "
                        "same options")
    return row


def report(out, control=None):
    """Table, summary.json and pictures of the run in `out`, from its files and those of the model it started from.
    control: a --dense run's folder; without one, that of the run's own --control."""
    args = argparse.Namespace(**read_json(os.path.join(out, "args.json")))
    rows = read_log(out)
    init = os.path.join(out, "dense", "last.pt") if args.init == "scratch" else args.init
    base = GPT.from_pretrained(init, block_size=args.block_size)
    edges_per_token = allowed_edges(base.config) / args.block_size
    best = None if args.dense else best_row(rows, args.tau)
    found = best or rows[-1]
    lines = [("untouched", args.base_ce, args.base_active)]
    control = control or args.control
    if control:
        lines.append(("dense control", check_control(args, control)["val_ce"], 1.0))
    lines.append(("dense control" if args.dense else "sparse", found["val_ce"], found["active"]))
    print(f"\n{'':16}validation CE   active edges   edges per token")
    for name, ce, active in lines:
        print(f"{name:16}{ce:13.4f}{active:15.3%}{active * edges_per_token:18.2f}")
    if not args.dense:
        which = "met: the sparsest such evaluation" if best else "not met by any evaluation: the last one"
        print(f"tau {args.tau:.4f}, {which}, step {found['step']} of {args.steps}")
        draw_curve(rows, lines, args.tau, os.path.join(out, "curve.png"))
        L, H = base.config.n_layer, base.config.n_head
        by_head = np.array([[found[f"active_{l}.{h}"] for h in range(H)] for l in range(L)])
        draw_heads(by_head, os.path.join(out, "edges_by_head.png"))
        sparse = GPT.from_pretrained(os.path.join(out, "best.pt" if best else "last.pt"))
        draw_attention(attention_rows({"untouched": base, "sparse": sparse}, by_head, encoding_of(base)), True,
                       "Where each token reads from: the heads with the most active edges",
                       os.path.join(out, "attention.png"), size=4)
    # The last file: it says that all is there.
    write_json(os.path.join(out, "summary.json"), {
        "base_ce": args.base_ce, "control_ce": lines[1][1] if control or args.dense else None,
        "sparse_ce": None if args.dense else found["val_ce"], "tau": args.tau,
        "constraint_met": None if args.dense else best is not None,
        "active_share": found["active"], "edges_per_token": found["active"] * edges_per_token,
        "step": found["step"], "steps": args.steps, "seed": args.seed})


def attention_rows(models, by_head, encoding, columns=4):
    """Figure 2b, for draw_attention: one prompt in the heads with the most active edges, a row for each model."""
    first = next(iter(models.values()))
    tokens = encoding.encode_ordinary(SHORT_PROMPT if encoding.name == "bytes" else PROMPT)[:first.config.block_size]
    labels = [encoding.decode([t]).replace(" ", "\u2423") for t in tokens]
    rows = []
    for name, model in models.items():
        maps = model.eval().attention_maps(torch.tensor([tokens]))[:, 0].flatten(0, 1).numpy()    # (L*H,T,T)
        rows.append(("reading position", [
            (f"{name}, layer {n // by_head.shape[1]}, head {n % by_head.shape[1]}", maps[n], labels, labels,
             name == "sparse") for n in np.argsort(-by_head, axis=None)[:columns]]))
    return rows

"""The report of a run of train.py, from its folder and its --init: a table, summary.json, three pictures (Figure 2)."""
import os

import numpy as np
import torch

from support.figures import draw_attention, draw_curve, draw_heads
from support.files import UserError, write_json
from support.log import best_row, by_head, read_run, share_at
from support.options import defaults

PROMPT = "When Mary and John went to the store, John gave a drink to"
SHORT_PROMPT = "Return a list of the values"    # where every byte is a token
# A control must have our value of every option in SHARED, and of every option that another program adds: all names
# that are not in OURS.
SHARED = ("data", "steps", "seed", "batch_size", "grad_accum", "processes", "eval_windows", "lr", "warmup",
          "weight_decay", "dtype")
OURS = {"processes", *defaults()}


def control_row(args, control, base):
    """The last row of a finished --dense run that differs from ours in nothing else, or a UserError.

    base: the facts of our untouched model."""
    theirs, their_base, rows = read_run(control)
    mine, other = vars(args), vars(theirs)
    names = [*SHARED, *sorted((mine.keys() | other.keys()) - OURS)]
    differ = [n for n in names if (mine.get(n) or None) != (other.get(n) or None)]    # an option it lacks is off
    if abs(base.ce - their_base.ce) > 1e-3 or base.block_size != their_base.block_size:
        differ.append("untouched model")
    if not theirs.dense:
        why = "not --dense"
    elif differ:
        why = f"other {', '.join(differ)}"
    elif rows[-1]["step"] < theirs.steps:
        why = f"stopped at step {rows[-1]['step']} of {theirs.steps}"
    else:
        return rows[-1]
    raise UserError(f"{control} is no control of {args.out}: {why}\n"
                    "pass the folder of a finished --dense run with the same options")


def report(out, control, load, encoding_of):
    """Print the table of the run in `out`, draw its pictures (of a --dense run none) and write summary.json, the last
    file: with it a first report is whole.

    control: None, or the folder of a --dense run. load, encoding_of: see train.main. Without a best.pt attention.png
    shows last.pt, which after Ctrl-C is some steps ahead of the last row.
    """
    args, base, rows = read_run(out)
    lines = [("untouched", base.ce, base.active)]
    facts = {"base_ce": base.ce, "steps": args.steps, "seed": args.seed}
    if args.dense:
        if control:
            raise UserError(f"{out} is itself a control\npass --report with the sparse run")
        last = rows[-1]
        print_table([*lines, ("dense control", last["val_ce"], last["active"])], base)
        write_json(os.path.join(out, "summary.json"), facts | {"control_ce": last["val_ce"], "step": last["step"]})
        return
    best, enough = best_row(rows, base.tau), share_at(rows, base.ce)
    found = best or rows[-1]
    control_ce = None
    if control:
        control_ce = control_row(args, control, base)["val_ce"]
        lines.append(("dense control", control_ce, 1.0))
    lines.append(("sparse", found["val_ce"], found["active"]))
    print_table(lines, base)
    which = "met: the sparsest such evaluation" if best else "not met by any evaluation: the last one"
    print(f"tau {base.tau:.4f}, {which}, step {found['step']} of {args.steps}\n"
          f"least edges at the untouched model's CE: {'never that low' if enough is None else f'{enough:.3%}'}")
    draw_curve(rows, lines, base.tau, os.path.join(out, "curve.png"))
    draw_heads(by_head(found), os.path.join(out, "edges_by_head.png"))
    init = os.path.join(out, "dense", "last.pt") if args.init == "scratch" else args.init
    models = {"untouched": load(init, block_size=base.block_size),
              "sparse": load(os.path.join(out, "best.pt" if best else "last.pt"))}
    draw_prompt(models, by_head(found), encoding_of(models["untouched"]), os.path.join(out, "attention.png"))
    write_json(os.path.join(out, "summary.json"), facts | {
        "control_ce": control_ce, "sparse_ce": found["val_ce"], "tau": base.tau, "constraint_met": best is not None,
        "share_at_untouched_ce": enough, "active_share": found["active"],
        "edges_per_token": found["active"] * base.edges_per_token, "step": found["step"]})


def print_table(lines, base):
    """lines: name, validation CE, active share."""
    print(f"\n{'':16}validation CE   active edges   edges per token")
    for name, ce, active in lines:
        print(f"{name:16}{ce:13.4f}{active:15.3%}{active * base.edges_per_token:18.2f}")


def draw_prompt(models, shares, encoding, path):
    """Figure 2b: one prompt in the four heads with the largest active shares (L,H), a row for each model."""
    length, H = models["sparse"].config.block_size, shares.shape[1]
    tokens = encoding.encode_ordinary(SHORT_PROMPT if encoding.name == "bytes" else PROMPT)[:length]
    labels = [encoding.decode([t]).replace(" ", "\u2423") for t in tokens]
    rows = []
    for name, model in models.items():
        maps = model.attention_maps(torch.tensor([tokens]))[:, 0].flatten(0, 1).numpy()    # (L*H,T,T)
        rows.append(("reading position", [
            (f"{name}, layer {n // H}, head {n % H}", maps[n], labels, labels, name == "sparse")
            for n in np.argsort(-shares, axis=None)[:4]]))
    draw_attention(rows, True, "Where each token reads from: the heads with the most active edges", path, size=4)

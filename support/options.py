"""The options of train.py: `parser` has them all, `settle` says which run they mean."""
import argparse
import math
import os
import re

from support.data import NAMES
from support.files import UserError, between, make_folder, pick_device, read_json
from support.weights import GPT2_SHA256

SCRATCH = {"block_size": 128, "layers": 4, "heads": 4, "width": 128, "batch_size": 8, "grad_accum": 1,
           "dense_steps": 4000, "dense_lr": 2e-3, "steps": 5000, "lr": 1e-3, "lam": 1.0, "rate": 0.2,
           "distill": 0.0, "eval_windows": 320, "eval_every": 200}
SCRATCH_ONLY = {"layers", "heads", "width", "dense_steps", "dense_lr"}
LAM_RANGE = 1e-3, 2.0    # at 2 all edges together are worth half a nat: more would not protect the loss better
COUNT, RATE = between(int, 1, 10**9), between(float, 1e-9, 1.0)
OPTIONS = (    # name, type (or choices), default, help
    ("tau", between(float, 1e-6, 100.0), None, "target of the validation CE, nats a token; default: the untouched one"),
    ("init", str, "gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path, a checkpoint of ours, or scratch"),
    ("data", str, "openwebtext", "openwebtext[-N], stdlib, or a path: a .txt, a folder of them, a .bin of tokens"),
    ("out", str, None, "folder of the run; default: runs/ and the name of --init, -dense for a control"),
    ("resume", str, None, "go on with the run in this folder, with its own options"),
    ("report", str, None, "only draw and print the report of the run in this folder"),
    ("control", str, None, "folder of a --dense run, for the report's table"),
    ("dense", bool, False, "the control: the same steps on the same data without gates"),
    ("steps", COUNT, 5000, "steps of sparse (or, with --dense, dense) training"),
    ("batch-size", COUNT, 16, "sequences per forward pass and process"),
    ("grad-accum", COUNT, 4, "forward passes per step"),
    ("block-size", COUNT, None, "positions, at most the model's own (the default)"),
    ("lr", RATE, 1e-4, "peak learning rate, after --warmup steps; then a cosine down to a tenth"),
    ("warmup", COUNT, 100, "steps until the peak"),
    ("weight-decay", between(float, 0.0, 10.0), 0.01, "of AdamW"),
    ("score-lr", between(float, 0.0, 1000.0), 5.0, "rate of q and k in sparse training, in multiples of --lr"),
    ("gate-bias", between(float, 0.0, 100.0), None, "b, how far open gates start; default: 2, or the checkpoint's own"),
    ("gate-bias-lr", between(float, 0.0, 10.0), 0.1, "peak rate of the thresholds, one per head; 0: b stays as it is"),
    ("temperature", between(float, 0.01, 100.0), 1.0, "of the gates' straight-through gradient"),
    ("constraint", ("held-out", "training", "sampled"), "held-out", "what lambda looks at: hard gates on held-out "
     "text, hard gates on training text, or the batch that trains, with sampled gates"),
    ("lam", between(float, *LAM_RANGE), 0.1, "lambda at the start: small, and edges go at once, before it grows"),
    ("rate", between(float, 1e-9, 100.0), 0.02, "kappa of GECO, per step: how fast lambda answers"),
    ("decay", between(float, 0.0, 0.9999), 0.97, "alpha of GECO, per step: how long Cbar remembers"),
    ("distill", between(float, 0.0, math.inf), math.inf, "weight of KL(untouched || sparse) beside the CE, both times "
     "lambda; inf: in its place; 0: the CE alone, as the paper"),
    ("eval-every", COUNT, 100, "steps between evaluations"),
    ("eval-windows", COUNT, 128, "sequences of the validation split they read"),
    ("seed", between(int, 0, 10**9), 0, "of initial weights, batches and gates; after a control of ours take "
     "another, or the same windows come again"),
    ("device", ("cuda", "mps", "cpu"), None, "default: cuda if there is one, else cpu"),
    ("dtype", ("float32", "bfloat16"), None, "of the forward pass; default: bfloat16 on cuda, else float32"),
    ("compile", bool, False, "torch.compile the model"),
    ("recompute", bool, False, "keep no activations inside a block: less memory, a third more time"),
    ("layers", COUNT, None, "of the small GPT that --init scratch trains first"),
    ("heads", COUNT, None, "of the small GPT"),
    ("width", COUNT, None, "of the small GPT"),
    ("dense-steps", COUNT, None, "of its training"),
    ("dense-lr", RATE, None, "of its training"),
)


def parser(about="", more=(), argv=None):
    """An argparse parser whose defaults are those of the --init that argv (sys.argv) names. more: further OPTIONS."""
    found = argparse.ArgumentParser(
        usage="%(prog)s --tau 3.3 [options]    (--help lists them)", description=about,
        epilog="defaults with --init scratch: " + " ".join(f"--{n.replace('_', '-')} {v}" for n, v in SCRATCH.items()))
    for name, kind, default, help in (*OPTIONS, *more):
        how = dict(action="store_true") if kind is bool else dict(type=kind) if callable(kind) else dict(choices=kind)
        shown = f" (default {default})" if default else ""
        found.add_argument(f"--{name}", default=default, help=(help + shown).replace("%", "%%"), **how)
    if found.parse_known_args(argv)[0].init == "scratch":
        found.set_defaults(**SCRATCH)
    return found


def settle(args, parser):
    """The options of the run that is meant: a new one in a folder that can be written, or those of an old one."""
    unset = object()
    given = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {name for name, value in vars(given).items() if value is not unset}    # also one given at its default
    if args.report:
        if given - {"report", "control"}:
            raise UserError("--report draws the report of its run anew; only --control goes with it\n"
                            "leave the others out")
        return args
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.resume:
        if given != {"resume"}:
            raise UserError("--resume goes on with the options of its run\nleave the others out")
        saved = read_json(os.path.join(args.resume, "args.json"))
        if saved["processes"] != processes:
            raise UserError(f"{args.resume} was started by {saved['processes']} processes, these are {processes}\n"
                            f"resume it with torchrun --nproc_per_node={saved['processes']}")
        return argparse.Namespace(**vars(args) | saved | {"out": args.resume})    # vars: options that are newer
    if args.init != "scratch" and given & SCRATCH_ONLY:
        raise UserError(", ".join(f"--{name.replace('_', '-')}" for name in sorted(given & SCRATCH_ONLY))
                        + " need --init scratch\nleave them out, or train a model from scratch")
    if args.dense and given & {"tau", "distill", "gate_bias_lr"}:
        raise UserError("--dense is the control: it has no constraint and no gates\n"
                        "leave --tau, --distill and --gate-bias-lr out")
    base = os.path.basename(os.path.normpath(args.init)).removesuffix(".pt")
    args.out = args.out or f"runs/{base}{'-dense' * args.dense}"
    make_folder(args.out)
    if os.path.exists(os.path.join(args.out, "args.json")):
        raise UserError(f"{args.out} holds a run already\n"
                        f"--resume {args.out} goes on with it, another --out starts anew")
    named = {"init": args.init in {"scratch", *GPT2_SHA256}, "data": re.fullmatch(NAMES, args.data), "control": False}
    for name in named:    # paths are kept whole: --resume and --report may run in another folder
        if not named[name] and os.path.exists(getattr(args, name) or ""):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    args.processes = processes
    args.dtype = args.dtype or ("bfloat16" if pick_device(args.device) == "cuda" else "float32")
    return args

"""The options of train.py: `parser` reads them, `settle` adds the defaults and says which run they mean."""
import argparse
import math
import os

from support.data import checked_source
from support.files import UserError, absolute, between, make_folder, read_json
from support.weights import GPT2_SHA256

SCRATCH = {"block_size": 128, "layers": 4, "heads": 4, "width": 128, "batch_size": 8, "grad_accum": 1,
           "dense_steps": 4000, "dense_lr": 2e-3, "steps": 5000, "lr": 1e-3, "lam": 1.0, "rate": 0.2,
           "eval_windows": 320, "eval_every": 200}
SCRATCH_ONLY = {"layers", "heads", "width", "dense_steps", "dense_lr"}
SPARSE_ONLY = {"tau", "distill", "score_lr", "gate_bias", "gate_bias_lr", "temperature", "constraint", "lam", "rate",
               "decay"}
LAM_RANGE = 1e-3, 2.0    # at 2 all edges together are worth half a nat: more would not protect the loss better
COUNT, RATE = between(int, 1, 10**9), between(float, 1e-9, 1.0)
OPTIONS = (    # name, type (or choices), default, help
    ("tau", between(float, 1e-6, 100.0), None, "target of validation CE, nats a token; default: the untouched model's"),
    ("init", str, "gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path, a checkpoint of ours, or scratch"),
    ("data", str, "openwebtext", "openwebtext[-N], stdlib, or a path: a .txt, a folder of them, a .bin of tokens"),
    ("out", str, None, "folder of the run; default: runs/ and the name of --init, with --dense also -dense"),
    ("resume", str, None, "go on with the run in this folder, with its own options"),
    ("report", str, None, "only draw and print the report of the run in this folder"),
    ("control", str, None, "with --report: folder of a --dense run, for its table"),
    ("dense", bool, False, "the control: the same steps on the same data without gates"),
    ("steps", COUNT, 5000, "steps of sparse (or, with --dense, dense) training"),
    ("batch-size", COUNT, 16, "sequences per forward pass and process"),
    ("grad-accum", COUNT, 4, "forward passes per step"),
    ("block-size", COUNT, None, "positions, at most the model's own (the default)"),
    ("lr", RATE, 1e-4, "peak learning rate, after --warmup steps; then a cosine down to a tenth"),
    ("warmup", COUNT, 100, "steps until the peak"),
    ("weight-decay", between(float, 0.0, 10.0), 0.01, "of AdamW"),
    ("score-lr", between(float, 0.0, 1000.0), 5.0, "rate of q and k (of their adapters: the matrix B) in sparse "
     "training, in multiples of --lr"),
    ("gate-bias", between(float, 0.0, 100.0), None, "b, how far open gates start; default: 2, or the checkpoint's own"),
    ("gate-bias-lr", between(float, 0.0, 10.0), 0.1, "peak rate of b, one per head; 0: b stays as it is"),
    ("temperature", between(float, 0.01, 100.0), 1.0, "of the gates' straight-through gradient"),
    ("constraint", ("held-out", "training", "sampled"), "held-out", "what lambda looks at: hard gates on held-out "
     "text, hard gates on training text, or the batch that trains, with sampled gates"),
    ("lam", between(float, *LAM_RANGE), 0.1, "lambda at the start: small, and edges go at once, before it grows"),
    ("rate", between(float, 1e-9, 100.0), 0.013, "kappa of GECO, per step: how fast lambda answers"),
    ("decay", between(float, 0.0, 0.9999), 0.97, "alpha of GECO, per step: the memory of C's average"),
    ("distill", between(float, 0.0, math.inf), 0.0, "weight of KL(untouched || sparse) beside the CE, both times "
     "lambda; inf: in its place"),
    ("eval-every", COUNT, 100, "steps between evaluations"),
    ("eval-windows", COUNT, 128, "validation sequences that an evaluation reads"),
    ("seed", between(int, 0, 10**9), 0, "of initial weights, batches and gates; if --init was trained here, "
     "take another than it had: the same one reads the same windows again"),
    ("device", ("cuda", "mps", "cpu"), None, "default: cuda if there is one, else cpu"),
    ("dtype", ("float32", "bfloat16"), None, "of the forward pass; default: bfloat16 on a GPU "
     "that has it, else float32"),
    ("compile", bool, False, "torch.compile the model"),
    ("recompute", bool, False, "keep no activations inside a block: less memory, a third more time"),
    ("layers", COUNT, None, "of the small GPT that --init scratch trains first"),
    ("heads", COUNT, None, "of the small GPT"),
    ("width", COUNT, None, "of the small GPT"),
    ("dense-steps", COUNT, None, "of its training"),
    ("dense-lr", RATE, None, "of its training"),
)


def defaults(init="gpt2", more=()):
    """{name: value} of an --init for which nothing else is given. more: further OPTIONS."""
    found = {name.replace("-", "_"): default for name, _, default, _ in (*OPTIONS, *more)}
    return found | (SCRATCH if init == "scratch" else {})


def parser(about="", more=(), program="python train.py"):
    """An argparse parser that returns what was given, and no defaults."""
    found = argparse.ArgumentParser(
        usage=f"{program} --tau 3.3 [options]    (--help lists them)", description=about,
        argument_default=argparse.SUPPRESS,
        epilog="defaults with --init scratch: " + " ".join(f"--{n.replace('_', '-')} {v}" for n, v in SCRATCH.items()))
    for name, kind, default, help in (*OPTIONS, *more):
        how = dict(action="store_true") if kind is bool else dict(type=kind) if callable(kind) else dict(choices=kind)
        shown = "" if default is None or kind is bool else f" (default {default})"
        found.add_argument(f"--{name}", help=(help + shown).replace("%", "%%"), **how)
    return found


def settle(given, more=()):
    """The options of the run that is meant: a new one in a folder that can be written, or those of an old one."""
    given = vars(given)
    args = argparse.Namespace(**defaults(given.get("init"), more) | given)
    if args.report:
        if given.keys() - {"report", "control"}:
            raise UserError("--report draws the report of its run anew; only --control goes with it\n"
                            "leave the others out")
        return args
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.resume:
        if given.keys() - {"device"} != {"resume"}:
            raise UserError("--resume goes on with the options of its run\nleave the others out, but for --device")
        saved = read_json(os.path.join(args.resume, "args.json"))
        if "processes" not in saved:
            raise UserError(f"{args.resume} is no run of train.py\npass a folder that it made")
        if saved["processes"] != processes:
            raise UserError(f"{args.resume} was started with {saved['processes']} processes, not {processes}\n"
                            f"resume it with torchrun --nproc_per_node={saved['processes']}")
        known = defaults(saved["init"], more)
        foreign = {name for name in saved.keys() - known.keys() - {"processes"} if saved[name]}
        if foreign:
            raise UserError(f"{args.resume} has {listed(foreign)}, which this program does not know\n"
                            "resume it with the program that began it")
        return argparse.Namespace(**known | saved | {"out": args.resume, "device": args.device or saved["device"]})
    if args.control:
        raise UserError("--control is for the report of a finished run\npass it with --report RUN")
    refused = given.keys() & SCRATCH_ONLY if args.init != "scratch" else set()
    if refused:
        raise UserError(f"only --init scratch has {listed(refused)}\nleave that out, or train a model from scratch")
    if args.compile and args.recompute:
        raise UserError("with --recompute nearly nothing would be compiled\nleave one of the two out")
    refused = given.keys() & SPARSE_ONLY if args.dense else set()
    if refused:
        raise UserError(f"--dense is the control: it has no constraint and no gates\nleave {listed(refused)} out")
    args.data = checked_source(args.data)
    base = os.path.basename(os.path.abspath(args.init)).removesuffix(".pt")
    args.out = args.out or f"runs/{base}{'-dense' * args.dense}"
    make_folder(args.out)
    if os.path.exists(os.path.join(args.out, "args.json")):
        raise UserError(f"{args.out} holds a run already\n"
                        f"--resume {args.out} goes on with it, another --out starts anew")
    args.init = absolute(args.init, {"scratch", *GPT2_SHA256})
    args.processes = processes
    return args


def listed(names):
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))

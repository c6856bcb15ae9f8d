"""The options of train.py, and what they come to: `parse` reads the command line, `settle` makes it a run."""
import argparse
import os

from extras.data import is_name
from extras.files import GPT2_SHA256, UserError, between, make_folder, read_json

SCRATCH = {"block-size": 128, "layers": 4, "heads": 4, "width": 128, "batch-size": 8, "grad-accum": 1,
           "dense-steps": 4000, "dense-lr": 2e-3, "steps": 3000, "lr": 1e-3, "eval-windows": 320, "eval-every": 200}
SCRATCH_ONLY = {"layers", "heads", "width", "dense_steps", "dense_lr"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def parse(about):
    """(parser, options). about: what the program does, in a line."""
    parser = argparse.ArgumentParser(usage="python train.py --tau 3.3 [options]    (--help lists them)",
                                     description=about, formatter_class=Help)
    option = parser.add_argument
    option("--tau", type=between(float, 1e-6, 100.0), help="target of the training CE, nats per token; without it: "
           "the untouched model's validation CE + 0.05")
    option("--init", default="gpt2", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, a path, a checkpoint of ours, "
           "or scratch")
    option("--data", default="openwebtext", help="openwebtext[-N], openwebtext-10k, fineweb[-N], stdlib, or a path: "
           "a .txt, a folder of them, or a .bin of tokens")
    option("--out", help="folder of the run; default: runs/ and the name of --init, -dense for a control")
    option("--resume", metavar="RUN", help="go on with the run in this folder, with its own options")
    option("--report", metavar="RUN", help="only draw and print the report of this run")
    option("--control", metavar="RUN", help="a --dense run, for the report's table")
    count = between(int, 1, 10**9)
    option("--steps", type=count, default=5000, help="steps of sparse (or, with --dense, dense) training")
    option("--batch-size", type=count, default=16, help="sequences per forward pass and process")
    option("--grad-accum", type=count, default=4, help="forward passes per step")
    option("--block-size", type=count, help="positions, at most the model's own (the default)")
    option("--lr", type=between(float, 1e-9, 1.0), default=1e-4, help="peak learning rate")
    option("--warmup", type=count, default=100, help="steps until the peak")
    option("--schedule", choices=("cosine", "constant"), default="cosine", help="after the warm-up")
    option("--weight-decay", type=between(float, 0.0, 10.0), default=0.01, help="of AdamW")
    option("--gate-bias", type=between(float, 0.0, 100.0),
           help="b: how far open the gates start; default: 2, or that of a checkpoint of ours")
    option("--rate", type=between(float, 1e-9, 100.0), default=0.05, help="kappa of GECO: how fast lam answers")
    option("--decay", type=between(float, 0.0, 0.9999), default=0.9, help="alpha of GECO: how long Cbar remembers")
    option("--lam", type=between(float, 1e-3, 10.0), default=1.0, help="lambda at the start; below 1, edges go at once "
           "and the model mends itself afterwards")
    option("--distill", type=between(float, 0.0, 1000.0), default=0.0,
           help="weight of KL(untouched || sparse) beside the CE: both times lambda")
    option("--lora-rank", type=between(int, 0, 10**4), default=0,
           help="train adapters of this rank on q and k, not the weights; 0: off")
    option("--lora-all", action="store_true", help="adapters on every linear layer")
    option("--dense", action="store_true", help="the control: the same steps on the same data without gates")
    option("--dtype", choices=("float32", "bfloat16"), help="of the forward pass: bfloat16 on cuda, else float32")
    option("--compile", action="store_true", help="torch.compile the model")
    option("--recompute", action="store_true",
           help="keep no activations inside a block: less memory, a third more time")
    option("--device", choices=("cuda", "mps", "cpu"), help="default: cuda if there is one, else cpu")
    option("--seed", type=between(int, 0, 10**9), default=0, help="of initial weights, batches and gates")
    option("--eval-every", type=count, default=100, help="steps between evaluations")
    option("--eval-windows", type=count, default=128, help="sequences of the validation split they read")
    scratch = parser.add_argument_group("with --init scratch", "other defaults there: " + ", ".join(
        f"--{name} {value}" for name, value in SCRATCH.items()))
    for name in ("layers", "heads", "width", "dense-steps"):
        scratch.add_argument(f"--{name}", type=count, metavar="N", default=argparse.SUPPRESS, help="of the small GPT")
    scratch.add_argument("--dense-lr", type=between(float, 1e-9, 1.0), default=argparse.SUPPRESS,
                         help="of its training")
    args, _ = parser.parse_known_args()
    if args.init == "scratch":
        parser.set_defaults(**{key.replace("-", "_"): value for key, value in SCRATCH.items()})
    args = parser.parse_args()
    return parser, args


def settle(parser, args):
    """The options of the run that is meant: a new one in a folder that can be written, or those of an old one."""
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.report:
        if given - {"report", "control"}:
            raise UserError("--report draws the report of its run anew; only --control goes with it\n"
                            "leave the others out")
        return args
    if args.resume:
        if given != {"resume"}:
            raise UserError("--resume goes on with the options of its run\nleave the others out")
        saved = read_json(os.path.join(args.resume, "args.json"))
        return argparse.Namespace(**vars(args) | saved | {"out": args.resume})    # vars: options that are newer
    if args.lora_all and not args.lora_rank or args.lora_rank and args.init == "scratch":
        raise UserError("--lora-rank adapts a model that is there, and --lora-all its other layers too\n"
                        "pass --init PATH --lora-rank 8")
    if args.init != "scratch" and given & SCRATCH_ONLY:
        raise UserError(", ".join(f"--{name.replace('_', '-')}" for name in sorted(given & SCRATCH_ONLY))
                        + " need --init scratch\nleave them out, or train a model from scratch")
    if args.dense and (args.tau or args.distill):
        raise UserError("--dense is the control: it has no constraint\nleave --tau and --distill out")
    base = os.path.basename(os.path.normpath(args.init)).removesuffix(".pt")
    args.out = args.out or f"runs/{base}{'-dense' * args.dense}"
    make_folder(args.out)
    if os.path.exists(os.path.join(args.out, "args.json")):
        raise UserError(f"{args.out} holds a run already\n"
                        f"--resume {args.out} goes on with it, another --out starts anew")
    named = {"init": args.init in {"scratch", *GPT2_SHA256}, "data": is_name(args.data), "control": False}
    for name in named:    # paths are kept whole: --resume and --report may run in another folder
        if not named[name] and os.path.exists(getattr(args, name) or ""):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    args.base_ce = args.processes = None
    return args

"""Sparse post-training of a pretrained GPT: as few attention edges as its loss allows (section 3, Figure 2).

    python train.py --tau 3.3                                       GPT-2 on OpenWebText: one GPU
    python train.py --init scratch --data stdlib                    a small GPT first, no network: a laptop CPU
    python train.py --resume RUN                                    go on with a run that was stopped
    python train.py --report RUN --control OTHER_RUN                table and pictures again, no training
    torchrun --standalone --nproc_per_node=4 train.py --tau 3.3 --grad-accum 1    four GPUs, the same step

RUN is the folder given by --out. It gets args.json (the options), base.json (the untouched model, tau), log.csv (a
line per evaluation), last.pt (weights and the state of the training), best.pt (the sparsest evaluation whose
validation loss met tau), summary.json and three pictures; a --dense run gets neither best.pt nor pictures. With
--init scratch a folder dense/ in it has log.csv and last.pt of the dense training. Losses are cross-entropies in nats
per token; edges are shares of the allowed ones. The gradient comes from sampled gates on the training text; lambda
looks at the model that is kept, averaged weights and hard gates, by default on text never trained on.

Nothing random has a state that outlives a step: the batches of step n follow from (seed, n), its gates from
(seed, n, rank). So a run that was killed and resumed gives what an uninterrupted one gives, on a CPU bit for bit.
"""
import argparse
import copy
import math
import os
import sys
from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from geco import Geco
from model import GPT, GPTConfig, allowed_edges
from support.data import batch, byte_encoding, encoding_of, gpt2_encoding, load_data, spread
from support.files import UserError, read_json, run_command, write_json
from support.log import Log
from support.losses import divergence
from support.options import LAM_RANGE, parser, settle
from support.place import Place
from support.report import report


@torch.no_grad()
def evaluate(model, windows, place, args):
    """With hard gates, on windows (N,T) of tokens and of next tokens -> CE in nats per token, active share (L,H)."""
    windows = [t.to(place.device) for t in windows]
    model.eval()
    ce, active = 0.0, 0.0
    for idx, targets in zip(*(t.split(args.batch_size) for t in windows)):
        with place.autocast():
            out = model(idx, targets)
        ce += out.loss.item() * len(idx)
        active = active + out.active_edges.cpu().double() * len(idx)
    return ce / len(windows[0]), active / len(windows[0])


def look_every(args):
    """Steps from one look of lambda to the next. A look with hard gates costs a forward pass, about a third of a step,
    so every fourth step: a twelfth of the time, less with --grad-accum."""
    return 1 if args.constraint == "sampled" else 4


def look(model, tokens, n, place, args):
    """The n-th look of lambda: CE of hard gates in nats per token, on one batch of windows a process."""
    first = (n * place.size + place.rank) * args.batch_size
    windows = batch(tokens, model.config.block_size, first, args.batch_size, args.seed)
    return place.mean(evaluate(model, windows, place, args)[0])[0]


def adamw(model, args):
    """AdamW, with a group of its own for the gates' b: another rate, and no decay."""
    trained = [(name.endswith("gate_bias"), p) for name, p in model.named_parameters() if p.requires_grad]
    weights = {"params": [p for is_bias, p in trained if not is_bias], "times": 1.0}
    biases = {"params": [p for is_bias, p in trained if is_bias], "times": args.gate_bias_lr / args.lr}
    return torch.optim.AdamW([weights, biases | {"weight_decay": 0.0}], betas=(0.9, 0.95),
                             weight_decay=args.weight_decay, fused=True)


def add_gradient(forward, tokens, T, step, place, args, geco, teacher):
    """Add the gradient of a step on windows of T tokens to the weights' .grad -> its CE in nats per token, expected
    and open share of edges.

    forward: the model, which may be compiled or wrapped. The three numbers are the same in every process.
    """
    torch.manual_seed((args.seed * 10**7 + step) * 1024 + place.rank)    # of this step's gates
    B, micros, numbers = args.batch_size, args.grad_accum, []
    for micro in range(micros):
        first = ((step * micros + micro) * place.size + place.rank) * B
        idx, targets = (t.to(place.device) for t in batch(tokens, T, first, B, args.seed))
        synchronise = place.size == 1 or micro == micros - 1
        with nullcontext() if synchronise else forward.no_sync():
            with place.autocast():
                found = forward(idx, targets)
                edges, loss = found.expected_edges.mean(), found.loss
                if teacher:
                    kl = divergence(found.logits, teacher(idx).logits)
                    loss = kl if args.distill == math.inf else loss + args.distill * kl
                objective = geco.objective(edges, loss) if geco else loss
            (objective / micros).backward()
        numbers.append(torch.stack((found.loss, edges, found.active_edges.mean())).detach())
    return place.mean(*torch.stack(numbers).cpu().double().mean(0).tolist())


@torch.no_grad()
def optimizer_step(optimizer, lr, scores, score_lr):
    """A step, each group at lr by its factor `times`; `scores`, the weights of q and k, move score_lr times as far.

    q and k are two thirds of the rows of GPT-2's c_attn, and AdamW has one rate for a tensor. But its step is
    proportional to its rate, weight decay included: so this is AdamW with another rate for these rows.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]
    before = [p.clone() for p in scores] if score_lr != 1 else []
    optimizer.step()
    optimizer.zero_grad()
    for p, old in zip(scores, before):
        p.copy_(torch.lerp(old, p, score_lr))


def twin(model):
    """A copy of the model. Frozen matrices are shared: with adapters they are nearly all of it. Vectors are not: a b
    that is frozen now may be trained later."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if p.ndim > 1 and not p.requires_grad})


@torch.no_grad()
def average(averaged, model, step):
    """Update `averaged`, the mean of the trained weights: over all steps so far, later over about the last 100."""
    for mean, new in zip(averaged.parameters(), model.parameters()):
        if new.requires_grad:
            mean.lerp_(new, max(0.01, 1 / (step + 1)))


def add_gates(model, tau, args):
    """Give the model the gates that args ask for -> the Geco that is to close them."""
    model.config.temperature = args.temperature
    model.set_gates(True, args.gate_bias)
    for block in model.h:
        block.attn.gate_bias.requires_grad_(args.gate_bias_lr > 0)
    every = look_every(args)    # the options are per step, Geco's rate and decay per update
    return Geco(tau, args.lam, args.rate * every, args.decay ** every, LAM_RANGE)


def stop(log, place, args):
    """After Ctrl-C: leave what --resume needs. All ranks end together, when it is saved."""
    if place.rank == 0:
        log.save()
    place.wait()
    again = f"the same program with --resume {args.out}" if args.out else "the same command"
    sys.exit(1 if place.rank else f"stopped after step {log.step}: {again} goes on")


def fit(model, data, out, place, args, geco=None, teacher=None, shift=0.0):
    """Train for args.steps steps, going on from out/last.pt if there is one.

    With a Geco: fewest edges under CE <= tau; without: lowest CE. teacher: the untouched model, frozen, to stay close
    to. shift: by how much the text that lambda looks at is harder than the validation text. Evaluations and checkpoints
    use averaged weights; at the end `model` gets them. Leaves (support/log.py) out/last.pt, out/log.csv and, as soon as
    an evaluation meets tau, out/best.pt.
    """
    train_tokens, val_tokens, constraint_tokens = data
    watched = {"held-out": constraint_tokens, "training": train_tokens, "sampled": None}[args.constraint]
    T, steps, every = model.config.block_size, args.steps, look_every(args)
    windows = spread(val_tokens, T, args.eval_windows)
    optimizer, scores = adamw(model, args), [p for block in model.h for p in block.attn.score_weights()]
    averaged = twin(model)
    log = Log(out, model, averaged, optimizer, geco)
    log.resume()
    if place.rank == 0:
        log.mend()
    forward = torch.compile(model) if args.compile else model
    forward = DistributedDataParallel(forward) if place.size > 1 else forward
    tokens_per_step = T * args.batch_size * args.grad_accum * place.size
    bar = tqdm(total=steps * tokens_per_step, initial=log.step * tokens_per_step, unit=" tokens", unit_scale=True,
               desc="sparse" if geco else "dense ", disable=place.rank > 0)
    model.train()
    with place.ctrl_c() as interrupted:
        for step in range(log.step, steps + 1):    # once more than there are steps, to evaluate the last
            recorded = bool(log.rows) and log.rows[-1]["step"] == step           # before the run was stopped
            if place.rank == 0 and (step % args.eval_every == 0 or step == steps) and not recorded:
                log.add(step * tokens_per_step, *evaluate(averaged, windows, place, args))
            if place.any(interrupted):
                stop(log, place, args)
            if step == steps:
                break
            ce, expected, sampled = add_gradient(forward, train_tokens, T, step, place, args, geco, teacher)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            if not (math.isfinite(ce) and math.isfinite(norm)):
                raise FloatingPointError(f"the cross-entropy is {ce} and its gradient {norm} at step {step}\nstart anew"
                                         " in another --out, with a lower --lr (of the dense phase: --dense-lr)")
            warm, cosine = (step + 1) / args.warmup, 0.55 + 0.45 * math.cos(math.pi * step / steps)
            optimizer_step(optimizer, args.lr * min(warm, cosine), scores, args.score_lr if geco else 1)
            average(averaged, model, step)
            log.step = step + 1
            log.recent.append(ce)
            status = f"step {log.step} of {steps}, CE {ce:.3f}"
            if geco:
                if step % every == 0:
                    seen = ce if watched is None else look(averaged, watched, step // every, place, args) - shift
                    used = geco.update(seen)
                    log.at_update = {"lam": used, "c_bar": geco.average, "expected": expected}
                status += f", lam {log.at_update['lam']:.3g}, expected {expected:.2%}, sampled {sampled:.2%}"
            bar.set_postfix_str(status, refresh=False)
            bar.update(tokens_per_step)
    bar.close()
    model.load_state_dict(averaged.state_dict())


def run(args, load, encoding_of, prepare):
    """From the options to the report. What args.out holds already is used, not made again: so a run resumes."""
    place = Place(args.device, args.dtype)
    args.dtype = str(place.dtype).removeprefix("torch.")    # args.json has it: a resumed run computes in the same
    if args.recompute and place.device.type == "mps":
        raise UserError("on mps --recompute would draw other gates in the backward pass: PyTorch does not keep the "
                        "random state there\nleave it out; a smaller --batch-size saves memory too")
    say = print if place.rank == 0 else lambda *_: None
    with place.rank_0_first():    # it downloads the model and makes the token files
        if args.init == "scratch":
            encoding = byte_encoding() if args.data == "stdlib" else gpt2_encoding()
            config = GPTConfig(args.block_size, encoding.n_vocab, args.layers, args.heads, args.width)
            model = GPT(config, generator=torch.Generator().manual_seed(args.seed))
        else:
            model = load(args.init, **({"block_size": args.block_size} if args.block_size else {}))
            encoding = encoding_of(model)
        prepare(model, args)
        data = load_data(args.data, encoding)
    model.to(place.device)
    model.recompute = args.recompute
    T, edges = model.config.block_size, allowed_edges(model.config)
    tokens_per_step = T * args.batch_size * args.grad_accum * place.size
    if min(len(tokens) for tokens in data) <= T:
        raise UserError(f"{args.data} has too few tokens for windows of {T}\npass more text, or a smaller --block-size")
    if place.rank == 0:
        write_json(os.path.join(args.out, "args.json"), vars(args))
    steps = args.steps + (args.dense_steps or 0)
    passes = steps * tokens_per_step / len(data[0])
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {edges:,} allowed edges per sequence of {T}\n"
        f"{place.size} x {place.device}, {args.dtype}, seed {args.seed}, output in {args.out}\n"
        f"{len(data[0]):,} training, {len(data[1]):,} validation and {len(data[2]):,} constraint tokens\n"
        f"{tokens_per_step:,} tokens per step, {steps:,} steps see every training token {passes:.1f} times")
    if model.config.gated:
        how = "the control drops them" if args.dense else "training goes on from them"
        say(f"note: {args.init} has gates, {how}")

    if args.init == "scratch":
        folder = os.path.join(args.out, "dense")
        os.makedirs(folder, exist_ok=True)
        dense = argparse.Namespace(**vars(args) | {"steps": args.dense_steps, "lr": args.dense_lr})
        fit(model, data, folder, place, dense)
    base = untouched(model, data, place, args)
    say(f"untouched model: validation CE {base['ce']:.4f} nats per token; "
        + ("dense control" if args.dense else f"tau {base['tau']:.4f}"))
    teacher = twin(model).eval().requires_grad_(False) if args.distill else None
    if args.distill == math.inf and base["tau"] <= base["ce"]:
        say("note: who learns from the untouched model alone hardly gets below its CE, so lambda will only rise: "
            "a larger --tau, in another --out, lets edges go")
    if args.dense:
        model.set_gates(False)
        geco = None
    else:
        geco = add_gates(model, base["tau"], args)
    shift = base["shift"] if args.constraint == "held-out" else 0.0
    fit(model, data, args.out, place, args, geco, teacher, shift)
    if place.device.type == "cuda":
        say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if place.rank == 0:
        report(args.out, None, load, encoding_of)
    place.leave()


def untouched(model, data, place, args):
    """The content of base.json: the untouched model's validation CE and active share; tau, by default that CE; shift,
    its CE on the constraint's split minus that CE; block_size and edges_per_token."""
    path, (_, val_tokens, constraint_tokens) = os.path.join(args.out, "base.json"), data
    if os.path.exists(path):
        return read_json(path)
    windows = [spread(tokens, model.config.block_size, args.eval_windows) for tokens in (val_tokens, constraint_tokens)]
    (ce, active), (constraint_ce, _) = (evaluate(model, split, place, args) for split in windows)
    ce, active, constraint_ce = place.mean(ce, active.mean().item(), constraint_ce)
    if not math.isfinite(ce):
        raise UserError(f"the untouched model's validation CE is {ce}\nits weights are no good: "
                        "take another --init, or a lower --dense-lr, and another --out")
    T = model.config.block_size
    base = {"ce": ce, "active": active, "tau": None if args.dense else args.tau or ce, "shift": constraint_ce - ce,
            "block_size": T, "edges_per_token": allowed_edges(model.config) / T}
    if place.rank == 0:    # no rank finds it too early: each has looked before place.mean, where all wait for all
        write_json(path, base)
    return base


def main(load=GPT.from_pretrained, encoding_of=encoding_of, options=(), prepare=lambda model, args: None,
         program="python train.py"):
    """The command. extras/train_llama.py hands over what loads other models, and has options and a name of its own.

    load(path, **config_overrides) -> model; encoding_of(model) -> its tiktoken encoding; options: further rows for
    support/options.py; prepare(model, args): what these options do to the model before it goes to the device.
    """
    command = parser(__doc__.partition("\n\n")[0], options, program)

    def report_or_run(args):
        args = settle(args, options)
        if args.report:
            report(args.report, args.control, load, encoding_of)
        else:
            run(args, load, encoding_of, prepare)

    run_command(command, report_or_run)


if __name__ == "__main__":
    main()

"""Sparse post-training of a pretrained GPT: as few attention edges as its loss allows (section 3, Figure 2).

    python train.py --tau 3.3                                       GPT-2 on OpenWebText: one GPU
    python train.py --init scratch --data stdlib                    a small GPT first, no network: a laptop CPU
    python train.py --resume RUN                                    go on with a run that was stopped
    python train.py --report RUN --control OTHER_RUN                table and pictures again, no training
    torchrun --standalone --nproc_per_node=4 train.py --tau 3.3     several GPUs

RUN is the folder given by --out. It gets args.json (the options), log.csv (a line per evaluation), last.pt (weights
and the state of the training), best.pt (the sparsest evaluation whose validation loss met tau), summary.json and three
pictures; with --init scratch also dense/, the same of the dense training. Losses are cross-entropies in nats per
token; edges are shares of the allowed ones.

Nothing random has a state that outlives a step: the batches of step n follow from (seed, n), its gates from
(seed, n, rank). So a run that was killed and resumed is the run that was not.
"""
import copy
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from extras.data import load
from extras.encodings import byte_encoding, encoding_of, gpt2_encoding
from extras.files import UserError, read_weights, write_csv, write_json
from extras.lora import add_adapters
from extras.options import parse, settle
from extras.place import Place
from extras.report import best_row, check_control, report
from geco import Geco
from model import GPT, GPTConfig, allowed_edges, save_checkpoint, sum_over_parts


# ---- Data

def window(tokens, start, T):
    return torch.from_numpy(tokens[start:start + T + 1].astype(np.int64))


@lru_cache(maxsize=2)    # a batch may reach into the next epoch
def epoch_order(windows, seed, epoch):
    return torch.randperm(windows, generator=torch.Generator().manual_seed(1000 * seed + epoch))


def batch(tokens, T, first, count, seed):
    """Windows number first, first + 1, ... of an endless stream -> idx (B,T) and next tokens (B,T).

    The windows do not overlap; each comes once an epoch, in an order drawn anew for every epoch.
    """
    windows, rows = (len(tokens) - 1) // T, []
    for n in range(first, first + count):
        start = T * int(epoch_order(windows, seed, n // windows)[n % windows])
        rows.append(window(tokens, start, T))
    rows = torch.stack(rows)                                         # (B,T+1)
    return rows[:, :-1], rows[:, 1:]


# ---- Training

@torch.no_grad()
def evaluate(model, tokens, place, args):
    """Hard gates, the same windows each time -> validation CE in nats per token, active share (L,H)."""
    T, model_was_training = args.block_size, model.training
    model.eval()
    windows = (len(tokens) - 1) // T
    starts = np.linspace(0, windows - 1, min(windows, args.eval_windows)).astype(int) * T
    ce, active = 0.0, 0.0
    for part in np.array_split(starts, math.ceil(len(starts) / args.batch_size)):
        rows = torch.stack([window(tokens, s, T) for s in part]).to(place.device)    # (B,T+1)
        with place.autocast():
            out = model(rows[:, :-1], rows[:, 1:])
        ce += out.loss.item() * len(part) / len(starts)
        active = active + out.active_edges.cpu().double() * len(part) / len(starts)
    model.train(model_was_training)
    return ce, active


def fit(model, data, out, place, args, steps, lr, geco=None, teacher=None):
    """Train up to step `steps`, going on from out/last.pt if there is one.

    With a Geco: fewest edges under CE <= tau; without: lowest CE. teacher: the frozen dense model to stay close
    to. Leaves out/last.pt, out/log.csv and, as soon as an evaluation meets tau, out/best.pt.
    """
    train_tokens, val_tokens = data
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)
    for leftover in Path(out).glob("*.tmp") if place.rank == 0 else ():    # of a killed run
        leftover.unlink()
    last, step, rows, recent = os.path.join(out, "last.pt"), 0, [], []    # recent: CE since the last row
    of_step = {"c_bar": math.nan, "lam": geco.lam if geco else math.nan, "expected": math.nan}    # of the last step
    if os.path.exists(last):
        weights, state = read_weights(last, merge=False)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        step, rows, recent, of_step = (state[name] for name in ("step", "rows", "recent", "of_step"))
        if geco:
            geco.load_state_dict(state["geco"])
        if rows and place.rank == 0:    # killed between last.pt and log.csv
            write_csv(os.path.join(out, "log.csv"), rows)

    def save():
        save_checkpoint(model, last, step=step, rows=rows, recent=recent, of_step=of_step,
                        optimizer=optimizer.state_dict(), geco=geco.state_dict() if geco else {})

    model.train()
    model.recompute, forward = args.recompute, torch.compile(model) if args.compile else model
    if place.size > 1:
        forward = DistributedDataParallel(forward)
    T, B, micros = args.block_size, args.batch_size, args.grad_accum
    tokens_per_step, interrupted = T * B * micros * place.size, []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))    # Ctrl-C: finish the step, save, stop
    bar = tqdm(total=steps, initial=step, desc="sparse" if geco else "dense ", disable=place.rank > 0)
    started, first_step = time.time(), step
    while True:
        due = step % args.eval_every == 0 or step == steps
        if due and place.rank == 0 and not (rows and rows[-1]["step"] == step):    # (resumed: it is there already)
            ce, active = evaluate(model, val_tokens, place, args)
            rows.append({"step": step, "tokens": step * tokens_per_step,
                         "train_ce": float(np.mean(recent)) if recent else math.nan,
                         **of_step, "val_ce": ce, "active": active.mean().item()}
                        | {f"active_{l}.{h}": float(share) for (l, h), share in np.ndenumerate(active.numpy())})
            recent.clear()
            if geco and rows[-1] is best_row(rows, geco.tau):
                save_checkpoint(model, os.path.join(out, "best.pt"), step=step)
            save()
            write_csv(os.path.join(out, "log.csv"), rows)
        if step == steps:
            break
        for group in optimizer.param_groups:    # warm-up, then constant or a cosine down to a tenth
            group["lr"] = lr * min((step + 1) / args.warmup, 1.0 if args.schedule == "constant" else
                                   0.55 + 0.45 * math.cos(math.pi * step / steps))
        torch.manual_seed((args.seed * 10**7 + step) * 1024 + place.rank)    # of this step's gates
        seen = []
        for micro in range(micros):
            first = ((step * micros + micro) * place.size + place.rank) * B
            idx, targets = (t.to(place.device) for t in batch(train_tokens, T, first, B, args.seed))
            with forward.no_sync() if place.size > 1 and micro < micros - 1 else nullcontext():
                with place.autocast():
                    found = forward(idx, targets)
                    loss = geco.objective(found.expected_edges.mean(), found.loss) if geco else found.loss
                    if teacher:
                        loss = loss + args.distill * geco.lam * divergence(teacher, idx, found.logits)
                (loss / micros).backward()
            seen.append(torch.stack((found.loss, found.expected_edges.mean(), found.active_edges.mean())).detach())
        seen = torch.stack(seen).cpu().double().mean(0)
        ce, expected, sampled, stop = place.mean(*seen.tolist(), len(interrupted))
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
        if not (math.isfinite(ce) and math.isfinite(norm)):
            raise FloatingPointError(f"the cross-entropy is {ce} and its gradient {norm} at step {step}\n"
                                     "start anew, in another --out, with a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        status = f"CE {ce:.3f}"
        if geco:
            lam = geco.lam
            geco.update(ce)
            of_step = {"c_bar": geco.average, "lam": lam, "expected": expected}
            status += (f", Cbar {geco.average:+.3f}, lam {lam:.3g}, "
                       f"expected {expected:.2%}, sampled {sampled:.2%}")
        step += 1
        recent.append(ce)
        speed = (step - first_step) * tokens_per_step / (time.time() - started)
        bar.set_postfix_str(f"{status}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()
        if stop:
            if place.rank == 0:
                save()
            bar.close()
            start = "python" if place.size == 1 else f"torchrun --nproc_per_node={place.size}"
            how = f"stopped after step {step}: {start} train.py --resume {args.out} goes on"
            sys.exit(how if place.rank == 0 else 1)
    bar.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def divergence(teacher, idx, logits):
    """KL(teacher || student) in nats per token, mean over the positions of idx (B,T); logits (B,T,V)."""
    def nats(found, wanted):
        found, wanted = (F.log_softmax(rows.float(), dim=-1) for rows in (found, wanted))
        return F.kl_div(found, wanted, log_target=True, reduction="sum")

    with torch.no_grad():
        wanted = teacher(idx).logits                                 # (B,T,V)
    return sum_over_parts(nats, logits, wanted) / idx.numel()


def run(args):
    """From the options to the report. What args.out holds already is used, not made again: so a run resumes."""
    place = Place(args.device, args.dtype)
    say = print if place.rank == 0 else lambda *_: None
    if args.processes not in (None, place.size):
        raise UserError(f"{args.out} was started by {args.processes} processes, these are {place.size}\n"
                        f"resume it with torchrun --nproc_per_node={args.processes}")
    args.processes = place.size
    if args.control:
        check_control(args, args.control)
    if place.rank > 0:
        place.wait()    # until rank 0 has downloaded the model and made the token files
    if args.init == "scratch":
        encoding = byte_encoding() if args.data == "stdlib" else gpt2_encoding()
    else:
        crop = {"block_size": args.block_size} if args.block_size else {}
        base = GPT.from_pretrained(args.init, **crop)
        if base.config.gated:
            say(f"note: {args.init} has gates: the control drops them" if args.dense else
                f"note: {args.init} has gates already, and training goes on from them")
        encoding = encoding_of(base)
    data = load(args.data, encoding)
    if place.rank == 0:
        place.wait()
    if args.init == "scratch":
        base = GPT(GPTConfig(args.block_size, encoding.n_vocab, args.layers, args.heads, args.width),
                   generator=torch.Generator().manual_seed(args.seed))
    config, args.block_size = base.config, base.config.block_size
    if args.lora_rank:    # before it goes to the device: frozen weights take half the memory there
        add_adapters(base, args.lora_rank, args.lora_all, place.dtype, torch.Generator().manual_seed(args.seed))
    base.to(place.device)
    T, tokens_per_step = args.block_size, args.block_size * args.batch_size * args.grad_accum * place.size
    if min(len(tokens) for tokens in data) <= T:
        raise UserError(f"{args.data} has too few tokens for windows of {T}\n"
                        "pass more text, or a smaller --block-size")
    if place.rank == 0:
        write_json(os.path.join(args.out, "args.json"), vars(args))
    say(f"{sum(p.numel() for p in base.parameters()):,} parameters, {allowed_edges(config):,} allowed edges "
        f"per sequence of {T}\n"
        f"{place.size} x {place.device}, {str(place.dtype).removeprefix('torch.')}, seed {args.seed}, "
        f"output in {args.out}\n"
        f"{len(data[0]):,} training and {len(data[1]):,} validation tokens, {tokens_per_step:,} tokens per step, "
        f"one pass = {len(data[0]) / tokens_per_step:,.0f} steps")
    steps = args.steps + (args.dense_steps if args.init == "scratch" else 0)
    passes = steps * tokens_per_step / len(data[0])
    if passes > 1:
        say(f"note: {steps:,} steps see every token {passes:.1f} times. A constraint that is met by memorising is not "
            "met: judge by the validation CE.")

    if args.init == "scratch":
        folder = os.path.join(args.out, "dense")
        if place.rank == 0:
            os.makedirs(folder, exist_ok=True)
        fit(base, data, folder, place, args, args.dense_steps, args.dense_lr)
    if args.base_ce is None:
        ce, active = evaluate(base, data[1], place, args)
        args.base_ce, args.base_active = place.mean(ce, active.mean().item())
        if not math.isfinite(args.base_ce):
            raise UserError(f"the untouched model's validation CE is {args.base_ce}\nits weights are no good: "
                            "take another --init" + ", or a lower --dense-lr" * (args.init == "scratch"))
        if args.tau is None and not args.dense:
            args.tau = args.base_ce + 0.05
        if place.rank == 0:
            write_json(os.path.join(args.out, "args.json"), vars(args))
    say(f"untouched model: validation CE {args.base_ce:.4f} nats per token; "
        + ("dense control" if args.dense else f"tau {args.tau:.4f}"))
    teacher = copy.deepcopy(base).eval() if args.distill else None
    model, geco = base, None
    config.gated = not args.dense    # the gates have no parameters: the rest stays
    if args.gate_bias is not None:
        config.gate_bias = args.gate_bias
    if not args.dense:
        geco = Geco(args.tau, args.lam, args.rate, args.decay)
    fit(model, data, args.out, place, args, args.steps, args.lr, geco, teacher)
    if place.device.type == "cuda":
        say(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if place.rank == 0:
        report(args.out)
    if place.size > 1:
        dist.destroy_process_group()


def main():
    parser, args = parse(__doc__.partition("\n\n")[0])
    try:
        args = settle(parser, args)
        if args.report:
            report(args.report, args.control)
        else:
            run(args)
    except (UserError, FloatingPointError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

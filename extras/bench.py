"""How fast is the attention? Plain definition, ours, and PyTorch's fused dense attention, in one run.

    python -m extras.bench [--lengths 128 256 512 1024 2048 4096] [--plot runs/bench.png]

Forward and backward, causal, gates sampled, 12 heads of size 64 as in GPT-2 small, as many sequences a call as make
4,096 tokens, bfloat16 on cuda and float32 on a CPU. The three take turns, so that whatever else the machine does falls
on all of them; medians are shown. Memory is the peak above the inputs, and measured in a process of its own for each.
Then one whole training step of GPT-2's shape (124 million random weights), dense beside sparse.
"""
import argparse
import math
import multiprocessing
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from extras.figures import draw_speed
from gates import sparse_attention
from model import GPT, GPTConfig
from patching import edge_scores, head_scores
from support.blockwise import blockwise_attention
from support.files import UserError, between, make_folder, run_command
from support.place import pick_device

HEADS, HEAD_SIZE, TOKENS = 12, 64, 4096
COLUMNS = ("   T", "plain ms", "ours ms", "dense ms", "plain / ours", "ours / dense", "plain MiB", "ours MiB",
           "dense MiB")


def dense_attention(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(()), None


ATTENTIONS = {"plain": sparse_attention, "ours": blockwise_attention, "dense": dense_attention}


# ---- What is timed

def inputs(T, device, tokens=TOKENS):
    """q, k and v (B,H,T,D), B T at most `tokens`, but B at least 1; bfloat16 on cuda, float32 on a CPU."""
    shape, dtype = (max(1, tokens // T), HEADS, T, HEAD_SIZE), torch.bfloat16 if device == "cuda" else torch.float32
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def step(attention, q, k, v):
    """Forward and backward, with a gradient for y and for the expected edges."""
    q.grad = k.grad = v.grad = None
    y, expected, _ = attention(q, k, v, 2.0, True, True)
    (y.sum() + expected.sum()).backward()


def training_step(gated, device):
    """A function that makes one training step of GPT-2's shape, one sequence of 1,024 tokens."""
    config = GPTConfig(gated=gated)
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    idx = torch.randint(config.vocab_size, (1, config.block_size + 1), device=device)

    def one_step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        (out.loss + out.expected_edges.mean()).backward()    # of the dense model: a constant
        optimizer.step()
    return one_step


def patching_runs(device, pairs, length):
    """head_scores and edge_scores for a model of GPT-2's shape, after the plain passes that they are made of."""
    config = GPTConfig()
    model = GPT(config).to(device)
    clean, corrupt = torch.randint(config.vocab_size, (2, pairs, length), device=device)
    batch = model, clean, corrupt, lambda logits: logits[:, -1, 0]
    return {"forward": torch.no_grad()(lambda: model(clean)),
            "forward and backward": lambda: model(clean).logits[:, -1, 0].sum().backward(),
            "head_scores": lambda: head_scores(*batch), "edge_scores": lambda: edge_scores(*batch)}


# ---- Time and memory

def alternate(functions, device, repeats):
    """Median seconds of each of {name: function}, all in turn `repeats` times after one call to warm up."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()    # it runs on by itself
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak(device):
    """Most bytes that this process has used so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        import resource    # which Windows does not have
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status", encoding="ascii") as file:    # Linux's ru_maxrss begins with the parent's peak
        return 1024 * int(file.read().partition("VmHWM:")[2].split()[0])


def peak_memory(name, T, device):
    """Most bytes that one step needs above its inputs. The process must be a fresh one."""
    step(ATTENTIONS[name], *inputs(16, device, tokens=16))    # libraries load, threads start
    tensors = inputs(T, device)
    before = peak(device)
    step(ATTENTIONS[name], *tensors)
    return peak(device) - before


def in_own_process(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, arguments)


# ---- What is printed

def print_times(what, functions, device, repeats):
    """The seconds of each function, and how many times those of the first they are."""
    times = alternate(functions, device, repeats)
    first = [*times.values()][0]
    print(f"{what}: " + ", ".join(f"{name} {t:.3g} s ({t / first:.2f}x)" for name, t in times.items()))


def print_table(args, device):
    rows, title = {}, f"at most {TOKENS} tokens a call, {HEADS} heads of size {HEAD_SIZE}"
    print(f"{title}, medians of {args.repeats}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for T in args.lengths:
        tensors, names = inputs(T, device), [name for name in ATTENTIONS if name != "plain" or T <= args.plain_up_to]
        steps = {name: lambda name=name: step(ATTENTIONS[name], *tensors) for name in names}
        seconds = alternate(steps, device, args.repeats)
        found = {name: (seconds[name], in_own_process(name, T, device)) for name in names}
        rows[T] = {"plain": (math.nan, math.nan)} | found
        plain, ours, dense = (1e3 * s for s, _ in rows[T].values())
        numbers = plain, ours, dense, plain / ours, ours / dense, *(m / 2**20 for _, m in rows[T].values())
        cells = [str(T)] + ["-" if math.isnan(x) else f"{x:.{1 if x > 10 else 2}f}" for x in numbers]
        print("|", " | ".join(f"{cell:>{len(name)}}" for cell, name in zip(cells, COLUMNS)), "|", flush=True)
    if args.plot:
        draw_speed(rows, title, args.plot)


def run(args):
    device = pick_device(args.device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")    # as in training
    if args.plot:
        if not args.plot.endswith(".png"):
            raise UserError(f"{args.plot} is no name of a picture\npass one that ends in .png")
        make_folder(os.path.dirname(args.plot) or ".")
    print(torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads", end=", ")
    if args.patching:
        print_times("GPT-2's shape, 25 pairs of 16 tokens", patching_runs(device, 25, 16), device, repeats=1)
        return
    print_table(args, device)
    steps = {"dense": training_step(False, device), "sparse": training_step(True, device)}
    print_times("\none training step of GPT-2's shape, 1 sequence of 1,024 tokens", steps, device, args.repeats)


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.bench [options]", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--lengths", type=between(int, 1, TOKENS), nargs="+", help="T (default 128 256 ... 4096)",
                        default=[128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--plain-up-to", type=between(int, 0, 2**20), default=2048,
                        help="longest T of the plain definition (default 2048); at 4,096 it takes over 5 GB")
    parser.add_argument("--repeats", type=between(int, 1, 1000), default=5, help="timed calls of each (default 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one, else cpu")
    parser.add_argument("--patching", action="store_true", help="time patching.py instead: 4 minutes on 2 cores")
    parser.add_argument("--plot", metavar="PATH", help="draw the table into this file")
    run_command(parser, run)


if __name__ == "__main__":
    main()

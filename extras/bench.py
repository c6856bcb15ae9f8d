"""How fast is the attention? Plain definition, ours, and PyTorch's fused dense attention, in one run.

    python extras/bench.py [--lengths 128 256 512 1024 2048 4096] [--plot runs/bench.png]

Forward and backward, causal, gates sampled, 12 heads of size 64 as in GPT-2 small, 4,096 tokens a call at every
length. The three take turns, so that whatever else the machine does falls on all of them; medians are shown.
Memory is the peak above the inputs, and measured in a process of its own for each. Then one whole training step
of GPT-2's shape (124 million random weights), dense beside sparse.
"""
import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from gates import reference_sparse_attention, sparse_attention
from extras.figures import draw_speed
from extras.files import UserError, between, make_folder, pick_device
from model import GPT, GPTConfig
from patching import edge_scores, head_scores, run, source_differences

HEADS, HEAD_SIZE, TOKENS = 12, 64, 4096


def dense_attention(q, k, v, *_):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), q.new_zeros(()), None


ATTENTIONS = {"plain": reference_sparse_attention, "ours": sparse_attention, "dense": dense_attention}


def inputs(T, device, dtype, tokens=TOKENS):
    shape = max(1, tokens // T), HEADS, T, HEAD_SIZE
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]


def step(attention, q, k, v):
    """Forward and backward, with a gradient for y and for the expected edges."""
    q.grad = k.grad = v.grad = None
    y, expected, _ = attention(q, k, v, 2.0, True, True)
    (y.sum() + expected.sum()).backward()


def seconds(function, device):
    """Wall time of one call; CUDA runs on by itself, so its own clock is read."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(functions, device, repeats):
    """Median seconds of each of {name: function}, all in turn `repeats` times after one call to warm up."""
    times = {name: [] for name in functions}
    for n in range(repeats + 1):
        for name, function in functions.items():
            t = seconds(function, device)
            if n:
                times[name].append(t)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(name, T, device, dtype):
    """Most bytes that one step needs above its inputs. On a CPU: of this process, which must be a fresh one."""
    step(ATTENTIONS[name], *inputs(16, device, dtype, tokens=16))    # libraries load, threads start
    tensors = inputs(T, device, dtype)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(ATTENTIONS[name], *tensors)
        return torch.cuda.max_memory_allocated() - before

    def peak():    # kilobytes on Linux, bytes on a Mac
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    before = peak()
    step(ATTENTIONS[name], *tensors)
    return peak() - before


def in_own_process(*arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, arguments)


def training_steps(device):
    """{name: a function that makes one training step of GPT-2's shape, one sequence of 1,024 tokens}."""
    idx = torch.randint(50257, (1, 1025), device=device, generator=torch.Generator(device).manual_seed(0))

    def prepare(gated):
        model = GPT(GPTConfig(gated=gated)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def one_step():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                out = model(idx[:, :-1], idx[:, 1:])
                loss = out.loss + out.expected_edges.mean() if gated else out.loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return one_step

    return {"dense": prepare(False), "sparse": prepare(True)}


def patching_times(device, pairs=100, length=16):
    """Print what patching.py's two workhorses cost on GPT-2's shape, beside the passes that they cannot do without."""
    model = GPT(GPTConfig()).to(device).eval()
    clean, corrupt = torch.randint(50257, (2, pairs, length), generator=torch.Generator().manual_seed(0))

    def metric(logits):
        return logits[:, -1, 0]

    def products():
        """What edge_scores must form: every source's output, and its product with every gradient."""
        differences = source_differences(model, *seen)
        grads = differences.transpose(0, 1)    # as many destinations as sources
        for first in range(0, len(grads), model.config.n_head + 1):    # the heads of a layer, and its MLP
            for group in (grads[first:first + model.config.n_head], grads[first + model.config.n_head:][:1]):
                torch.einsum("nstc,dntc->nsd", differences[:, :first + 1], group)

    batch = slice(0, 25)
    with torch.no_grad():
        seen = [run(model, tokens[batch])[1] for tokens in (clean, corrupt)]
    forward, formed, both, edges = alternate({
        "forward": torch.no_grad()(lambda: model(clean.to(device))),
        "products": torch.no_grad()(products),
        "forward and backward": lambda: metric(model(clean[batch].to(device)).logits).sum().backward(),
        "edge_scores": lambda: edge_scores(model, clean[batch], corrupt[batch], metric),
    }, device, repeats=3).values()
    heads = seconds(lambda: head_scores(model, clean, corrupt, metric), device)
    L, H = model.config.n_layer, model.config.n_head
    print(f"head_scores, {pairs} pairs of {length} tokens: {heads:.1f} s, {heads / (L * H * forward):.2f} times its "
          f"{L * H} forward passes of {forward:.2f} s\n"
          f"edge_scores, 25 pairs: {edges:.2f} s, of which {formed:.2f} s are the products; the rest is "
          f"{(edges - formed) / both:.2f} times one forward and backward pass of {both:.2f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--lengths", type=between(int, 1, 2**20), nargs="+",
                        default=[128, 256, 512, 1024, 2048, 4096], help="T")
    parser.add_argument("--plain-up-to", type=between(int, 0, 2**20), default=2048,
                        help="longest T of the plain definition: at 4,096 it takes 10 GB")
    parser.add_argument("--repeats", type=between(int, 1, 1000), default=5, help="timed calls of each")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        help="default: cuda if there is one, else cpu; bfloat16 on cuda, float32 on a CPU")
    parser.add_argument("--patching", action="store_true", help="time patching.py instead: 10 minutes on 2 cores")
    parser.add_argument("--plot", metavar="PATH", help="draw the table into this file")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        if args.plot:
            make_folder(os.path.dirname(args.plot) or ".")
    except UserError as error:
        parser.error(str(error))

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if args.patching:
        print(f"{where}, float32")
        patching_times(device)
        return
    print(f"{where}, {dtype}, {TOKENS} tokens a call, {HEADS} heads of size {HEAD_SIZE}, medians of {args.repeats}\n\n"
          "|    T | plain ms | ours ms | dense ms | plain / ours | ours / dense | plain MiB | ours MiB | dense MiB |\n"
          "|---|---|---|---|---|---|---|---|---|")
    names_at = {T: [name for name in ATTENTIONS if name != "plain" or T <= args.plain_up_to] for T in args.lengths}
    # First of all: a process's peak counts from what its parent held when it was started.
    memory = {(name, T): in_own_process(name, T, device, dtype) for T, names in names_at.items() for name in names}
    rows = {}
    for T, names in names_at.items():
        tensors = inputs(T, device, dtype)
        times = alternate({name: (lambda f=ATTENTIONS[name]: step(f, *tensors)) for name in names},
                          device, args.repeats)
        rows[T] = {name: (times[name], memory[name, T]) for name in names}
        ms = {name: f"{1e3 * times[name]:.1f}" if name in times else "-" for name in ATTENTIONS}
        mib = {name: f"{rows[T][name][1] / 2**20:.0f}" if name in times else "-" for name in ATTENTIONS}
        gain = f"{times['plain'] / times['ours']:.1f}x" if "plain" in times else "-"
        print(f"| {T:4} | {ms['plain']:>8} | {ms['ours']:>7} | {ms['dense']:>8} | {gain:>12} | "
              f"{times['ours'] / times['dense']:11.2f}x | {mib['plain']:>9} | {mib['ours']:>8} | {mib['dense']:>9} |",
              flush=True)
    times = alternate(training_steps(device), device, args.repeats)
    print(f"\none training step of GPT-2's shape, 1 sequence of 1,024 tokens: dense {times['dense']:.2f} s, "
          f"sparse {times['sparse']:.2f} s ({times['sparse'] / times['dense']:.2f}x), "
          f"{1024 / times['dense']:,.0f} and {1024 / times['sparse']:,.0f} tokens/s")
    if device == "cuda":
        print(f"peak memory of both {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if args.plot:
        draw_speed(rows, f"{TOKENS} tokens a call, {HEADS} heads of size {HEAD_SIZE}", args.plot)


if __name__ == "__main__":
    main()

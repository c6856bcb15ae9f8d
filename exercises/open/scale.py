"""What would a larger model need? Memory and time, counted by formula, so that one can plan; nothing is run.

    python -m exercises.open.scale [--block-size 512] [--rank 16] [--tokens 5e8] [--flops 4e14]

The share of edges by size is `python -m extras.sweep width`. Here, for Llama's shapes, with `extras.train_llama
--recompute --batch-size 1`, T positions at a time:

    parameters   P = E V C + L (2 C^2 (1 + G/H) + 3 C M)        embedding and head (E = 2, or 1 if they are the same);
                 q, k, v and out; the gated MLP
    all trained  20 P bytes: weights, their average, gradients and AdamW's two moments in float32; + 2 P, the weights in
                 bfloat16
    adapters     2 P + 2 E V C bytes: matrices frozen in bfloat16, embedding and head in float32; + 20 r L (3 C + C G/H)
                 for adapters of rank r on q and k
    activations  4 L T C bytes, what goes into each block, + 2 T (17 C + 4 M) inside the one that is computed anew
    logits       6 T V bytes: in bfloat16, and their gradient in float32
    attention    4 T (4 C + 2 H) bytes: q, k, v, output and two words of noise; in the plain definition 20 H T^2
    time         8 P operations a token (forward 2, again 2, backward 4), 6 P with adapters, + 9 L T C of attention
                 (2 products forward, again 2, 5 backward, each T C under the causal mask), over --flops a second

Shapes: C width, L layers, H heads, G heads of keys and values, M inside the MLP, V vocabulary.
"""
import argparse

from support.files import between, run_command

SHAPES = {    # L, C, H, G, M, V, E
    "SmolLM2-135M": (30, 576, 9, 3, 1536, 49152, 1),
    "OLMo-7B": (32, 4096, 32, 32, 11008, 50304, 2),
    "30B": (60, 6656, 52, 52, 17920, 32000, 2),
    "70B": (80, 8192, 64, 8, 28672, 32000, 2),
}


def count(L, C, H, G, M, V, E, T, rank):
    """Parameters, bytes, and operations a token: {what: number}."""
    P = E * V * C + L * (2 * C * C * (1 + G / H) + 3 * C * M)
    adapters = rank * L * (3 * C + C * G / H)
    return {"parameters": P, "all trained": 22 * P, "adapters": 2 * P + 2 * E * V * C + 20 * adapters,
            "activations": 4 * L * T * C + 2 * T * (17 * C + 4 * M), "logits": 6 * T * V,
            "attention": 4 * T * (4 * C + 2 * H), "plain attention": 20 * H * T * T,
            "operations": 8 * P + 9 * L * T * C, "with adapters": 6 * P + 9 * L * T * C}


def run(args):
    print(f"T = {args.block_size}, rank {args.rank}, {args.tokens:.0e} tokens, {args.flops:.0e} operations a second\n")
    print("| | parameters, billions | all trained, GB | adapters, GB | activations, GB | logits, GB | "
          "attention, GB | plain, GB | days, all trained | days, adapters |\n" + "|---" * 10 + "|")
    for name, shape in SHAPES.items():
        found = count(*shape, args.block_size, args.rank)
        numbers = [f"{found[what] / 1e9:.4g}" for what in list(found)[:7]]
        days = [f"{found[what] * args.tokens / args.flops / 86400:.3g}" for what in ("operations", "with adapters")]
        print(f"| {name} | {' | '.join([*numbers, *days])} |")


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.scale [options]",
                                     description="Memory and time of larger models, counted.")
    parser.add_argument("--block-size", type=between(int, 1, 10**6), default=512, help="T (default 512)")
    parser.add_argument("--rank", type=between(int, 1, 10**4), default=16, help="of the adapters (default 16)")
    parser.add_argument("--tokens", type=between(float, 1, 1e15), default=5e8, help="to train on (default 5e8)")
    parser.add_argument("--flops", type=between(float, 1, 1e20), default=4e14,
                        help="operations a second: 40%% of an H100's peak in bfloat16 (default 4e14)")
    run_command(parser, run)


if __name__ == "__main__":
    main()

"""How far back does a model read, and which of its open edges does it hardly use? Dense beside sparse.

    python -m extras.distance --dense A --sparse B --data stdlib [--out runs/distance]

context   the cross-entropy of a validation token when only the last c tokens are shown, c = 1, 2, 4, ...: what does
          it gain from the far ones?
copy      the cross-entropy of a text that was shown before, d tokens back: can it still be read from there?
idle      of the sparse model, by layer: the share of open edges, and how many of these weigh less than IDLE; and what
          it costs to close the latter

A and B: GPT-2 names, paths, or checkpoints of ours. Cross-entropies in nats per token, hard gates. Both models and all
lengths are asked about the same places of the text: the error of sparse - dense is that of the paired difference.
Shapes: N places, T positions, V vocabulary.
"""
import argparse
import dataclasses
import os

import numpy as np
import torch

from extras.circuits import load_models, model_options
from extras.figures import draw_distance
from extras.tokenizer import encoding_of
from model import allowed_edges
from patching import forward
from support.data import load_data
from support.files import UserError, between, make_folder, run_command, write_json

AT_ONCE = 4096    # tokens in a forward pass
IDLE = 0.01       # an open edge that adds less than this share of a value might as well be closed


@torch.no_grad()
def losses(model, rows, count, run=lambda model, tokens: model(tokens).logits):
    """rows (N,T+1) of tokens -> (N) mean CE of the last `count` tokens of each row. run: tokens -> logits (N,T,V)."""
    T, found = rows.shape[1] - 1, []
    for part in rows.split(max(1, AT_ONCE // T)):
        part = part.to(model.wte.weight.device)
        log_p = run(model.eval(), part[:, :-1])[:, T - count:].float().log_softmax(-1)       # (n,count,V)
        found.append(-log_p.gather(2, part[:, -count:, None]).mean((1, 2)).cpu())
    return torch.cat(found).double()


@torch.no_grad()
def idle_edges(model, rows):
    """rows (N,T) -> by layer (L): open edges / allowed edges, and those that weigh less than IDLE / open edges."""
    maps = model.eval().attention_maps(rows.to(model.wte.weight.device)).cpu()               # (L,N,H,T,T)
    allowed = len(rows) * allowed_edges(dataclasses.replace(model.config, n_layer=1, block_size=rows.shape[1]))
    is_open, idle = (found.sum((1, 2, 3, 4)) for found in (maps > 0, (maps > 0) & (maps < IDLE)))      # (L)
    return is_open / allowed, idle / is_open.clamp(min=1)


def without_idle(model, tokens):
    """Logits (N,T,V) of a run in which the edges that weigh less than IDLE are closed."""
    def attend(attn, q, k, v):
        weights = attn.weights(q, k)                                                         # (N,H,T,T)
        return weights.where(weights >= IDLE, 0) @ v

    return forward(model, tokens, attend=attend)


def mean_and_error(values):
    """Of values (N): their mean and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def rows_of_context(tokens, ends, c):
    """(N,c+1): the token at each end and the c before it."""
    return torch.from_numpy(tokens[ends[:, None] + np.arange(-c, 1)].astype(np.int64))


def rows_of_copy(tokens, ends, d):
    """(N,2d): the d tokens before each end, twice."""
    return rows_of_context(tokens, ends, d)[:, :-1].repeat(1, 2)


def compare(args):
    models = load_models(args)
    longest = min(args.longest, *(model.config.block_size for model in models.values()))
    tokens = load_data(args.data, encoding_of(models["dense"]))[1]
    if longest < 4:    # a copy needs two tokens twice
        raise UserError(f"the models read at most {longest} tokens\npass models that read 4 or more")
    if len(tokens) < longest + 2:    # an error bar needs two places
        raise UserError(f"{args.data} has too few validation tokens for a context of {longest}\npass more text")
    make_folder(args.out)
    ends = np.unique(np.linspace(longest, len(tokens) - 1, args.windows).astype(int))    # the same for every length
    lengths = [2 ** n for n in range(longest.bit_length())]                   # 1, 2, 4, ... <= longest
    questions = {"context": {c: (rows_of_context(tokens, ends, c), 1) for c in lengths},
                 "copy": {d: (rows_of_copy(tokens, ends, d), d - 1) for d in lengths[1:] if 2 * d <= longest}}
    found = {}
    for question, of_length in questions.items():
        found[question] = {"dense": {}, "sparse": {}, "sparse - dense": {}}
        print(f"\n{question:10}" + "".join(f"{name:>18}" for name in found[question])
              + "    nats per token, +- standard error")
        for n, (rows, count) in of_length.items():
            dense, sparse = (losses(model, rows, count) for model in models.values())
            for column, ce in zip(found[question].values(), (dense, sparse, sparse - dense)):
                column[n] = mean_and_error(ce)
            print(f"{n:<10}" + "".join("{:10.3f} +- {:.3f}".format(*column[n]) for column in found[question].values()),
                  flush=True)
    longest_rows = questions["context"][lengths[-1]][0]
    rows = longest_rows[:max(1, AT_ONCE // lengths[-1]), 1:]                  # as many as fit
    found["idle"] = [shares.tolist() for shares in idle_edges(models["sparse"], rows)]
    print(f"\n{'layer':10}{'open edges':>18}{f'of these, < {IDLE}':>18}    sparse, {len(rows)} rows of {rows.shape[1]}")
    for layer, (share, idle) in enumerate(zip(*found["idle"])):
        print(f"{layer:<10}{share:18.3%}{idle:18.1%}")
    plain = losses(models["sparse"], longest_rows, lengths[-1])
    closed = losses(models["sparse"], longest_rows, lengths[-1], without_idle)
    found["cost of idle edges"] = mean_and_error(closed - plain)
    print("closing the latter costs {:.4f} +- {:.4f} nats per token".format(*found["cost of idle edges"]))
    write_json(os.path.join(args.out, "distance.json"), vars(args) | found)
    draw_distance(found, os.path.join(args.out, "distance.png"))
    print(f"\ndistance.json and distance.png are in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.distance --dense A --sparse B --data stdlib [options]",
                                     description="What do two models gain from tokens that are far back?")
    model_options(parser)
    parser.add_argument("--data", required=True, help="as --data of train.py; its validation split is read")
    parser.add_argument("--longest", type=between(int, 4, 2**20), default=128,
                        help="context that is shown at most (default 128)")
    parser.add_argument("--windows", type=between(int, 2, 10**6), default=1000, help="rows per length (default 1000)")
    parser.add_argument("--out", default="runs/distance", help="folder of the picture (default runs/distance)")
    run_command(parser, compare)


if __name__ == "__main__":
    main()

"""Does LoRA limit how sparse a model can get?

    python -m exercises.open.lora --init MODEL --data TEXT [--steps 200] [--out runs/lora]

A Llama (a folder from Hugging Face, or a dense run of extras.train_llama) gets gates and trains for the same number of
steps with adapters on q and k, of rank 4, 16 and 64, with adapters of rank 16 on every layer, and whole. It learns from
the untouched model alone (--distill inf): so no arm buys edges with what it learns of the text. tau is the untouched
CE, which such a student does not reach: lambda hardly falls, and edges are compared at equal CE. Adapters train at 1e-3
and whole models at 2e-4, usual rates for each; q and k (of adapters, B) at five times that. The gates' b, one per head,
is learned in all arms. So the first three differ in nothing but the rank. Seeds begin at 1: a model that was trained
here with seed 0 would read its windows again.
"""
import argparse
import shlex

from exercises.open.arms import compare
from support.data import checked_source
from support.files import absolute, between, run_command

ARMS = {"rank 4": "--lr 1e-3 --lora-rank 4", "rank 16": "--lr 1e-3 --lora-rank 16",
        "rank 64": "--lr 1e-3 --lora-rank 64", "rank 16, all layers": "--lr 1e-3 --lora-rank 16 --lora-all",
        "all weights": "--lr 2e-4"}


def run(args):
    init, data = map(shlex.quote, (absolute(args.init), checked_source(args.data)))
    command = (f"-m extras.train_llama --init {init} --data {data} --steps {args.steps} "
               "--block-size 128 --batch-size 4 --grad-accum 1 --eval-every 50 --eval-windows 64 "
               "--warmup 20 --distill inf" + (f" --dtype {args.dtype}" if args.dtype else ""))
    seeds = range(1, 1 + args.seeds)
    compare({name: f"{command} {arm}" for name, arm in ARMS.items()}, seeds, args.out, args.at_once)


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.lora --init MODEL --data TEXT [options]",
                                     description="Edges by the rank of the adapters.")
    parser.add_argument("--init", required=True, help="checkpoint or folder of the model")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--steps", type=between(int, 1, 10**7), default=200, help="of each run (default 200)")
    parser.add_argument("--seeds", type=between(int, 1, 100), default=1, help="1, 2, ... (default 1)")
    parser.add_argument("--at-once", type=between(int, 1, 256), default=1, help="runs at a time (default 1)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: train.py's own")
    parser.add_argument("--out", default="runs/lora", help="folder of the runs (default runs/lora)")
    run_command(parser, run)


if __name__ == "__main__":
    main()

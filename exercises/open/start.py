"""Sparse from the start: why not train with gates from the first step?

    python -m exercises.open.start [--seeds 3] [--out runs/start]

A small GPT reads the same number of tokens in both arms, with the same peak rate, weight decay, tau and GECO: 2,000
steps without gates and 3,000 with, or 1 without and 4,999 with. (The first arm has two warm-ups and two cosines.) All
gates start open: with b = 8 one draw in 3,000 is shut. b stays, and q and k have no rate of their own: AdamW moves b at
full speed however small its gradient is, and would shut nearly all gates in 100 steps, before attention is learned.
Lambda looks at training text. The default, held-out text, needs a correction that is measured just before the gates
come: in the second arm that is after one step, when it means nothing. Lambda's rate is a quarter of the default: with
0.2 it swung by a factor of 20 within 200 steps in a trial. Compared at equal CE.
"""
import argparse
import os

from exercises.open.arms import compare
from support.files import between, run_command

COMMAND = ("train.py --init scratch --data stdlib --device cpu --dense-lr 1e-3 --gate-bias 8 --tau 1.75 "
           "--constraint training --score-lr 1 --gate-bias-lr 0 --rate 0.05")
ARMS = {"dense, then sparse": f"{COMMAND} --dense-steps 2000 --steps 3000",
        "sparse from the start": f"{COMMAND} --dense-steps 1 --steps 4999"}


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.start [options]",
                                     description="Gates after a dense training, or from the first step on.")
    parser.add_argument("--seeds", type=between(int, 1, 100), default=3, help="0, 1, ... (default 3)")
    parser.add_argument("--at-once", type=between(int, 1, 256), default=os.cpu_count() or 1,
                        help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/start", help="folder of the runs (default runs/start)")
    run_command(parser, lambda args: compare(ARMS, range(args.seeds), args.out, args.at_once))


if __name__ == "__main__":
    main()

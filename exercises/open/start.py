"""Sparse from the start: why not train with gates from the first step?

    python -m exercises.open.start [--seeds 3] [--out runs/start]

A small GPT reads as many tokens in both arms, with the same peak rate, weight decay, tau and GECO: 2,000 steps without
gates and 3,000 with, or 5,000 with. (The first arm has two warm-ups and two cosines.) All gates start open: with b = 8
one draw in 3,000 is shut. Lambda looks at training text: how much harder other text is, is known of a trained model
only. Compared at equal CE.
"""
import argparse
import os

from exercises.open.arms import compare
from support.files import between, run_command

COMMAND = ("train.py --init scratch --data stdlib --device cpu --dense-lr 1e-3 --gate-bias 8 --tau 1.75 "
           "--constraint training")
ARMS = {"dense, then sparse": f"{COMMAND} --dense-steps 2000 --steps 3000",
        "sparse from the start": f"{COMMAND} --dense-steps 1 --steps 4999"}


def main():
    parser = argparse.ArgumentParser(usage="python -m exercises.open.start [options]",
                                     description="Gates after a dense training, or from the first step on.")
    parser.add_argument("--seeds", type=between(int, 1, 100), default=3, help="0, 1, ... (default 3)")
    parser.add_argument("--at-once", type=between(int, 1, 256), default=os.cpu_count() or 1,
                        help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/start", help="folder of the runs (default runs/start)")
    run_command(parser, lambda args: compare(ARMS, args.seeds, args.out, args.at_once))


if __name__ == "__main__":
    main()

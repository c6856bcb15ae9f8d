"""Ablations: one option takes several values, the others stay as they are, three seeds each.

    python extras/sweep.py [bias|tau|rate|start|distill] [--out runs/sweep]    without a name: all five

Every run is a command that you can give yourself, as short as the comparison allows, on one thread; as many run at a
time as there are cores. A run that is in --out already is not made again, so a stopped sweep goes on.
"""
import argparse
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from extras.figures import draw_sweeps
from extras.files import UserError, between, make_folder, read_json

TOY = "toy_addition.py --steps 4000"
SMALL_GPT = "train.py --init scratch --data stdlib --dense-steps 1000 --steps 400 --device cpu"
SWEEPS = {    # command, option, its values; the one in brackets is the command's own
    "bias": (TOY, "--gate-bias", ("0", "1", "[2]", "4")),
    "tau": (TOY, "--tau", ("0.01", "[0.03]", "0.1")),
    "rate": (TOY, "--rate", ("0.0025", "[0.01]", "0.04")),
    "start": (TOY, "--dense-steps", ("1", "[2500]")),    # gates from the first step on, or afterwards
    "distill": (SMALL_GPT, "--distill", ("[0]", "1")),
}


def commands(name, seeds, out):
    """{(value, seed): (command line without --out, folder)} of one sweep. Sweeps share the runs they have in common."""
    base, option, values = SWEEPS[name]
    found = {}
    for value in values:
        choice = "" if value.startswith("[") else f" {option} {value}"
        for seed in range(seeds):
            line = f"{base}{choice} --seed {seed}"
            found[value.strip("[]"), seed] = line, os.path.join(out, re.sub(r"[^\w.]+", "-", line))
    return found


def one_run(line, folder):
    """Run it, unless it was. summary.json is the last file that a run writes."""
    if os.path.exists(os.path.join(folder, "summary.json")):
        return
    resume = ["train.py", "--resume", folder] if os.path.exists(os.path.join(folder, "args.json")) else None
    make_folder(folder)
    with open(f"{folder}.txt", "w", encoding="utf-8") as printed:
        done = subprocess.run([sys.executable, *(resume or [*shlex.split(line), "--out", folder])], cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=printed, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"python {line} failed\nread {folder}.txt")


def outcome(folder):
    """Active share, CE in nats, accuracy (None: no such thing), was tau met?"""
    found = read_json(os.path.join(folder, "summary.json"))
    return found["active_share"], found["sparse_ce"], found.get("sparse_accuracy"), found["constraint_met"]


def print_table(name, results):
    option = SWEEPS[name][1]
    print(f"\n| {option} | active edges, % | CE, nats | right, % | tau met |")
    print("|---|---|---|---|---|")
    for value, outcomes in results.items():
        shares, losses, accuracies, met = zip(*outcomes)
        right = "-" if None in accuracies else spread([100 * x for x in accuracies], ".2f")
        print(f"| {value} | {spread([100 * x for x in shares], '.2f')} | {spread(losses, '.4f')} | {right} | "
              f"{sum(met)} of {len(met)} |")


def spread(values, form):
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def sweep(args):
    out = os.path.abspath(args.out)
    make_folder(out)
    wanted = {name: commands(name, args.seeds, out) for name in ([args.name] if args.name else SWEEPS)}
    runs = {folder: line for found in wanted.values() for line, folder in found.values()}
    pool = ThreadPoolExecutor(args.at_once)
    try:
        for run in tqdm([pool.submit(one_run, line, folder) for folder, line in runs.items()], desc="runs"):
            run.result()
    finally:
        pool.shutdown(cancel_futures=True)    # after a failure or Ctrl-C: start no further run
    results = {}
    for name, found in wanted.items():
        results[name] = {}
        for (value, _), (_, folder) in found.items():
            results[name].setdefault(value, []).append(outcome(folder))
        print_table(name, results[name])
    draw_sweeps({f"{SWEEPS[name][0].split()[0]} {SWEEPS[name][1]}": found for name, found in results.items()},
                f"One choice at a time, {args.seeds} seeds each", os.path.join(out, "sweep.png"))
    print(f"\nevery run, what it printed and sweep.png are in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python extras/sweep.py [name] [options]", description="Ablations.")
    parser.add_argument("name", nargs="?", choices=SWEEPS, help="what takes several values; without it: each in turn")
    parser.add_argument("--seeds", type=between(int, 1, 100), default=3, help="0, 1, ... for each value (default 3)")
    parser.add_argument("--at-once", type=between(int, 1, 256), default=os.cpu_count() or 1,
                        help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/sweep", help="folder of all runs (default runs/sweep)")
    try:
        sweep(parser.parse_args())
    except (UserError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

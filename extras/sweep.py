"""Ablations: one option takes several values, the others stay as they are, three seeds each.

    python -m extras.sweep [--out runs/sweep]             of the toy: bias, tau, rate, start
    python -m extras.sweep constraint                     of the small GPT: or distill, frontier, temperature, width

Every run is a command that you can give yourself, as short as the comparison allows, on one thread; as many run at a
time as there are cores. A run that is in --out already is not made again, so a stopped sweep goes on.
"""
import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from extras.figures import draw_sweeps
from support.files import UserError, between, make_folder, read_json, run_command

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY = "toy_addition.py --no-gif"
SMALL_GPT = "train.py --init scratch --data stdlib --steps 3000 --device cpu"
SWEEPS = {    # command, option, its values; the one in brackets is the command's own
    "bias": (TOY, "--gate-bias", ("[0]", "1", "2", "4")),
    "tau": (TOY, "--tau", ("0.001", "[0.003]", "0.01")),
    "rate": (TOY, "--rate", ("0.025", "[0.1]", "0.4")),
    "start": (TOY, "--dense-steps", ("1", "[8000]")),    # gates from the first step on, or afterwards
    "constraint": (SMALL_GPT, "--constraint", ("sampled", "training", "[held-out]")),
    "distill": (SMALL_GPT, "--distill", ("[0]", "0.3", "1", "3")),
    "frontier": (SMALL_GPT, "--tau", ("1.6", "[untouched]", "1.8", "2")),    # then extras.frontier draws them
    "temperature": (SMALL_GPT, "--temperature", ("0.3", "[1]", "3")),
    "width": (SMALL_GPT, "--width", ("64", "[128]", "256")),
}
ONLY_SPARSE = "constraint", "distill", "frontier", "temperature"    # options without a say in the dense phase


def commands(name, seeds, out):
    """{value: [(command line without --out, folder) of each seed]}. Sweeps share the runs they have in common."""
    base, option, values = SWEEPS[name]
    found = {}
    for value in values:
        choice = "" if value.startswith("[") else f" {option} {value}"
        lines = [f"{base}{choice} --seed {seed}" for seed in range(seeds)]
        found[value.strip("[]")] = [(line, folder_of(line, out)) for line in lines]
    return found


def folder_of(line, out):
    """The folder of a command's run: its name has all options, so no other run is taken for it."""
    name = re.sub(r"[^\w.]+", "-", line)
    if len(name) > 200:    # systems allow 255
        name = name[:180] + hashlib.sha256(line.encode()).hexdigest()[:16]
    return os.path.join(out, name)


def one_run(line, folder):
    """Run it, unless it was. summary.json is the last file that a run writes."""
    if os.path.exists(os.path.join(folder, "summary.json")):
        return
    begun = os.path.exists(os.path.join(folder, "args.json"))    # by train.py
    program = line.partition(" --")[0].split()
    words = [*program, "--resume", folder] if begun else [*shlex.split(line), "--out", folder]
    make_folder(folder)
    with open(f"{folder}.txt", "w", encoding="utf-8") as printed:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                              stdout=printed, stderr=subprocess.STDOUT)
    if not os.path.exists(os.path.join(folder, "summary.json")):    # code 1 with a summary: tau was not met
        raise UserError(f"python {line} failed\nread {folder}.txt")


def run_all(runs, at_once):
    """Every (command line, folder) of runs, at_once at a time. After a failure or Ctrl-C no further run starts."""
    failed = threading.Event()

    def unless_failed(line, folder):
        if not failed.is_set():
            try:
                one_run(line, folder)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(at_once) as pool:
        list(tqdm(pool.map(unless_failed, *zip(*runs)), total=len(runs), desc="runs"))


def share_dense(name, found, at_once):
    """Make the runs of the command's own value, which all sweeps share, and give their dense phases to the runs of the
    other values with the same seeds."""
    own = found[next(value.strip("[]") for value in SWEEPS[name][2] if value.startswith("["))]
    run_all(own, at_once)
    for of_value in found.values():
        for (_, source), (_, folder) in zip(own, of_value):
            if not os.path.exists(folder):
                part = f"{folder}.part"
                shutil.copytree(os.path.join(source, "dense"), os.path.join(part, "dense"), dirs_exist_ok=True)
                os.rename(part, folder)    # whole, or not there


def outcome(folder):
    """Active share, CE in nats, least share at the untouched model's CE, share of right sums, was tau met? None: the
    run has no such number."""
    found = read_json(os.path.join(folder, "summary.json"))
    names = "active_share", "sparse_ce", "share_at_untouched_ce", "sparse_accuracy", "constraint_met"
    return [found.get(name) for name in names]


def print_table(option, results):
    print(f"\n| {option} | active edges, % | CE, nats | edges at the untouched CE, % | right, % | tau met |\n"
          "|---|---|---|---|---|---|")
    for value, outcomes in results.items():
        shares, losses, *more, met = zip(*outcomes)
        cells = [mean_and_range(shares, ".2f", 100), mean_and_range(losses, ".4f"),
                 *("-" if None in of_seeds else mean_and_range(of_seeds, ".2f", 100) for of_seeds in more)]
        print(f"| {value} | {' | '.join(cells)} | {sum(met)} of {len(met)} |")


def mean_and_range(values, form, unit=1):
    """Mean and range, in words; of one value, the value."""
    values = unit * np.array(values)
    spread = f" ({values.min():{form}} to {values.max():{form}})" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}"


def sweep(args):
    out = os.path.abspath(args.out)
    make_folder(out)
    names = [args.name] if args.name else [name for name, (base, *_) in SWEEPS.items() if base == TOY]
    wanted = {name: commands(name, args.seeds, out) for name in names}
    if args.name in ONLY_SPARSE:
        share_dense(args.name, wanted[args.name], args.at_once)
    run_all(dict.fromkeys(run for found in wanted.values() for of_value in found.values() for run in of_value),
            args.at_once)
    results = {}
    for name, found in wanted.items():
        base, option, _ = SWEEPS[name]
        outcomes = {value: [outcome(folder) for _, folder in of_value] for value, of_value in found.items()}
        print_table(option, outcomes)
        results[f"{base.split()[0]} {option}"] = outcomes
    draw_sweeps(results, f"One choice at a time, {args.seeds} seeds each", os.path.join(out, "sweep.png"))
    print(f"\nevery run, what it printed and sweep.png are in {args.out}")


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.sweep [name] [options]", description="Ablations.")
    parser.add_argument("name", nargs="?", choices=SWEEPS, help="what takes several values; without it: all of the toy")
    parser.add_argument("--seeds", type=between(int, 1, 100), default=3, help="0, 1, ... for each value (default 3)")
    parser.add_argument("--at-once", type=between(int, 1, 256), default=os.cpu_count() or 1,
                        help="runs at a time (default: one a core)")
    parser.add_argument("--out", default="runs/sweep", help="folder of all runs (default runs/sweep)")
    run_command(parser, sweep)


if __name__ == "__main__":
    main()

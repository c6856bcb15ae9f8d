"""Loss against edges over many runs, one dot each: Figure 2a as the paper draws it.

    python -m extras.frontier RUN RUN ... [--control DENSE_RUN ...] [--out runs/frontier]

RUN is the folder of a finished sparse run of train.py; the runs differ in --tau, --lam or --seed. A dot is the run's
last evaluation: what one gets, not the luckiest moment. Each run is compared with the first control that fits: one of
the same untouched model, seed, steps and so on. Prints a table, writes frontier.png and frontier.json. At the end: the
least edges at which any run was no worse than its untouched model.
"""
import argparse
import os

from extras.figures import draw_frontier
from support.files import UserError, make_folder, run_command, write_json
from support.log import read_run, share_at
from support.report import control_row


def outcome(run, controls):
    """What the table shows of one run, as a dict. controls: folders of --dense runs."""
    args, base, rows = read_run(run)
    if args.dense or rows[-1]["step"] < args.steps:
        raise UserError(f"{run} is no finished sparse run: it {'has no gates' if args.dense else 'was stopped'}\n"
                        f"leave it out{'' if args.dense else ', or finish it with --resume'}")
    return {"run": run, "seed": args.seed, "tau": base.tau, "val_ce": rows[-1]["val_ce"], "active": rows[-1]["active"],
            "untouched_ce": base.ce, "share_at_untouched_ce": share_at(rows, base.ce),
            "control_ce": control_ce(args, controls, base)}


def control_ce(args, controls, base):
    """That of the first control of this run; None without controls."""
    for control in controls:
        try:
            return control_row(args, control, base)["val_ce"]
        except UserError:
            if control == controls[-1]:
                raise


def compare(args):
    found = [outcome(run, args.control) for run in args.runs]
    make_folder(args.out)
    print(f"{'run':40}{'tau':>9}{'CE':>9}{'edges':>10}{'at the untouched CE':>22}")
    for f in sorted(found, key=lambda f: f["active"]):
        least = "-" if f["share_at_untouched_ce"] is None else f"{f['share_at_untouched_ce']:.3%}"
        print(f"{f['run']:40}{f['tau']:9.4f}{f['val_ce']:9.4f}{f['active']:10.3%}{least:>22}")
    reached = [f["share_at_untouched_ce"] for f in found if f["share_at_untouched_ce"] is not None]
    print(f"least edges at the untouched model's CE: {f'{min(reached):.3%}' if reached else 'no run was that good'}")
    draw_frontier(found, os.path.join(args.out, "frontier.png"))
    write_json(os.path.join(args.out, "frontier.json"), {"runs": found})


def main():
    parser = argparse.ArgumentParser(usage="python -m extras.frontier RUN RUN ... [options]",
                                     description="Loss against edges over many runs: Figure 2a.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished sparse run of train.py")
    parser.add_argument("--control", nargs="+", default=[], help="folder of a --dense run for each model and seed")
    parser.add_argument("--out", default="runs/frontier", help="folder of the picture (default runs/frontier)")
    run_command(parser, compare)


if __name__ == "__main__":
    main()

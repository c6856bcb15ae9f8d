"""What a training of train.py leaves on disk: a row for each evaluation, and all that going on with it needs."""
import argparse
import csv
import math
import os
from pathlib import Path

import numpy as np

from support.files import explained, read_json, write_csv
from support.weights import read_weights, save_checkpoint


class Log:
    """log.csv, last.pt and best.pt of one training, in the folder `out`."""

    def __init__(self, out, model, averaged, optimizer, geco):
        """model: the weights that train; averaged: their average, which the checkpoints hold."""
        self.out, self.model, self.averaged, self.optimizer, self.geco = out, model, averaged, optimizer, geco
        self.step, self.rows = 0, []
        self.recent = []    # CE of the steps since the last row
        # at lambda's last update: lam in use before it, Cbar after it, and the expected share of edges in that step
        self.at_update = {"lam": geco.lam if geco else math.nan, "c_bar": math.nan, "expected": math.nan}

    def resume(self):
        """Take up all that last.pt holds, if it is there."""
        if os.path.exists(self.path("last.pt")):
            weights, state = read_weights(self.path("last.pt"))
            self.averaged.load_state_dict(weights)
            self.model.load_state_dict(state["trained"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.rows, self.recent, self.at_update = (
                state[name] for name in ("step", "rows", "recent", "at_update"))
            if self.geco:
                self.geco.load_state_dict(state["geco"])

    def mend(self):
        """After a kill: delete half-written files, and write those that last.pt is ahead of."""
        for leftover in Path(self.out).glob("tmp-[0-9]*-*"):
            leftover.unlink()
        if self.rows:
            self.write()

    def path(self, name):
        return os.path.join(self.out, name)

    def save(self):
        save_checkpoint(self.averaged, self.path("last.pt"), step=self.step, rows=self.rows, recent=self.recent,
                        at_update=self.at_update, trained=self.model.state_dict(),
                        optimizer=self.optimizer.state_dict(), geco=self.geco.state_dict() if self.geco else {})

    def add(self, tokens, ce, active):
        """A row for an evaluation: tokens read so far, validation CE, active share (L,H)."""
        row = {"step": self.step, "tokens": tokens, "train_ce": float(np.mean(self.recent or math.nan)),
               **self.at_update, "val_ce": ce, "active": active.mean().item()}
        row |= {f"active_{l}.{h}": float(share) for (l, h), share in np.ndenumerate(active.numpy())}
        self.rows.append(row)
        self.recent = []
        self.save()    # first: the other files follow from it
        self.write()

    def write(self):
        """log.csv, and best.pt if these weights are the best so far."""
        last = self.rows[-1]    # after a stop between two evaluations the weights are newer
        if self.geco and last["step"] == self.step and best_row(self.rows, self.geco.tau) is last:
            save_checkpoint(self.averaged, self.path("best.pt"), step=self.step)
        write_csv(self.path("log.csv"), self.rows)


def read_run(out):
    """(options, facts of the untouched model, evaluations from first to last) of the run in a folder."""
    path = os.path.join(out, "log.csv")
    args = argparse.Namespace(**read_json(os.path.join(out, "args.json")))
    base = argparse.Namespace(**read_json(os.path.join(out, "base.json")))
    with explained(f"cannot read {path}", "pass the folder of a run", OSError, ValueError, TypeError):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{name: int(x) if name in ("step", "tokens") else float(x) for name, x in row.items()}
                    for row in csv.DictReader(file)]
        if not rows:
            raise ValueError("it holds no evaluation yet")
    return args, base, rows


def best_row(rows, tau):
    """The sparsest of the evaluations after step 0 whose validation CE meets tau, or None."""
    good = [row for row in rows if row["step"] and row["val_ce"] <= tau]
    return min(good, key=lambda row: (row["active"], row["val_ce"]), default=None)


def share_at(rows, ce):
    """The smallest active share at which a run, after step 0, had at most this validation CE, or None. Between two
    neighbouring evaluations, one above and one below it, CE and share are interpolated linearly."""
    rows = [row for row in rows if row["step"]]
    shares = [row["active"] for row in rows if row["val_ce"] <= ce]
    for pair in zip(rows, rows[1:]):
        worse, better = sorted(pair, key=lambda row: -row["val_ce"])
        if better["val_ce"] < ce < worse["val_ce"]:
            part = (ce - better["val_ce"]) / (worse["val_ce"] - better["val_ce"])
            shares.append(better["active"] + part * (worse["active"] - better["active"]))
    return min(shares, default=None)


def by_head(row):
    """The active share of every head (L,H) in a row of log.csv."""
    heads = [tuple(map(int, name.removeprefix("active_").split("."))) for name in row if name.startswith("active_")]
    shares = np.zeros(1 + np.array(heads).max(0))
    for l, h in heads:
        shares[l, h] = row[f"active_{l}.{h}"]
    return shares

"""Shared by the open questions that compare trainings: an arm is a command, and edges are read at the same loss."""
import os

from extras.sweep import folder_of, mean_and_range, run_all
from support.files import make_folder
from support.log import read_run, share_at


def compare(arms, seeds, out, at_once):
    """Run every {name: command without --seed and --out} with each of the seeds, on one thread each. Print a row for
    each arm, means and ranges over its seeds: CE and edges at the end, and the least edges at two CEs, the same for all
    runs: the lowest that every run has reached, perhaps early, with many edges; and the highest last CE of all runs."""
    make_folder(out)
    lines = {(name, seed): f"{arms[name]} --seed {seed}" for name in arms for seed in seeds}
    folders = {run: folder_of(line, os.path.abspath(out)) for run, line in lines.items()}
    run_all(list(zip(lines.values(), folders.values())), at_once)
    rows = {run: read_run(folder)[2] for run, folder in folders.items()}
    best = [min(row["val_ce"] for row in found if row["step"]) for found in rows.values()]
    levels = sorted({max(best), max(found[-1]["val_ce"] for found in rows.values())})    # one, if CE fell to the end
    titles = ["", "last CE, nats", "edges then, %", *(f"least edges at CE {ce:.4f}, %" for ce in levels)]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in arms:
        found = [rows[name, seed] for seed in seeds]
        cells = (mean_and_range([of_run[-1]["val_ce"] for of_run in found], ".4f"),
                 mean_and_range([of_run[-1]["active"] for of_run in found], ".2f", 100),
                 *(mean_and_range([share_at(of_run, ce) for of_run in found], ".2f", 100) for ce in levels))
        print(f"| {name} | {' | '.join(cells)} |")

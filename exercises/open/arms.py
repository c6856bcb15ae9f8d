"""Shared by the open questions that compare trainings: an arm is a command, and edges are read at the same loss."""
import os

from extras.figures import draw_arms
from extras.sweep import folder_of, mean_and_range, run_all
from support.files import make_folder
from support.log import read_run, share_at


def compare(arms, seeds, out, at_once):
    """Run every {name: command without --seed and --out} with each of the seeds, on one thread each. Print a row for
    each arm, means and ranges over its seeds, and draw them: CE and edges at the end, and the least edges at two CEs,
    the same for all runs: the lowest that every run has reached, perhaps early, with many edges; and the highest last
    CE of all runs."""
    make_folder(out)
    lines = {(name, seed): f"{arms[name]} --seed {seed}" for name in arms for seed in seeds}
    folders = {run: folder_of(line, os.path.abspath(out)) for run, line in lines.items()}
    run_all(list(zip(lines.values(), folders.values())), at_once)
    rows = {run: read_run(folder)[2] for run, folder in folders.items()}
    best = [min(row["val_ce"] for row in found if row["step"]) for found in rows.values()]
    levels = sorted({max(best), max(found[-1]["val_ce"] for found in rows.values())})    # one, if CE fell to the end
    titles = ["last CE, nats", "edges then, %", *(f"least edges at CE {ce:.4f}, %" for ce in levels)]
    print(f"| | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|")
    measured = [(name, found[-1]["val_ce"], 100 * found[-1]["active"], *(100 * share_at(found, ce) for ce in levels))
                for (name, _), found in rows.items()]
    for name in arms:
        ce, *shares = zip(*(values for arm, *values in measured if arm == name))
        print(f"| {name} | {mean_and_range(ce, '.4f')} | {' | '.join(mean_and_range(of, '.2f') for of in shares)} |")
    path = os.path.join(out, "arms.png")
    draw_arms(measured, titles, "The same loss, how many edges?", path)
    print(f"\nthe picture is {path}")

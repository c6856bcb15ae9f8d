"""Pictures of trainings and of attention: numbers come in, a file goes out, and nothing is computed here.

Colours are told apart in greyscale too: lines differ in style, maps go from white to dark.
"""
import numpy as np
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure    # pyplot would choose a screen for the whole process, and keep each figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from support.files import replacing


def save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def draw_weights(ax, weights, causal, boxed):
    """One map (T,T) on its axes, with a frame around every edge that is not 0 if boxed. Returns the image."""
    if causal:    # grey: keys that come later cannot be read
        weights = np.ma.masked_where(np.triu(np.ones(weights.shape), 1) > 0, weights)
        ax.set_facecolor("0.88")
    for i, j in np.argwhere(np.ma.filled(weights, 0) > 0) if boxed else ():
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, lw=1))
    return ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)


def draw_attention(rows, causal, title, path, size=2.9):
    """Attention maps side by side (Figures 1 and 2b). size: inches of a map.

    rows: (label, panels) each, and panels (title, weights (T,T), a row a query, queries, keys, boxed) each:
    queries and keys are the T labels of the axes, boxed draws a frame around every edge that is not 0.
    """
    columns = len(rows[0][1])
    figure = Figure((size * columns, size * len(rows) + 1), layout="compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, panels) in zip(axes, rows):
        for ax, (name, weights, queries, keys, boxed) in zip(row, panels):
            image = draw_weights(ax, weights, causal, boxed)
            long = max(map(len, keys)) > 1    # words stand upright
            ax.set_xticks(range(len(keys)), keys, rotation=90 if long else 0, fontsize=8 if long else None)
            ax.set_yticks(range(len(queries)), queries, fontsize=8)
            ax.set_title(name, fontsize=10)
            ax.tick_params(length=0)
        row[0].set_ylabel(label, fontsize=11)
    for ax in axes[-1]:
        ax.set_xlabel("position read", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.5, pad=0.01, label="attention weight of the edge (boxed: gate open)")
    figure.suptitle(title)
    save(figure, path)


def draw_film(rows, maps, queries, keys, causal, tau, title, path):
    """A GIF of one sequence's attention while edges go, a frame for each evaluation; below it CE, lambda and edges.

    rows: evaluations of toy_addition.train_sparse; maps: for each the weights (L,H,T,T); queries, keys: the T labels.
    """
    figure = Figure((7.5, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    L, H, T, _ = maps[0].shape
    panels, curves = top.subplots(1, L * H, squeeze=False)[0], bottom.subplots(1, 3)
    for n, ax in enumerate(panels):
        ax.set(title=f"layer {n // H}, head {n % H}", xlabel="position read")
        ax.set_xticks(range(T), keys)
        ax.set_yticks(range(T), queries if n == 0 else [""] * T, fontsize=7)
        ax.tick_params(length=0)
    steps, dots = [row["step"] for row in rows], []
    for ax, (column, label) in zip(curves, (("hard_ce", "CE (nats per digit)"), ("lam", "lambda"),
                                            ("active", "active edges"))):
        values = [row[column] for row in rows]
        ax.set_yscale("log" if column != "active" else "linear")
        ax.set_ylim(min(values) / 1.5 if column != "active" else 0, 1.5 * max(values) or 1)    # not 0 to 0
        ax.plot(steps, values, "k", lw=1)
        dots.append((ax.plot([], [], "o", color="C3")[0], column))
        ax.set_xlabel("step")
        ax.set_title(label, fontsize=9)
    curves[0].axhline(tau, color="C3", ls="--", lw=1)

    def draw(frame):
        figure.suptitle(f"{title}: step {steps[frame]:,}, {rows[frame]['active']:.1f} edges in the mean")
        for ax, weights in zip(panels, maps[frame].flatten(0, 1).numpy()):
            for old in [*ax.images, *ax.patches]:
                old.remove()
            draw_weights(ax, weights, causal, boxed=True)
        for dot, column in dots:
            dot.set_data([steps[frame]], [rows[frame][column]])

    draw(0)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")    # all frames share one layout, which takes longer than the drawing
    writer = PillowWriter(fps=4)
    with replacing(path) as temporary, writer.saving(figure, temporary, dpi=80):
        for frame in [*range(len(rows)), *[len(rows) - 1] * 4]:    # the last one stays a while
            draw(frame)
            writer.grab_frame()


def draw_training(dense, sparse, tau, path):
    """The toy's cross-entropy, multiplier and edges over both phases; the gates are switched on at step 0.

    dense, sparse: histories of toy_addition.train_dense and train_sparse.
    """
    figure = Figure((8, 8), layout="constrained")
    ce, lam, edges = figure.subplots(3, 1, sharex=True)
    steps, evaluated = [row["step"] for row in sparse], [row for row in sparse if "hard_ce" in row]
    at = [row["step"] for row in evaluated]
    before = [row["step"] - len(dense) for row in dense]
    ce.semilogy(before, [row["ce"] for row in dense], "0.6", lw=0.5, label="dense, batch")
    ce.semilogy(steps, [row["ce"] for row in sparse], "C0", lw=0.5, label="sampled gates, batch: what trains")
    ce.semilogy(steps, [row["seen"] for row in sparse], "k", lw=1,
                label="hard gates, averaged weights: what lambda sees")
    ce.axhline(tau, color="C3", ls="--", label=f"tau = {tau}")
    ce.set(ylabel="cross-entropy (nats per digit)", ylim=(1e-5, 5))
    ce.set_title("Two-digit addition: dense, then sparse under GECO")
    lam.semilogy(steps, [row["lam"] for row in sparse], "C0")
    lam.set(ylabel="multiplier lambda")
    edges.semilogy(steps, [row["expected"] for row in sparse], "C0", lw=0.8, label="expected: sum of sigmoid(g)")
    edges.semilogy(at, [row["active"] for row in evaluated], "k", lw=1.2, label="active, hard gates")
    edges.set(ylabel="edges per sum", xlabel="step (0: the gates are switched on)")
    for axis in (lam.yaxis, edges.yaxis):    # 10, 20, 50, ...
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    ce.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=2)
    edges.legend(fontsize=8)
    save(figure, path)


def draw_curve(rows, lines, tau, path):
    """Figure 2a: cross-entropy against active edges, over training.

    rows: those of log.csv; lines: (name, cross-entropy, active share) of the models that are compared.
    """
    figure = Figure((7, 4.5), layout="constrained")
    ax = figure.subplots()
    share = [100 * row["active"] for row in rows]
    ax.semilogx(share, [row["val_ce"] for row in rows], "-o", ms=3, lw=1, label="sparse, hard gates, over training",
                nonpositive="mask")
    ax.annotate("gates switched on", (share[0], rows[0]["val_ce"]), textcoords="offset points", xytext=(-8, 8),
                ha="right")
    for name, ce, active in lines:
        marker = {"untouched": "s", "dense control": "D", "sparse": "*"}[name]
        ax.plot(100 * active, ce, marker, color="k", ms=9, ls="none",
                label=f"{name}: {ce:.3f}" + " (no edges)" * (active == 0))
    ax.axhline(tau, color="C3", ls="--", lw=1, label=f"tau = {tau:.3f}")
    ax.margins(y=0.12)    # room for the note at the top
    ax.set(xlabel="active edges (% of the allowed ones, log axis)", ylabel="validation cross-entropy (nats per token)",
           title="Loss against edges while the gates close")
    ax.legend(fontsize=8)
    save(figure, path)


def draw_heads(by_head, path):
    """Share of active edges (L,H) as a map, in percent."""
    L, H = by_head.shape
    figure = Figure((1.5 + 0.6 * max(H, 6), 1.2 + 0.5 * L), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(100 * by_head, cmap="Blues", vmin=0)
    for l, h in np.ndindex(L, H):
        percent = 100 * by_head[l, h]
        ax.text(h, l, f"{percent:.0f}" if percent >= 9.95 else f"{percent:.2g}", ha="center", va="center", fontsize=7,
                color="w" if by_head[l, h] > 0.6 * by_head.max() else "k")
    ax.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L), title="Active edges by head (%)")
    figure.colorbar(image, ax=ax, label="% of the allowed edges")
    save(figure, path)

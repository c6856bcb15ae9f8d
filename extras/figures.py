"""All pictures: numbers come in, a file goes out, and nothing is computed here.

Colours are told apart in greyscale too: lines differ in style, maps go from white to dark.
"""
import matplotlib
import numpy as np

matplotlib.use("Agg")    # draws into files, needs no screen
import matplotlib.pyplot as plt
from matplotlib.collections import LineCollection

from extras.files import replacing

STYLES = {"dense": dict(color="black", ls="-", lw=2.2, marker="o"),
          "sparse": dict(color="C1", ls="--", lw=1.6, marker="s")}


def save(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)


def draw_attention(rows, causal, title, path, size=2.9):
    """Attention maps side by side (Figures 1 and 2b). size: inches of a map.

    rows: (label, panels) each, and panels (title, weights (T,T) of query times key, queries, keys, boxed) each:
    queries and keys are the T labels of the axes, boxed draws a frame around every edge that is not 0.
    """
    columns = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="compressed",
                                figsize=(size * columns, size * len(rows) + 1))
    for row, (label, panels) in zip(axes, rows):
        for ax, (name, weights, queries, keys, boxed) in zip(row, panels):
            if causal:    # grey: keys that come later cannot be read
                weights = np.ma.masked_where(np.triu(np.ones(weights.shape), 1) > 0, weights)
                ax.set_facecolor("0.88")
            image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
            for i, j in np.argwhere(np.ma.filled(weights, 0) > 0) if boxed else ():
                ax.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, lw=1))
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


def draw_training(dense, sparse, tau, path):
    """The toy's cross-entropy, multiplier and edges over both phases; the gates are switched on at step 0.

    dense, sparse: histories of toy_addition.train, one dict per step.
    """
    figure, (ce, lam, edges) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    steps, evaluated = [row["step"] for row in sparse], [row for row in sparse if "hard_ce" in row]
    at = [row["step"] for row in evaluated]
    before = [row["step"] - len(dense) for row in dense]
    ce.semilogy(before, [row["ce"] for row in dense], "0.6", label="dense, batch")
    ce.semilogy(steps, [row["ce"] for row in sparse], "C0", lw=0.5, label="sampled gates, batch")
    ce.semilogy(at, [row["hard_ce"] for row in evaluated], "k", lw=1.2, label="hard gates, all training sums")
    ce.axhline(tau, color="C3", ls="--", label=f"tau = {tau}")
    ce.set(ylabel="cross-entropy (nats per digit)", ylim=(1e-5, 5))
    ce.set_title("Two-digit addition: dense, then sparse under GECO")
    lam.semilogy(steps, [row["lam"] for row in sparse], "C0")
    lam.set(ylabel="multiplier lambda")
    edges.semilogy(steps, [row["expected"] for row in sparse], "C0", lw=0.8, label="expected: sum of sigmoid(g)")
    edges.semilogy(at, [row["active"] for row in evaluated], "k", lw=1.2, label="active, hard gates")
    edges.set(ylabel="edges per sum", xlabel="step (0: the gates are switched on)")
    ce.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=2)
    edges.legend(fontsize=8)
    save(figure, path)


def draw_curve(rows, lines, tau, path):
    """Figure 2a: cross-entropy against active edges, over training.

    rows: those of log.csv; lines: (name, cross-entropy, active share) of the models that are compared.
    """
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    share = [100 * row["active"] for row in rows]
    ax.semilogx(share, [row["val_ce"] for row in rows], "-o", ms=3, lw=1, label="sparse, hard gates, over training")
    ax.annotate("gates switched on", (share[0], rows[0]["val_ce"]), textcoords="offset points", xytext=(-8, 8),
                ha="right")
    for (name, ce, active), marker in zip(lines, ("s", "D", "*")):
        ax.plot(100 * active, ce, marker, color="k", ms=9, ls="none", label=f"{name}: {ce:.3f}")
    ax.axhline(tau, color="C3", ls="--", lw=1, label=f"tau = {tau:.3f}, of the training loss")
    ax.margins(y=0.12)    # room for the note at the top
    ax.set(xlabel="active edges (% of the allowed ones, log axis)", ylabel="validation cross-entropy (nats per token)",
           title="Loss against edges while the gates close")
    ax.legend(fontsize=8)
    save(figure, path)


def draw_heads(by_head, path):
    """Share of active edges (L,H) as a map, in percent."""
    L, H = by_head.shape
    figure, ax = plt.subplots(figsize=(1.5 + 0.6 * max(H, 6), 1.2 + 0.5 * L), layout="constrained")
    image = ax.imshow(100 * by_head, cmap="Blues", vmin=0)
    for l, h in np.ndindex(L, H):
        percent = 100 * by_head[l, h]
        ax.text(h, l, f"{percent:.0f}" if percent >= 9.95 else f"{percent:.2g}", ha="center", va="center", fontsize=7,
                color="w" if by_head[l, h] > 0.6 * by_head.max() else "k")
    ax.set(xlabel="head", ylabel="layer", xticks=range(H), yticks=range(L), title="Active edges by head (%)")
    figure.colorbar(image, ax=ax, label="% of the allowed edges")
    save(figure, path)


def draw_effects(found, of, kinds, share, title, path):
    """Figures 3 and 4a: what `measure` of extras/compare.py found, over the number of heads or edges (of)."""
    what = {"heads": "explained effect", "edges": "share of scores"}[of]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for ax, kind in zip(axes, kinds):
        for name, f in found.items():
            y, style = f[f"{what}, {kind}"], dict(STYLES[name], ms=4)
            label = f"{name}: {what}, {share:.0%} at {f[f'{of}, {kind}']} {of}"
            if of == "heads":
                ax.plot(range(len(y)), y, label=label, **style)
                ax.xaxis.get_major_locator().set_params(integer=True)
            else:
                kept = f[f"kept circuit, {kind}"]
                ax.semilogx(range(1, len(y)), y[1:], label=label, **style | dict(marker=""))
                ax.semilogx(kept.keys(), kept.values(), label=f"{name}: effect of these edges alone",
                            **style | dict(ls=":", lw=0.8, mfc="white"))
                ax.set_ylim(-0.3, 1.5)
        ax.axhline(share, color="0.6", lw=0.8)
        ax.set(xlabel=f"number of {of}, best first", title=f"{kind} ranking")
        ax.legend(fontsize=8)
    axes[0].set_ylabel("share of m(clean) - m(corrupt)" + (", or of all |scores|" if of == "edges" else ""))
    figure.suptitle(title)
    save(figure, path)


def draw_circuits(circuits, L, H, total, title, path):
    """Figure 4b: circuits on a grid of heads with the MLPs to the right; width by |score|, dashed below 0.

    circuits: {model: edges (source, destination, score)}, nodes numbered as in patching.nodes; total: edges there are.
    """
    grid = [(h + 0.5 * (h == H), l + 0.45 * (h == H)) for l in range(L) for h in range(H + 1)]
    place = [((H - 1) / 2, -1), *grid, ((H - 1) / 2, L)]
    figure, axes = plt.subplots(1, 2, figsize=(2 * min(4 + H, 9), min(3 + L, 10)), layout="constrained")
    for ax, (name, edges) in zip(axes, circuits.items()):
        largest = max((abs(score) for *_, score in edges), default=1)
        ax.add_collection(LineCollection(
            [(place[s], place[d]) for s, d, _ in edges], colors="0.2",
            linewidths=[0.15 + 4 * abs(score) / largest for *_, score in edges],
            linestyles=["-" if score > 0 else "--" for *_, score in edges]))
        used = {node for s, d, _ in edges for node in (s, d)}
        for node, (x, y) in enumerate(place):
            colour = "0.6" if node in used else "white"
            ax.plot(x, y, "s" if x > H else "o", ms=9, mec="black", mfc=colour, zorder=3)
        for text, at, below in (("embedding", place[0], -16), ("logits", place[-1], 9)):
            ax.annotate(text, at, (0, below), textcoords="offset points", ha="center")
        ax.set(xlabel="head", ylabel="layer", xlim=(-0.7, H + 1.2), ylim=(-1.6, L + 0.6),
               title=f"{name}: {len(edges):,} of {total:,} edges")
        ax.set_xticks([*range(H), H + 0.5], [*range(H), "MLP"])
        ax.set_yticks(range(L))
    figure.suptitle(title)
    save(figure, path)


def draw_sweeps(results, title, path):
    """Ablations, a column for each: {what: {value: [(active share, CE, ...) of each seed]}}."""
    figure, axes = plt.subplots(2, len(results), squeeze=False, sharex="col", layout="constrained",
                                figsize=(1.5 + 2.9 * len(results), 6))
    for column, (what, found) in zip(axes.T, results.items()):
        for ax, n, unit in zip(column, (0, 1), (100, 1)):
            seeds = [[unit * outcome[n] for outcome in outcomes] for outcomes in found.values()]
            mean = [np.mean(values) for values in seeds]
            ax.vlines(range(len(seeds)), [min(v) for v in seeds], [max(v) for v in seeds], color="0.6", lw=5)
            ax.plot(mean, "-o", color="black", label="mean; bar: range of the seeds")
            ax.margins(x=0.15, y=0.25)    # room for the legend
        column[0].set_ylim(bottom=0)
        column[0].set_title(what, fontsize=10)
        column[1].set_xticks(range(len(found)), found)
        column[1].set_xlabel("value")
    axes[0, 0].set_ylabel("active edges (% of the allowed)")
    axes[1, 0].set_ylabel("cross-entropy (nats)")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def draw_distance(found, path):
    """CE against the context shown and against the distance to copy from, as extras/distance.py finds them."""
    about = {"context": ("only the last c tokens are shown", "context c (tokens)"),
             "copy": ("a text that was shown d tokens before", "distance d (tokens)")}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (question, models) in zip(axes, found.items()):
        for name, style in STYLES.items():
            of_length = models[name]
            ax.errorbar(list(of_length), [ce for ce, _ in of_length.values()], [e for _, e in of_length.values()],
                        label=name, capsize=2, **style | dict(ms=4))
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(of_length), [str(n) for n in of_length])
        ax.set(title=about[question][0], xlabel=about[question][1])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("cross-entropy (nats per token)")
    axes[0].legend()
    figure.suptitle("What far tokens are worth, dense beside sparse; bars: standard error")
    save(figure, path)


def draw_speed(rows, title, path):
    """Time and memory against length, all axes logarithmic. rows: {T: {name: (seconds, bytes)}} of extras/bench.py."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {"plain": ("C3", ":", "plain definition"), "ours": ("C0", "-", "ours"),
              "dense": ("k", "--", "fused, dense")}
    for name, (color, line, label) in styles.items():
        for ax, n, unit in ((axes[0], 0, 1e3), (axes[1], 1, 1 / 2**20)):
            shown = [(T, found[name][n] * unit) for T, found in rows.items() if name in found]
            ax.loglog(*zip(*shown), line, marker="o", color=color, label=label, base=2)
    for ax, label in zip(axes, ("forward and backward (ms)", "peak memory above the inputs (MiB)")):
        ax.set(xlabel="length T", ylabel=label)
        ax.set_xticks(list(rows), [str(T) for T in rows])
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title)
    save(figure, path)

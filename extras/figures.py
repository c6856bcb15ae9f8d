"""Pictures of circuits, ablations, distances and timings: numbers come in, a file goes out."""
import contextlib
import math

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from support.figures import save

STYLES = {"dense": dict(color="black", ls="-", lw=2.2), "sparse": dict(color="C1", ls="--", lw=1.6)}
CUT = dict(color="C0", ls=":", lw=2)
MARKS = {"embedding": "s", "position": "^", "feature": "o", "error": "x", "logit": "D"}
NAMED = 60    # a circuit with at most this many nodes shows their names
SPEED_STYLES = {"plain": dict(color="C3", ls=":", label="plain definition"),
                "ours": dict(color="C0", ls="-", label="ours"),
                "dense": dict(color="black", ls="--", label="fused, dense")}


@contextlib.contextmanager
def picture(path, title, rows, columns, size, **options):
    """The axes (rows,columns) to draw on. The picture is written at the end. size: inches; options: of subplots."""
    figure = Figure(size, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **options)
    figure.suptitle(title)
    save(figure, path)


def draw_head_effects(found, kinds, share, title, path):
    """Figure 3: the effect of the first k heads, restored in a corrupted run, or (thin) kept in a clean one. found:
    what `measure` of extras/circuits.py makes, by model."""
    with picture(path, title, 1, 2, (11, 4.5), sharey=True) as axes:
        for ax, kind in zip(axes[0], kinds):
            for name, f in found.items():
                counts = f["numbers of heads"]
                ax.plot(counts, f[f"restored effect, {kind}"], **STYLES[name],
                        label=f"{name}: restored, {share:.0%} at {f[f'heads restored, {kind}']}")
                ax.plot(counts, f[f"explained effect, {kind}"], ":" if name == "dense" else "-.", lw=1.2,
                        color=STYLES[name]["color"],
                        label=f"{name}: kept, {share:.0%} at {f[f'heads kept, {kind}']}")
            ax.xaxis.get_major_locator().set_params(integer=True)
            finish_effects(ax, share, "heads", kind)
        axes[0, 0].set_ylabel("share of m(clean) - m(corrupt)")


def draw_edges(found, kinds, share, title, path):
    """Figure 4a: what the n best edges hold of all |scores|, and (dots) the effect that they have alone."""
    with picture(path, title, 1, 2, (11, 4.5), sharey=True) as axes:
        for ax, kind in zip(axes[0], kinds):
            for name, f in found.items():
                ax.plot(f[f"share of scores, {kind}"], **STYLES[name],
                        label=f"{name}: share of scores, {share:.0%} at {f[f'edges, {kind}']}")
                ax.plot(*zip(*f[f"kept circuit, {kind}"].items()), ":o", color=STYLES[name]["color"], lw=0.8, ms=4,
                        mfc="white", label=f"{name}: effect of these edges alone")
            ax.set_xscale("log", nonpositive="mask")
            ax.set_ylim(-0.3, 1.5)
            finish_effects(ax, share, "edges", kind)
        axes[0, 0].set_ylabel("share of m(clean) - m(corrupt), or of all |scores|")


def finish_effects(ax, share, of, kind):
    ax.axhline(share, color="0.6", lw=0.8)
    ax.set(xlabel=f"number of {of}, best first", title=f"{kind} ranking")
    ax.legend(fontsize=8)


def draw_circuits(circuits, L, H, total, title, path):
    """Figure 4b: circuits on a grid of heads with the MLPs to the right; width by |score|, dashed below 0. Nodes that
    take part have a black frame, and their names (layer.head) if they are few.

    circuits: {model: (S,S) the scores of its edges, 0 for all others}, as patching.edge_scores orders them; total:
    edges there are.
    """
    middle = (H - 1) / 2
    layers = [[*((h, l) for h in range(H)), (H + 0.5, l + 0.45)] for l in range(L)]
    place = np.array([(middle, -1), *sum(layers, []), (middle, L)])                  # (S+1,2) x and y of each node
    names = ["in", *sum(([*(f"{l}.{h}" for h in range(H)), f"m{l}"] for l in range(L)), []), "out"]
    with picture(path, title, 1, 2, (2 * min(4 + H, 9), min(3 + L, 10))) as axes:
        for ax, (name, scores) in zip(axes[0], circuits.items()):
            sources, destinations = scores.numpy().nonzero()
            ends, size = (place[sources], place[destinations + 1]), scores.numpy()[sources, destinations]
            ax.add_collection(LineCollection(
                np.stack(ends, 1), colors="0.2", linewidths=0.15 + 4 * abs(size) / abs(size).max(initial=0),
                linestyles=np.where(size > 0, "-", "--")))
            ax.scatter(*place.T, s=60, c="white", edgecolors="0.8", zorder=1)
            used = np.union1d(sources, destinations + 1)
            few = len(used) <= NAMED
            ax.scatter(*place[used].T, s=330 if few else 60, c="0.85" if few else "0.4", edgecolors="black", zorder=3)
            for n in used if few else ():
                ax.text(*place[n], names[n], fontsize=7, ha="center", va="center", zorder=4)
            ax.set(xlabel="head", ylabel="layer", title=f"{name}: {len(size):,} of {total:,} edges")
            ax.set_xticks([*range(H), H + 0.5], [*range(H), "MLP"])
            ax.set_yticks(range(-1, L + 1), ["embedding", *range(L), "logits"])


def draw_carriers(found, units, title, path):
    """Mean cumulative share over the number of carriers, of an edge and of a prompt: see extras/attribute.py."""
    with picture(path, title, 2, len(units), (4.5 * len(units), 8), sharey=True, sharex="col") as axes:
        for row, what in zip(axes, ("an edge", "a prompt")):
            for ax, unit in zip(row, units):
                for arm, style in (STYLES | {"cut": CUT}).items():
                    ax.plot(found[arm][f"curve: {unit} of {what}"], **style,
                            label=f"{arm}: 80 % at {found[arm][f'{unit} for 80% of {what}']}")
                ax.set_xscale("symlog", linthresh=1)
                ax.axhline(0.8, color="0.6", lw=0.8)
                ax.legend(fontsize=8, loc="lower right")
            row[0].set_ylabel(f"share of what crosses positions in {what}, mean")
        for ax, unit in zip(axes[1], units):
            ax.set_xlabel(f"number of {unit}, largest first")


def draw_graphs(graphs, tokens, L, title, path):
    """One prompt's attribution graphs: positions to the right, layers up. graphs: {arm: [(source, target, count)]}, of
    nodes as extras/attribution.py has them; width by |count|, dashed below 0; dark edges cross positions. Positions
    before the first that takes part are left out."""
    first = min(node.position for edges in graphs.values() for *ends, _ in edges for node in ends)
    with picture(path, title, 1, len(graphs), (max(7, 0.32 * (len(tokens) - first) + 3) * len(graphs), 6)) as axes:
        for ax, (arm, edges) in zip(axes[0], graphs.items()):
            nodes = list(dict.fromkeys(node for source, target, _ in edges for node in (source, target)))
            seen, place = {}, {}    # nodes of one kind, layer and position stand side by side
            for node in nodes:
                n = seen[node[:3]] = seen.get(node[:3], -1) + 1
                height = {"embedding": -1, "position": -0.6, "error": node.layer + 0.3}.get(node.kind, node.layer)
                place[node] = node.position + 0.3 * math.sin(2.4 * n), height + 0.08 * (n % 3)
            most = max(abs(count) for *_, count in edges)
            for source, target, count in edges:
                across = source.position != target.position
                ax.plot(*zip(place[source], place[target]), "-" if count > 0 else "--", zorder=1 + across,
                        color="black" if across else "0.7", lw=0.4 + 3 * abs(count) / most)
            for kind, mark in MARKS.items():
                if of_kind := [place[node] for node in nodes if node.kind == kind]:
                    ax.scatter(*zip(*of_kind), marker=mark, s=36, c="C1" if kind == "feature" else "C0", zorder=3,
                               label=kind)
            across = sum(source.position != target.position for source, target, _ in edges)
            plain = [token.replace("$", r"\$") for token in tokens]    # two of them would begin a formula
            ax.set_xticks(range(len(plain)), plain, rotation=90 if max(map(len, tokens)) > 1 else 0, fontsize=8)
            ax.set_yticks(range(-1, L + 1), ["tokens", *range(L), "logit"])
            ax.set(title=f"{arm}: {across} of {len(edges)} edges cross positions", ylabel="layer",
                   xlim=(first - 0.6, len(tokens) - 0.4))
            ax.legend(fontsize=8, loc="upper left")


def draw_frontier(runs, path):
    """Figure 2a: cross-entropy against active edges, a dot for each of runs (dicts of extras/frontier.py)."""
    with picture(path, "Loss against edges, one dot a run", 1, 1, (7, 4.5)) as axes:
        ax = axes[0, 0]
        dots = ax.scatter([100 * run["active"] for run in runs], [run["val_ce"] for run in runs], 60,
                          [run["tau"] for run in runs], cmap="viridis", edgecolor="black", zorder=3, label="sparse")
        ax.figure.colorbar(dots, label="tau (nats per token)")
        ax.set_xscale("log")
        for key, name, style in (("untouched_ce", "untouched model", ":"), ("control_ce", "dense control", "--")):
            for n, ce in enumerate({run[key] for run in runs} - {None}):
                ax.axhline(ce, color="black", lw=0.8, ls=style, label=f"{name}, all edges" if n == 0 else None)
        ax.margins(x=0.15, y=0.15)
        ax.set(xlabel="active edges (% of the allowed ones, log axis)",
               ylabel="validation cross-entropy (nats per token)")
        ax.legend(fontsize=8)


def draw_sweeps(results, title, path):
    """Ablations, a column for each: {what: {value: [(active share, CE, ...) of each seed]}}."""
    units = ("active edges (% of the allowed)", 100), ("cross-entropy (nats)", 1)
    with picture(path, title, 2, len(results), (1.5 + 2.9 * len(results), 6), sharex="col") as axes:
        for column, (what, found) in zip(axes.T, results.items()):
            for n, (label, unit) in enumerate(units):
                values = unit * np.array([[seed[n] for seed in outcomes] for outcomes in found.values()])
                column[n].vlines(range(len(found)), values.min(1), values.max(1), color="0.6", lw=5)
                column[n].plot(values.mean(1), "-o", color="black", label="mean; bar: range of the seeds")
                column[n].margins(x=0.15, y=0.25)    # room for the legend
                axes[n, 0].set_ylabel(label)
            column[0].set_ylim(bottom=0)
            column[0].set_title(what, fontsize=10)
            column[1].set_xticks(range(len(found)), found)
            column[1].set_xlabel("value")
        axes[0, 0].legend(fontsize=8)


def draw_arms(rows, measures, title, path):
    """Runs of several arms, a panel for each measure, a dot for each run. rows: (arm, a value of each measure)."""
    arms = list(dict.fromkeys(arm for arm, *_ in rows))
    with picture(path, title, 1, len(measures), (1.5 + 2.6 * len(measures), 4)) as axes:
        for n, (ax, measure) in enumerate(zip(axes[0], measures), 1):
            for at, arm in enumerate(arms):
                values = [row[n] for row in rows if row[0] == arm]
                ax.plot([at] * len(values), values, "ko", mfc="none")
                ax.plot(at, np.mean(values), "k_", ms=24)
            ax.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=9)
            ax.margins(x=0.2, y=0.15)
            ax.set_title(measure, fontsize=10)
            if not measure.endswith("nats"):
                ax.set_ylim(bottom=0)
        axes[0, 0].set_ylabel("a dot for each seed, a dash for their mean")


def draw_distance(found, path):
    """CE against the context shown and against the distance to copy from, as extras/distance.py finds them."""
    about = {"context": ("only the last c tokens are shown", "context c (tokens)"),
             "copy": ("a text that was shown d tokens before", "distance d (tokens)")}
    title = "What far tokens are worth, dense beside sparse; bars: standard error"
    with picture(path, title, 1, 2, (10, 4)) as axes:
        for ax, (question, labels) in zip(axes[0], about.items()):
            models = found[question]
            for name, style in STYLES.items():
                ce, error = zip(*models[name].values())
                ax.errorbar(list(models[name]), ce, error, label=name, capsize=2, marker="o", ms=4, **style)
            lengths_axis(ax, models["dense"], *labels)
        axes[0, 0].set_ylabel("cross-entropy (nats per token)")
        axes[0, 0].legend()


def draw_speed(rows, title, path):
    """Time and memory against length, all axes logarithmic. rows: {T: {name: (seconds, bytes)}}, nan: not measured."""
    units = ("forward and backward (ms)", 1e3), ("peak memory above the inputs (MiB)", 2**-20)
    with picture(path, title, 1, 2, (10, 4)) as axes:
        for n, (ax, (label, unit)) in enumerate(zip(axes[0], units)):
            for name, style in SPEED_STYLES.items():
                ax.plot(list(rows), [unit * found[name][n] for found in rows.values()], marker="o", **style)
            ax.set_yscale("log", base=2)
            lengths_axis(ax, rows, label, "length T")
        axes[0, 0].legend()


def lengths_axis(ax, lengths, title, label):
    """The x axis is logarithmic and names every length."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(lengths), list(lengths))
    ax.set(title=title, xlabel=label)
    ax.grid(alpha=0.3)

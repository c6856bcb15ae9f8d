"""`answer` holds the functions to check: yours, from gate.py and the like, or with --reference the project's own."""
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--reference", action="store_true", help="check the project's own functions")


def reference(name):
    """The project's functions under the names and arguments of the exercise."""
    import gates
    import geco
    import patching
    import toy_addition
    from extras import attribution

    def expected_edges(q, k, gate_bias):
        return gates.sparse_attention(q, k, k, gate_bias)[1]

    def patch_head(model, clean, corrupt, layer, head):
        chosen = torch.zeros(1, model.config.n_layer, model.config.n_head, dtype=torch.bool)
        chosen[0, layer, head] = True
        with torch.no_grad():
            return patching.run_with_heads(model, corrupt, patching.outputs(model, clean)[0], chosen)

    def curves(scores):
        scores = scores[:, None]    # (N,1,S): one source
        return patching.cumulative(scores).mean(0), patching.cumulative(scores.mean(0))

    def head_attribution(model, clean, corrupt, metric):
        scores = patching.edge_scores(model, clean, corrupt, metric).sum(-1)    # (N,S): of every source
        return scores[:, 1:].unflatten(1, (model.config.n_layer, -1))[..., :-1]

    def missed_edges(model, clean, corrupt, metric, small):
        scores, names = patching.edge_scores(model, clean, corrupt, metric).abs().mean(0), patching.nodes(model.config)
        return {(s, d) for s, d in patching.edge_names(model.config)
                if scores[names.index(s), names.index(d) - 1] < small
                and patching.exact_edge_score(model, clean, corrupt, metric, s, d).abs().mean() > 10 * small}

    def hard(loss, g):
        return loss(gates.sample_gates(g, sample=False))

    def expected(loss, g):
        p = torch.sigmoid(g.double())
        draws = torch.cartesian_prod(*[torch.tensor([0, 1])] * len(g))              # (2^n,n)
        return sum(torch.where(a > 0, p, 1 - p).prod() * loss(a) for a in draws)

    def restored(model, clean, corrupt, metric, order):
        m = patching.metric_of_restored_heads(model, clean, corrupt, metric, torch.tensor(order))
        return patching.share_of_effect(m, metric(model(clean).logits).detach())

    def kept(model, clean, corrupt, metric, order):
        m = patching.metric_of_kept_heads(model, clean, corrupt, metric, torch.tensor(order))
        return patching.share_of_effect(m, m[:, -1])

    def strongest_key(pattern, v, gradient):
        pairs = attribution.carried(pattern, v, gradient).sum(1).abs()              # (H,T)
        return divmod(int(pairs.argmax()), pairs.shape[1])

    return SimpleNamespace(**{
        "gate": dict(sample_gates=gates.sample_gates),
        "edges": dict(expected_edges=expected_edges),
        "attention": dict(sparse_attention=gates.sparse_attention),
        "constraint": dict(Geco=geco.Geco),
        "patch_head": dict(patch_head=patch_head),
        "effect": dict(curves=curves, needed=patching.first_reaching),
        "attribution": dict(head_attribution=head_attribution, missed_edges=missed_edges),
        "hard_gates": dict(hard=hard, expected=expected),
        "keep_or_restore": dict(restored=restored, kept=kept),
        "sum_rule": dict(carried=attribution.carried, strongest_key=strongest_key),
        "carry": dict(find_carry_edge=toy_addition.find_carry_edge),
    }[name])


@pytest.fixture(scope="module")
def answer(request):
    """The exercise that this check file is named after."""
    name = Path(request.module.__file__).stem.removeprefix("check_")
    if request.config.getoption("--reference"):
        return reference(name)
    return importlib.import_module(f"exercises.{name}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

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

    return SimpleNamespace(**{
        "gate": dict(sample_gates=gates.sample_gates),
        "edges": dict(expected_edges=expected_edges),
        "attention": dict(sparse_attention=gates.sparse_attention),
        "constraint": dict(Geco=geco.Geco),
        "patch_head": dict(patch_head=patch_head),
        "effect": dict(curves=curves, needed=patching.heads_needed),
        "attribution": dict(head_attribution=head_attribution, missed_edges=missed_edges),
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

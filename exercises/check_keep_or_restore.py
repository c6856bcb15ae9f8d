import pytest
import torch

from exercises.check_patch_head import by_hand
from model import GPT, GPTConfig

ORDER = [4, 0, 5, 2, 1, 3]


@pytest.fixture
def example():
    """A model, clean and corrupted sentences, and a metric."""
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim == 2 else 1)
    clean, corrupt = torch.randint(11, (2, 4, 6))
    return model, clean, corrupt, lambda logits: logits[:, -1, 3] - logits[:, -1, 7]


def curve(model, run_on, others, metric, patched):
    """Mean metric on `run_on` with the heads of each set in `patched` from the run on `others`."""
    z = by_hand(model, others, {})[1]
    heads = [(n // 3, n % 3) for n in range(6)]
    return [metric(by_hand(model, run_on, {heads[n]: z[heads[n]] for n in chosen})[0]).mean().item()
            for chosen in patched]


def test_restored_against_runs_written_out(answer, example):
    model, clean, corrupt, metric = example
    m = curve(model, corrupt, clean, metric, [ORDER[:k] for k in range(7)])
    m_clean = metric(model(clean).logits).mean().item()
    expected = [(x - m[0]) / (m_clean - m[0]) for x in m]
    found = [float(x) for x in answer.restored(model, clean, corrupt, metric, ORDER)]
    assert found == pytest.approx(expected), "run on the corrupted sentences; the first k heads of " \
        "order are clean; means over sentences first, then the ratio"


def test_kept_against_runs_written_out(answer, example):
    model, clean, corrupt, metric = example
    m = curve(model, clean, corrupt, metric, [ORDER[k:] for k in range(7)])
    expected = [(x - m[0]) / (m[-1] - m[0]) for x in m]
    found = [float(x) for x in answer.kept(model, clean, corrupt, metric, ORDER)]
    assert found == pytest.approx(expected), "run on the clean sentences; all heads but the first k " \
        "are corrupted there; means over sentences first, then the ratio"


def test_both_begin_at_none_and_kept_ends_at_all(answer, example):
    kept, restored = (f(*example, ORDER) for f in (answer.kept, answer.restored))
    assert float(kept[0]) == float(restored[0]) == 0, "no head, no effect: the curve begins at 0"
    assert float(kept[-1]) == pytest.approx(1), "with every head kept this is the plain clean run"
    assert abs(float(restored[-1]) - 1) > 1e-3, "embeddings are not patched: all heads restored is not the clean run"

"""exercises/: every check fails on the stub, because it is a stub, and passes on the project's own functions."""
import inspect
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gates
import patching as P
import toy_addition as toy
from exercises import (check_attention, check_attribution, check_carry, check_constraint, check_effect, check_gate,
                       check_hard_gates, check_patch_head, check_sum_rule, tour)
from exercises.conftest import reference
from geco import Geco
from model import GPT, GPTConfig
from support.weights import save_checkpoint

FOLDER = Path(__file__).parent.parent / "exercises"
CHECKS = sorted(FOLDER.glob("check_*.py"))


def run(*arguments):
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
                          capture_output=True, text=True, cwd=FOLDER.parent)
    return done.returncode, done.stdout


def test_the_projects_own_functions_are_right_answers():
    code, output = run(*CHECKS, "--reference")
    assert code == 0, output[-3000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= 63


@pytest.mark.skipif(any("raise NotImplementedError" not in (FOLDER / check.name.removeprefix("check_")).read_text()
                        for check in CHECKS), reason="some exercises are solved here")
def test_every_check_of_every_stub_fails_for_want_of_an_answer():
    code, output = run(*CHECKS, "--tb=line")
    failed = int(re.search(r"(\d+) failed", output)[1])
    assert code == 1 and "passed" not in output and "error" not in output.splitlines()[-1]
    assert len(re.findall(r":\d+: NotImplementedError$", output, re.MULTILINE)) == failed


def test_every_exercise_is_listed_with_its_check():
    listed = set(re.findall(r"`(\w+)\.py`", (FOLDER / "README.md").read_text()))
    stubs = {path.stem for path in FOLDER.glob("*.py")} - {"conftest", "__init__", "tour", *(c.stem for c in CHECKS)}
    assert listed >= stubs == {path.stem.removeprefix("check_") for path in CHECKS}


def test_the_tour_walks_through_a_trained_toy(tmp_path, monkeypatch, capsys):
    """Its numbers for one row against the plain definition, and a line of code at every step."""
    monkeypatch.setattr(sys, "argv", ["tour", "--run", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        tour.main()
    told = "lacks dense.pt, sparse.pt, log.csv, summary.json\nrun python toy_addition.py first"
    assert stopped.value.code == 2 and told in capsys.readouterr().err
    for name, gated in (("dense", False), ("sparse", True)):
        model = GPT(toy.toy_config(gated=gated, gate_bias=0.0), generator=torch.Generator().manual_seed(3))
        save_checkpoint(model, tmp_path / f"{name}.pt", layout="reversed")
    (tmp_path / "log.csv").write_text("step,seen,lam,active\n250,0.5,1.5,30\n500,0.25,3,20\n")
    (tmp_path / "summary.json").write_text('{"tau": 0.004}')
    tour.main()
    printed = capsys.readouterr().out
    model, idx = GPT.from_pretrained(tmp_path / "sparse.pt"), toy.addition_data()[0][[3628]]
    q, k, v = model.h[0].attn.heads(model.h[0].ln_1(model.embed(idx)))
    y, expected, active = gates.sparse_attention(q, k, v, 0.0)
    assert "36 + 28 = 64, three digits backwards: 460" in printed and "above tau, 0.004 nats" in printed
    drawn = [line.split()[2:] for line in printed.splitlines() if line.startswith("    draw ")]
    agree = sum(len(set(of_key)) == 1 for of_key in zip(*drawn, strict=True))
    assert len(drawn) == 3 and f"The draws agree at {agree} of 8 keys" in printed
    assert [line.split()[0] for line in printed.splitlines() if re.match(r" +\d+ +\d\.", line)] == ["250", "500"]
    begins = ", ".join(f"{x:.3f}" for x in y[0, 0, 7, :3])
    assert f"from these weights y begins {begins}; gates.py says {begins}" in printed
    assert f"{active.item():.1%} are open; expected were {expected.item():.1%}" in printed
    quoted = re.findall(r"^    (\w+\.py):(\d+)    (.+)$", printed, re.M)
    assert len(quoted) == 11 and (tmp_path / "tour.png").read_bytes().startswith(b"\x89PNG")
    for file, number, line in quoted:
        assert (FOLDER.parent / file).read_text().splitlines()[int(number) - 1].strip() == line


# ---- wrong answers to exercise 4, with one mistake each

class NewLam(Geco):
    def update(self, ce):
        super().update(ce)
        return self.lam


class AveragedValue(Geco):
    def objective(self, edges, ce):
        return edges + self.lam * (ce - ce.detach() + self.average)


class NoTau(Geco):
    def objective(self, edges, ce):
        return edges + self.lam * ce


class AverageFromZero(Geco):
    def update(self, ce):
        self.steps += 1
        return super().update(ce)


class WoundUp(Geco):
    @property
    def lam(self):    # in its range, but log_lam is not
        low, high = self.lam_range
        return math.exp(min(max(self.log_lam, math.log(low)), math.log(high)))

    def update(self, ce):
        used, before = self.lam, self.log_lam
        super().update(ce)
        self.log_lam = before + self.rate * self.average
        return used


class UpsideDown(Geco):
    def update(self, ce):
        return super().update(2 * self.tau - ce)


class Swallowing(Geco):
    def update(self, ce):
        return super().update(ce) if math.isfinite(ce) else self.lam


def unmet(answer):
    """The checks of exercise 4 that an answer does not pass."""
    names = []
    for name, check in vars(check_constraint).items():
        if name.startswith("test_"):
            marks = getattr(check, "pytestmark", [])
            for values in marks[0].args[1] if marks else [()]:
                try:
                    check(SimpleNamespace(Geco=answer), *(values if isinstance(values, tuple) else (values,)))
                except (AssertionError, pytest.fail.Exception):
                    names.append(name)
    return set(names)


@pytest.mark.parametrize("wrong, check", [
    (NewLam, "test_update_returns_the_lam_that_the_step_used"), (AveragedValue, "test_the_objective_is_the_lagrangian"),
    (NoTau, "test_the_objective_is_the_lagrangian"), (AverageFromZero, "test_the_average_starts_at_the_first_value"),
    (WoundUp, "test_it_stays_in_its_range_and_comes_back"), (UpsideDown, "test_it_rises_above_tau_and_falls_below"),
    (Swallowing, "test_a_broken_loss_is_not_swallowed")])
def test_wrong_answers_to_the_constraint_are_caught(wrong, check):
    assert check in unmet(wrong)


def test_a_right_answer_to_the_constraint_meets_every_check():
    assert unmet(Geco) == set()


# ---- and to the others

def gate_open_at_0(logits, sample):
    noise = torch.logit(torch.rand_like(logits), eps=1e-7) if sample else 0
    soft = torch.sigmoid(logits + noise)
    return (logits + noise >= 0).to(soft) + (soft - soft.detach())


def gate_of_tame_noise(logits, sample):
    noise = torch.logit(torch.rand_like(logits), eps=1e-2) if sample else 0
    soft = torch.sigmoid(logits + noise)
    return (logits + noise > 0).to(soft) + (soft - soft.detach())


def output_without_gradient(q, k, v, gate_bias, causal=True, sample=False):
    expected = gates.sparse_attention(q, k, v, gate_bias, causal)[1]
    y, _, active = gates.sparse_attention(q, k, v, gate_bias.detach(), causal, sample)
    return y, expected, active


def expected_without_gradient(*arguments, **options):
    y, expected, active = gates.sparse_attention(*arguments, **options)
    return y, expected.detach(), active


def output_of_another_draw(*arguments, **options):
    y = gates.sparse_attention(*arguments, **options)[0]
    return y, *gates.sparse_attention(*arguments, **options)[1:]


def output_of_hard_gates(q, k, v, gate_bias, causal=True, sample=False):
    y = gates.sparse_attention(q, k, v, gate_bias, causal, False)[0]
    return y, *gates.sparse_attention(q, k, v, gate_bias, causal, sample)[1:]


def picked_on_the_held_out(model, idx, train_rows, held_out):
    return toy.find_carry_edge(model, idx, held_out, held_out)


def carry_by_row(model, idx, train_rows, held_out):
    """As if a row's number said which sum it is."""
    return toy.find_carry_edge(model, toy.addition_data()[0], train_rows, held_out)


def absolute_after_the_mean(model, clean, corrupt, metric, small):
    scores, names = P.edge_scores(model, clean, corrupt, metric).mean(0).abs(), P.nodes(model.config)
    return {(s, d) for s, d in P.edge_names(model.config) if scores[names.index(s), names.index(d) - 1] < small
            and P.exact_edge_score(model, clean, corrupt, metric, s, d).mean().abs() > 10 * small}


def one_more_than_are_below(curve, share):
    n = int((curve < share).sum())
    return n if n < len(curve) else None


def a_hook_that_looks_is_left(model, clean, corrupt, layer, head):
    model.h[layer].attn.c_proj.register_forward_pre_hook(lambda *_: None)
    return reference("patch_head").patch_head(model, clean, corrupt, layer, head)


def strongest_with_its_sign(pattern, v, gradient):
    pairs = torch.einsum("hij,hid,hjd->hj", pattern, gradient, v)
    return divmod(int(pairs.argmax()), pairs.shape[1])


def gates_of_detached_scores(q, k, v, gate_bias, causal=True, sample=False):
    y, expected, active = gates.sparse_attention(q.detach(), k.detach(), v, gate_bias, causal, sample)
    weights = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y + weights - weights.detach(), expected, active


@pytest.mark.parametrize("check, wrong", [
    (check_gate.test_without_noise_a_gate_is_open_where_its_logit_is_positive, dict(sample_gates=gate_open_at_0)),
    (check_gate.test_gates_are_bits_and_open_with_probability_sigmoid, dict(sample_gates=gate_of_tame_noise)),
    *((check_attention.test_one_draw_makes_output_share_and_gradient, dict(sparse_attention=wrong)) for wrong in (
        output_without_gradient, expected_without_gradient, output_of_another_draw, output_of_hard_gates)),
    (check_attention.test_a_score_has_a_gradient_through_its_gate_and_through_the_softmax,
     dict(sparse_attention=gates_of_detached_scores)),
    (check_carry.test_it_is_picked_on_one_set_and_reported_on_the_other, dict(find_carry_edge=picked_on_the_held_out)),
    (check_carry.test_shares_are_those_of_the_held_out_sums, dict(find_carry_edge=carry_by_row)),
    (check_attribution.test_edges_that_open_a_gate_are_missed, dict(missed_edges=absolute_after_the_mean)),
    (check_effect.test_a_curve_may_come_down_again, dict(needed=one_more_than_are_below)),
    (check_patch_head.test_the_model_is_left_as_it_was, dict(patch_head=a_hook_that_looks_is_left)),
    (check_sum_rule.test_the_strongest_pair, dict(strongest_key=strongest_with_its_sign))])
def test_wrong_answers_are_caught(check, wrong):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=6, vocab_size=11, n_layer=2, n_head=3, n_embd=12)).double().eval()
    with pytest.raises(AssertionError):
        check(SimpleNamespace(**wrong), *[model] * ("model" in inspect.signature(check).parameters))


def test_an_answer_in_the_precision_of_its_logits_is_right():
    def expected(loss, g):
        p, total = torch.sigmoid(g), 0
        for bits in itertools.product((0.0, 1.0), repeat=len(g)):
            draw = torch.tensor(bits)
            total += loss(draw) * torch.where(draw > 0, p, 1 - p).prod()
        return total

    answer = SimpleNamespace(hard=reference("hard_gates").hard, expected=expected)
    torch.manual_seed(0)
    for name, check in vars(check_hard_gates).items():
        if name.startswith("test_"):
            check(answer)

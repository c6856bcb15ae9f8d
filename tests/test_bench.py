"""extras/bench.py: the table it prints, and that its memory column measures memory."""
import re
from types import SimpleNamespace

import pytest
import torch

from extras import bench
from model import GPT


def test_it_prints_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    took = {"plain": 0.030, "ours": 0.010, "dense": 0.004, "sparse": 0.012}
    monkeypatch.setattr(bench, "alternate", lambda functions, *_: {name: took[name] for name in functions})
    monkeypatch.setattr(bench, "training_step", lambda *_: None)
    mib = {"plain": 7, "ours": 3, "dense": 2}
    monkeypatch.setattr(bench, "in_own_process", lambda name, T, device: mib[name] << 20)
    monkeypatch.setattr("sys.argv", ["bench.py", "--lengths", "8", "16", "--repeats", "1", "--plain-up-to", "8",
                                     "--device", "cpu", "--plot", str(tmp_path / "new" / "bench.png")])
    bench.main()
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    assert [int(row[0]) for row in rows] == [8, 16]
    assert [float(cell) for cell in rows[0][1:4]] == [30, 10, 4]    # ms
    assert [float(cell.rstrip(" x")) for cell in rows[0][4:6]] == [3, 2.5]
    assert [float(cell) for cell in rows[0][6:]] == [7, 3, 2]    # MiB
    assert [row[n].strip() for row in rows[1:] for n in (1, 4, 6)] == ["-"] * 3      # the plain one only up to 8
    assert "dense 0.004 s (1.00x), sparse 0.012 s (3.00x)" in printed
    assert (tmp_path / "new" / "bench.png").stat().st_size > 10_000


def test_patching_on_a_small_model(monkeypatch, capsys):
    config = bench.GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=8)
    monkeypatch.setattr(bench, "GPTConfig", lambda: config)
    monkeypatch.setattr("sys.argv", ["bench", "--patching", "--device", "cpu"])
    bench.main()
    assert re.search(r": forward [\d.]+ s \(1.00x\), .*, head_scores [\d.]+ s \([\d.]+x\), edge_scores [\d.]+ s",
                     capsys.readouterr().out)


@pytest.mark.parametrize("gated", [False, True])
def test_a_training_step_trains(gated, monkeypatch):
    config, models = bench.GPTConfig(16, 50, 1, 2, 8, gated=gated), []
    monkeypatch.setattr(bench, "GPTConfig", lambda gated: config)
    monkeypatch.setattr(bench, "GPT", lambda config: models.append(GPT(config)) or models[0])
    step = bench.training_step(gated, "cpu")
    before = models[0].h[0].attn.c_attn.weight.clone()
    step()
    assert not torch.equal(models[0].h[0].attn.c_attn.weight, before)


def test_the_attentions_take_turns(monkeypatch):
    """By a clock that knows when each call starts and ends: the first of each, which is slow, does not count."""
    calls, ticks = [], iter([0, 9, 0, 9, 0, 1, 0, 5, 0, 3, 0, 7])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    times = bench.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, "cpu", repeats=2)
    assert calls == ["a", "b"] * 3 and times == {"a": 2, "b": 6}


def test_the_definition_needs_the_memory_of_its_matrices(monkeypatch):
    """At T = 512 one float32 score matrix of all heads of 8 sequences takes 96 MiB, and autograd keeps several. One
    thread: the libraries keep some memory for each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain, ours = (bench.in_own_process(name, 512, "cpu") / 2**20 for name in ("plain", "ours"))
    assert plain > 3 * 96 and ours < 96


def test_bad_input_is_told_in_a_line(monkeypatch, capsys):
    for arguments in (["--lengths", "0"], ["--repeats", "x"], ["--plot", "/proc/nothing/x.png"], ["--plot", "x.foo"]):
        monkeypatch.setattr("sys.argv", ["bench.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            bench.main()
        assert stopped.value.code == 2 and "Traceback" not in capsys.readouterr().err

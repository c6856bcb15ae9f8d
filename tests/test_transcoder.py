"""extras/transcoder.py against loops, a finite difference, and a small training that is stopped and resumed."""
import json

import pytest
import torch

from extras import transcoder as X
from model import GPT, GPTConfig
from support.data import byte_encoding, load_data, spread
from support.files import UserError
from support.weights import save_checkpoint


def random_transcoder(activation="topk", **sizes):
    torch.manual_seed(2)
    made = X.Transcoder(**{**dict(layers=3, width=6, features=7, k=2, activation=activation), **sizes}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
        made.in_scale.uniform_(0.5, 2)
        made.out_scale.uniform_(0.5, 2)
    return made


@pytest.mark.parametrize("activation, cross", [("topk", True), ("jump", True), ("topk", False)])
def test_features_and_outputs_by_hand(activation, cross):
    made, x = random_transcoder(activation, cross=cross), torch.randn(3, 5, 6, dtype=torch.float64)    # (L,T,C)
    features = [made.encode(l, x[l]) for l in range(3)]
    outputs = made.decode(features)
    for t in range(5):
        for l in range(3):
            h = [(made.encoder[l, f] @ x[l, t] * made.in_scale[l] + made.encoder_bias[l, f]).item() for f in range(7)]
            if activation == "topk":
                best = sorted(h)[-2:]
                expected = [v if v in best and v > 0 else 0 for v in h]
            else:
                expected = [v if v > made.log_threshold[l, f].exp() else 0 for f, v in enumerate(h)]
            assert features[l][t].tolist() == pytest.approx(expected)
            direction, constant = made.reader(l, 3)
            assert (direction @ x[l, t] + constant).item() == pytest.approx(h[3])
        for m in range(3):
            y = made.constant(m) + sum(features[l][t, f] * made.vectors(l, f)[m - l]
                                       for l in range(0 if cross else m, m + 1) for f in range(7))
            torch.testing.assert_close(outputs[m][t], y)
    assert [len(made.vectors(l, 0)) for l in range(3)] == ([3, 2, 1] if cross else [1, 1, 1])
    assert sum((a > 0).sum() for a in features) > 5


def test_the_sites_are_the_models_own():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12, gated=True)).eval()
    idx = torch.randint(11, (2, 8))
    sites = X.mlp_sites(model, idx)
    torch.testing.assert_close(model.unembed(sites.last), model(idx).logits)
    x = model.embed(idx)
    for l, block in enumerate(model.h):
        torch.testing.assert_close(sites.before[l], x)
        x = x + block.attn(block.ln_1(x))[0]
        torch.testing.assert_close(sites.between[l], x)
        torch.testing.assert_close(sites.outputs[l], block.mlp(block.ln_2(x)))
        x = x + sites.outputs[l]
    nothing = X.mlp_sites(model, idx, lambda l, x: torch.zeros_like(x))
    assert all(y.eq(0).all() for y in nothing.outputs) and not torch.equal(nothing.last, sites.last)


def test_the_loss_by_hand():
    """Nothing asleep: the plain sum of shares of variance. A sleeper adds what it misses of what is missed."""
    made = random_transcoder()
    sites = X.Sites([], [], *(list(torch.randn(3, 2, 5, 6, dtype=torch.float64)) for _ in range(2)), None)
    variance, asleep = torch.tensor([0.5, 1.0, 2.0]), torch.zeros(3, 7, dtype=torch.bool)
    loss, active = X.loss_of(made, sites, variance, asleep, 0.0)
    features = [made.encode(l, x) for l, x in enumerate(sites.inputs)]
    expected = sum((((y - guess) * scale) ** 2).mean() / v for y, guess, scale, v in
                   zip(sites.outputs, made.decode(features), made.out_scale, variance))
    assert loss.item() == pytest.approx(expected.item())
    assert torch.equal(active, torch.stack([(a > 0).any(0).any(0) for a in features]))
    l, f = (~active).nonzero()[0].tolist() if (~active).any() else (0, 0)
    asleep[l, f] = True
    with torch.no_grad():
        made.encoder_bias[l, f] -= made.pre_activations(l, sites.inputs[l])[..., f].max() - 0.01
    more, _ = X.loss_of(made, sites, variance, asleep, 0.0)
    features = [made.encode(m, x) for m, x in enumerate(sites.inputs)]
    expected = 0
    for m, (y, v) in enumerate(zip(sites.outputs, variance)):
        missed = y * made.out_scale[m] - made.scaled_output(m, features)
        h = made.pre_activations(l, sites.inputs[l])[..., f, None].relu()
        helper = h * made.decoder[l][m - l, f] if m >= l else 0
        expected += (missed.square().mean() + X.HELP * (missed - helper).square().mean()) / v
    assert more.item() == pytest.approx(expected.item())
    assert torch.autograd.grad(more, made.encoder)[0][l, f].abs().max() > 0


def test_the_price_of_an_active_feature():
    """Of JumpReLU: sparsity times the number of active features a token, summed over the layers."""
    made = random_transcoder("jump")
    sites = X.Sites([], [], *(list(torch.randn(3, 2, 5, 6, dtype=torch.float64)) for _ in range(2)), None)
    nothing = torch.ones(3), torch.zeros(3, 7, dtype=torch.bool)
    free, dear = (X.loss_of(made, sites, *nothing, price)[0].item() for price in (0.0, 0.3))
    active = sum((made.encode(l, x) > 0).sum().item() for l, x in enumerate(sites.inputs)) / 10
    assert dear - free == pytest.approx(0.3 * active) and active > 1


def test_the_threshold_of_jump_relu_has_the_gradient_of_a_smoothed_step():
    """On average over h evenly spread around it, the gradient is that of the share above the threshold."""
    threshold = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)
    h = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None].expand(-1, 2)
    X.Jump.apply(h, threshold).mean(0).sum().backward()
    assert threshold.grad.tolist() == pytest.approx([-1, -1], rel=1e-3)    # d/dt of 1 - t
    assert X.Jump.apply(h, threshold).mean(0).tolist() == pytest.approx([0.6, 0.3], abs=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text.txt").write_text("\n\n\n".join(f"the cat sat on mat {n} and saw {n} hats" for n in range(400)))
    model = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16, gated=True),
                generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.ndim == 2 else 1)
    save_checkpoint(model, folder / "model.pt")
    return folder


def command(tiny, monkeypatch, out, *more):
    monkeypatch.setenv("TORCH_HOME", str(tiny / "home"))
    monkeypatch.setattr("sys.argv", ["transcoder", "--model", str(tiny / "model.pt"), "--data", str(tiny / "text.txt"),
                                     "--features", "40", "--k", "6", "--steps", "60", "--windows", "8", "--device",
                                     "cpu", "--out", str(out), *more])
    X.main()


def ce_with(mlp, model, idx, targets):
    """The model's CE with mlp(l, x) for the output of the MLP of layer l, where x is what that reads."""
    hooks = [block.mlp.register_forward_hook(lambda _, inputs, __, l=l: mlp(l, *inputs))
             for l, block in enumerate(model.h)]
    ce = model(idx, targets).loss.item()
    for hook in hooks:
        hook.remove()
    return ce


def test_the_command_learns_and_says_how_well(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(X, "AT_ONCE", 48)    # three of the eight windows
    command(tiny, monkeypatch, tmp_path / "a", "--steps", "300")
    found, printed = json.loads((tmp_path / "a" / "summary.json").read_text()), capsys.readouterr().out
    model = GPT.from_pretrained(tiny / "model.pt")
    made = X.load_transcoder(str(tmp_path / "a"), model)
    unseen = spread(load_data(str(tiny / "text.txt"), byte_encoding())[1], 16, 8)
    before = X.quality(model, X.Transcoder(2, 16, 40, 6), *unseen)
    assert min(found["explained"]) > max(before["explained"])
    assert made.options == dict(layers=2, width=16, features=40, k=6, activation="topk", cross=True)
    sites = X.mlp_sites(model, unseen[0])
    features = [made.encode(l, x) for l, x in enumerate(sites.inputs)]
    for l, (y, guess) in enumerate(zip(sites.outputs, made.decode(features))):
        y, guess = (t.detach().flatten(0, 1).double().numpy() for t in (y, guess))
        explained = 1 - ((y - guess) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert found["explained"][l] == pytest.approx(explained, abs=1e-4)
    assert found["ce"] == pytest.approx(model(*unseen).loss.item(), abs=1e-4)
    active = torch.stack([(a > 0).sum((0, 1)) for a in features])                    # (L,F)
    assert found["dead"] == pytest.approx((active == 0).double().mean().item()) and found["dead"] < 1
    assert found["active"] == pytest.approx(active.sum().item() / (8 * 16 * 2)) and 1 < found["active"] <= 6
    seen = []

    def by_features(l, x):
        seen[l:] = [made.encode(l, x)]
        return made.constant(l) + sum(a @ torch.stack([made.vectors(m, f)[l - m] for f in range(40)])
                                      for m, a in enumerate(seen))

    assert found["ce_features"] == pytest.approx(ce_with(by_features, model, *unseen), abs=1e-4)
    means = [y.mean((0, 1)) for y in sites.outputs]
    assert found["ce_means"] == pytest.approx(ce_with(lambda l, x: means[l].expand_as(x), model, *unseen), abs=1e-4)
    gap = found["ce_means"] - found["ce"]
    assert found["recovered"] == pytest.approx((found["ce_means"] - found["ce_features"]) / gap)
    assert f"{found['ce']:.4f}" in printed and f"{found['recovered']:.1%} of the gap recovered" in printed
    lines = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert lines[0] == "step,loss,asleep" and [line.split(",")[0] for line in lines[1:]] == ["100", "200", "300"]


def test_stopped_and_resumed_is_as_if_never_stopped(tiny, tmp_path, monkeypatch, capsys, one_thread):
    monkeypatch.setattr(X, "SAVE_EVERY", 20)
    monkeypatch.setattr(X, "SLEEPS", 2)
    one = "--k", "1"    # and few features: or in so short a run none would be asleep
    command(tiny, monkeypatch, tmp_path / "whole", *one)
    step = torch.optim.Adam.step
    calls = []

    def stopping(self, *args, **options):
        calls.append(1)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", stopping)
    with pytest.raises(SystemExit, match="stopped"):
        command(tiny, monkeypatch, tmp_path / "parts", *one)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    command(tiny, monkeypatch, tmp_path / "parts", *one)

    def full(*_):
        raise RuntimeError("file write failed\nC++ trace")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        command(tiny, monkeypatch, tmp_path / "full", *one)
    told = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2 and "last.pt: file write failed\nmake room" in told and "C++" not in told
    assert not (tmp_path / "full" / "log.csv").exists()
    for name in ("log.csv", "summary.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    ours, theirs = (X.read(tmp_path / name / "last.pt", GPT.from_pretrained(tiny / "model.pt"), "cpu")["idle"]
                    for name in ("parts", "whole"))
    assert torch.equal(ours, theirs) and ours.max() > 0
    with pytest.raises(SystemExit) as stopped:
        command(tiny, monkeypatch, tmp_path / "whole", *one, "--lr", "0.1")
    assert stopped.value.code == 2 and "holds a run with other lr\npass another --out" in capsys.readouterr().err


def test_what_is_no_transcoder_of_the_model_is_told(tmp_path):
    other = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=12))
    made = X.Transcoder(2, 12, 8)
    rest = dict.fromkeys(("step", "optimizer", "rows", "idle", "variance"))
    torch.save({"model": made.state_dict(), "options": made.options, "of": X.fingerprint(other), **rest},
               tmp_path / "last.pt")
    assert torch.equal(X.load_transcoder(str(tmp_path), other).encoder, made.encoder)
    with torch.no_grad():
        other.h[1].mlp.c_fc.bias[5] += 1
    with pytest.raises(UserError, match="of a model with other weights\ntrain one for this model"):
        X.load_transcoder(str(tmp_path), other)
    (tmp_path / "last.pt").write_bytes(b"PK")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no transcoder"):
            X.load_transcoder(str(folder), other)

"""extras/llama.py and tokenizer.py against a Llama in numpy and byte-pair encoding written out."""
import json
import math

import numpy as np
import pytest
import torch

import patching as P
from extras import train_llama
from extras.llama import Llama, load_model
from extras.tokenizer import bytes_of_characters, encoding_of, tokenizer_encoding
from model import GPT, allowed_edges
from support import report
from support.files import UserError
from support.weights import save_checkpoint
from tests.test_model import gpt2_weights, write_safetensors

# Of the two frequencies below, 1 and 0.1, one is kept, one interpolated with 64 positions, slowed down with 16.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
          "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 31,
          "max_position_embeddings": 64, "rope_theta": 100.0, "rms_norm_eps": 0.01, "hidden_act": "silu",
          "tie_word_embeddings": True}
TOKENS = [3, 1, 4, 15, 9, 26, 5, 30, 0, 7, 7, 2]


def weights(config, seed=0):
    """Random tensors under Hugging Face's names."""
    rng, C, M, D = np.random.default_rng(seed), config["hidden_size"], config["intermediate_size"], 4
    G = config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], C)}
    norms = config["architectures"] == ["LlamaForCausalLM"]
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        shapes |= {at + "self_attn.q_proj.weight": (C, C), at + "self_attn.k_proj.weight": (G * D, C),
                   at + "self_attn.v_proj.weight": (G * D, C), at + "self_attn.o_proj.weight": (C, C),
                   at + "mlp.gate_proj.weight": (M, C), at + "mlp.up_proj.weight": (M, C),
                   at + "mlp.down_proj.weight": (C, M)}
        if norms:
            shapes |= {at + "input_layernorm.weight": (C,), at + "post_attention_layernorm.weight": (C,)}
    if norms:
        shapes["model.norm.weight"] = (C,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], C)
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def numpy_llama(w, config, tokens):
    """The forward pass in float64, one head and one pair of rotated numbers at a time. Returns logits (T,V)."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    T, H, G, D = len(tokens), config["num_attention_heads"], config["num_key_value_heads"], 4

    def norm(x, at):
        if config["architectures"] == ["OlmoForCausalLM"]:
            return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * w[at + ".weight"]

    def frequency(n):
        f = config["rope_theta"] ** (-2 * n / D)
        if "rope_scaling" in config:
            s = config["rope_scaling"]
            length = 2 * math.pi / f
            if length > s["original_max_position_embeddings"] / s["low_freq_factor"]:
                return f / s["factor"]
            if length > s["original_max_position_embeddings"] / s["high_freq_factor"]:
                smooth = (s["original_max_position_embeddings"] / length - s["low_freq_factor"]) / (
                    s["high_freq_factor"] - s["low_freq_factor"])
                return (1 - smooth) * f / s["factor"] + smooth * f
        return f

    def rotate(x):    # (T,D): complex numbers x_n + i x_(n + D/2), turned
        z = x[:, :D // 2] + 1j * x[:, D // 2:]
        z = z * np.exp(1j * np.outer(np.arange(T), [frequency(n) for n in range(D // 2)]))
        return np.concatenate((z.real, z.imag), -1)

    x = w["model.embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        at, out = f"model.layers.{n}.", []
        u = norm(x, at + "input_layernorm")
        q, k, v = (u @ w[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
        for h in range(H):
            g = h * G // H
            qh, kh, vh = (t[:, i * D:(i + 1) * D] for t, i in ((q, h), (k, g), (v, g)))
            scores = np.where(np.tri(T) > 0, rotate(qh) @ rotate(kh).T / math.sqrt(D), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out.append(p / p.sum(-1, keepdims=True) @ vh)
        x = x + np.concatenate(out, -1) @ w[at + "self_attn.o_proj.weight"].T
        u = norm(x, at + "post_attention_layernorm")
        gate = u @ w[at + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (u @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def write(folder, config, w, sharded=False):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if sharded:
        names = sorted(w)
        weight_map = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
        for shard in set(weight_map.values()):
            write_safetensors(folder / shard, {name: w[name] for name in names if weight_map[name] == shard})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        write_safetensors(folder / "model.safetensors", w)
    return folder


@pytest.mark.parametrize("change", [
    {}, {"tie_word_embeddings": False}, {"num_key_value_heads": 6}, {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    {"architectures": ["OlmoForCausalLM"], "model_type": "olmo", "tie_word_embeddings": False},
    {"model_type": None},    # told by its architecture
])
@pytest.mark.parametrize("sharded", [False, True])
def test_logits_are_those_of_a_numpy_llama(tmp_path, change, sharded):
    config = CONFIG | change
    w = weights(config)
    model = load_model(write(tmp_path / "hf", config, w, sharded))
    assert isinstance(model, Llama) and not model.training
    expected = numpy_llama(w, config, TOKENS)
    logits = model(torch.tensor([TOKENS])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    save_checkpoint(model, tmp_path / "ours.pt")
    again = load_model(tmp_path / "ours.pt", gated=True, gate_bias=100.0)    # all gates open: dense
    out = again(torch.tensor([TOKENS]))
    np.testing.assert_allclose(out.logits[0].detach().numpy(), expected, atol=1e-5 * np.abs(expected).max())
    assert out.active_edges.shape == (2, 6) and out.active_edges.min() == 1    # per query head


def test_gates_are_counted_and_maps_are_weights(tmp_path):
    folder = write(tmp_path / "hf", CONFIG, weights(CONFIG))
    model = load_model(folder, gated=True, gate_bias=0.0, block_size=12)
    idx = torch.tensor([TOKENS, TOKENS[::-1]])
    maps, out = model.attention_maps(idx), model(idx)
    shares = (maps > 0).sum((-2, -1)).double().mean(1) / 78
    torch.testing.assert_close(out.active_edges.double(), shares, atol=1e-6, rtol=0)
    assert 0.1 < shares.mean() < 0.9 and allowed_edges(model.config) == 2 * 6 * 78
    x = torch.tensor(TOKENS)[None]
    later = x.clone()
    later[0, 7:] = 5
    assert torch.equal(model(x).logits[:, :7], model(later).logits[:, :7])    # causal


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_copies_for_each_head_are_the_same_function(tmp_path, kv_heads):
    """Head h of the copies is head h of an ordinary pass over copy h, in q, k and v."""
    config = CONFIG | {"num_key_value_heads": kv_heads}
    attn = load_model(write(tmp_path / "hf", config, weights(config))).double().h[1].attn
    x = torch.randn(2, 6, 5, 24, dtype=torch.float64)                                # (B,H,T,C)
    ordinary = [attn.heads(x[:, h]) for h in range(6)]
    for each, found in zip(zip(*ordinary), attn.heads(x)):                           # q, k, v
        expected = torch.stack([t[:, h] for h, t in enumerate(each)], dim=1)         # (B,H,T,D)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert (expected - each[0]).abs().max() > 0.1                                # the copies do differ


def test_all_that_makes_the_scores(tmp_path):
    model = load_model(write(tmp_path / "hf", CONFIG, weights(CONFIG)), gated=True)
    attn = model.h[0].attn
    assert [id(p) for p in attn.score_weights()] == [id(attn.q_proj.weight), id(attn.k_proj.weight)]
    attn.k_proj.requires_grad_(False)
    assert [id(p) for p in attn.score_weights()] == [id(attn.q_proj.weight)]


def test_the_family_is_told_by_the_files(tmp_path):
    """Hugging Face's by config.json, GPT-2's also without one; a checkpoint of ours by its config alone."""
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    write_safetensors(gpt / "model.safetensors", gpt2_weights())
    assert type(load_model(gpt, n_head=3)) is GPT
    for hf in ({"n_head": 3}, {"n_head": 3, "model_type": "gpt2"}, {"n_head": 3, "architectures": ["GPT2LMHeadModel"]}):
        (gpt / "config.json").write_text(json.dumps(hf))
        assert type(load_model(gpt)) is GPT
    llama = load_model(write(tmp_path / "llama", CONFIG, weights(CONFIG)))
    for model, beside in ((load_model(gpt), tmp_path / "llama"), (llama, gpt)):    # the other family's config.json
        save_checkpoint(model, beside / "ours.pt")
        assert type(load_model(beside / "ours.pt")) is type(model)
    with pytest.raises(UserError, match="GPTConfig has no field n_hidden, n_kv_head"):
        GPT.from_pretrained(gpt / "ours.pt")


@pytest.mark.parametrize("change, message", [
    ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
     r"architectures=\['MistralForCausalLM'\]\nexpected GPT-2's layout, or one of LlamaForCausalLM, OlmoForCausalLM$"),
    ({"architectures": None}, "architectures=None\nexpected GPT-2's"),    # model_type llama alone is not enough
    ({"attention_bias": True}, "attention_bias=True\nonly attention_bias=False"),
    ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ({"head_dim": 8}, "head_dim=8"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling=.*yarn"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling=.*factor"),
    ({"rope_scaling": LLAMA3 | {"factor": None} | {"partial_rotary_factor": 0.5}}, "rope_scaling="),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling=(.|\n)*with factor, high_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"num_attention_heads": 0}, "num_attention_heads=0\nexpected a number of 1 or more"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0\nexpected a number of 1 or more"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps=1e-5\nexpected a number"),
    ({"num_attention_heads": "6"}, "num_attention_heads=6\nexpected"),
    ({"rope_theta": "1e4"}, "rope_theta=1e4\nexpected a number"),
    ({"rope_scaling": {"rope_theta": "1e4"}}, "rope_scaling=.*1e4"),
    ({"intermediate_size": 48}, "gate_proj.weight has shape"),
    ({"num_key_value_heads": 4}, "no Llama has 24 = n_embd, 6 = n_head, 4 = n_kv_head"),
    ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
])
def test_what_is_not_implemented_is_named(tmp_path, change, message):
    folder = write(tmp_path / "hf", CONFIG | change, weights(CONFIG))
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_config_without_a_size_is_named(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "vocab_size"}
    with pytest.raises(UserError, match="config.json has vocab_size=None"):
        load_model(write(tmp_path / "hf", config, weights(CONFIG)))


def test_two_models_of_one_config_do_not_share_it(tmp_path):
    config = load_model(write(tmp_path / "hf", CONFIG, weights(CONFIG))).config
    one, other = Llama(config), Llama(config)
    one.set_gates(True)
    assert one.config.gated and not other.config.gated and not config.gated


def test_what_config_json_leaves_out_has_the_familys_defaults(tmp_path):
    """As many key heads as query heads, theta 10,000, eps 1e-6, a head of its own."""
    explicit = CONFIG | {"num_key_value_heads": 6, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
                         "tie_word_embeddings": False}
    w = weights(explicit)
    short = {key: value for key, value in CONFIG.items() if key not in (
        "num_key_value_heads", "rope_theta", "rms_norm_eps", "tie_word_embeddings")}
    model = load_model(write(tmp_path / "hf", short, w | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}))    # a constant of old checkpoints
    expected = numpy_llama(w, explicit, TOKENS)
    logits = model(torch.tensor([TOKENS])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_newer_files_keep_theta_among_the_rope_parameters(tmp_path):
    short = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    folder = write(tmp_path / "hf", short | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
                   weights(CONFIG))
    logits = load_model(folder)(torch.tensor([TOKENS])).logits[0].detach().numpy()
    expected = numpy_llama(weights(CONFIG), CONFIG, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    both = short | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "rope_scaling": LLAMA3}
    read = load_model(write(tmp_path / "both", both, weights(CONFIG))).config
    assert read.rope_theta == 100.0 and read.rope_scaling["factor"] == LLAMA3["factor"]


def test_broken_files_are_named(tmp_path):
    w = weights(CONFIG)
    with pytest.raises(UserError, match="wte.weight is missing"):
        load_model(write(tmp_path / "a", CONFIG, {k: t for k, t in w.items() if "embed" not in k}))
    with pytest.raises(UserError, match="its head is not its embedding"):
        load_model(write(tmp_path / "b", CONFIG, w | {
            "lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="reads at most 64 positions, not 65"):
        load_model(write(tmp_path / "c", CONFIG, w), block_size=65)


# ---- Tokenizers

def test_bytes_are_written_as_gpt2_writes_them():
    """Pairs from its published vocabulary."""
    byte_of = bytes_of_characters()
    assert len(byte_of) == len(set(byte_of.values())) == 256
    published = {"!": 33, "~": 126, "a": 97, "\u0120": 32, "\u010a": 10, "\u0109": 9, "\u0100": 0, "\u0143": 173,
                 "\u00a1": 161, "\u00ff": 255}
    assert {c: byte_of[c] for c in published} == published


TEXT = "The cat sat on the mat, and the cat's hat was on the cat. In 1984 the 12 cats ate the rats!  Überall\n\n sat"


def trained_tokenizer(merges=40):
    """A byte-level tokenizer.json, its merges learned from TEXT by the textbook algorithm."""
    character = {b: c for c, b in bytes_of_characters().items()}
    vocab = {character[b]: n for n, b in enumerate(sorted(character))}
    words, pairs = [[character[b] for b in word.encode()] for word in TEXT.replace(" ", "\0 ").split("\0")], []
    for _ in range(merges):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=counts.get)
        pairs.append(best)
        vocab["".join(best)] = len(vocab)
        words = [merge(word, best) for word in words]
    special = {"content": "<|endoftext|>", "id": len(vocab), "special": True}
    return {"normalizer": None, "added_tokens": [special],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in pairs]}}


def merge(word, pair):
    out = []
    for c in word:
        if out and (out[-1], c) == pair:
            out[-1] += c
        else:
            out.append(c)
    return out


def by_hand(tokenizer, pieces):
    """Byte-pair encoding of pieces that are split already: apply the merges in order."""
    character, tokens = {b: c for c, b in bytes_of_characters().items()}, []
    for piece in pieces:
        word = [character[b] for b in piece.encode()]
        for pair in tokenizer["model"]["merges"]:
            word = merge(word, tuple(pair.split(" ")))
        tokens += [tokenizer["model"]["vocab"][t] for t in word]
    return tokens


PIECES = ["The", " cat", "'s", " hat", " ", "1", "9", "8", "4", ",", " ", "1", "2", "  ", "1", " cats", "!", " ",
          " Über", "\n", "\n", " sat", " "]


@pytest.mark.parametrize("listed", [False, True])
def test_a_tokenizer_is_its_merges(tmp_path, listed):
    tokenizer = trained_tokenizer()
    expected = by_hand(tokenizer, PIECES)
    if listed:    # newer files write a merge as a list
        tokenizer["model"]["merges"] = [pair.split(" ") for pair in tokenizer["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoding = tokenizer_encoding(tmp_path / "tokenizer.json")
    assert encoding.encode_ordinary("".join(PIECES)) == expected and len(expected) < len("".join(PIECES))
    assert encoding.decode(encoding.encode_ordinary(TEXT)) == TEXT
    assert encoding.eot_token == 296 and encoding.n_vocab == 297


def test_bytes_that_a_vocabulary_lacks_are_left_out(tmp_path):
    """SmolLM2's lacks 21 of them. Hugging Face's tokenizer skips them too."""
    tokenizer = trained_tokenizer()
    character = {b: c for c, b in bytes_of_characters().items()}
    for byte in (4, 241):
        del tokenizer["model"]["vocab"][character[byte]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoding = tokenizer_encoding(tmp_path / "tokenizer.json")
    assert encoding.encode_ordinary("The\x04 cat") == by_hand(trained_tokenizer(), ["The", " cat"])
    assert encoding.encode_ordinary_batch(["a\x04b", "c"]) == [by_hand(trained_tokenizer(), [t]) for t in ("ab", "c")]
    assert encoding.n_vocab == 297


def test_added_words_are_found_in_text_before_all_else(tmp_path):
    """As OLMo's runs of spaces: the longest first."""
    tokenizer = trained_tokenizer()
    for n, word in enumerate(("  ", "    ", "at")):
        tokenizer["added_tokens"].append({"content": word, "id": 297 + n, "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoding, plain = tokenizer_encoding(tmp_path / "tokenizer.json"), trained_tokenizer()
    a, b, c = (by_hand(plain, [letter]) for letter in "abc")
    assert encoding.encode_ordinary("a      b  cat") == [*a, 298, 297, *b, 297, *c, 299]
    assert encoding.decode(encoding.encode_ordinary("a      b  cat")) == "a      b  cat"
    assert encoding.encode_ordinary("<|endoftext|>") != [296]    # special ones are not


def test_composed_letters_and_what_lies_between_matches(tmp_path):
    """NFC makes one letter of e and its accent. And a Split keeps the text between its matches, each run as a piece."""
    tokenizer = trained_tokenizer() | {"normalizer": {"type": "NFC"}}
    tokenizer["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    encoding = tokenizer_encoding(tmp_path / "tokenizer.json")
    pieces = ["the cat", "1", "9", " caf\u00e9 sat"]
    assert encoding.encode_ordinary("the cat19 cafe\u0301 sat") == by_hand(tokenizer, pieces)
    assert by_hand(tokenizer, ["\u00e9"]) != by_hand(tokenizer, ["e\u0301"])


def test_a_template_is_mentioned(tmp_path):
    tokenizer = trained_tokenizer() | {"post_processor": {"type": "TemplateProcessing", "single": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.warns(UserWarning, match="puts special tokens around a text"):
        tokenizer_encoding(tmp_path / "tokenizer.json")


def test_a_gpt2_may_bring_its_tokenizer_too(tmp_path):
    weights_, folder = gpt2_weights(), tmp_path / "hf"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", weights_)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 3}))
    (folder / "tokenizer.json").write_text(json.dumps(trained_tokenizer()))
    model = load_model(folder)
    with pytest.raises(UserError, match="has 297 tokens, the model 31"):
        encoding_of(model)


def test_a_model_brings_its_tokenizer(tmp_path):
    config = CONFIG | {"vocab_size": 297}
    folder = write(tmp_path / "hf", config, weights(config))
    (folder / "tokenizer.json").write_text(json.dumps(trained_tokenizer()))
    model = load_model(folder)
    save_checkpoint(model, tmp_path / "ours.pt")
    for loaded in (model, load_model(tmp_path / "ours.pt")):
        assert encoding_of(loaded).n_vocab == 297
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer, is gone\nput it back"):
        encoding_of(model)
    del model.notes["tokenizer"]
    with pytest.raises(UserError, match="no encoding is known for a vocabulary of 297 tokens\n.*put a tokenizer.json"):
        encoding_of(model)


@pytest.mark.parametrize("at, value, message", [
    (("normalizer",), {"type": "Lowercase"}, "the normalizer Lowercase"),
    (("pre_tokenizer",), {"type": "Metaspace"}, "the pre-tokeniser Metaspace"),
    (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "the pre-tokeniser Digits \\+ ByteLevel"),
    (("model", "type"), "Unigram", "a Unigram model"),
    (("model", "byte_fallback"), True, "byte_fallback=True"),
    (("model", "merges", 0), "a b", "numbers do not follow its merges"),
    (("added_tokens",), [], "a vocabulary without <|endoftext|>"),
    (("model", "vocab", "Xq"), 300, "a token without a merge \\('Xq'\\)"),
    (("model", "vocab", "Xq"), 7, "numbers do not follow its merges"),
    (("model", "vocab", "\u4e00"), 300, "the character '\u4e00' in the vocabulary"),
    (("model", "unk_token"), "<unk>", "unk_token=<unk>"),
    (("model",), None, "is no tokenizer.json .AttributeError.*\ndownload it again"),
    (("pre_tokenizer", "pretokenizers"), [], "is no tokenizer.json .IndexError"),
    (("pre_tokenizer", "pretokenizers", 0), {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "("}},
     "the pre-tokeniser Split"),
    (("pre_tokenizer", "pretokenizers"), [
        {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "a"}, "invert": True},
        {"type": "ByteLevel", "use_regex": False}], "the pre-tokeniser Split \\+ ByteLevel"),
    (("added_tokens", 0), {"content": "<x>", "id": 296, "lstrip": True}, "lstrip of the added token '<x>'"),
])
def test_a_tokenizer_that_is_not_implemented_is_named(tmp_path, at, value, message):
    tokenizer = trained_tokenizer()
    part = tokenizer
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        tokenizer_encoding(tmp_path / "tokenizer.json")


# ---- train.py and patching.py on it

def test_patching_works_on_it(tmp_path):
    """Two tokens of nearly the same embedding: the first-order scores are then the exact ones."""
    model = load_model(write(tmp_path / "hf", CONFIG, weights(CONFIG)), gated=True, gate_bias=0.5).double()
    with torch.no_grad():
        model.wte.weight[2] = model.wte.weight[1] + 1e-6 * torch.randn(24, dtype=torch.float64)
    corrupt = torch.randint(3, 31, (2, 7))
    corrupt[:, 2], clean = 1, corrupt.clone()
    clean[:, 2] = 2

    def metric(logits):
        return logits[:, -1, 5]

    scores, names = P.edge_scores(model, clean, corrupt, metric), P.nodes(model.config)
    largest = (P.edge_ranks(scores.abs().mean(0), model.config) < 10).nonzero().tolist()
    for s, d in largest:
        exact = P.exact_edge_score(model, clean, corrupt, metric, names[s], names[d + 1])
        torch.testing.assert_close(scores[:, s, d], exact, rtol=1e-3, atol=1e-12)
    every = P.edge_mask(model.config)
    with torch.no_grad():
        m_clean, m_corrupt = (metric(model(tokens).logits) for tokens in (clean, corrupt))
    kept = [P.kept_circuit(model, clean, corrupt, metric, edges) for edges in (every, ~every)]
    torch.testing.assert_close(torch.stack(kept), torch.stack((m_clean, m_corrupt)), rtol=0, atol=1e-12)
    assert (m_clean - m_corrupt).abs().min() > 1e-9


def test_patched_heads_and_edges_are_those_of_the_copies(tmp_path):
    """With heads that share keys too, a run in which each head reads its own copy of the stream is the model's run."""
    model = load_model(write(tmp_path / "hf", CONFIG, weights(CONFIG)), gated=True, gate_bias=0.5).double()
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        copied = P.forward(model, tokens, read=P.copies)
        torch.testing.assert_close(copied, model(tokens).logits, rtol=0, atol=1e-12)


def command(monkeypatch, home, *arguments):
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr("sys.argv", ["train_llama.py", *map(str, arguments)])
    train_llama.main()


@pytest.mark.parametrize("more", [[], ["--lora-rank", "2"]])
def test_training_works_on_it(tmp_path, monkeypatch, more):
    config = CONFIG | {"vocab_size": 297}
    folder = write(tmp_path / "hf", config, weights(config))
    (folder / "tokenizer.json").write_text(json.dumps(trained_tokenizer()))
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"{n} {TEXT}" for n in range(100)))
    if more:    # the pictures have been drawn once
        for name in ("draw_curve", "draw_heads", "draw_attention"):
            monkeypatch.setattr(report, name, lambda *_, **__: None)

    home, out = tmp_path / "home", tmp_path / "run"
    command(monkeypatch, home, "--init", folder, "--data", tmp_path / "text.txt", "--out", out, "--steps", 4,
            "--eval-every", 2, "--tau", 9, "--batch-size", 4, "--block-size", 16, "--lr", 0.01, "--device", "cpu",
            *more)
    before, after = load_model(folder).state_dict(), load_model(out / "last.pt")
    assert after.state_dict().keys() == before.keys() | {f"h.{n}.attn.gate_bias" for n in range(2)}
    changed = {name.split(".", 2)[2] for name, t in before.items()
               if name.startswith("h.0") and not torch.equal(t, after.state_dict()[name])}
    assert changed == {"attn.q_proj.weight", "attn.k_proj.weight"} if more else "mlp.up_proj.weight" in changed
    assert after.config.gated and encoding_of(after).n_vocab == 297 and (out / "attention.png").exists() == (not more)
    log = (out / "log.csv").read_text()
    command(monkeypatch, home, "--resume", out)                      # the run is over: nothing changes
    assert (out / "log.csv").read_text() == log


@pytest.mark.parametrize("scratch, options, told", [
    (False, ["--lora-all"], "pass --lora-rank 8 with it"), (True, ["--lora-rank", "8"], "need a trained model")])
def test_adapters_that_cannot_be(tmp_path, monkeypatch, capsys, scratch, options, told):
    folder = write(tmp_path / "hf", CONFIG | {"vocab_size": 297}, weights(CONFIG | {"vocab_size": 297}))
    (folder / "tokenizer.json").write_text(json.dumps(trained_tokenizer()))
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"{n} {TEXT}" for n in range(100)))
    monkeypatch.setattr("train.gpt2_encoding", lambda: tokenizer_encoding(folder / "tokenizer.json"))
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, tmp_path / "home", "--init", "scratch" if scratch else folder, "--data",
                tmp_path / "text.txt", "--out", tmp_path / "run", "--block-size", 16, "--device", "cpu", *options)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and told in errors
    assert len(errors.partition("error:")[2].strip().splitlines()) == 2 and not list((tmp_path / "run").iterdir())

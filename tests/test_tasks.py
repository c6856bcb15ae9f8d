"""extras/tasks.py: what the sentences say, read back as text, and metrics by hand."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import patching
from extras import tasks
from support.data import byte_encoding, gpt2_encoding
from support.files import UserError
from toy_addition import ALPHABET, addition_data, split

VOCABULARY = Path(__file__).resolve().parents[2] / "shared" / "tiktoken"    # GPT-2's, if it lies beside the checkout


class Words:
    """Stands in for GPT-2's vocabulary where that is not at hand: a token for every word and for every two digits, with
    the space before it, and for every other character."""
    name = "words"

    def __init__(self):
        self.pieces = []

    def encode_ordinary(self, text):
        found = re.findall(r" ?[A-Za-z]+| ?\d\d|\s+|[^\w\s]", text)
        assert "".join(found) == text
        self.pieces += dict.fromkeys(piece for piece in found if piece not in self.pieces)
        return [self.pieces.index(piece) for piece in found]

    encode = encode_ordinary

    def decode(self, tokens):
        return "".join(self.pieces[t] for t in tokens)


@pytest.fixture(params=["words", "gpt2"])
def gpt2(request, monkeypatch):
    if request.param == "words":
        words = Words()
        monkeypatch.setattr(tasks, "gpt2_encoding", lambda: words)
        return words
    if not VOCABULARY.is_dir():
        pytest.skip("GPT-2's vocabulary is not here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
    return gpt2_encoding()


def texts(encoding, tokens):
    return [encoding.decode(row) for row in tokens.tolist()]


def logits_of(row, tokens_and_values, V=50257):
    """Logits (1,T,V) whose last position has these values; elsewhere, at earlier positions, they are noise."""
    logits = torch.randn(1, 4, V)
    logits[0, -1] = 0
    for token, value in tokens_and_values.items():
        logits[0, -1, token] = value
    return logits


@pytest.mark.parametrize("corruption", ["abc", "swap"])
def test_ioi(gpt2, corruption):
    clean, corrupt, metric = tasks.ioi(200, 0, corruption=corruption)
    orders, openings = set(), set()
    sentence = re.compile(r"(\w+) (\w+) and (\w+) .*, (\w+) (\w+) the (\w+) to$")
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        opening, first, second, subject, *_ = sentence.match(good).groups()
        _, *others = sentence.match(bad).groups()[:4]
        answer = {first: second, second: first}[subject]
        orders.add(first == answer)
        openings.add(opening)
        if corruption == "swap":
            assert others == [first, second, answer]
        else:
            assert len({first, second, *others}) == 5
        assert good.replace(first, "").replace(second, "") == re.sub("|".join(others), "", bad)    # all else alike
        values = {gpt2.encode(" " + answer)[0]: 3.0, gpt2.encode(" " + subject)[0]: 1.0}
        one = tasks.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits_of(n, values)).item() == pytest.approx(2.0)
    assert orders == {True, False} and len(openings) >= 3
    assert clean.shape == corrupt.shape == (200, 14)
    again = tasks.ioi(200, 0, corruption=corruption)
    assert torch.equal(again[0], clean) and torch.equal(again[1], corrupt)
    assert not torch.equal(tasks.ioi(200, 1)[0], clean)


def test_sentences_quoted_as_examples_are_some_of_ours():
    """Those of patching.py and of docs/circuits.md: a template, and words of the task's own lists."""
    page = " ".join(Path(tasks.__file__).parents[1].joinpath("docs/circuits.md").read_text(encoding="utf-8").split())
    quoted = [re.search(r"clean +(After .* to) ", patching.__doc__)[1],
              re.search(r"corrupt +(After .* to) ", patching.__doc__)[1], re.search(r"\*(When .*? to)\*", page)[1]]
    words = {"{}": tasks.NAMES, "{place}": tasks.PLACES, "{object}": tasks.OBJECTS}
    for sentence in quoted:
        forms = list(tasks.IOI["ours"])
        for field, some in words.items():
            forms = [form.replace(field, f" ({'|'.join(some.split())})") for form in forms]
        assert any(re.fullmatch(form, sentence) for form in forms), sentence


def test_the_papers_own_sentences(gpt2):
    clean, corrupt, _ = tasks.ioi(50, 0, template="paper")
    names = r"When (\w+) and (\w+) went to the \w+, (\w+) gave a \w+ to"
    assert clean.shape == corrupt.shape and all(re.fullmatch(names, text) for text in texts(gpt2, clean))
    clean, corrupt, _ = tasks.greater_than(50, 0, template="paper")
    years = r"The \w+ lasted from the year (\d\d)\d\d to the year \1"
    assert all(re.fullmatch(years, text) for text in (*texts(gpt2, clean), *texts(gpt2, corrupt)))


def test_ioi_long_is_ioi_with_a_distractor(gpt2):
    clean, corrupt, metric = tasks.ioi_long(50, 0)
    for good, bad in zip(texts(gpt2, clean), texts(gpt2, corrupt)):
        place, other = re.search(r"(\w+), the (\w+) next door was closed\. \w+ \w+ the \w+ to$", good).groups()
        assert place != other and f"{place}, the {other} next door was closed." in bad
    right, wrong = metric.keywords["right"], metric.keywords["wrong"][:, 0]
    assert all((row == r).sum() == 1 and (row == w).sum() == 2 for row, r, w in zip(clean, right, wrong))
    assert clean.shape[1] == tasks.ioi(1, 0)[0].shape[1] + 7


def test_greater_than(gpt2):
    clean, corrupt, metric = tasks.greater_than(200, 0)
    assert clean.shape == corrupt.shape == (200, 14)
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        century, year, again = re.search(r"year (\d\d)(\d\d) .* year (\d\d)$", good).groups()
        assert century == again and 2 <= int(year) <= 98 and bad == good.replace(century + year, century + "01")
        assert [gpt2.decode([t]) for t in clean[n].tolist()].count(year) == 1    # the year is a token
        logits = logits_of(n, {gpt2.encode(f"{y:02d}")[0]: 0.1 * y for y in range(100)})
        p = logits[0, -1].double().softmax(0)
        expected = sum((1 if y > int(year) else -1) * p[gpt2.encode(f"{y:02d}")[0]].item() for y in range(100))
        one = tasks.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits).item() == pytest.approx(expected, abs=5e-4)    # float32: a sum over 50,257, in any order
    assert len({good.split()[0] for good in texts(gpt2, clean)}) == 3


def test_docstring(gpt2):
    clean, corrupt, metric = tasks.docstring(50, 0)
    for n, (good, bad) in enumerate(zip(texts(gpt2, clean), texts(gpt2, corrupt))):
        args, others = (re.search(r"\(self, (.*)\):", text)[1].split(", ") for text in (good, bad))
        assert len({*args, *others}) == 8
        assert re.findall(r":param (\w+):", good) == args[:2] and good.endswith(":param")
        assert bad == good.replace(", ".join(args), ", ".join(others))
        values = {gpt2.encode(" " + name)[0]: i for i, name in enumerate([*args, *others])}
        one = tasks.select(clean, corrupt, metric, torch.tensor([n]))[2]
        assert one(logits_of(n, values)).item() == pytest.approx(2 - 7)    # the third name against the last
        compile(good.split(":param")[0] + '"""', "docstring", "exec")
    assert len({text.partition("(")[0] for text in texts(gpt2, clean)}) == 3    # templates


def test_copy():
    clean, corrupt, metric = tasks.copy(100, 0, vocab_size=257, length=7)
    assert clean.shape == (100, 13) and clean.max() < 256
    assert torch.equal(clean[:, :6], clean[:, 7:])
    assert (clean != corrupt).nonzero().tolist() == [[n, 6] for n in range(100)]
    assert all(len(set(row)) == 7 for row in clean.tolist())
    logits = torch.randn(100, 13, 257)
    expected = [logits[n, -1, clean[n, 6]] - logits[n, -1, corrupt[n, 6]] for n in range(100)]
    torch.testing.assert_close(metric(logits), torch.stack(expected))
    with pytest.raises(UserError, match="different tokens to copy"):
        tasks.copy(1, 0, vocab_size=8, length=7)


@pytest.mark.parametrize("layout", ["reversed", "paper"])
def test_addition(layout):
    clean, corrupt, metric = tasks.addition(200, 0, layout)
    assert {*map(tuple, clean.tolist())} <= {*map(tuple, addition_data(layout)[0][split()[1]].tolist())}    # held out
    logits = torch.randn(200, clean.shape[1], 13)
    values = metric(logits)
    for n, rows in enumerate(zip(clean.tolist(), corrupt.tolist())):
        sums = []
        for row in rows:
            a, b = "".join(ALPHABET[t] for t in row).rstrip("?=").split("+")
            sums.append((int(a), int(b)))
        (a, b), (c, d) = sums
        assert (a // 10, b // 10) == (c // 10, d // 10) and (a % 10 + b % 10 > 9) != (c % 10 + d % 10 > 9)
        tens = [(a + b) // 10 % 10, (c + d) // 10 % 10]
        assert (tens[0] - tens[1]) % 10 in (1, 9)
        assert values[n].item() == pytest.approx((logits[n, -2, tens[0]] - logits[n, -2, tens[1]]).item())


def test_options_reach_their_task(gpt2, monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=50257, block_size=64), notes={})
    monkeypatch.setattr(tasks, "encoding_of", lambda _: gpt2)
    clean, corrupt, _ = tasks.make_pairs("ioi", 5, 3, model, template="paper", corruption="swap")
    ours, theirs, _ = tasks.ioi(5, 3, "swap", "paper", encoding=gpt2)
    assert torch.equal(clean, ours) and torch.equal(corrupt, theirs)
    assert not torch.equal(clean, tasks.make_pairs("ioi", 5, 3, model, template=None, corruption="swap")[0])


def test_rows_that_no_token_has_are_not_copied(monkeypatch):
    """Of a model with more rows than its tokenizer has tokens."""
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=10_000, block_size=64), notes={"tokenizer": "x"})
    monkeypatch.setattr(tasks, "encoding_of", lambda _: SimpleNamespace(n_vocab=40))
    assert tasks.make_pairs("copy", 50, 0, model)[0].max() < 40
    model.notes = {}
    assert tasks.make_pairs("copy", 50, 0, model)[0].max() > 40


def test_select_takes_the_metric_along():
    clean, corrupt, metric = tasks.addition(40, 0)
    logits, rows = torch.randn(40, 9, 13), torch.tensor([31, 2, 2, 17])
    part = tasks.select(clean, corrupt, metric, rows)
    torch.testing.assert_close(part[2](logits[rows]), metric(logits)[rows])
    assert torch.equal(part[0], clean[rows]) and torch.equal(part[1], corrupt[rows])


def test_words_and_sentences_are_checked(gpt2):
    byte_level = byte_encoding()
    for task in (tasks.ioi, tasks.docstring):
        with pytest.raises(UserError, match="only 0 of the words .* are one token in the vocabulary bytes"):
            task(2, 0, encoding=byte_level)
    with pytest.raises(UserError, match="do not split"):
        tasks.greater_than(2, 0, encoding=byte_level)
    with pytest.raises(UserError, match="not equally long"):
        tasks.encode([" key", " key key"], gpt2)


def test_without_the_vocabulary_the_message_says_where_to_put_it(monkeypatch):
    def refuse(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(UserError, match="cannot download GPT-2's vocabulary: no network\n.*TIKTOKEN_CACHE_DIR"):
        tasks.ioi(2, 0)

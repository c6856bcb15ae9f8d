"""The tasks of extras/circuits.py: sentences in pairs, and what counts as the right answer (Figures 3 to 5).

    clean, corrupt, metric = ioi(100, seed=0)      # tokens (N,T) each, and metric(logits (N,T,V)) -> (N)

All sentences of a task are equally long, so that they fit one batch. `encoding` is a tiktoken.Encoding, by default
GPT-2's. The metrics are partials of the three functions below, with arguments of one row a pair: see `select`.
Shapes: N pairs, T positions, V vocabulary, K wrong answers.
"""
import functools

import numpy as np
import torch

from extras.tokenizer import encoding_of
from support.data import gpt2_encoding
from support.files import UserError
from toy_addition import ALPHABET, addition_data, split


# ---- Metrics

def logit_difference(logits, right, wrong):
    """Logit of the right token (N) minus that of the likeliest wrong one (N,K), at the last position."""
    last = logits[:, -1]                                                          # (N,V)
    right, wrong = right.to(last.device), wrong.to(last.device)
    return last.gather(1, right[:, None])[:, 0] - last.gather(1, wrong).max(1).values


def tens_difference(logits, right, wrong):
    """`logit_difference` at the last position but one: the tens of a sum, in both layouts."""
    return logit_difference(logits[:, :-1], right, wrong)


def later_years(logits, numbers, year):
    """Probability of the two-digit tokens `numbers` (N,100) above `year` (N) minus that of the others."""
    p = torch.softmax(logits[:, -1], -1).gather(1, numbers.to(logits.device))     # (N,100)
    sign = torch.where(torch.arange(100) > year[:, None], 1, -1)                  # (N,100)
    return (p * sign.to(p.device)).sum(1)                                         # (N)


# ---- From text to tokens

def one_token(words, encoding, needed):
    """Those of the words that are one token with the space before them."""
    good = [" " + word for word in words.split() if len(encoding.encode_ordinary(" " + word)) == 1]
    if len(good) < needed:
        raise UserError(f"only {len(good)} of the words {words[:15]}... are one token in the vocabulary "
                        f"{encoding.name}\nthis task needs {needed}: take --task copy")
    return good


def encode(sentences, encoding):
    """Equally long sentences as tokens (N,T)."""
    rows = [encoding.encode_ordinary(sentence) for sentence in sentences]
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"the sentences of this task are not equally long in the vocabulary {encoding.name}\n"
                        "write templates for it, or take --task copy")
    return torch.tensor(rows)


def pairs_of_text(rows, encoding):
    """What a task returns, from rows of text: a clean and a corrupted sentence, the right word, the wrong words."""
    clean, corrupt, right, wrong = (encode(column, encoding) for column in zip(*rows))
    return clean, corrupt, functools.partial(logit_difference, right=right[:, 0], wrong=wrong)


# ---- Tasks

NAMES = """Alice Anna Ben Carl Clara David Emma Eric Frank George Grace Helen Henry Jack James Jane John Julia
    Kate Laura Leo Linda Lucy Maria Mark Martin Mary Nick Oliver Paul Peter Rachel Robert Rose Sam Sarah Simon
    Susan Thomas Tom"""
PLACES = """airport bakery bank beach bridge castle cinema farm garden harbour hospital hotel kitchen library
    market museum office park restaurant school station theatre zoo"""
OBJECTS = """ball basket bag book bottle camera coin flower gift glass guitar hammer key knife lamp letter map
    necklace newspaper pen phone ring sandwich ticket watch"""
IOI = {"ours": ("When{} and{} met at the{place},{} handed the{object} to",
                "After{} and{} came to the{place},{} passed the{object} to",
                "While{} and{} sat in the{place},{} lent the{object} to",
                "Because{} and{} work at the{place},{} brought the{object} to"),
       "paper": ("When{} and{} went to the{place},{} gave a{object} to",)}
DISTRACTOR = ", the{other} next door was closed."


def ioi(n, seed, corruption="abc", template="ours", encoding=None, between=","):
    """Indirect objects, the task of Wang et al. 2022 in sentences of ours: "When A and B met at the PLACE, B handed
    the OBJECT to" -> A. template "paper": theirs, "When A and B went to the PLACE, B gave a OBJECT to".

    A and B, or B and A, at random. corruption "abc": three fresh names; "swap": A hands it over, so that B is right.
    between: what stands in place of the comma. Metric: logit(A) - logit(B).
    """
    encoding, rng, rows = encoding or gpt2_encoding(), np.random.default_rng(seed), []
    names, places, objects = (one_token(w, encoding, k) for w, k in ((NAMES, 5), (PLACES, 2), (OBJECTS, 1)))
    for _ in range(n):
        sentence, flip = IOI[template][rng.integers(len(IOI[template]))].replace(",", between), rng.integers(2)
        a, b, *fresh = rng.choice(names, 5, replace=False)
        words = {"place": rng.choice(places), "object": rng.choice(objects)}
        if "{other}" in sentence:
            words["other"] = rng.choice([place for place in places if place != words["place"]])
        both = (b, a) if flip else (a, b)
        others = {"abc": fresh, "swap": (*both, a)}[corruption]
        rows.append((sentence.format(*both, b, **words), sentence.format(*others, **words), a, b))
    return pairs_of_text(rows, encoding)


def ioi_long(n, seed, corruption="abc", template="ours", encoding=None):
    """IOI with a distractor between: "When A and B met at the PLACE, the OTHER next door was closed. B handed the
    OBJECT to" -> A. The paper names a task IOI-Long; its exact form is unknown to us, this one is ours."""
    return ioi(n, seed, corruption, template, encoding, between=DISTRACTOR)


NOUNS = """war siege reign strike project journey voyage campaign revolt marriage trial study drought famine
    plague alliance experiment dispute truce mission expedition conflict occupation rebellion contract"""
GREATER_THAN = {"ours": ("The{noun} began in the year {century}{year} and ended in the year {century}",
                         "That{noun} started around the year {century}{year} and stopped around the year {century}",
                         "Their{noun} went on from the year {century}{year} until about the year {century}"),
                "paper": ("The{noun} lasted from the year {century}{year} to the year {century}",)}


def greater_than(n, seed, template="ours", encoding=None):
    """Years, the task of Hanna et al. 2023 in sentences of ours: "The war began in the year 1732 and ended in the year
    17" -> above 32. template "paper": theirs, "The war lasted from the year 1732 to the year 17".

    Corruption: the first year ends in 01. Metric: probability of the two-digit tokens above the year minus that of
    the others. Only years that split into century and two digits, in the clean and in the corrupted sentence.
    """
    encoding, rng, rows = encoding or gpt2_encoding(), np.random.default_rng(seed), []
    numbers = [encoding.encode_ordinary(f"{y:02d}") for y in range(100)]          # 100 lists of one token
    split_years = {(c, y) for c in range(11, 20) for y in range(1, 99)
                   if encoding.encode_ordinary(f" {c}{y:02d}") == encoding.encode_ordinary(f" {c}") + numbers[y]}
    years = sorted((c, y) for c, y in split_years if y > 1 and (c, 1) in split_years)
    if not years or any(len(tokens) > 1 for tokens in numbers):
        raise UserError(f"years do not split into century and two digits in the vocabulary {encoding.name}\n"
                        "take --task copy")
    nouns = one_token(NOUNS, encoding, 1)
    for _ in range(n):
        sentence, noun = GREATER_THAN[template][rng.integers(len(GREATER_THAN[template]))], rng.choice(nouns)
        century, year = years[rng.integers(len(years))]
        rows.append([sentence.format(noun=noun, century=century, year=y) for y in (f"{year:02d}", "01")] + [year])
    clean, corrupt, ends = zip(*rows)
    numbers = torch.tensor(numbers).T.expand(n, -1)                               # (N,100)
    metric = functools.partial(later_years, numbers=numbers, year=torch.tensor(ends))
    return encode(clean, encoding), encode(corrupt, encoding), metric


def copy(n, seed, vocab_size=50257, length=10):
    """Induction: random tokens x_1 ... x_length, then x_1 ... x_(length-1) again -> x_length.

    Corruption: another x_length in the first half. Metric: logit(x_length) - logit(the other). x_1 ... x_length
    and the other are all different. None is the vocabulary's last, which is <|endoftext|> in GPT-2 and among bytes, and
    `?` in the toy. Special tokens elsewhere, as SmolLM2's first 17, may be drawn.
    """
    if not 2 <= length <= vocab_size - 2:
        raise UserError(f"no {length} + 1 different tokens to copy in a vocabulary of {vocab_size}\n"
                        "take a length from 2 to the vocabulary minus 2")
    rng = np.random.default_rng(seed)
    x = torch.tensor(np.array([rng.choice(vocab_size - 1, length + 1, replace=False) for _ in range(n)]))
    first, last, other = x[:, :length - 1], x[:, length - 1:length], x[:, length:]
    metric = functools.partial(logit_difference, right=last[:, 0], wrong=other)
    return torch.cat((first, last, first), 1), torch.cat((first, other, first), 1), metric    # (N,2*length-1)


ARGUMENTS = """load size file last name path text user key value mode type page line word color date time count
    index limit start end width height depth scale shape point node root table field label title owner group
    token order price"""
WORDS = "old new first second small large main other next final raw full local current inner outer"
DOCSTRING = '''def {}(self,{},{},{},{}):
    """{} the{}{}

    :param{}: the{}{}
    :param{}: the{}{}
    :param'''
VERBS = (("load", "Load"), ("save", "Write"), ("find", "Return"))


def docstring(n, seed, encoding=None):
    """The next argument of a Python docstring, the task of Heimersheim & Janiak 2023 in words of ours:
    "def load(self, a, b, c, d)" -> c.

    The docstring has described a and b and goes on with ":param". Corruption: four other names in the def line.
    Metric: logit(c) minus the largest logit of the other seven names.
    """
    encoding, rng, rows = encoding or gpt2_encoding(), np.random.default_rng(seed), []
    arguments, words = one_token(ARGUMENTS, encoding, 8), one_token(WORDS, encoding, 6)
    for _ in range(n):
        names, w = rng.choice(arguments, 8, replace=False), rng.choice(words, 6, replace=False)
        name, verb = VERBS[rng.integers(len(VERBS))]
        clean, corrupt = (DOCSTRING.format(name, *args, verb, *w[:2], names[0], *w[2:4], names[1], *w[4:])
                          for args in (names[:4], names[4:]))
        rows.append((clean, corrupt, names[2], "".join(np.delete(names, 2))))
    return pairs_of_text(rows, encoding)


def addition(n, seed, layout="reversed"):
    """Two-digit sums of toy_addition.py, the clean ones held out there: does the carry reach the tens?

    Corruption: the same tens digits with other units, so that the units carry if and only if they did not; the tens
    of the sum then differ by one. Metric: logit(its tens digit) - logit(the corrupted sum's), at the tens slot.
    """
    rng, (idx, targets) = np.random.default_rng(seed), addition_data(layout)
    clean, rows = rng.choice(split()[1].numpy(), n, replace=False), np.arange(10_000)    # row 100 a + b is a + b
    tens, carries = rows // 1000 * 10 + rows // 10 % 10, rows // 100 % 10 + rows % 10 >= 10
    corrupt = np.array([rng.choice(rows[(tens == tens[r]) & (carries != carries[r])]) for r in clean])
    metric = functools.partial(tens_difference, right=targets[clean, -2], wrong=targets[corrupt, -2][:, None])
    return idx[clean], idx[corrupt], metric


TASKS = {"ioi": ioi, "ioi-long": ioi_long, "greater-than": greater_than, "copy": copy, "docstring": docstring,
         "addition": addition}
OPTIONS = {"corruption": ("ioi", "ioi-long"), "template": ("ioi", "ioi-long", "greater-than")}    # who has them


# ---- Pairs for a model

def make_pairs(task, n, seed, model, **options):
    """The task's pairs, if they fit the model: its vocabulary, its length and, for sums, how it writes them.
    options: corruption and template, None for the task's default."""
    V, T, layout = model.config.vocab_size, model.config.block_size, model.notes.get("layout")
    options = {name: value for name, value in options.items() if value}
    for name in options:
        if task not in OPTIONS[name]:
            raise UserError(f"--{name} is a choice of --task {', '.join(OPTIONS[name])}\nleave it out")
    if task == "addition":
        if layout is None or V != len(ALPHABET):
            raise UserError("addition needs checkpoints of toy_addition.py, which know how they write a sum\n"
                            f"these have {V} tokens: take another --task")
        pairs = addition(n, seed, layout)
    elif task == "copy":
        V = encoding_of(model).n_vocab if "tokenizer" in model.notes else V    # a model may have rows to spare
        pairs = copy(n, seed, V, min(10, (T + 1) // 2, V - 2))
    elif V != 50257 and "tokenizer" not in model.notes:
        raise UserError(f"{task} is written in GPT-2's 50257 tokens, this model has {V}\n"
                        "take --task copy, or addition with checkpoints of toy_addition.py")
    else:
        pairs = TASKS[task](n, seed, encoding=encoding_of(model), **options)
    if pairs[0].shape[1] > T:
        raise UserError(f"{task} has sentences of {pairs[0].shape[1]} tokens, the model reads at most {T}\n"
                        "take another --task")
    return pairs


def select(clean, corrupt, metric, rows):
    """Some of a task's pairs: its metric is a partial whose arguments have one row a pair."""
    answers = {name: t[rows] for name, t in metric.keywords.items()}
    return clean[rows], corrupt[rows], functools.partial(metric.func, **answers)

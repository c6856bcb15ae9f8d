"""Vocabularies as tiktoken encodings: any tokenizer.json with byte-level BPE, as GPT-2's, SmolLM2's, OLMo's, Llama 3's.

    encoding = encoding_of(model)      # load_model (extras/llama.py) has noted where the model's tokenizer.json lies
"""
import os
import re
import unicodedata
import warnings
import zlib
from pathlib import Path

import tiktoken

from support import data
from support.files import UserError, first_line, read_json

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")
ENDS = "<|endoftext|>", "<|end_of_text|>", "</s>"


def encoding_of(model):
    """The tokens that a model was trained on: its tokenizer.json, or told by the size of its vocabulary."""
    path, V = model.notes.get("tokenizer"), model.config.vocab_size
    if path is None:
        try:
            return data.encoding_of(model)
        except UserError as error:
            raise UserError(f"{error}; or put a tokenizer.json beside the weights") from error
    if not os.path.exists(path):
        raise UserError(f"{path}, this model's tokenizer, is gone\nput it back")
    encoding = tokenizer_encoding(path)
    if encoding.n_vocab > V:
        raise UserError(f"{path} has {encoding.n_vocab} tokens, the model {V}\n"
                        "put the model's own tokenizer.json there")
    return encoding


class HuggingFaceEncoding(tiktoken.Encoding):
    """Three things that Hugging Face's tokenizers do and tiktoken does not.

    Some vocabularies lack bytes that are rare in text. tiktoken needs all 256, so the lacking ones get numbers above
    the vocabulary, and are dropped after merging. (Hugging Face drops them before, so their neighbours may merge.)
    Some add words that are found in ordinary text before all else, as OLMo's runs of spaces: the longest first. And
    some compose letters and accents first (nfc).
    """

    def __init__(self, name, mergeable_ranks, special_tokens, words=(), nfc=False, **kwargs):
        self.nfc, self.words = nfc, {word: special_tokens[word] for word in words}
        self.any_word = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        size = max(*mergeable_ranks.values(), *special_tokens.values()) + 1
        lacking = [bytes([b]) for b in range(256) if bytes([b]) not in mergeable_ranks]
        numbers = {byte: size + n for n, byte in enumerate(lacking)}
        super().__init__(name, mergeable_ranks=mergeable_ranks | numbers, special_tokens=special_tokens, **kwargs)
        self.max_token_value = size - 1    # n_vocab is one more

    def encode_ordinary(self, text):
        text, tokens = unicodedata.normalize("NFC", text) if self.nfc else text, []
        for piece in re.split(f"({self.any_word})", text) if self.words else [text]:
            tokens += [self.words[piece]] if piece in self.words else super().encode_ordinary(piece)
        return [token for token in tokens if token < self.n_vocab]


def bytes_of_characters():
    """Byte-level BPE writes bytes as characters: Latin-1's printable ones as themselves, the others from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(c): b for c, b in zip(plain + [256 + n for n in range(len(others))], plain + others)}


def require(fine, what):
    if not fine:
        raise NotImplementedError(what)


def split_pattern(parts):
    """The regular expression of a tokenizer.json's pre-tokenisers, a list."""
    last = parts[-1]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    match plain, last.get("use_regex", True), parts[:-1]:
        case True, True, []:
            return GPT2_SPLIT
        case True, True, [{"type": "Digits", "individual_digits": True}]:
            return DIGITS_SPLIT
        case True, False, [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": regex}, "invert": False}]:
            return rf"{regex}|(?:(?!{regex})[\s\S])+"    # what lies between two matches is a piece too
    require(False, "the pre-tokeniser " + " + ".join(str(part.get("type")) for part in parts))


def check_merges(model, learned):
    """tiktoken merges in the order of the tokens' numbers, Hugging Face in that of the merges: they must agree."""
    merged = ["".join(pair).replace(" ", "") for pair in model["merges"]]    # "a b", in newer files [a, b]
    order = [model["vocab"].get(token, -1) for token in merged]
    fine = order == sorted(order) and -1 not in order and len(set(learned.values())) == len(learned)
    require(fine, "a vocabulary whose numbers do not follow its merges")
    if not model.get("ignore_merges"):    # tiktoken would take any pair
        require(len(set(merged)) == len(merged), "a token with several merges")
        whole = {token for token in learned if len(token) > 1} - set(merged)
        require(not whole, f"a token without a merge ({min(whole, default='')!r})")


def read_tokenizer(tokenizer, name):
    """The content of a tokenizer.json as an encoding. NotImplementedError if it asks for what is not here."""
    model, added = tokenizer["model"], tokenizer.get("added_tokens", [])
    require(model.get("type", "BPE") == "BPE" and "merges" in model, f"a {model.get('type')} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token"):
        require(not model.get(key), f"{key}={model.get(key)}")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    require(normalizer in (None, "NFC"), f"the normalizer {normalizer}")
    first = tokenizer.get("pre_tokenizer") or {}
    pattern = split_pattern(first.get("pretokenizers", [first]))
    words = [token for token in added if not token.get("special")]
    for token in words:
        for key in ("lstrip", "rstrip", "single_word"):
            require(not token.get(key), f"{key} of the added token {token['content']!r}")
    special = {token["content"]: token["id"] for token in added}
    learned = {token: n for token, n in model["vocab"].items() if token not in special}
    byte_of = bytes_of_characters()
    unknown = set("".join(learned)) - byte_of.keys()
    require(not unknown, f"the character {min(unknown, default='')!r} in the vocabulary")
    check_merges(model, learned)
    ends = [special[end] for end in ENDS if end in special]
    require(ends, "a vocabulary without <|endoftext|>")
    special["<|endoftext|>"] = ends[0]
    ranks = {bytes(byte_of[c] for c in token): n for token, n in learned.items()}
    words = [token["content"] for token in words]
    return HuggingFaceEncoding(name, ranks, special, words, nfc=normalizer == "NFC", pat_str=pattern)


def tokenizer_encoding(path):
    """Hugging Face's tokenizer.json as a tiktoken encoding; what cannot be expressed as one is named."""
    tokenizer = read_json(path)
    if "TemplateProcessing" in str(tokenizer.get("post_processor")):
        warnings.warn(f"{path} puts special tokens around a text (Llama 3: one before it); that is not done here")
    try:
        return read_tokenizer(tokenizer, f"{Path(path).parent.name}-{zlib.crc32(Path(path).read_bytes()):08x}")
    except NotImplementedError as error:
        raise UserError(f"{path}: {error} is not implemented here\n"
                        "expected byte-level BPE like that of GPT-2, SmolLM2, OLMo or Llama 3") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no tokenizer.json ({type(error).__name__}: {first_line(error)})\n"
                        "download it again") from error

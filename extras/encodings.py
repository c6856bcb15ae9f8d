"""Vocabularies as tiktoken encodings: bytes, GPT-2's, and any tokenizer.json with byte-level BPE."""
import os
import re
import unicodedata
import warnings
import zlib
from pathlib import Path

import tiktoken

from extras.files import UserError, first_line, read_json

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_SPLIT = GPT2_SPLIT.replace(r" ?\p{N}+", r"\p{N}").replace(r"|\s+(?!\S)", r"|\s+(?=\p{N})|\s+(?!\S)")


def byte_encoding():
    """Every byte is a token, 256 is <|endoftext|>: a vocabulary that needs no download."""
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([n]): n for n in range(256)},
                             special_tokens={"<|endoftext|>": 256})


def gpt2_encoding():
    """GPT-2's byte-pair encoding, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:    # requests' errors are OSErrors; ValueError: wrong hash
        raise UserError(f"cannot download GPT-2's vocabulary: {str(error)[:120]}\nTIKTOKEN_CACHE_DIR names a folder "
                        "that has it; python train.py --init scratch --data stdlib needs none") from error


def encoding_of(model):
    """The tokens that a model was trained on: its tokenizer.json, or told by the size of its vocabulary."""
    if "tokenizer" in model.notes:
        if not os.path.exists(model.notes["tokenizer"]):
            raise UserError(f"{model.notes['tokenizer']} is gone, with which this model was made\nput it there again")
        encoding = tokenizer_encoding(model.notes["tokenizer"])
        if encoding.n_vocab > model.config.vocab_size:
            raise UserError(f"{model.notes['tokenizer']} has {encoding.n_vocab} tokens, the model "
                            f"{model.config.vocab_size}\nput the model's own tokenizer.json there")
        return encoding
    encodings = {50257: gpt2_encoding, 257: byte_encoding}
    if model.config.vocab_size not in encodings:
        raise UserError(f"no encoding is known for a vocabulary of {model.config.vocab_size} tokens\n"
                        "expected 50257 (GPT-2), 257 (bytes), or a tokenizer.json beside the weights")
    return encodings[model.config.vocab_size]()


class HuggingFaceEncoding(tiktoken.Encoding):
    """Three things that Hugging Face's tokenizers do and tiktoken does not.

    Some vocabularies lack bytes that are rare in text: these are left out, as late as here. (tiktoken needs all 256, so
    that the lacking ones get numbers above the vocabulary for a moment; Hugging Face merges what stood around them.)
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


def split_pattern(parts):
    """The regular expression of a tokenizer.json's pre-tokenisers, or None for those that are unknown here."""
    kinds, last = [part.get("type") for part in parts], parts[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and last.get("use_regex", True):
        return DIGITS_SPLIT
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        match, isolated = parts[0]["pattern"].get("Regex"), parts[0].get("behavior") == "Isolated"
        if match and isolated and not parts[0].get("invert"):
            return rf"{match}|(?:(?!{match})[\s\S])+"    # what lies between two matches is a piece too
    return None


def tokenizer_encoding(path):
    """Hugging Face's tokenizer.json as a tiktoken encoding; what cannot be expressed as one is named."""
    try:
        return read_tokenizer(read_json(path), path)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no tokenizer.json\n{type(error).__name__}: {first_line(error)}") from error


def read_tokenizer(tokenizer, path):
    def refuse(what):
        raise UserError(f"{path}: {what} is not implemented here\n"
                        "expected byte-level BPE like that of GPT-2, SmolLM2, OLMo or Llama 3")

    model, parts = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        refuse(f"a {model.get('type')} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "unk_token"):
        if model.get(key):
            refuse(f"{key}={model[key]}")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(f"the normalizer {normalizer}")
    if "TemplateProcessing" in str(tokenizer.get("post_processor")):
        warnings.warn(f"{path} puts special tokens around a text (Llama 3: one before it); that is not done here")
    parts = parts.get("pretokenizers", [parts])
    pattern = split_pattern(parts)
    if pattern is None:
        refuse("the pre-tokeniser " + " + ".join(str(part.get("type")) for part in parts))
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    words = [token for token in tokenizer.get("added_tokens", []) if not token.get("special")]
    for token in words:
        for key in ("lstrip", "rstrip", "single_word"):
            if token.get(key):
                refuse(f"{key} of the added token {token['content']!r}")
    byte_of, vocab = bytes_of_characters(), model["vocab"]
    if unknown := set("".join(vocab.keys() - added.keys())) - byte_of.keys():
        refuse(f"the character {min(unknown)!r} in the vocabulary")
    ranks = {bytes(byte_of[c] for c in token): n for token, n in vocab.items() if token not in added}
    # tiktoken merges in the order of the tokens' numbers, Hugging Face in that of the merges: they must agree.
    merged = ["".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]]
    order = [vocab.get(token, -1) for token in merged]
    if order != sorted(order) or -1 in order or len(set(ranks.values())) < len(ranks):
        refuse("a vocabulary whose numbers do not follow its merges")
    if len(set(merged)) < len(merged) and not model.get("ignore_merges"):    # tiktoken would take any pair
        refuse("a token with several merges")
    whole = {token for token in vocab if len(token) > 1} - set(merged) - added.keys()
    if whole and not model.get("ignore_merges"):
        refuse(f"a token without a merge ({min(whole)!r})")
    name = f"{Path(path).parent.name}-{zlib.crc32(Path(path).read_bytes()):08x}"
    for end in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if end in added:
            return HuggingFaceEncoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                       special_tokens={**added, "<|endoftext|>": added[end]},
                                       words=[token["content"] for token in words], nfc=normalizer == "NFC")
    refuse("a vocabulary without <|endoftext|>")

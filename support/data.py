"""Text in, tokens out: what train.py reads, and the two vocabularies that need no file.

    train, val, constraint = load_data("openwebtext", gpt2_encoding())    # arrays of tokens; the cache keeps them
    idx, targets = batch(train, T=1024, first=0, count=16, seed=0)

A source is a name (openwebtext, openwebtext-7, stdlib) or a path. Text is cut into documents, and each goes as a whole
to one of three splits. A split is one file: its documents' tokens, with <|endoftext|> after each. (A .bin of tokens is
cut in two places, each moved to the next end of a document.) train is what the weights learn, constraint is what
lambda looks at, and val is looked at by neither: it is for the report.
"""
import ast
import lzma
import os
import platform
import re
import shutil
import sysconfig
import tarfile
import uuid
import zlib
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from support.files import UserError, explained, fetch

OPENWEBTEXT = ("https://huggingface.co/datasets/Skylion007/openwebtext/resolve/"    # this revision has the archives
               "f3808c30e817981b845ec549c43e82bb467d8144/subsets/urlsf_subset{:02d}.tar")
OFFLINE = ("without network: --data PATH (a .txt, a folder of them, a .bin of tokens), or\n"
           "python train.py --init scratch --data stdlib")
NAMES = r"stdlib|openwebtext(?:-(\d+))?"
SPLITS = ("train", "val", "constraint")
HELD_OUT = 20       # one document in 20 is for validation, and another one for the constraint


# ---- Vocabularies

def byte_encoding():
    """Every byte is a token, 256 is <|endoftext|>: a vocabulary that needs no download."""
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([n]): n for n in range(256)},
                             special_tokens={"<|endoftext|>": 256})


def gpt2_encoding():
    """GPT-2's byte-pair encoding, which tiktoken downloads once."""
    advice = ("set TIKTOKEN_CACHE_DIR to a folder that has it; "
              "python train.py --init scratch --data stdlib needs none")
    with explained("cannot download GPT-2's vocabulary", advice, OSError, ValueError):    # ValueError: wrong hash
        return tiktoken.get_encoding("gpt2")


def encoding_of(model):
    """The tokens that a model was trained on, told by the size of its vocabulary."""
    encodings = {50257: gpt2_encoding, 257: byte_encoding}
    if model.config.vocab_size not in encodings:
        raise UserError(f"no encoding is known for a vocabulary of {model.config.vocab_size} tokens\n"
                        "expected 50257 (GPT-2) or 257 (bytes)")
    return encodings[model.config.vocab_size]()


# ---- Batches

def windows_at(tokens, starts, T):
    """The windows of T tokens that begin at starts -> idx (N,T) and next tokens (N,T), int64."""
    rows = torch.from_numpy(np.stack([tokens[s:s + T + 1] for s in starts]).astype(np.int64))    # (N,T+1)
    return rows[:, :-1], rows[:, 1:]


def spread(tokens, T, most):
    """At most `most` windows, evenly spread over all -> idx (N,T) and next tokens (N,T)."""
    windows = (len(tokens) - 1) // T
    return windows_at(tokens, np.linspace(0, windows - 1, min(windows, most)).astype(int) * T, T)


@lru_cache(maxsize=4)    # of two splits; a batch may reach into the next epoch
def epoch_order(windows, seed, epoch):
    return torch.randperm(windows, generator=torch.Generator().manual_seed(1000 * seed + epoch))


def batch(tokens, T, first, count, seed):
    """Windows number first, first + 1, ... of an endless stream -> idx (B,T) and next tokens (B,T).

    The windows do not overlap; each comes once an epoch, in an order drawn anew for every epoch.
    """
    windows = (len(tokens) - 1) // T
    return windows_at(tokens, [T * int(epoch_order(windows, seed, n // windows)[n % windows])
                               for n in range(first, first + count)], T)


# ---- Sources

def checked_source(source):
    """The source by a name that means the same in another folder, or a UserError."""
    if re.fullmatch(NAMES, source):
        return source
    if not os.path.exists(source):
        raise UserError(f"no such data: {source}\nexpected openwebtext[-N], stdlib or a path")
    if not os.path.isdir(source) and not source.endswith((".txt", ".bin")):
        raise UserError(f"{source} is no text\nexpected a .txt, a folder of them, or a .bin of tokens")
    return os.path.abspath(source)


def load_data(source, encoding):
    """Tokens of the three splits, memory-mapped arrays of whole documents, in the order of SPLITS."""
    source, cache = checked_source(source), Path(torch.hub.get_dir(), "sparse-attention-data")
    if source.endswith(".bin"):
        tokens = read_tokens(source, encoding)
        if tokens[:2000:2].any() and not tokens[1:2000:2].any():
            raise UserError(f"in {source} every other token is 0: are its integers wider?\nwrite {tokens.dtype}")
        if tokens.max() >= encoding.n_vocab:
            raise UserError(f"{source} holds token {tokens.max()}, outside the model's vocabulary of "
                            f"{encoding.n_vocab}\npass data that was tokenised for this model")
        cuts = []
        for n in (2, 1):
            cut = len(tokens) * (HELD_OUT - n) // HELD_OUT
            ends = np.flatnonzero(tokens[max(cut - 1, 0):-1] == encoding.eot_token)
            cuts.append(cut + (ends[0] if len(ends) else 0))    # on to the end of the document, if one ends there
        return tuple(np.split(tokens, cuts))

    if source == "stdlib":
        documents, key = docstrings, f"stdlib-{platform.python_version()}"
    elif match := re.fullmatch(NAMES, source):
        url = OPENWEBTEXT.format(int(match[1] or 0))
        archive = fetch(url, cache / url.rpartition("/")[2], OFFLINE)
        documents, key = lambda: archived_texts(archive), archive.stem
    else:
        files = sorted(Path(source).rglob("*.txt")) if os.path.isdir(source) else [Path(source)]
        stamp = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        documents, key = lambda: texts_of(files), f"{Path(source).stem}-{zlib.crc32(stamp.encode()):08x}"
    folder = cache / f"{key}-{encoding.name}-{len(SPLITS)}-splits"
    if not folder.exists():
        tokenise(documents(), encoding, folder)
    return tuple(read_tokens(folder / f"{split}.bin", encoding) for split in SPLITS)


def archived_texts(path):
    """The .txt files of an archive and of the archives inside it, in order, read as a stream."""
    def walk(tar):
        for member in tar:
            if member.isfile() and member.name.endswith(".txt"):
                yield tar.extractfile(member).read().decode("utf-8", errors="replace")
            elif member.isfile() and member.name.endswith(".xz"):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r|xz") as inner:
                    yield from walk(inner)

    with explained(f"{path} is damaged or truncated", "delete it and run again",
                   tarfile.TarError, lzma.LZMAError, EOFError, OSError):
        with tarfile.open(path, mode="r|*") as tar:
            yield from walk(tar)


def texts_of(files):
    """The documents of .txt files: each file is one, or several with two blank lines between them."""
    for path in files:
        with explained(f"cannot read {path}", "pass text files that you may read", OSError):
            text = path.read_text(encoding="utf-8", errors="replace")
        yield from filter(str.strip, re.split(r"\n{3,}", text))


def docstrings():
    """The docstrings of Python's standard library, one document a file: English that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] in ("site-packages", "dist-packages", "test"):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):    # the library keeps some broken files, to test parsers with
            continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
        if any(found):
            yield "\n\n".join(filter(None, found))


def token_type(encoding):
    return np.uint16 if encoding.n_vocab <= 2**16 else np.uint32


def tokenise(documents, encoding, folder):
    """Write a file for each split into the folder, all at once or not at all. A document's checksum says where it goes,
    so that a text that comes twice cannot be in two of them."""
    temporary, counts = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp"), [0, 0, 0]
    with explained(f"cannot write to {folder.parent}", "set TORCH_HOME to a folder that can be written", OSError):
        temporary.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(open(temporary / f"{split}.bin", "wb")) for split in SPLITS]
            bar = stack.enter_context(tqdm(unit=" documents", desc=f"tokenising {folder.name}"))
            while some := list(islice(documents, 1000)):
                for text, tokens in zip(some, encoding.encode_ordinary_batch(some, num_threads=os.cpu_count())):
                    part = zlib.crc32(text.encode("utf-8", errors="replace")) % HELD_OUT
                    split = part + 1 if part < 2 else 0              # its place in SPLITS
                    files[split].write(np.array(tokens + [encoding.eot_token], token_type(encoding)))
                    counts[split] += 1
                bar.update(len(some))
        if not all(counts):
            raise UserError(f"{sum(counts)} documents are too few to hold out two in {HELD_OUT}\n"
                            "put more .txt files into a folder, or two blank lines between documents")
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.exists():    # else another run has made the same one meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_tokens(path, encoding):
    """A file of tokens, mapped into memory: uint16, or uint32 for a vocabulary that needs it."""
    advice = "if you did not name this file, delete its folder and run again; else pass another"
    with explained(f"cannot read the tokens in {path}", advice, OSError, ValueError):
        return np.memmap(path, token_type(encoding), "r")

"""Text in, tokens out: the data that train.py reads.

    train, val = load("openwebtext", gpt2_encoding())    # two arrays of tokens, in the cache after the first call

A source is a name (see --data in train.py) or a path. Text is cut into documents, each goes to the training or the
validation split as a whole, and lies there as its tokens followed by <|endoftext|>, all in one file per split.
"""
import ast
import lzma
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from extras.files import UserError, fetch

OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar"
OPENWEBTEXT_10K = "https://cdn-datasets.huggingface.co/nlp/datasets/openwebtext/openwebtext-10k.tar.xz"
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
SHA256 = {    # of the files whose hash we know
    FINEWEB.format("val", 0): "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640",
    FINEWEB.format("train", 1): "771fa4a99b9fe0946ffb6e848b4ba5c6a9b0fe87860ebf03bc2c1c7e45f8178e",
}
OFFLINE = ("without network: --data PATH (a .txt, a folder of them, a .bin of tokens), or\n"
           "python train.py --init scratch --data stdlib")
HELD_OUT = 20       # one document in 20 is for validation
SHARD_MAGIC = 20240520
FINEWEB_NAME, OPENWEBTEXT_NAME = r"fineweb(?:-(\d+))?", r"openwebtext(?:-(\d+|10k))?"


def is_name(source):
    return re.fullmatch(f"stdlib|{FINEWEB_NAME}|{OPENWEBTEXT_NAME}", source) is not None


def load(source, encoding):
    """Tokens of the training and of the validation split, two memory-mapped arrays of whole documents."""
    cache = Path(torch.hub.get_dir(), "sparse-attention-data")
    if match := re.fullmatch(FINEWEB_NAME, source):
        if encoding.n_vocab != 50257:
            raise UserError("fineweb comes as GPT-2's tokens, and this model has others\npass text: --data FOLDER")
        train = download(FINEWEB.format("train", int(match[1] or 1)), cache)
        return read_tokens(train, encoding), read_tokens(download(FINEWEB.format("val", 0), cache), encoding)
    if source.endswith(".bin"):
        tokens = read_tokens(source, encoding)
        cut = len(tokens) * (HELD_OUT - 1) // HELD_OUT
        ends = np.flatnonzero(tokens[max(cut - 1, 0):-1] == encoding.eot_token)
        cut += ends[0] if len(ends) else 0    # on to the end of the document, if one ends there
        return tokens[:cut], tokens[cut:]

    if source == "stdlib":
        documents, key = docstrings, f"stdlib-{sys.version_info.major}.{sys.version_info.minor}"
    elif match := re.fullmatch(OPENWEBTEXT_NAME, source):
        url = OPENWEBTEXT_10K if match[1] == "10k" else OPENWEBTEXT.format(int(match[1] or 0))
        archive = download(url, cache)
        documents, key = lambda: archived_texts(archive), archive.name.partition(".")[0]
    elif os.path.exists(source):
        files = sorted(Path(source).rglob("*.txt")) if os.path.isdir(source) else [Path(source)]
        stamp = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
        documents, key = lambda: texts_of(files), f"{Path(source).stem}-{zlib.crc32(stamp.encode()):08x}"
    else:
        raise UserError(f"no such data: {source}\n"
                        "expected openwebtext[-N], openwebtext-10k, fineweb[-N], stdlib or a path")
    folder = cache / f"{key}-{encoding.name}"
    if not folder.exists():
        tokenise(documents(), encoding, folder)
    return read_tokens(folder / "train.bin", encoding), read_tokens(folder / "val.bin", encoding)


def download(url, folder):
    return fetch(url, folder / url.rpartition("/")[2], SHA256.get(url), OFFLINE)


def archived_texts(path):
    """The .txt files of an archive and of the archives inside it, in order, read as a stream."""
    def walk(tar):
        for member in tar:
            if member.name.endswith(".txt"):
                yield tar.extractfile(member).read().decode("utf-8", errors="replace")
            elif member.name.endswith(".xz"):
                with tarfile.open(fileobj=tar.extractfile(member), mode="r|xz") as inner:
                    yield from walk(inner)
    try:
        with tarfile.open(path, mode="r|*") as tar:
            yield from walk(tar)
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged or truncated: {error}\ndelete it and run again") from error


def texts_of(files):
    """The documents of .txt files: each file is one, or several with two blank lines between them."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
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
    """Write train.bin and val.bin into the folder, all at once or not at all. One document in HELD_OUT, chosen by
    its checksum, is for validation, so that a text that comes twice cannot be in both."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    counts = [0, 0]
    try:
        temporary.mkdir(parents=True)
        with open(temporary / "train.bin", "wb") as train, open(temporary / "val.bin", "wb") as val, \
                tqdm(unit=" documents", desc=f"tokenising {folder.name}") as bar:
            while some := list(islice(documents, 1000)):
                for text, tokens in zip(some, encoding.encode_ordinary_batch(some, num_threads=os.cpu_count())):
                    held_out = zlib.crc32(text.encode("utf-8", errors="replace")) % HELD_OUT == 0
                    (train, val)[held_out].write(np.array(tokens + [encoding.eot_token], token_type(encoding)))
                    counts[held_out] += 1
                bar.update(len(some))
        if not all(counts):
            raise UserError(f"{sum(counts)} documents are too few to hold out one in {HELD_OUT}\n"
                            "put more .txt files into a folder, or two blank lines between documents")
        if not folder.exists():    # another run may have made the same one meanwhile
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_tokens(path, encoding):
    """A file of tokens, mapped into memory: raw uint16 (uint32 for a large vocabulary), or a fineweb shard."""
    try:
        head = np.fromfile(path, np.int32, 256)
        if len(head) == 256 and head[0] == SHARD_MAGIC:
            tokens = np.memmap(path, np.uint16, "r", offset=head.nbytes)
            if head[1] != 1 or len(tokens) != head[2]:
                raise ValueError(f"its header promises {head[2]} tokens, it holds {len(tokens)}")
        else:
            tokens = np.memmap(path, token_type(encoding), "r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tokens in {path}: {error}\ndelete it, or pass another --data") from error
    if tokens.max() >= encoding.n_vocab:
        raise UserError(f"{path} holds token {tokens.max()}, outside the model's vocabulary of {encoding.n_vocab}\n"
                        "pass data that was tokenised for this model")
    return tokens

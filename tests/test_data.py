"""support/data.py: every source on tiny archives with the nesting of the real ones, and broken ones; vocabularies and
batches. support/files.py: what it fetches."""
import __future__
import functools
import hashlib
import http.server
import inspect
import io
import itertools
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch

from support import data
from support.data import byte_encoding
from support.files import UserError, fetch

TEXTS = [f"document {n} " + "word " * n for n in range(120)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "sparse-attention-data"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server that stands in for OpenWebText's."""
    root = tmp_path / "www"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "OPENWEBTEXT",
                        f"http://127.0.0.1:{httpd.server_port}/" + data.OPENWEBTEXT.rpartition("/")[2])
    yield root
    httpd.shutdown()


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.REGTYPE if content else tarfile.DIRTYPE
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def inner_archive(texts, start=0):
    return tar_of([(f"{start + n:07d}.txt", text.encode()) for n, text in enumerate(texts)], "w:xz")


def documents(*splits, encoding):
    """All documents of the token arrays, told apart by <|endoftext|>."""
    found = []
    for tokens in splits:
        assert tokens[-1] == encoding.eot_token
        parts = np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1)[:-1]
        found += [encoding.decode(part[:-1].tolist()) for part in parts]
    return found


def check_split(train, val, constraint, encoding, texts=TEXTS):
    assert sorted(documents(train, val, constraint, encoding=encoding)) == sorted(texts)    # all of them, each once
    assert all(1 <= len(documents(tokens, encoding=encoding)) <= 20 for tokens in (val, constraint))


@pytest.mark.parametrize("source, name", [("openwebtext", "urlsf_subset00.tar"),
                                          ("openwebtext-7", "urlsf_subset07.tar")])
def test_openwebtext(server, source, name):
    outer = tar_of([("subset/one_data.xz", inner_archive(TEXTS[:70])),
                    ("subset/two_data.xz", inner_archive(TEXTS[70:], 70))])
    (server / name).write_bytes(outer)
    encoding = byte_encoding()
    check_split(*data.load_data(source, encoding), encoding)
    (server / name).unlink()
    check_split(*data.load_data(source, encoding), encoding)    # from the cache


def test_a_folder_in_an_archive_is_no_text(server, cache):
    encoding = byte_encoding()
    files = [(f"texts.txt/{n}.txt", text.encode()) for n, text in enumerate(TEXTS)]
    (server / "urlsf_subset00.tar").write_bytes(tar_of([("texts.txt", b""), *files]))
    check_split(*data.load_data("openwebtext", encoding), encoding)


def test_integers_that_are_too_wide_are_told(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 200, 4000)
    (tmp_path / "wide.bin").write_bytes(tokens.astype(np.int64).tobytes())
    with pytest.raises(UserError, match="every other token is 0: .*\nwrite uint16"):
        data.load_data(str(tmp_path / "wide.bin"), byte_encoding())
    (tmp_path / "text.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="is no text\nexpected a .txt, a folder"):
        data.load_data(str(tmp_path / "text.parquet"), byte_encoding())


def test_two_runs_may_make_the_same_files_at_once(tmp_path):
    """The one that is later takes those of the other, and leaves nothing of its own."""
    def documents():
        yield from TEXTS
        data.tokenise(iter(TEXTS), byte_encoding(), tmp_path / "made")

    data.tokenise(documents(), byte_encoding(), tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert {path.name for path in (tmp_path / "made").iterdir()} == {f"{split}.bin" for split in data.SPLITS}


def test_a_known_hash_is_checked(server, cache):
    (server / "urlsf_subset03.tar").write_bytes(b"some bytes")
    url, path, sha256 = data.OPENWEBTEXT.format(3), cache / "bytes", hashlib.sha256(b"some bytes").hexdigest()
    with pytest.raises(UserError, match="invalid hash value .*expected .0000.*\ntake another"):
        fetch(url, path, "take another", "0" * 64)
    assert not any(cache.iterdir())
    assert fetch(url, path, "take another", sha256) == path and path.read_bytes() == b"some bytes"
    (server / "urlsf_subset03.tar").unlink()
    assert fetch(url, path, "take another", sha256) == path    # it is there: nothing is asked for


def test_no_network_names_the_offline_ways(server, cache):
    with pytest.raises(UserError, match="cannot download .*404[^$]*--data PATH[^$]*--init scratch --data stdlib"):
        data.load_data("openwebtext", byte_encoding())
    assert not any(cache.iterdir())    # nothing half-written


def test_a_download_that_stops_early_leaves_nothing(server, cache, monkeypatch):
    def promise_more(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 400)

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", promise_more)
    with pytest.raises(UserError, match="it ended after 400 of 1000 bytes"):
        data.load_data("openwebtext", byte_encoding())
    assert not any(cache.iterdir())


@pytest.mark.parametrize("damage", ["cut", "cut inside", "no archive"])
def test_broken_archives(server, cache, damage):
    inner = inner_archive(TEXTS)
    outer = tar_of([("a_data.xz", inner[:len(inner) // 2] if damage == "cut inside" else inner)])
    content = {"cut": outer[:512 + len(inner) // 2], "cut inside": outer,
               "no archive": b"<html>not here</html>" * 100}[damage]
    (server / "urlsf_subset00.tar").write_bytes(content)
    with pytest.raises(UserError, match="is damaged or truncated.*\ndelete it"):
        data.load_data("openwebtext", byte_encoding())
    assert [path.name for path in cache.iterdir()] == ["urlsf_subset00.tar"]


def test_text_file_and_folder(tmp_path):
    encoding, folder = byte_encoding(), tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("\n\n\n".join(TEXTS[:60]))
    (folder / "sub" / "b.txt").write_text("\n\n\n\n".join(TEXTS[60:]))
    (folder / "c.md").write_text("not read")
    check_split(*data.load_data(str(folder), encoding), encoding)
    (tmp_path / "all.txt").write_text("\n\n\n".join(TEXTS))
    check_split(*data.load_data(str(tmp_path / "all.txt"), encoding), encoding)
    (tmp_path / "all.txt").write_text("\n\n\n".join(TEXTS[:100]))    # changed: the cache must not answer
    check_split(*data.load_data(str(tmp_path / "all.txt"), encoding), encoding, TEXTS[:100])


def test_a_text_that_comes_twice_is_in_one_split(tmp_path):
    (tmp_path / "twice.txt").write_text("\n\n\n".join([*TEXTS, "between", *TEXTS]))
    found = [set(documents(tokens, encoding=data.byte_encoding()))
             for tokens in data.load_data(str(tmp_path / "twice.txt"), data.byte_encoding())]
    assert all(found) and not any(a & b for a, b in itertools.combinations(found, 2))


def test_too_few_documents(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UserError, match="1 documents are too few.*\n.*two blank lines"):
        data.load_data(str(tmp_path / "one.txt"), byte_encoding())


def test_a_token_file_is_cut_between_documents(tmp_path):
    encoding = byte_encoding()
    tokens = np.array(([65] * 9 + [256]) * 40 + [66] * 5, np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    train, val, constraint = data.load_data(str(tmp_path / "tokens.bin"), encoding)
    assert np.concatenate((train, val, constraint)).tolist() == tokens.tolist()
    assert (len(train), len(val)) == (370, 20) and train[-1] == val[-1] == 256    # of 405: 364.5 and 384.75


@pytest.mark.parametrize("content, message", [
    (np.array([1, 2, 257], np.uint16).tobytes(), "holds token 257, outside the model's vocabulary of 257"),
    (b"", "cannot read the tokens"),
])
def test_bad_token_files(tmp_path, content, message):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load_data(str(tmp_path / "bad.bin"), byte_encoding())


@pytest.mark.parametrize("source", ["nope", "openwebtext-x", "openwebtext-10k", "fineweb"])
def test_no_such_source(source):
    with pytest.raises(UserError, match=f"no such data: {source}\nexpected openwebtext"):
        data.load_data(source, byte_encoding())


def test_docstrings_are_the_standard_librarys():
    found = list(itertools.islice(data.docstrings(), 10))    # the files come in alphabetical order
    assert any(text.startswith(inspect.getdoc(__future__)) for text in found)
    assert len(set(found)) == 10


def test_bytes_round_trip():
    encoding, text = byte_encoding(), "Überraschung \n\t € \U0001f600"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == 257 and encoding.eot_token == 256


def test_the_size_of_a_vocabulary_tells_the_encoding(monkeypatch):
    def model(vocab_size):
        return SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))

    assert data.encoding_of(model(257)).name == "bytes"
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: f"the encoding {name}")
    assert data.encoding_of(model(50257)) == "the encoding gpt2"
    with pytest.raises(UserError, match="no encoding is known for a vocabulary of 300 tokens\nexpected 50257.* or 257"):
        data.encoding_of(model(300))


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("Hash mismatch")])
def test_gpt2s_vocabulary_that_does_not_come_names_the_offline_ways(monkeypatch, error):
    def get_encoding(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    match = f"cannot download GPT-2's vocabulary: {error}\nset TIKTOKEN_CACHE_DIR .*stdlib"
    with pytest.raises(UserError, match=match):
        data.gpt2_encoding()


def test_a_large_vocabulary_takes_wider_tokens(tmp_path):
    """Above 2^16 tokens the files are uint32: a token that 16 bits cannot hold comes back as it is. The files that
    another encoding has left of the same text are not taken for these."""
    encoding = tiktoken.Encoding("large", pat_str=r"[\s\S]", mergeable_ranks={bytes([n]): n for n in range(256)},
                                 special_tokens={"<|endoftext|>": 70_000})
    (tmp_path / "all.txt").write_text("\n\n\n".join(TEXTS))
    check_split(*data.load_data(str(tmp_path / "all.txt"), data.byte_encoding()), data.byte_encoding())
    splits = data.load_data(str(tmp_path / "all.txt"), encoding)
    assert {tokens.dtype for tokens in splits} == {np.dtype(np.uint32)}
    check_split(*splits, encoding)


# ---- batches

def test_windows_come_once_an_epoch_and_are_shifted_by_one():
    tokens, T = np.arange(101, dtype=np.uint16), 10
    idx, targets = data.batch(tokens, T, 0, 30, seed=3)
    assert idx.dtype == targets.dtype == torch.int64 and idx.shape == (30, 10)
    assert torch.equal(targets, idx + 1)
    for epoch in idx.split(10):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert not torch.equal(idx[:10], idx[10:20])    # in another order
    again = torch.cat([data.batch(tokens, T, first, 3, seed=3)[0] for first in range(0, 30, 3)])
    assert torch.equal(idx, again)                  # a function of the position alone
    assert not torch.equal(idx[:10], data.batch(tokens, T, 0, 10, seed=4)[0])    # and of the seed


def test_few_windows_are_spread_over_the_whole_text():
    idx, targets = data.spread(np.arange(101), 10, 4)
    assert idx[:, 0].tolist() == [0, 30, 60, 90] and torch.equal(targets, idx + 1)
    assert data.spread(np.arange(101), 10, 99)[0][:, 0].tolist() == list(range(0, 100, 10))


def test_a_window_has_one_token_more_than_it_is_long():
    tokens = np.arange(100, 200, dtype=np.uint16)
    idx, targets = data.windows_at(tokens, [7, 94], 5)    # the last one up to the very end
    assert idx.tolist() == [[107, 108, 109, 110, 111], [194, 195, 196, 197, 198]]
    assert targets.tolist() == [[108, 109, 110, 111, 112], [195, 196, 197, 198, 199]]

"""extras/data.py: every source on tiny archives with the nesting of the real ones, and broken ones."""
import __future__
import functools
import http.server
import inspect
import io
import itertools
import lzma
import tarfile
import threading

import numpy as np
import pytest
import tiktoken

from extras import data
from extras.encodings import byte_encoding
from extras.files import UserError

TEXTS = [f"document {n} " + "word " * n for n in range(120)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "sparse-attention-data"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server that stands in for all the named sources."""
    root = tmp_path / "www"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/"
    for name in ("OPENWEBTEXT", "OPENWEBTEXT_10K", "FINEWEB"):
        monkeypatch.setattr(data, name, url + getattr(data, name).rpartition("/")[2])
    yield root
    httpd.shutdown()


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
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


def check_split(train, val, encoding, texts=TEXTS):
    assert sorted(documents(train, val, encoding=encoding)) == sorted(texts)    # all of them, each once
    held_out = documents(val, encoding=encoding)
    assert 1 <= len(held_out) <= 20 and not set(held_out) & set(documents(train, encoding=encoding))


@pytest.mark.parametrize("source, name", [("openwebtext", "urlsf_subset00.tar"),
                                          ("openwebtext-7", "urlsf_subset07.tar")])
def test_openwebtext(server, source, name):
    outer = tar_of([("subset/one_data.xz", inner_archive(TEXTS[:70])),
                    ("subset/two_data.xz", inner_archive(TEXTS[70:], 70))])
    (server / name).write_bytes(outer)
    encoding = byte_encoding()
    check_split(*data.load(source, encoding), encoding)
    (server / name).unlink()
    check_split(*data.load(source, encoding), encoding)    # from the cache


def test_openwebtext_10k(server):
    outer = lzma.compress(tar_of([("openwebtext-10k/10k.xz", inner_archive(TEXTS))]))
    (server / "openwebtext-10k.tar.xz").write_bytes(outer)
    encoding = byte_encoding()
    check_split(*data.load("openwebtext-10k", encoding), encoding)


def shard(tokens, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, np.uint16).tobytes()


def large_as_gpt2():
    return tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks={bytes([n]): n for n in range(256)},
                             special_tokens={"<|endoftext|>": 50256})


def test_fineweb(server):
    (server / "fineweb_train_000003.bin").write_bytes(shard(range(200)))
    (server / "fineweb_val_000000.bin").write_bytes(shard([5, 6, 7]))
    train, val = data.load("fineweb-3", large_as_gpt2())
    assert train.tolist() == list(range(200)) and val.tolist() == [5, 6, 7]


def test_a_known_hash_is_checked(server, monkeypatch):
    (server / "fineweb_train_000001.bin").write_bytes(shard([1, 2, 3]))
    monkeypatch.setitem(data.SHA256, data.FINEWEB.format("train", 1), "0" * 64)
    with pytest.raises(UserError, match="invalid hash value .*expected .0000"):
        data.load("fineweb", large_as_gpt2())
    with pytest.raises(UserError, match="fineweb comes as GPT-2's tokens"):
        data.load("fineweb", byte_encoding())


def test_no_network_names_the_offline_ways(server, cache):
    with pytest.raises(UserError, match="cannot download .*404[^$]*--data PATH[^$]*--init scratch --data stdlib"):
        data.load("openwebtext", byte_encoding())
    assert not any(cache.iterdir())    # nothing half-written


def test_a_download_that_stops_early_leaves_nothing(server, cache, monkeypatch):
    def promise_more(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 400)

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "do_GET", promise_more)
    with pytest.raises(UserError, match="it ended after 400 of 1000 bytes"):
        data.load("openwebtext", byte_encoding())
    assert not any(cache.iterdir())


@pytest.mark.parametrize("damage", ["cut", "cut inside", "no archive"])
def test_broken_archives(server, cache, damage):
    inner = inner_archive(TEXTS)
    outer = tar_of([("a_data.xz", inner[:len(inner) // 2] if damage == "cut inside" else inner)])
    content = {"cut": outer[:512 + len(inner) // 2], "cut inside": outer,
               "no archive": b"<html>not here</html>" * 100}[damage]
    (server / "urlsf_subset00.tar").write_bytes(content)
    with pytest.raises(UserError, match="is damaged or truncated.*\ndelete it"):
        data.load("openwebtext", byte_encoding())
    assert [path.name for path in cache.iterdir()] == ["urlsf_subset00.tar"]


def test_text_file_and_folder(tmp_path):
    encoding, folder = byte_encoding(), tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("\n\n\n".join(TEXTS[:60]))
    (folder / "sub" / "b.txt").write_text("\n\n\n\n".join(TEXTS[60:]))
    (folder / "c.md").write_text("not read")
    check_split(*data.load(str(folder), encoding), encoding)
    (tmp_path / "all.txt").write_text("\n\n\n".join(TEXTS))
    check_split(*data.load(str(tmp_path / "all.txt"), encoding), encoding)
    (tmp_path / "all.txt").write_text("\n\n\n".join(TEXTS[:100]))    # changed: the cache must not answer
    check_split(*data.load(str(tmp_path / "all.txt"), encoding), encoding, TEXTS[:100])


def test_too_few_documents(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(UserError, match="1 documents are too few.*\n.*two blank lines"):
        data.load(str(tmp_path / "one.txt"), byte_encoding())


def test_a_token_file_is_cut_between_documents(tmp_path):
    encoding = byte_encoding()
    tokens = np.array(([65] * 9 + [256]) * 40 + [66] * 5, np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    train, val = data.load(str(tmp_path / "tokens.bin"), encoding)
    assert np.concatenate((train, val)).tolist() == tokens.tolist()
    assert train[-1] == 256 and 380 <= len(train) < 400


@pytest.mark.parametrize("content, message", [
    (np.array([1, 2, 257], np.uint16).tobytes(), "holds token 257, outside the model's vocabulary of 257"),
    (shard([1, 2, 3], count=9), "its header promises 9 tokens, it holds 3"),
    (b"", "cannot read the tokens"),
])
def test_bad_token_files(tmp_path, content, message):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.load(str(tmp_path / "bad.bin"), byte_encoding())


def test_no_such_source():
    with pytest.raises(UserError, match="no such data: nope\nexpected openwebtext"):
        data.load("nope", byte_encoding())


def test_docstrings_are_the_standard_librarys():
    found = list(itertools.islice(data.docstrings(), 10))    # the files come in alphabetical order
    assert any(text.startswith(inspect.getdoc(__future__)) for text in found)
    assert len(set(found)) == 10


def test_bytes_round_trip():
    encoding, text = byte_encoding(), "Überraschung \n\t € \U0001f600"
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.n_vocab == 257 and encoding.eot_token == 256

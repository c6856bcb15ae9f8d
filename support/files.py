"""Files in and out, all at once or not at all, and the one error that a user gets to see."""
import argparse
import contextlib
import csv
import hashlib
import http.client
import json
import os
import shutil
import sys
import tempfile
import urllib.request

import torch
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can mend: its message says in two lines what is wrong and what to do."""


def first_line(error):
    """What went wrong, without the path, which the message has named."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).partition("\n")[0][:160]


@contextlib.contextmanager
def explained(what, advice, *errors):
    """These errors of the block become a UserError. Its two lines: what went wrong, and what to do."""
    try:
        yield
    except errors as error:
        raise UserError(f"{what}: {first_line(error)}\n{advice}") from error


def between(kind, low, high):
    """A type for argparse: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:      # nan is not between them either
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__        # argparse names it where the text is no number at all
    return parse


def run_command(parser, function):
    """Parse the command line and return function(args). A user's mistake prints its message and exits with code 2,
    Ctrl-C exits with code 1."""
    args = parser.parse_args()
    try:
        return function(args)
    except (UserError, FloatingPointError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError as error:    # of a GPU
        parser.error(f"{first_line(error)}\nask for less at once: docs/reading-a-run.md has a row on it")
    except KeyboardInterrupt:
        sys.exit("stopped")


def make_folder(path):
    """Create the output folder, or say at once, before hours of training, that nothing can be written there."""
    with explained(f"cannot write to {path}", "pass another folder to write to", OSError):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def absolute(path, names=()):
    """The absolute path. One of `names`, or a path that does not exist, is returned as it is."""
    return os.path.abspath(path) if path not in names and os.path.exists(path) else path


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to. At the end it takes the place of `path`; after an error it is deleted."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f"tmp-{os.getpid()}-{name}")    # two processes may write the same file at once
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, content, indent=1):
    make_folder(os.path.dirname(path) or ".")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent, default=torch.Tensor.tolist)


def read_json(path):
    """The JSON object in a file, a dict."""
    with explained(f"cannot read {path}", "pass a path with an undamaged file", OSError, ValueError):
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
    return content


def write_csv(path, rows):
    """A line for each of rows, dicts with the same keys."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def fetch(url, path, advice, sha256=None):
    """path, downloaded from url if it is not there yet. advice: what to do if that fails."""
    if os.path.exists(path):
        return path
    with explained(f"cannot download {url}", advice, OSError, http.client.HTTPException):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
        with urllib.request.urlopen(request, timeout=60) as response, replacing(path) as temporary:
            size = int(response.headers.get("Content-Length") or 0)
            with (open(temporary, "wb") as file, tqdm.wrapattr(
                    response, "read", total=size or None, desc=os.path.basename(path)) as body):
                shutil.copyfileobj(body, file)
            if size and os.path.getsize(temporary) != size:    # a broken connection looks like the end
                raise OSError(f"it ended after {os.path.getsize(temporary)} of {size} bytes")
            if sha256:
                with open(temporary, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256:
                    raise OSError(f"invalid hash value (expected {sha256[:16]}..., got {found[:16]}...)")
    return path

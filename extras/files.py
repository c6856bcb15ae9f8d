"""Files in and out: folders, JSON, and weights in Hugging Face's formats. And the one error that a user gets to see.

Weights are read as (tensors by name, metadata). The metadata is the rest of a checkpoint of ours, or Hugging Face's
config.json under the key "config.json".
"""
import argparse
import contextlib
import csv
import http.client
import json
import os
import pickle
import re
import struct
import tempfile
import urllib.request

import torch

from extras.lora import merged


class UserError(ValueError):
    """A mistake that the user can mend: its message says in two lines what is wrong and what to do."""


def make_folder(path):
    """Create the output folder, or say at once, before hours of training, that nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}\npass another folder with --out") from error


def between(kind, low, high):
    """A type for argparse: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:      # nan is not between them either
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__    # argparse names it where the text is no number at all
    return parse


def pick_device(name=None):
    """The name of a device that this machine has: `name`, or without one cuda, else cpu."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or ("cuda" if here["cuda"] else "cpu")
    if not here[name]:
        raise UserError(f"this machine has no {name}\npass --device cpu")
    if name == "mps":
        print("warning: PyTorch has computed wrong results on mps before: compare a few numbers with --device cpu")
    return name


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to. It takes the place of `path` at the end, and is gone after an error."""
    temporary = f"{path}.{os.getpid()}.tmp"    # two processes may write the same file at once
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


def write_csv(path, rows):
    """A line for each of rows, dicts with the same keys."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def fetch(url, path, sha256, advice):
    """path, downloaded from url if it is not there yet. sha256: None where unknown; advice: what to do if it fails."""
    if os.path.exists(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
        with urllib.request.urlopen(request, timeout=60) as response:
            size = int(response.headers.get("Content-Length") or 0)
        with replacing(path) as temporary:
            torch.hub.download_url_to_file(url, temporary, hash_prefix=sha256)
            if size and os.path.getsize(temporary) != size:    # torch.hub takes a broken connection for the end
                raise OSError(f"it ended after {os.path.getsize(temporary)} of {size} bytes")
    except (OSError, http.client.HTTPException, RuntimeError) as error:    # RuntimeError: wrong hash
        raise UserError(f"cannot download {url}: {first_line(error)}\n{advice}") from error
    return path


GPT2_URL = "https://huggingface.co/openai-community/{}/resolve/main/model.safetensors"
GPT2_SHA256 = {    # None: not known to us
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": None, "gpt2-large": None, "gpt2-xl": None,
}


def fetch_gpt2(name):
    """Path of GPT-2's weights in torch.hub's cache, downloaded on the first call."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")
    return fetch(GPT2_URL.format(name), path, GPT2_SHA256[name], "Download it elsewhere and pass its path instead "
                 f"of '{name}', or put it at {path}; offline: python train.py --init scratch --data stdlib")


BAD_PICKLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, LookupError, ValueError, TypeError,
              AttributeError, AssertionError, struct.error)    # all seen from torch.load on damaged files
REQUIRED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd"}


def first_line(error):
    return str(error).partition("\n")[0][:160]


def read_weights(path, merge=True):
    """A folder, a single file or the index of a sharded one -> (tensors by name, metadata).

    merge: adapters (extras/lora.py) become part of the weights.
    """
    if os.path.isdir(path):
        names = [n + end for n in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
        files = [os.path.join(path, n) for n in names if os.path.exists(os.path.join(path, n))]
        if not files:
            raise UserError(f"no weights in the folder {path}\nexpected one of {', '.join(names)}")
        path = files[0]
    if not os.path.exists(path):
        raise UserError(f"no such file or folder: {path}\nexpected a path, or one of {', '.join(GPT2_SHA256)}")
    config = os.path.join(os.path.dirname(path), "config.json")
    meta = {"config.json": read_json(config)} if os.path.exists(config) else {}
    if path.endswith(".index.json"):
        tensors = {}
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{path} names no shards\nexpected a weight_map from tensors to files")
        for shard in sorted(set(shards.values())):
            tensors.update(read_weights(os.path.join(os.path.dirname(path), shard))[0])
        return tensors, meta
    if path.endswith(".safetensors"):
        return read_safetensors(path), meta
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except BAD_PICKLE as error:
        raise UserError(f"{path} is truncated, or holds more than tensors and plain values\n"
                        f"{type(error).__name__}: {first_line(error)}") from error
    if isinstance(tensors, dict) and {"config", "model"} <= tensors.keys():
        tensors, meta = tensors.pop("model"), tensors
        if not isinstance(meta["config"], dict) or not REQUIRED <= meta["config"].keys():
            raise UserError(f"{path} is the checkpoint of another program\n"
                            "expected one of ours, or a state dict")
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise UserError(f"{path} holds no tensors by name\nexpected a state dict or a checkpoint of ours")
    return merged(tensors) if merge else tensors, meta


def read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}\n{first_line(error)}") from error
    return content


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """The format: header length (8 bytes, little-endian), header (JSON), then the raw data of all tensors."""
    try:
        with open(path, "rb") as file:
            size, length = os.path.getsize(path), int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"its header would be {length} bytes long, the file is {size}")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                if 8 + length + end > size:
                    raise ValueError(f"{name} would end at byte {8 + length + end}, the file at {size}")
                dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
                if dtype is None:
                    raise ValueError(f"{name} has the unsupported type {entry['dtype']}")
                file.seek(8 + length + begin)
                raw = bytearray(file.read(end - begin))    # a copy: the file's offsets are not aligned
                tensors[name] = torch.frombuffer(raw, dtype=dtype).view(entry["shape"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is truncated, or no safetensors file that can be read here\n"
                        f"{first_line(error)}") from error
    return tensors


def from_gpt2_layout(tensors, path):
    """Hugging Face's GPT-2 -> our names and layout: no prefix, no masks, no second head, Linear weights."""
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors = {name: t for name, t in tensors.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path} has an output head of its own\nexpected GPT-2's: lm_head.weight = wte.weight")
    conv1d = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")    # these are stored (in, out)
    return {name: t.t().contiguous() if conv1d.search(name) and t.ndim == 2 else t
            for name, t in tensors.items()}


def infer_config(tensors, hf, path, n_head=None):
    """GPTConfig's fields from the tensors' shapes; the number of heads from config.json (hf), else D = 64."""
    wanted = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for key, value in wanted.items():
        if hf.get(key, value) != value:
            raise UserError(f"{path}: config.json has {key}={hf[key]}\nexpected GPT-2's {key}={value}")
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or tensors[name].ndim != 2:
            raise UserError(f"{path} does not fit this GPT: {name} is missing or no matrix\n"
                            "expected GPT-2's tensors")
    (V, C), T = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    layers = {int(m[1]) for m in (re.match(r"h\.(\d+)\.", name) for name in tensors) if m}
    n_head = n_head or hf.get("n_head") or (C // 64 if C % 64 == 0 else None)
    if n_head is None:
        raise UserError(f"{path}: the number of heads is unknown (width {C}, no config.json)\npass n_head=...")
    n_layer = max(max(layers, default=-1) + 1, hf.get("n_layer", 0))    # a layer that is not there gets named
    return dict(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=C)

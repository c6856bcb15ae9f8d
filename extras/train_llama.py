"""train.py for what extras/llama.py loads, the Llama family and GPT-2, and with low-rank adapters if asked.

    python -m extras.train_llama --init FOLDER --block-size 512 --lora-rank 16 --batch-size 1 --grad-accum 64

It takes all options of train.py and two more. What it has begun it also resumes and reports.
"""
import torch

import train
from extras.llama import load_model
from extras.lora import add_adapters
from extras.tokenizer import encoding_of
from support.files import UserError, between

OPTIONS = (
    ("lora-rank", between(int, 0, 10**4), 0, "train adapters of this rank on q and k, not the weights; 0: off"),
    ("lora-all", bool, False, "with --lora-rank: adapters on every linear layer but the output head"),
)


def adapt(model, args):
    """Put the adapters that args ask for on the model: before it goes to the device, where frozen weights take half."""
    if args.lora_all and not args.lora_rank:
        raise UserError("--lora-all says where adapters go, not of which rank\npass --lora-rank 8 with it")
    if args.lora_rank and args.init == "scratch":
        raise UserError("adapters need a trained model, not --init scratch\npass --init PATH")
    if args.lora_rank:
        generator = torch.Generator().manual_seed(args.seed)
        add_adapters(model, args.lora_rank, args.lora_all, getattr(torch, args.dtype), generator)


def main():
    train.main(load_model, encoding_of, OPTIONS, adapt, "python -m extras.train_llama")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Measures how fast bnb loads each container, beside safetensors' and PyTorch's own loaders, in one run.

    make && python3 tests/golden/bench_loading.py      # from the repository's root; makes files of 4 GB in TMPDIR

Files are in the page cache. mapped: until each byte was read once, in place; copied: until all is in memory of its own.
For Python these are load_file (which maps) and then a sum over each tensor's bytes, or a clone of each. Medians of 5.
What it does not do: empty the page cache (a cold read is the disk's speed).
"""
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import safetensors
import safetensors.torch
import torch
from transformers import OPTConfig, OPTForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
REPS = 5


def make(tmp):
    config = OPTConfig(vocab_size=50272, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
                       word_embed_proj_dim=1024)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model = model.to_empty(device="cpu").half()
    for p in model.parameters():
        p.data.view(torch.int16).random_(0, 1 << 14)  # any finite numbers
    model.tie_weights()
    model.save_pretrained(tmp + "/st")
    model.save_pretrained(tmp + "/sharded", max_shard_size="200MB")
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for name, zipped in (("bin", True), ("legacy", False)):
        os.makedirs(tmp + "/" + name)
        torch.save(state, tmp + "/" + name + "/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        subprocess.run(["cp", tmp + "/st/config.json", tmp + "/" + name], check=True)
    for out, options in (("f16.bnb", ["--type", "f16"]), ("nf4.bnb", ["--type", "nf4"]),
                         ("int8.bnb", ["--type", "int8"]), ("nf4-hf", ["--type", "nf4", "--format", "hf"]),
                         ("int8-hf", ["--type", "int8", "--format", "hf"])):
        subprocess.run([ROOT + "/quantize", tmp + "/st", tmp + "/" + out, *options], check=True, capture_output=True)


def timed(load, use):
    times = []
    for rep in range(REPS + 1):
        start = time.perf_counter()
        tensors = load()
        kept = [use(t) for t in tensors]
        times.append(time.perf_counter() - start)
        n = sum(t.numel() * t.element_size() for t in tensors)
        del tensors, kept
    return n, statistics.median(times[1:])


def read(t):
    t.flatten().view(torch.int64 if t.numel() * t.element_size() % 8 == 0 else torch.uint8).sum()


def row(what, how, n, seconds):
    print("%-34s %-22s %6.3f GB %8.3f s %7.2f GB/s" % (what, how, n / 1e9, seconds, n / seconds / 1e9), flush=True)


def python_loaders(tmp):
    files = lambda d: sorted(glob.glob(d + "/*.safetensors"))
    st = lambda d: (lambda: [t for f in files(d) for t in safetensors.torch.load_file(f).values()])
    pt = lambda d, mmap: (lambda: list(torch.load(d + "/pytorch_model.bin", mmap=mmap).values()))
    for d in ("st", "sharded", "nf4-hf", "int8-hf"):
        row("safetensors (Python), " + d, "mapped", *timed(st(tmp + "/" + d), read))
        row("safetensors (Python), " + d, "copied", *timed(st(tmp + "/" + d), torch.clone))
    row("torch.load, bin", "mapped", *timed(pt(tmp + "/bin", True), read))
    row("torch.load, bin", "copied", *timed(pt(tmp + "/bin", False), lambda t: None))
    row("torch.load, legacy", "copied", *timed(pt(tmp + "/legacy", False), lambda t: None))


def bnb(tmp):
    stored = ("st", "sharded", "bin", "legacy", "nf4-hf", "int8-hf", "f16.bnb", "nf4.bnb", "int8.bnb")
    quantized = (("st", ["--type", "nf4"]), ("st", ["--type", "int8"]), ("bin", ["--type", "nf4"]))
    for d, options in (*((d, []) for d in stored), *quantized):
        out = subprocess.run([ROOT + "/bench", "--load", "-m", tmp + "/" + d, "-r", str(REPS), "--json", *options],
                             check=True, capture_output=True).stdout
        for r in json.loads(out)["load"]:
            if options and not r["no_mmap"]:
                continue  # nothing can stay in the file
            how = "to " + options[1] if options else "copied" if r["no_mmap"] else "mapped"
            row("bnb, " + d, how, r["bytes"], r["seconds"])


def main():
    print("torch", torch.__version__, "safetensors", safetensors.__version__, "threads", torch.get_num_threads())
    with tempfile.TemporaryDirectory() as tmp:
        make(tmp)
        python_loaders(tmp)
        bnb(tmp)


if __name__ == "__main__":
    main()

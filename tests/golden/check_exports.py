#!/usr/bin/env python3
"""Loads what ./quantize --format hf writes in transformers and bitsandbytes, and compares.

    make test && python3 tests/golden/check_exports.py [-v]     # from the repository's root; status 1: a failure

Sources: checkpoints/ (quantized by bitsandbytes) as stored, models/ (f32) in each type, models/demo with its tokenizer.
For each export:
    loads       transformers loads it: no warning, no missing and no unexpected key
    planes      as stored: each tensor equals the source's, byte for byte. Else: each plane equals what bitsandbytes
                makes of the same weights on this CPU (--quant-compat cpu). Nested scales hang on a mean whose last bits
                are those of an order of summation: it may differ by 2 ulp, and a code of a scale then by one step
    round trip  .bnb -> hf -> .bnb gives the same file
    logits      bnb's (f32) against transformers' (4 bits: dequantized, f32; 8 bits: bitsandbytes' own kernels)
    tokens      64 greedy tokens are the same; 8 bits: after each of transformers' 64 tokens, wherever its best leads by
                more than the limit for logits
It prints a line for each and a summary. What it does not do: write anything that stays.
"""
import glob
import json
import logging
import os
import subprocess
import sys
import tempfile

import bitsandbytes as bnb
import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

sys.argv, verbose = sys.argv[:1], "-v" in sys.argv  # make_checkpoints looks at arguments
from make_checkpoints import F16, BF16, F32, dequantized, is_conv1d, logits_of, plain_model, quantized_weights

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
N_GREEDY, PROMPT = 64, [7, 3, 19, 40, 22, 11, 5, 30]
F32_LIMIT = 1e-4   # max |diff| / max |logit|
INT8_LIMIT = 2e-2  # relative euclidean distance: a last bit makes another 8-bit activation in the next layer
TYPES = {  # name: options of ./quantize, what transformers is asked for (None: nothing to compare planes with)
    "nf4": (["--type", "nf4"], dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "fp4": (["--type", "fp4"], dict(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    "nf4-nested": (["--type", "nf4", "--double-quant"],
                   dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "nf4-128": (["--type", "nf4", "--blocksize", "128"], None),
    "fp4-skip": (["--type", "fp4", "--skip-modules", "c_proj,out_proj,lm_head"],
                 dict(load_in_4bit=True, bnb_4bit_quant_type="fp4",
                      llm_int8_skip_modules=["c_proj", "out_proj", "lm_head"])),
    "int8": (["--type", "int8", "--threshold", "4"], dict(load_in_8bit=True, llm_int8_threshold=4.0)),
    "int8-sharded": (["--type", "int8", "--shard-size", "0.00005"], dict(load_in_8bit=True)),
    "f32": (["--type", "f32"], None),
    "f16": (["--type", "f16"], None),
    "bf16": (["--type", "bf16"], None),
}
results = []  # (what, name, ok, detail)


def note(what, name, ok, detail=""):
    results.append((what, name, bool(ok), detail))
    if verbose or not ok:
        print("%-4s %-10s %s %s" % ("ok" if ok else "FAIL", what, name, detail), flush=True)


def run(*args):
    r = subprocess.run([os.path.join(ROOT, args[0]), *args[1:]], capture_output=True)
    if r.returncode:
        raise SystemExit("%s: %s" % (" ".join(args), r.stderr.decode()))
    return r.stdout


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def load(path, name):
    log = Warnings()
    logger = logging.getLogger("transformers")
    logger.addHandler(log)
    model, info = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", device_map="cpu",
                                                       output_loading_info=True)
    logger.removeHandler(log)
    bad = {k: v for k, v in info.items() if v}
    note("loads", name, not bad and not log.lines, "%s %s" % (bad or "", log.lines or ""))
    return model.eval()


def reference(model):
    """The same network for comparing logits: 8 bits as bitsandbytes runs them, all else in f32."""
    int8 = any(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules())
    weights = quantized_weights(model)
    if int8:
        for p in model.parameters():
            p.data = p.data.float() if p.dtype in (F16, BF16) else p.data
        return model, True
    state = {k: v.float() for k, v in model.state_dict().items() if v.dtype in (F16, BF16, F32)}
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = F32
    config._attn_implementation = "eager"
    return plain_model(type(model), config, state, weights), False


def logits_by_bnb(path, ids, n):
    """f32 [ids, n_vocab] and the n greedy tokens that follow."""
    out = run("build/test/tool_logits", path, str(n), *map(str, ids))
    split = len(out) - 4 * n
    return np.frombuffer(out[:split], "<f4").reshape(len(ids), -1), np.frombuffer(out[split:], "<i4").tolist()


def compare_logits(path, model, name):
    model, int8 = reference(model)
    ids = list(PROMPT)
    while len(ids) < len(PROMPT) + N_GREEDY:
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    want, (got, tokens) = logits_of(model, PROMPT).numpy(), logits_by_bnb(path, PROMPT, N_GREEDY)
    if not int8:
        d = float(np.abs(got - want).max() / np.abs(want).max())
        note("logits", name, d <= F32_LIMIT, "%.2g" % d)
        same = next((i for i, (a, b) in enumerate(zip(tokens, ids[len(PROMPT):])) if a != b), N_GREEDY)
        return note("tokens", name, same == N_GREEDY, "%d the same" % same)
    d = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    note("logits", name, d <= INT8_LIMIT, "%.2g" % d)
    want, got = logits_of(model, ids).numpy()[len(PROMPT) - 1:-1], logits_by_bnb(path, ids, 0)[0][len(PROMPT) - 1:-1]
    best = np.sort(want)[:, -2:]
    gap, other = (best[:, 1] - best[:, 0]) / np.abs(want).max(), want.argmax(1) != got.argmax(1)
    detail = "%d the same" % (N_GREEDY - other.sum())
    if other.any():
        detail += ", others lead by %.2g at most" % gap[other].max()
    note("tokens", name, not (other & (gap > INT8_LIMIT)).any(), detail)


def tensors_of(path):
    """name -> bytes, dtype and shape but for codes, whose storage type may be another."""
    out = {}
    for f in sorted(glob.glob(os.path.join(path, "*.safetensors"))):
        with safe_open(f, "pt") as s:
            for k in s.keys():
                out[k] = s.get_tensor(k)
    for f in glob.glob(os.path.join(path, "*.pt")):
        out = {k: v for k, v in torch.load(f).items() if isinstance(v, torch.Tensor) and not k.endswith(".attn.bias")}
    return out


def raw(t):
    t = t.detach().contiguous().flatten()
    return (t.view(torch.uint8) if t.dtype != torch.uint8 else t).numpy().tobytes()


def compare_stored(source, export, name, conv1d_differs):
    a, b = tensors_of(source), tensors_of(export)
    for k in [k for k in b if k.endswith("weight_format") and k not in a]:
        a[k] = b[k]  # the one that was a string
    bad = ["%s only in one" % k for k in sorted(set(a) ^ set(b))]
    for k in sorted(set(a) & set(b)):
        turned = conv1d_differs and is_conv1d(k) and a[k].dtype.is_floating_point and k + ".absmax" not in a
        w = a[k].t() if turned else a[k]
        if raw(w) != raw(b[k]):
            bad.append(k)
    note("planes", name, not bad, "%d tensors" % len(b) if not bad else str(bad[:3]))


def nested_differences(want, got, bad):
    """What is left of `bad` after nested scales whose mean differs by at most 2 ulp, and how many those are."""
    left, n_means, n_codes = [], 0, 0
    for k in bad:
        base = k.split(".weight.")[0] + ".weight"
        blob = next((b for b in want if b.startswith(base + ".quant_state")), None)
        if not blob or base + ".nested_absmax" not in want or k not in got:
            left.append(k)
            continue
        a, b = (json.loads(bytes(s[blob].tolist())) for s in (want, got))
        offsets = np.array([s.pop("nested_offset") for s in (a, b)], "<f4").view("<i4")
        steps = int((want[base + ".absmax"].int() - got[base + ".absmax"].int()).abs().max())
        if a != b or abs(offsets[0] - offsets[1]) > 2 or steps > 1 or k == base:
            left.append(k)
        n_means += k == blob
        n_codes += int((want[k] != got[k]).sum()) if k == base + ".absmax" else 0
    return left, "%d means differ in the last bits, and %d codes of scales by one step" % (n_means, n_codes)


def compare_quantized(source, how, model, name):
    """Against what bitsandbytes makes of the source on this CPU."""
    want = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**how), dtype=F32,
                                                device_map="cpu").state_dict()
    got = model.state_dict()
    bad, detail = sorted(set(want) ^ set(got)) + [k for k in want if k in got and raw(want[k]) != raw(got[k])], ""
    if bad and how.get("bnb_4bit_use_double_quant"):
        bad, detail = nested_differences(want, got, bad)
    note("planes", name, not bad, "%d tensors%s" % (len(got), detail and "; " + detail) if not bad else
         "%d of %d differ: %s" % (len(bad), len(got), bad[:3]))


def round_trip(source, options, tmp, name):
    first, hf, again = (os.path.join(tmp, n) for n in ("first.bnb", "hf", "again.bnb"))
    run("quantize", source, first, *options)
    run("quantize", first, hf, "--format", "hf")
    run("quantize", hf, again, "--type", "stored")
    a, b = open(first, "rb").read(), open(again, "rb").read()
    note("round trip", name, a == b, "%d bytes" % len(a))


def check_stored(source):
    name = os.path.basename(source)
    with tempfile.TemporaryDirectory() as tmp:
        hf = os.path.join(tmp, "out")
        run("quantize", source, hf, "--format", "hf")
        compare_stored(source, hf, name, name.startswith("mingpt"))
        compare_logits(hf, load(hf, name), name)
        round_trip(source, ["--type", "stored"], tmp, name)


def check_type(source, kind):
    name = os.path.basename(source) + " as " + kind
    options, how = TYPES[kind]
    has_config = os.path.exists(os.path.join(source, "config.json"))
    plain = kind in ("f32", "f16", "bf16")
    more = [] if plain else ["--rest-type", "f32", "--quant-compat", "cpu"]
    with tempfile.TemporaryDirectory() as tmp:
        hf = os.path.join(tmp, "out")
        run("quantize", source, hf, "--format", "hf", *options, *more)
        model = load(hf, name)
        if how and has_config:
            compare_quantized(source, how, model, name)
        compare_logits(hf, model, name)
        round_trip(source, [o for o in options if o not in ("--shard-size", "0.00005")] + more, tmp, name)


def check_demo():
    source, name = os.path.join(ROOT, "models", "demo"), "demo"
    text = "And Moses said unto the people, don't  \u00e9 12\n"
    want = AutoTokenizer.from_pretrained(source)(text).input_ids
    for start in (source, os.path.join(source, "demo-nf4.bnb")):  # tokenizer files copied, and made from a .bnb
        label = name + (" (.bnb)" if start.endswith(".bnb") else "")
        with tempfile.TemporaryDirectory() as tmp:
            hf = os.path.join(tmp, "out")
            run("quantize", start, hf, "--format", "hf", "--type", "f32")
            tokenizer = AutoTokenizer.from_pretrained(hf)
            note("tokenizer", label, tokenizer(text).input_ids == want and tokenizer.decode(want) == text)
            model = load(hf, label)
            ids = tokenizer("In the beginning", return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=48, do_sample=False, eos_token_id=None)[0]
            out = out[ids.input_ids.shape[1]:]
            mine = run("main", "-m", hf, "-p", "In the beginning", "-n", "48", "--temp", "0", "--no-echo",
                       "--ignore-eos")
            note("text", label, tokenizer.decode(out) == mine.decode(), repr(mine.decode()[:40]))


def main():
    print("torch", torch.__version__, "transformers", transformers.__version__, "bitsandbytes", bnb.__version__)
    for path in sorted(glob.glob(os.path.join(HERE, "checkpoints", "*.expect"))):
        check_stored(path[:-7])
    for path in sorted(glob.glob(os.path.join(HERE, "models", "*.expect"))):
        for kind in TYPES:
            check_type(path[:-7], kind)
    check_demo()
    for what in dict.fromkeys(r[0] for r in results):
        mine = [r for r in results if r[0] == what]
        print("%-10s %3d of %3d" % (what, sum(r[2] for r in mine), len(mine)))
    sys.exit(not all(r[2] for r in results))


if __name__ == "__main__":
    main()

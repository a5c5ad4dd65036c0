#!/usr/bin/env python3
"""Compares bnb's tokenizer with the `tokenizers` and `transformers` packages on GPT-2's vocabulary.

Run:  pip install tokenizers transformers
      python3 tests/golden/compare_tokenizers.py TOOL_ENCODE [TEXT_FILE_OR_DIR ...]

TOOL_ENCODE is the program made from tests/tool_encode.cpp. Without texts it takes some that Debian installs. Every kind
of tokenizer that models/tokenizer_json.cpp reads is written by the packages themselves, encoded by both sides and
compared id by id; then bnb's own export is read back by the packages. Prints one line for each comparison; exit status
1: a difference. Also prints both speeds, in bytes per second of CPU time on one thread.
"""
import json
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors  # noqa: E402
from tokenizers.models import BPE  # noqa: E402

GPT2 = pathlib.Path(__file__).resolve().parent / "gpt2"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
DEFAULT_TEXTS = ["/usr/share/doc", "/usr/share/vim", "/usr/share/perl", "/usr/lib/python3", "/usr/share/applications",
                 "/usr/share/i18n"]
ALPHABETS = [
    " ab", " \n\ta1.", "'stremvdl aSTREMVDL\u017f", "a1 \u00a0\u3000\u2028\u0085", " \r\nab12!'", "aaaaaab ",
    "0123456789 a\u00b2\u2167", " .,;:!?-_()[]{}<>|/\\\"'`~@#$%^&*+=",
    "e\u0301\u0302 \u0928\u092e\u0938\u094d\u0924\u0947 \u05e9\u05c1", "\u4f60\u597d\uff0c \u3053\u3093\u1112\u1161\u11ab",
    "\U0001f468\u200d\U0001f469\ufe0f\U0001f1e9 a", "the of and ing tion er 's",
    "\x00\x01\x1c\x1f\x7f\x80\x9f a", "\ufeff\u200b\u180e\ufffd a1", "<|endoftx>s/[]\u0120", "fo d[LR] B_1",
]


def random_strings(n, seed):
    rng = random.Random(seed)
    everything = [c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    for i in range(n):
        alphabet = ALPHABETS[i % len(ALPHABETS)] if i % 4 else rng.choices(everything, k=6)
        yield "".join(rng.choices(alphabet, k=rng.choice([1, 2, 3, 5, 8, 13, 30, 100])))


def marked_strings(n, seed):
    """Strings with added tokens in them, next to everything that can decide whether they count."""
    rng = random.Random(seed)
    parts = ["<|endoftext|>", "foo", "fo", "food", "[L]", "[R]", "[LR]", " B", " ", "  ", "\n", "\u00a0", "x", "1", "_",
             "\u0301", ".", "<", "</s>", "<s>", "<pad>", "\u2167", "\u200d", "the"]
    for _ in range(n):
        yield "".join(rng.choices(parts, k=rng.randint(1, 9)))


def real_texts(paths, limit=12_000_000):
    """Whole files, cut into parts of at most 100 KB, `limit` bytes of them, none of which dominates."""
    files = []
    for path in map(pathlib.Path, paths):
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    random.Random(1).shuffle(files)
    texts, total = [], 0
    for f in files:
        try:
            text = f.read_bytes()[:400_000].decode()
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" in text or total > limit:
            continue
        texts += [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
        total += len(text.encode())
    return texts


def records(texts):
    return b"".join(struct.pack("<I", len(t)) + t for t in (t.encode() for t in texts))


def ours(tool, directory, texts, *options):
    done = subprocess.run([tool, str(directory), *options], input=records(texts), stdout=subprocess.PIPE, check=True)
    lines = done.stdout.decode().split("\n")[:-1]
    assert len(lines) == len(texts), (len(lines), len(texts))
    return [[int(i) for i in line.split()] for line in lines]


failures = 0


def compare(name, texts, mine, theirs):
    global failures
    bad = [i for i in range(len(texts)) if mine[i] != theirs[i]]
    failures += bool(bad)
    n_bytes = sum(len(t.encode()) for t in texts)
    print(f"{name}: {len(texts)} texts, {n_bytes} bytes, {sum(map(len, theirs))} ids: {len(bad)} differ", flush=True)
    for i in bad[:5]:
        print(f"    {ascii(texts[i][:200])}\n      ours   {mine[i][:40]}\n      theirs {theirs[i][:40]}")


def bpe(n_merges, **kwargs):
    lines = (GPT2 / "merges.txt").read_text().split("\n")[1:n_merges + 1]
    merges = [tuple(line.split(" ")) for line in lines]
    return BPE(vocab=json.load(open(GPT2 / "vocab.json")), merges=merges, **kwargs)


def byte_level(pre=None, n_merges=50_000, **kwargs):
    t = Tokenizer(bpe(n_merges, **kwargs))
    t.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    return t


def kinds():
    """name -> a tokenizer of each kind that is read"""
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made = {
        "gpt2": byte_level(),
        "prefix space": byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "digits": byte_level(digits),
        "llama3": byte_level(split),
        "half the merges": byte_level(n_merges=25_000),  # so that half the tokens cannot be reached by merging
        "llama3 + ignore_merges, half the merges": byte_level(split, n_merges=25_000, ignore_merges=True),
    }
    for t in made.values():
        t.add_special_tokens(["<|endoftext|>"])
    t = made["added tokens"] = byte_level()
    t.add_special_tokens(["<|endoftext|>", AddedToken("</s>", lstrip=True, rstrip=True), "<s>"])
    t.add_tokens([AddedToken("foo", single_word=True, normalized=False), AddedToken("fo", normalized=True),
                  AddedToken("food", normalized=False), AddedToken("[L]", lstrip=True, normalized=False),
                  AddedToken("[R]", rstrip=True), AddedToken("[LR]", lstrip=True, rstrip=True),
                  AddedToken(" B", normalized=False)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[
        ("<s>", t.token_to_id("<s>")), ("</s>", t.token_to_id("</s>"))])
    return made


def compare_kinds(tool, texts):
    marked = list(marked_strings(20_000, 7))
    for name, t in kinds().items():
        with tempfile.TemporaryDirectory() as d:
            t.save(f"{d}/tokenizer.json")
            everything = texts + marked
            for parse in (True, False):
                t.encode_special_tokens = not parse
                theirs = [t.encode(s).ids for s in everything]
                label = f"{name}, special tokens {'parsed' if parse else 'as text'}"
                compare(label, everything, ours(tool, d, everything, "add", *["parse"] * parse), theirs)
            exported = subprocess.run([tool, d, "export"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
            again = Tokenizer.from_str(exported.stdout.decode())
            again.encode_special_tokens = True
            read_back = [again.encode(s).ids for s in everything]
            compare(f"{name}, our export read by tokenizers", everything, theirs, read_back)


def compare_code_points(tool):
    """Every code point between letters, digits and spaces; those assigned lately may differ with the tables' age."""
    t = byte_level()
    texts = [f"a{chr(c)}b 1{chr(c)}2 {chr(c)} {chr(c)}" for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    mine, theirs = ours(tool, GPT2, texts), [t.encode(s).ids for s in texts]
    bad = [texts[i][1] for i in range(len(texts)) if mine[i] != theirs[i]]
    old = [c for c in bad if unicodedata.category(c) != "Cn"]
    global failures
    failures += bool(old)
    print(f"every code point: {len(texts)} texts: {len(bad)} differ, of which {len(old)} are in Unicode "
          f"{unicodedata.unidata_version} {list(map(ascii, old[:5]))}", flush=True)


def compare_transformers(tool, texts):
    """vocab.json + merges.txt, read by AutoTokenizer: GPT-2, and OPT's rules on a vocabulary of its shape."""
    from transformers import AutoTokenizer
    vocab = json.load(open(GPT2 / "vocab.json"))
    order = [t for t in vocab if t != "<|endoftext|>"]
    random.Random(3).shuffle(order)
    opt = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>"] + order + ["<|endoftext|>"])}
    opt_config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "add_prefix_space": False,
                  "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    for name, table, config in (("gpt2", vocab, {"tokenizer_class": "GPT2Tokenizer"}), ("opt", opt, opt_config)):
        with tempfile.TemporaryDirectory() as d:
            d = pathlib.Path(d)
            (d / "vocab.json").write_text(json.dumps(table))
            (d / "merges.txt").write_bytes((GPT2 / "merges.txt").read_bytes())
            (d / "tokenizer_config.json").write_text(json.dumps(config))
            (d / "config.json").write_text(json.dumps({"model_type": name}))
            t = AutoTokenizer.from_pretrained(d)
            theirs = t(texts)["input_ids"]
            compare(f"transformers, {name}", texts, ours(tool, d, texts, "add", "parse"), theirs)
            saved = d / "saved"
            t.save_pretrained(saved)
            compare(f"transformers, {name} saved by it", texts, ours(tool, saved, texts, "add", "parse"), theirs)


def compare_speed(tool, texts):
    text = "\n".join(texts)
    t = byte_level()
    lines = text.split("\n")
    for name, parts in (("whole", [text]), ("lines", lines)):
        start = time.process_time()
        for part in parts:
            t.encode(part)
        seconds = time.process_time() - start
        done = subprocess.run([tool, str(GPT2), "time"], input=records(parts), stderr=subprocess.PIPE, check=True)
        speed = len(text.encode()) / seconds / 1e6
        print(f"speed, {name}: tokenizers {speed:.1f} MB/s; bnb {done.stderr.decode().splitlines()[1]}", flush=True)


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    tool, paths = sys.argv[1], sys.argv[2:] or DEFAULT_TEXTS
    tricky, real = list(random_strings(40_000, 5)), real_texts(paths)
    t = byte_level()
    for name, texts in (("random strings", tricky), ("real text", real)):
        compare(f"gpt2, {name}", texts, ours(tool, GPT2, texts), [t.encode(s).ids for s in texts])
    compare_code_points(tool)
    compare_kinds(tool, tricky[:20_000] + real[:20])
    compare_transformers(tool, tricky[:20_000] + list(marked_strings(5_000, 9)) + real[:20])
    compare_speed(tool, real[:60])
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()

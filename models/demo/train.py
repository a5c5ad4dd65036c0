#!/usr/bin/env python3
"""Trains the demo model of this directory: a small GPT-2 on the King James Bible.

What it makes, in --out (default: the directory of this script), a Hugging Face model directory:
    model.safetensors                                   f16 weights, GPT-2 names; the output head is tied to wte
    config.json  generation_config.json                 GPT2LMHeadModel
    tokenizer.json  vocab.json  merges.txt              byte-level BPE, GPT-2's split pattern, 4096 tokens
    tokenizer_config.json  special_tokens_map.json      <|endoftext|> is the last token, as in GPT-2
    heldout.txt                                         every 40th chapter: never trained on, never selected on

How to run it:
    apt-get install bible-kjv bible-kjv-text            # the text, and the program that unpacks it
    pip install torch transformers tokenizers safetensors
    python3 train.py                                    # trains (needs a GPU to be quick), then evaluates
    python3 train.py --evaluate                         # only: held-out perplexity in f32 on the CPU, and samples
    python3 train.py --text FILE                        # another text, as `bible -f ge1:1-rev22:21` prints it:
                                                        # a line is <book><chapter>:<verse> <text of the verse>

The text: a verse is a line, a blank line ends a chapter, <|endoftext|> ends a book. No headings, no verse numbers.
Seeds are fixed. A GPU's sums are not ordered, so a second run gives the same quality, not the same bytes.

What it does not do: resume, use several GPUs, or train anything larger. It is no fine-tuning tool.
"""
import argparse, itertools, json, math, pathlib, re, subprocess, time

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

EOT = "<|endoftext|>"
N_VOCAB, N_CTX = 4096, 512
SEED = 1611
CHAPTERS_PER_FOLD = 40      # of every 40 chapters, number 19 is held out and number 39 is for validation


# ---- text -----------------------------------------------------------------------------------------------------

def read_chapters(path):
    """-> [(book, text of one chapter)] in the order of the book."""
    if path:
        lines = pathlib.Path(path).read_text().splitlines()
    else:
        lines = subprocess.run(["bible", "-f", "ge1:1-rev22:21"], stdin=subprocess.DEVNULL, check=True,
                               capture_output=True, text=True).stdout.splitlines()
    verses = [re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line).groups() for line in lines if line]
    return [(book, "\n".join(text for _, _, text in group) + "\n")
            for (book, _), group in itertools.groupby(verses, key=lambda v: v[:2])]


def split_chapters(chapters):
    """-> texts of the training books, validation text, held-out text."""
    train, valid, heldout = {}, [], []
    for i, (book, text) in enumerate(chapters):
        fold = i % CHAPTERS_PER_FOLD
        if fold == 19: heldout.append(text)
        elif fold == 39: valid.append(text)
        else: train.setdefault(book, []).append(text)
    return ["\n".join(texts) for texts in train.values()], "\n".join(valid), "\n".join(heldout)


# ---- tokenizer ------------------------------------------------------------------------------------------------

def write_tokenizer(books, out):
    """Trains the BPE on the training books and writes the five tokenizer files."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)       # use_regex: GPT-2's pattern
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = byte_level
    trained.train_from_iterator(books, trainers.BpeTrainer(
        vocab_size=N_VOCAB - 1, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False))

    # <|endoftext|> goes last, in the vocabulary and among the added tokens: the layout of GPT-2's own files.
    bpe = json.loads(trained.to_str())["model"]
    bpe["vocab"][EOT] = len(bpe["vocab"])
    tokenizer = Tokenizer(models.BPE(bpe["vocab"], [tuple(pair) for pair in bpe["merges"]]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([EOT])
    assert tokenizer.get_vocab_size() == N_VOCAB

    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer.model.save(str(out))                                      # vocab.json, merges.txt
    specials = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": N_CTX, "add_prefix_space": False, **specials}
    for name, value in (("special_tokens_map.json", specials), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    return tokenizer


# ---- training: a million tokens are few for six million parameters, so dropout and decay are strong -------------

DROPOUT = 0.3
BATCH = 32                  # windows of N_CTX tokens per step
CHECK_EVERY = 100           # steps between looks at the validation text


def windows_nll(model, ids, n_ctx=N_CTX):
    """Sum of -log p and number of scored tokens, over windows of n_ctx tokens that do not overlap. A window's first
    token is context only; the last window may be shorter."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in ids.split(n_ctx):
            if len(window) < 2: break
            logits = model(window[None]).logits[0, :-1].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return total, count


def train(args):
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    books, valid, heldout = split_chapters(read_chapters(args.text))
    (out / "heldout.txt").write_text(heldout)
    tokenizer = write_tokenizer(books, out)

    torch.manual_seed(SEED)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = [i for book in books for i in tokenizer.encode(book).ids + [N_VOCAB - 1]]
    stream = torch.tensor(stream, device=device)
    valid = torch.tensor(tokenizer.encode(valid).ids, device=device)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=N_VOCAB, n_positions=N_CTX, n_embd=256, n_layer=6, n_head=4,
        bos_token_id=N_VOCAB - 1, eos_token_id=N_VOCAB - 1,
        resid_pdrop=DROPOUT, embd_pdrop=DROPOUT, attn_pdrop=DROPOUT)).to(device)
    print(f"{model.num_parameters()} parameters; tokens: {len(stream)} train, {len(valid)} validation", flush=True)

    # Muon takes the matrices of the blocks, AdamW the embedding tables, gains and biases; the last two do not decay.
    params = dict(model.named_parameters())
    blocks = [p for name, p in params.items() if p.ndim == 2 and ".h." in name]
    tables = [p for name, p in params.items() if p.ndim == 2 and ".h." not in name]
    vectors = [p for p in params.values() if p.ndim == 1]
    optimizers = [
        torch.optim.Muon(blocks, lr=6e-3, weight_decay=1.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                          lr=3e-3, betas=(0.9, 0.98), fused=device == "cuda")]
    warmup = max(1, args.steps // 20)
    def schedule(step):                                                 # linear warm-up, then a cosine to zero
        done = max(0, step - warmup) / max(1, args.steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]

    best, best_state, start = math.inf, None, time.time()
    crop = torch.arange(N_CTX + 1, device=device)
    for step in range(1, args.steps + 1):
        model.train()
        at = torch.randint(len(stream) - N_CTX, (BATCH, 1)).to(device)
        batch = stream[at + crop]                                       # [batch, N_CTX + 1], cut at random places
        with torch.autocast(device, torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizers: o.step(); o.zero_grad()
        for s in schedulers: s.step()

        if step % CHECK_EVERY == 0 or step == args.steps:               # keep the best state seen on validation
            model.eval()
            total, count = windows_nll(model, valid)
            if total / count < best:
                best, best_state = total / count, {n: p.detach().clone() for n, p in model.state_dict().items()}
            print(f"step {step}  {time.time() - start:.0f} s  train {loss.item():.4f}  "
                  f"validation {total / count:.4f}  best {best:.4f} (perplexity {math.exp(best):.2f})", flush=True)

    model.load_state_dict(best_state)
    model.half().save_pretrained(out)                                   # f16; the tied head is not stored


# ---- evaluation -----------------------------------------------------------------------------------------------

def evaluate(args):
    """Held-out perplexity and samples of the directory as it was saved, in f32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32, attn_implementation="eager").eval()
    text = (pathlib.Path(args.out) / "heldout.txt").read_text()
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    total, count = windows_nll(model, ids)
    print(f"held-out: {len(text.encode())} bytes, {len(ids)} tokens, {count} scored in windows of {N_CTX}\n"
          f"perplexity {math.exp(total / count):.4f}, nats per token {total / count:.5f}")
    prompt = tokenizer("In the beginning", return_tensors="pt")
    for name, how in (("greedy", dict(do_sample=False)), ("sampled, temperature 0.8, top-k 40",
                                                          dict(do_sample=True, temperature=0.8, top_k=40))):
        torch.manual_seed(SEED)
        made = model.generate(**prompt, max_new_tokens=160, pad_token_id=N_VOCAB - 1, **how)
        print(f"\n[{name}]\n{tokenizer.decode(made[0])}")


if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="output of `bible -f ge1:1-rev22:21` (default: run it)")
    parser.add_argument("--out", default=here, help="model directory (default: this script's)")
    parser.add_argument("--evaluate", action="store_true", help="no training")
    parser.add_argument("--steps", type=int, default=4500, help="training steps (default: %(default)s)")
    args = parser.parse_args()
    if not args.evaluate: train(args)
    evaluate(args)

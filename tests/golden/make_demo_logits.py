#!/usr/bin/env python3
"""Makes demo_logits.json and demo_logits.bin: what transformers computes for the demo model in models/demo.

How to run it (needs torch and transformers; a minute on a CPU):
    python3 tests/golden/make_demo_logits.py

Reference: GPT2LMHeadModel on the committed f16 weights, in f32, eager attention, on the CPU.

demo_logits.json
    model, weights_sha256   the directory, and the SHA-256 of its model.safetensors: a test fails early on other weights
    logits_file, n_vocab    logits_file holds float32, little endian, [prompts][n_vocab], without a header:
                            the logits of each prompt's last position
    prompts                 per prompt:
        text, tokens        the prompt, and its token ids (no token is put in front)
        logits_row          row in logits_file
        max_abs_logit       largest |logit| of the row: tolerances are relative to it
        greedy_tokens       the 64 tokens that follow under greedy decoding; <|endoftext|> does not end it
        greedy_text         those tokens decoded
        greedy_min_margin   smallest gap between best and second best logit over the 64 steps. An implementation
                            whose logits are off by less than half of it must give the same tokens.
    heldout                 perplexity of models/demo/heldout.txt: the text's n_tokens in windows of `window` tokens that do
                            not overlap; a window's first token is not scored; nll is the mean in nats over n_scored

What it does not do: test anything. tests/ reads these files; they need no Python.
"""
import hashlib, json, math, pathlib, struct

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

PROMPTS = ["In the beginning", "And Moses said unto the people,"]
N_GREEDY = 64

here = pathlib.Path(__file__).resolve().parent
demo = here.parent.parent / "models" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo)
model = GPT2LMHeadModel.from_pretrained(demo, dtype=torch.float32, attn_implementation="eager").eval()
n_ctx = model.config.n_positions


@torch.no_grad()
def logits_of(tokens):
    """-> [len(tokens), n_vocab]; every call computes the whole sequence, so no cache can matter."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


prompts, rows = [], []
for text in PROMPTS:
    tokens = tokenizer(text).input_ids
    row = logits_of(tokens)[-1]
    sequence, margin = list(tokens), math.inf
    for _ in range(N_GREEDY):
        best = logits_of(sequence)[-1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        sequence.append(best.indices[0].item())
    greedy = sequence[len(tokens):]
    prompts.append({"text": text, "tokens": tokens, "logits_row": len(rows), "max_abs_logit": row.abs().max().item(),
                    "greedy_tokens": greedy, "greedy_text": tokenizer.decode(greedy), "greedy_min_margin": margin})
    rows.append(row)

tokens = tokenizer((demo / "heldout.txt").read_text(), verbose=False).input_ids
nll, n_scored = 0.0, 0
for start in range(0, len(tokens) - 1, n_ctx):
    window = tokens[start:start + n_ctx]
    log_p = logits_of(window)[:-1].double().log_softmax(-1)
    nll -= log_p.gather(1, torch.tensor(window[1:])[:, None]).sum().item()
    n_scored += len(window) - 1

golden = {
    "model": "models/demo",
    "weights_sha256": hashlib.sha256((demo / "model.safetensors").read_bytes()).hexdigest(),
    "logits_file": "demo_logits.bin", "n_vocab": model.config.vocab_size,
    "prompts": prompts,
    "heldout": {"file": "models/demo/heldout.txt", "n_tokens": len(tokens), "window": n_ctx, "n_scored": n_scored,
                "nll": nll / n_scored, "perplexity": math.exp(nll / n_scored)},
}
values = torch.stack(rows).flatten().tolist()
(here / "demo_logits.bin").write_bytes(struct.pack(f"<{len(values)}f", *values))
(here / "demo_logits.json").write_text(json.dumps(golden, indent=1, ensure_ascii=True) + "\n")
for prompt in prompts: print(f"{prompt['text']!r} -> {prompt['greedy_text']!r}, margin {prompt['greedy_min_margin']:.4f}")
print(f"held-out perplexity {golden['heldout']['perplexity']:.4f}")

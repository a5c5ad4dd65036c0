#!/usr/bin/env python3
"""Makes the small random checkpoints under models/ and what transformers (and bitsandbytes) compute with them.

    python3 make_models.py          # needs torch, transformers, bitsandbytes (CPU is enough); takes a minute

Each models/NAME/ is a Hugging Face directory (f32 safetensors; minGPT: its state_dict alone). models/NAME.expect holds,
little-endian:
    i32 n_prompt, n_vocab, n_greedy, n_modes
    i32 prompt [n_prompt], i32 greedy [n_greedy]            greedy: f32, what follows the prompt
    n_modes times: mode as 8 bytes (zero-padded), f32 logits [n_prompt, n_vocab]

Modes: f32; int8, nf4, fp4, nf4dq: as transformers with bitsandbytes runs them on this CPU (4-bit in bf16 where the CPU
multiplies bf16); nf4.f32, fp4.f32, nf4dq.f32: bitsandbytes' codes, dequantized to f32 and run in f32.

Weights are larger than a trained model's, so that greedy decoding does not fall into one token.
It does not make pre-quantized checkpoints.
"""
import copy
import os
import shutil
import struct

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")
N_PROMPT, N_GREEDY, V, P = 17, 64, 160, 96


def gpt2(**more):
    return GPT2LMHeadModel, GPT2Config(vocab_size=V, n_positions=P, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
                                       eos_token_id=0, **more)


def opt(**more):
    return OPTForCausalLM, OPTConfig(vocab_size=V, max_position_embeddings=P, hidden_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, ffn_dim=256, **more)


MODELS = {
    "gpt2": gpt2(),
    "gpt2-odd": (GPT2LMHeadModel, GPT2Config(vocab_size=V - 3, n_positions=P, n_embd=48, n_layer=2, n_head=3, n_inner=80,
                                             activation_function="gelu", scale_attn_by_inverse_layer_idx=True,
                                             tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)),
    "mingpt": (GPT2LMHeadModel, GPT2Config(vocab_size=V, n_positions=P, n_embd=48, n_layer=3, n_head=3, bos_token_id=0,
                                           eos_token_id=0, tie_word_embeddings=False)),  # gpt-nano, see mingpt()
    "opt": opt(word_embed_proj_dim=64),
    "opt-post": opt(word_embed_proj_dim=128, do_layer_norm_before=False),
    "opt-nobias": opt(word_embed_proj_dim=64, enable_bias=False, layer_norm_elementwise_affine=False,
                      activation_function="gelu"),
}
QUANTIZED = {"gpt2", "opt", "opt-post"}  # K a multiple of the block: bitsandbytes' CPU kernels are wrong otherwise
MODES = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32),
    "nf4dq": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32),
}


def randomize(model, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            norm = "ln_" in name or "layer_norm" in name
            scale = 0.05 if p.dim() == 1 else 0.5 if "wpe" in name or "embed_positions" in name else 0.12
            p.copy_(1 + 0.1 * noise if norm and name.endswith("weight") else scale * noise)
            # an outlier feature, as LLM.int8() is made for: one large column behind the second norm
            if norm and name.endswith("weight"):
                p.view(-1)[5] = 5.0


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def dequantized(model, quantized):
    """A copy of the f32 model that holds the values of the quantized one's weights."""
    out = copy.deepcopy(model)
    weights = dict(quantized.named_parameters())
    with torch.no_grad():
        for name, p in out.named_parameters():
            q = weights[name]
            if isinstance(q, bnb.nn.Params4bit):
                w = bnb.functional.dequantize_4bit(q.data, q.quant_state).float()
                p.copy_(w if p.shape == w.shape and not is_conv1d(name) else w.t())
    return out


def is_conv1d(name):
    return any(name.endswith(s) for s in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def greedy(model, ids):
    out = list(ids)
    for _ in range(N_GREEDY):
        out.append(int(logits_of(model, out)[-1].argmax()))
    return out[len(ids):]


def write_expect(name, prompt, tokens, modes):
    with open(os.path.join(HERE, name + ".expect"), "wb") as f:
        n_vocab = next(iter(modes.values())).shape[1]
        f.write(struct.pack("<4i", len(prompt), n_vocab, len(tokens), len(modes)))
        f.write(struct.pack("<%di" % len(prompt), *prompt) + struct.pack("<%di" % len(tokens), *tokens))
        for mode, logits in modes.items():
            f.write(mode.encode()[:8].ljust(8, b"\0") + logits.contiguous().numpy().astype("<f4").tobytes())


def mingpt(model, path):
    """Saves under minGPT's names: Linear layout, mask buffers, a head of its own, no config.json."""
    sd = {}
    for k, v in model.state_dict().items():
        sd[k] = (v.t() if is_conv1d(k) else v).contiguous().clone()
    for i in range(model.config.n_layer):
        sd["transformer.h.%d.attn.bias" % i] = torch.tril(torch.ones(P, P)).view(1, 1, P, P)
    shutil.rmtree(path)
    os.makedirs(path)
    save_file(sd, os.path.join(path, "model.safetensors"))


def main():
    for i, (name, (cls, config)) in enumerate(MODELS.items()):
        path = os.path.join(HERE, name)
        shutil.rmtree(path, ignore_errors=True)
        torch.manual_seed(i)
        config._attn_implementation = "eager"
        model = cls(config).eval().float()
        randomize(model, 100 + i)
        model.tie_weights()
        model.save_pretrained(path)
        g = torch.Generator().manual_seed(200 + i)
        prompt = torch.randint(3, V - 3, (N_PROMPT,), generator=g).tolist()
        model = cls.from_pretrained(path, attn_implementation="eager", dtype=torch.float32).eval()
        modes = {"f32": logits_of(model, prompt)}
        tokens = greedy(model, prompt)
        if name == "mingpt":
            mingpt(model, path)
        for mode, q in (MODES.items() if name in QUANTIZED else ()):
            m = cls.from_pretrained(path, quantization_config=q, dtype=torch.float32, attn_implementation="eager",
                                    device_map="cpu").eval()
            if mode != "int8":  # before the first forward, which repacks the weights
                modes[mode + ".f32"] = logits_of(dequantized(model, m), prompt)
            modes[mode] = logits_of(m, prompt)
        write_expect(name, prompt, tokens, modes)
        print(name, "distinct greedy tokens:", len(set(tokens)),
              {m: float((l - modes["f32"]).abs().max() / modes["f32"].abs().max()) for m, l in modes.items()})


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Makes tests/golden/formats.bin: what bitsandbytes computes for many small tensors.

    pip install torch bitsandbytes==0.50.2 numpy        (CPU wheels are enough)
    python3 tests/golden/make_formats.py                (x86-64 Linux with AVX2; about a minute)

Results of compat "cpu" come from the real bitsandbytes on the CPU. Results of compat "cuda" come from the NumPy
model in section CUDA below, which states what its GPU kernels compute (checked against an H100 for 16-bit weights;
f32 weights use the correctly rounded reciprocal, see bnb.c [NUM]). Inputs are not stored: tests/test_formats.cpp
makes them again with the generator of section INPUT. The script stops if bitsandbytes disagrees with itself in a way
that is not marked TRAP below, and prints how often it met each trap.

File: "BNBFMT1\\0", u32 count, then records of 104 bytes, little-endian:
    u8 compat (0 cuda, 1 cpu), type, src_type, double_quant (ids of bnb.h)   u32 pattern, blocksize, rows, cols, seed
    f32 nested_offset    u32 crc32 of planes [4]    u32 crc32 of the dequantized f32, f16, bf16 [3]
    u8 first bytes of planes 0, 1, 2 [3][16], to see how a failing case differs
Before a crc every NaN becomes the positive quiet one, and with FP4 every zero becomes +0.
"""
import os
import struct
import sys
import zlib

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import numpy as np
import torch
import bitsandbytes
import bitsandbytes.functional as F

f32 = np.float32
F32, F16, BF16, INT8, NF4, FP4 = 0, 1, 2, 8, 9, 10
NAME = {NF4: "nf4", FP4: "fp4"}
TORCH = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
np.seterr(all="ignore")

# ---------------------------------------------------------------------------------------------------------- numbers


def widen(raw, dtype):
    """Stored numbers (f32, or 16-bit patterns) -> f32."""
    if dtype == F32:
        return raw
    return raw.view(np.float16).astype(f32) if dtype == F16 else (raw.astype(np.uint32) << 16).view(f32)


def narrow(x, dtype):
    """f32 -> stored numbers, rounded to nearest even."""
    if dtype == F32:
        return x
    if dtype == F16:
        return x.astype(np.float16).view(np.uint16)
    u = x.view(np.uint32).astype(np.uint64)
    r = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), r)


# ------------------------------------------------------------------------------------------------------------ INPUT
# One generator per case: s = s * 1664525 + 1013904223 (mod 2^32), s is the draw.

NORMAL, BITS, TINY, SPARSE, ZERO, TIES = range(6)


def draws(seed, n):
    power = np.cumprod(np.full(n, 1664525, np.uint32), dtype=np.uint32)  # a^1 .. a^n
    sums = np.cumsum(np.concatenate([[np.uint32(1)], power[:-1]]), dtype=np.uint32)
    return power * np.uint32(seed) + sums * np.uint32(1013904223)


def normalish(seed, n, scale):
    t = (draws(seed, 4 * n) >> 8).reshape(n, 4).astype(np.int64).sum(1) - (1 << 25)
    return ((t.astype(f32) * f32(2.0**-24)) * f32(scale)).astype(f32)


def midpoints(type_):
    code = np.sort(F.get_4bit_type(NAME[type_], device="cpu").numpy())
    return ((code[:-1] + code[1:]) * f32(0.5)).astype(f32)


def make_input(pattern, type_, dtype, blocksize, seed, n):
    if pattern == NORMAL:
        return narrow(normalish(seed, n, 0.02), dtype)
    if pattern == BITS:
        return draws(seed, n).view(f32) if dtype == F32 else (draws(seed, n) >> 16).astype(np.uint16)
    if pattern == TINY:
        return narrow(normalish(seed, n, 1e-38), dtype)
    if pattern == ZERO:
        return narrow(np.zeros(n, f32), dtype)
    u = draws(seed, n)
    if pattern == SPARSE:  # half zeros, some NaN and infinities
        x = (u >> 8).astype(f32) * f32(2.0**-24) - f32(0.5)
        x[u >> 31 == 1] = 0
        pick = (u >> 16) & 255
        x[pick == 0], x[pick == 1], x[pick == 2] = np.nan, np.inf, -np.inf
        return narrow(x, dtype)
    # TIES: every block has the maximum 1, so that the others fall on a decision or one step beside it
    t = midpoints(type_)[(u >> 16) % 15]
    x = (t.view(np.uint32) + (u >> 8) % 3 - 1).view(f32)
    x[::blocksize] = 1
    return narrow(x, dtype)


# ------------------------------------------------------------------------------------------------------------- CUDA
# 2 bits for each 10-bit mantissa, low bits first: 1 = the hardware's reciprocal is one ulp up, 2 = one ulp down.
RCP = bytes.fromhex(
    "002040201401000002000020010000200020000800a0420014000500040000a000801000400104000200000082000000"
    "000040010420800814000000000000010001000020000080000011000500000000080000000010080000000040000000"
    "100040014800058004000400004080080414100040002800040001001000440000400500410000404000002040010000"
    "000000000000000000200000400000000040510000004000400100400000000500000000000101000000008000000000"
    "00000080540400000044000400400000000000000000000000001111000000040000000000004100010000000120200a"
    "00080100000040010004000020000200"
)


def ftz(x):
    return np.where(np.abs(x) < np.finfo(f32).tiny, np.copysign(f32(0), x), x).astype(f32)


def rcp(x):
    x = ftz(x)
    r = (f32(1) / x).astype(f32)
    m = x.view(np.uint32) & 0x7FFFFF
    k = np.frombuffer(RCP, np.uint8)[m >> 15] >> (2 * (m >> 13 & 3)).astype(np.uint8) & 3
    k = np.where((m & 0x1FFF == 0) & np.isfinite(r) & (r != 0), k, 0)
    return ftz((r.view(np.uint32) + (k == 1) - (k == 2)).astype(np.uint32).view(f32))


def blocks_absmax(a, blocksize):
    """max |a| of each block; NaN is ignored."""
    pad = np.zeros(-(-a.size // blocksize) * blocksize, f32)
    pad[: a.size] = np.where(np.isnan(a), f32(0), np.abs(a))
    return pad.reshape(-1, blocksize).max(1) if a.size else np.zeros(0, f32)


def count_above(x, bounds):
    """Number of bounds strictly below x; 0 for NaN."""
    return np.where(np.isnan(x), 0, np.searchsorted(bounds, x, side="left")).astype(np.int64)


FP4_BOUNDS = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], f32)
FP4_CODE = np.array([0, 1, 6, 7, 4, 5, 2, 3])


def cuda_quantize4(a, type_, blocksize):
    a = ftz(a)
    absmax = blocks_absmax(a, blocksize)
    scale = rcp(absmax)
    if a.size % 2:
        a = np.append(a, f32(0))
    x = ftz(a * np.repeat(scale, blocksize)[: a.size])
    if type_ == NF4:
        q = count_above(x, midpoints(NF4))
    else:
        q = FP4_CODE[count_above(np.abs(x), FP4_BOUNDS)] | np.where(x < 0, 8, 0)
    return (q[0::2] << 4 | q[1::2]).astype(np.uint8), absmax


def cuda_quantize8(d, code):
    d = ftz(d)
    absmax = blocks_absmax(d, 256)
    x = ftz(d * np.repeat(rcp(absmax), 256)[: d.size])
    mid = ((code[:-1] + code[1:]) * f32(0.5)).astype(f32)
    q = count_above(x, mid)
    q += (q % 2 == 1) & (x == np.append(mid, np.nan)[q])  # an exact midpoint goes to the even code
    return q.astype(np.uint8), absmax


def cuda_quantize_rows(h):
    """h: f16 [N, K], widened -> codes, SCB"""
    scb = blocks_absmax(h.reshape(-1), h.shape[1])
    q = np.rint(h * ftz(f32(127) * rcp(scb))[:, None])
    return np.where(np.isnan(q), 0, q).astype(np.int8), scb


# ------------------------------------------------------------------------------------------------------------ cases


def tensor(raw, dtype):
    return torch.from_numpy(raw if dtype == F32 else raw.view(np.int16)).view(TORCH[dtype]).clone()


def numbers(t):
    t = t.detach().contiguous().reshape(-1)
    return t.numpy() if t.dtype == torch.float32 else t.view(torch.int16).numpy().view(np.uint16)


def same(a, b):
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def canonical(x, fp4):
    """x: f32 -> f32 with one NaN and, for FP4, one zero."""
    x = np.where(np.isnan(x), np.uint32(0x7FC00000).view(f32), x).astype(f32)
    return np.where(x == 0, f32(0), x) if fp4 else x


def check(ok, what):
    if not ok:
        sys.exit("bitsandbytes does not do what this script says: " + what)


traps = {}


def trap(name):
    traps[name] = traps.get(name, 0) + 1


def record(compat, type_, dtype, double, pattern, blocksize, rows, cols, seed):
    n, fp4 = rows * cols, type_ == FP4
    raw = make_input(pattern, type_, dtype, blocksize, seed, n)
    a, offset = widen(raw, dtype), f32(0)
    planes = [b"", b"", b"", b""]
    what = "compat %d type %d src %d double %d pattern %d blocksize %d [%d, %d]" % (
        compat, type_, dtype, double, pattern, blocksize, rows, cols)
    if type_ == INT8:
        h = a.astype(np.float16).reshape(rows, cols)
        if compat == 0:
            q, scb = cuda_quantize_rows(h.astype(f32))
        else:
            q, scb, _ = (t.numpy() if t is not None else None for t in F.int8_vectorwise_quant(torch.from_numpy(h.copy())))
        planes[0], planes[1] = q.tobytes(), canonical(scb, False).tobytes()
        values = F.int8_vectorwise_dequant(torch.from_numpy(q), torch.from_numpy(scb)).numpy().reshape(-1)
    else:
        code = F.create_dynamic_map().numpy().astype(f32)
        if compat == 0:
            q, absmax = cuda_quantize4(a, type_, blocksize)
        else:
            t, s = F.quantize_4bit(tensor(raw, dtype), blocksize=blocksize, quant_type=NAME[type_],
                                   compress_statistics=False)
            q, absmax = t.numpy().reshape(-1), s.absmax.numpy()
        state = F.QuantState(absmax=torch.from_numpy(absmax), shape=torch.Size([n]), blocksize=blocksize,
                             code=F.get_4bit_type(NAME[type_], device="cpu"), quant_type=NAME[type_], dtype=torch.float32)
        planes[0], planes[1] = q.tobytes(), canonical(absmax, False).tobytes()
        if double:
            # TRAP mean: bitsandbytes takes torch's f32 mean, whose last bits depend on its summation order
            offset = f32(absmax.astype(np.float64).sum() / absmax.size)
            d = (absmax - offset).astype(f32)
            if compat == 0:
                q8, absmax2 = cuda_quantize8(d, code)
            else:
                t8, s8 = F.quantize_blockwise(torch.from_numpy(d), code=torch.from_numpy(code), blocksize=256)
                q8, absmax2 = t8.numpy(), s8.absmax.numpy()
                _, whole = F.quantize_4bit(tensor(raw, dtype), blocksize=blocksize, quant_type=NAME[type_],
                                             compress_statistics=True)
                if same(numbers(whole.offset)[0:1], np.array([offset])):
                    check(same(whole.absmax.numpy(), q8) and same(whole.state2.absmax.numpy(), absmax2) and
                          same(whole.state2.code.numpy(), code), what + ": nested statistics")
                else:
                    trap("mean: the offset differs from the exact mean by %d ulp" % abs(int(
                        numbers(whole.offset).view(np.int32)[0]) - int(np.array([offset]).view(np.int32)[0])))
            planes[1], planes[2], planes[3] = q8.tobytes(), canonical(absmax2, False).tobytes(), code.tobytes()
            state.absmax, state.offset, state.nested = torch.from_numpy(q8), torch.tensor(offset), True
            state.state2 = F.QuantState(absmax=torch.from_numpy(absmax2), code=torch.from_numpy(code), blocksize=256,
                                        dtype=torch.float32)
        packed = torch.from_numpy(q.copy()).reshape(-1, 1)
        values = numbers(F.dequantize_4bit(packed, state))
        for other in (F16, BF16):
            state.dtype = TORCH[other]
            peer = widen(numbers(F.dequantize_4bit(packed, state)), other)
            ours = widen(narrow(values, other), other)
            for i in np.flatnonzero(~((peer == ours) | (np.isnan(peer) & np.isnan(ours)))):
                # TRAPS of its compiled CPU code: bf16 results flush subnormals and may turn a NaN into a number
                small = other == BF16 and abs(values[i]) < np.finfo(f32).tiny and peer[i] == 0
                nan = other == BF16 and np.isnan(values[i])
                check(small or nan, what + ": dequantized element %d: %r, not %r" % (i, peer[i], ours[i]))
                trap("bf16 subnormal flushed" if small else "bf16 NaN turned into a number")
    crc = [zlib.crc32(p) for p in planes]
    crc += [zlib.crc32(narrow(canonical(values, fp4), t).tobytes()) for t in (F32, F16, BF16)]
    out = struct.pack("<4B5If7I", compat, type_, dtype, double, pattern, blocksize, rows, cols, seed, offset, *crc)
    return out + b"".join(p[:16].ljust(16, b"\0") for p in planes[:3])


def cases():
    sizes = [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 129, 255, 1000, 2047, 2049, 4095, 4096, 4097, 6001, 9001]
    i = 0
    for type_ in (NF4, FP4):
        for dtype in (F32, F16, BF16):
            for double in (0, 1):
                for blocksize in (32, 64, 128, 256, 512, 1024, 2048, 4096):
                    for pattern in (NORMAL, BITS, TINY, SPARSE, ZERO, TIES):
                        yield type_, dtype, double, pattern, blocksize, 1, sizes[i * 7 % len(sizes)]
                        i += 1
        for n in sizes:
            yield type_, F32, 0, NORMAL, 64, 1, n
            yield type_, F32, 1, NORMAL, 64, 1, n
        yield type_, F32, 1, NORMAL, 32, 1, 32 * 600 + 5  # three nested blocks, the last one short
        yield type_, F16, 1, BITS, 32, 1, 32 * 600 + 5
    for dtype in (F32, F16, BF16):
        for pattern in (NORMAL, BITS, TINY, SPARSE, ZERO):
            for rows, cols in ((1, 1), (7, 3), (5, 16), (9, 100), (3, 1025), (2, 4097), (1, 9000)):
                yield INT8, dtype, 0, pattern, 64, rows, cols


def main():
    check(bitsandbytes.__version__.startswith("0.50."), "version " + bitsandbytes.__version__)
    code = F.create_dynamic_map().numpy().astype(f32)
    check(zlib.crc32(code.tobytes()) == 0x1B137AEB, "this CPU (without AVX2?) makes another dynamic map than bnb.c holds")
    records = []
    for seed, case in enumerate(cases(), 1):
        records += [record(compat, *case, seed) for compat in (0, 1)]
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "formats.bin")
    with open(path, "wb") as f:
        f.write(b"BNBFMT1\0" + struct.pack("<I", len(records)) + b"".join(records))
    print("%s: %d records, %d bytes" % (path, len(records), os.path.getsize(path)))
    for name, count in sorted(traps.items()):
        print("trap met %5d times: %s" % (count, name))


if __name__ == "__main__":
    main()

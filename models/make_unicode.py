#!/usr/bin/env python3
"""Writes models/unicode.inc: the character classes that pre-tokenizers need.

Run:  pip install regex && python3 models/make_unicode.py
Letters, numbers and white space come from tests/golden/gpt2/unicode-classes.txt (Unicode 17.0). The `regex` package
adds which characters count as part of a word (\\w), which only added tokens with `single_word` ask for.
"""
import pathlib

import regex

ROOT = pathlib.Path(__file__).resolve().parent.parent
CODE_POINTS, PAGE = 0x110000, 256
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
BANNER = """\
/* Character classes of Unicode 17.0. Made by models/make_unicode.py: do not edit.
 * One character per code point: L letter, N number, S white space, O any other; lower case: part of a word (\\w).
 * Derived from Unicode data files, Copyright (c) Unicode, Inc.,
 * Unicode License v3: https://www.unicode.org/license.txt */
"""


def read_classes():
    classes = ["O"] * CODE_POINTS
    for line in open(ROOT / "tests/golden/gpt2/unicode-classes.txt"):
        if line.strip() and not line.startswith("#"):
            name, first, last = line.split()
            for code in range(int(first, 16), int(last, 16) + 1):
                classes[code] = name
    return classes


def is_word(code, name):
    surrogate = 0xD800 <= code < 0xE000
    return name == "L" or (name != "S" and not surrogate and WORD.match(chr(code)) is not None)


def main():
    text = "".join(c.lower() if is_word(i, c) else c for i, c in enumerate(read_classes()))
    pages, index = {}, []
    for start in range(0, CODE_POINTS, PAGE):
        index.append(pages.setdefault(text[start:start + PAGE], len(pages)))
    assert len(pages) <= 256
    with open(ROOT / "models/unicode.inc", "w") as out:
        out.write(BANNER)
        out.write(f"static const uint8_t unicode_page_of[{len(index)}] = {{ /* [code point / {PAGE}] */\n")
        for row in range(0, len(index), 32):
            out.write("    " + ",".join(map(str, index[row:row + 32])) + ",\n")
        out.write("};\n\n")
        out.write(f"static const char unicode_pages[{len(pages)}][{PAGE} + 1] = {{ /* [page][code point % {PAGE}] */\n")
        for page in pages:
            out.write("".join(f'    "{page[i:i + 64]}"\n' for i in range(0, PAGE, 64))[:-1] + ",\n")
        out.write("};\n")


if __name__ == "__main__":
    main()

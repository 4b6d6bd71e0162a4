"""Strings on which tokenizers tend to disagree."""

from __future__ import annotations

import random

CHAT = "<|turn>user\nHello there!<turn|>\n<|turn>model\n<|channel>thought\nhm<channel|>Hi.<turn|>\n"

ODD = [
    "",
    " ",
    "  ",
    "   a",
    "\n",
    "\n\n",
    "\n\n\n\n\na\n",
    " \n \n",
    "\t\t\tx",
    "\r\n\r\n",
    "a  b   c    d" + " " * 40 + "e",
    " " * 100,
    "\n" * 50,
    "a" * 300,
    "---" * 30,
    "héllo wörld",
    "e\u0301 \u00e9",
    "日本語のテキスト",
    "مرحبا بالعالم",
    "🎉🎉 👩‍👩‍👧",
    "\u200b\ufeff\u00a0",
    "\u2581\u2581 a\u2581b",
    "\x00\x01\x7f",
    "𝔹½²³",
    "1234567890 3.14159 1e-7",
    "<unk><pad><mask>",
    "<bos>twice",
    "<eos>a<bos>",
    '<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|><|tool_response>',
    "<|image|><|audio|><|think|>",
    "<|turn",
    "turn|>",
    "<0x41><0x0A>",
    "<table><unused5>",
    CHAT,
    " " + CHAT + " ",
]


def texts(count: int = 300) -> list[str]:
    """The odd ones, and random mixtures of words, specials, spaces and rare characters."""
    rng = random.Random(7)
    pieces = ["the", "of", " and", "ing", "Model", "42", " ", "  ", "\n", "\t", ".", ", ", "é", "字", "🎉", "\u2581"]
    pieces += ["<|turn>", "<turn|>", "<eos>", "<", "|>", "def f(x):", "http://", "don't"]
    return ODD + ["".join(rng.choices(pieces, k=rng.randrange(1, 40))) for _ in range(count)]

"""The fixed set of texts and chats on which an artifact's tokenizer and template are compared with the original's."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

SEED, GENERATED = 20261, 210
PIECES = (
    *("the", "The", "whale", "naïve", "Straße", "don't", "e-mail", "U.S.A."),
    *("x = y + 1", "0", "42", "3.14159", "1,000"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "\u200b", "\u200d", "\ufeff", "\u2581"),
    *("日本語", "中文字符", "한국어", "हिन्दी", "العربية", "עברית", "ไทย", "Ελλάδα", "Привет", "Ünïcödé"),
    *("e\u0301", "a\u030a\u0323", "\u1100\u1161\u11a8", "ﬁ", "Ⅳ", "①", "½", "²"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "❤️", "\U0001f9ff", "\U00010348", "\ue000", "\ufffd"),
    *("def f(x):", "    return x", "#include <a.h>", "</div>", "{{ x }}", "%s"),
    *("\\n", "<0x0A>", "a_b", "CamelCase", "->"),
    *("!", "?!", "...", "--", "—", "“q”", "«»", ";", "://", "@", "#", "$", "€", "`", "~"),
)
RUNS = (" ", "\n", "\t", "a", "=", "-", ".", "0", "é", "字", "😀", " a", "\r\n", "\u2581", "\u200b")
LENGTHS = (2, 3, 7, 16, 33)
WHOLE = (
    *("", "Hello", " Hello", "Hello ", "\nHello\n", "\u0000", "\u0007bell", "a\u0000b", "\x7f", "\u0085", "\u2028"),
    *("Café au lait, s'il vous plaît.", "for (int i = 0; i < 10; ++i) { sum += a[i]; }", '{"a": [1, 2.5e-3, null]}'),
)
# Chats that every template is asked to write; tools and thinking are a model's own matter.
CHATS: tuple[tuple[list[dict[str, Any]], bool], ...] = (
    ([{"role": "user", "content": "Hello"}], True),
    ([{"role": "user", "content": "  two\nlines \n"}], True),
    ([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], False),
    (
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Grüße, 世界 <b>&amp;"},
        ],
        True,
    ),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], True),
)


@cache
def fixed_texts() -> tuple[str, ...]:
    """About 300 texts: scripts, digits, spaces, code, emoji, long runs, line ends, combining marks, odd characters."""
    chance = random.Random(SEED)
    made = ["".join(chance.choices(PIECES, k=chance.randint(1, 9))) for _ in range(GENERATED)]
    runs = [run * length for run in RUNS for length in LENGTHS]
    return tuple(dict.fromkeys([*WHOLE, *runs, *made]))


def with_specials(tokens: list[str]) -> list[str]:
    """Texts in which special tokens stand, as a user may type them."""
    return [text for token in tokens for text in (token, f"a {token} b", f"{token}\n{token}x")]

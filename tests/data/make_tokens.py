"""Writes tokens.json: ids of unusual texts by tokenizers that share no code with the fast tokenizers of `Tokenizer`.

Run by hand with transformers < 5, whose slow tokenizers are sentencepiece in C++ (T5) and plain Python (BERT):

    VENV/bin/python tests/data/make_tokens.py
"""

import hashlib
import json
from pathlib import Path

import transformers

ASSETS = Path(__file__).parents[1] / "golden" / "assets"
TEXTS = {  # name: text, or [text, repetitions] if long
    "answer": "<extra_id_0> A",
    "answer_joined": "<extra_id_0>A",
    "question": "question: who? answer: <extra_id_0>",
    "sentinels": " ".join(f"<extra_id_{i}>" for i in range(100)),
    "last_sentinel": "x <extra_id_99> y",
    "no_sentinel": "<extra_id_100> <extra_id_> <extra_id_0",
    "han": "漢字 and 仮名 and 한글",
    "emoji": "👍 👍🏽 x👨‍👩‍👧y 🇮🇱",
    "hebrew": "שלום, עולם! 123",
    "arabic": "مَرْحَبًا بالعالم ١٢٣",
    "both_directions": "abc שלום \u202edef\u202c ghi",
    "accents": "naïve café cafe\u0301 Ångström ẞ \u0130 \u0131",
    "compatibility": "ﬁne ① \uff21 ½ ² ™ …",
    "punctuation": "don't U.S.A. (x)[y]{z} a-b_c «d» “e” £5 50% ~",
    "replaced": "a\ufffdb \ufffd",
    "private": "\ue000 x",
    "unassigned": "\uffff x",
    "next_line": "x\x85y",
    "composed_twice": "\u01cb\u0308",
    "empty": "",
    "space": " ",
    "spaces": "   ",
    "inner_spaces": "  two   spaces  ",
    "newline": "\n",
    "lines": "a\nb\r\nc\td\x0be",
    "other_spaces": "a\u00a0b\u2003c\u3000d\u200be\u2028f",
    "nul": "\0",
    "inner_nul": "a\0b \x01\x7f",
    "metaspace": "▁a ▁ b▁",
    "hundred": ["y", 100],  # BERT's longest word
    "hundred_and_one": ["y", 101],
    "long_word": ["y", 100_000],
    "long_known_word": ["theory", 20_000],
    "long_han": ["漢", 100_000],
    "long_unknown": ["👍", 100_000],
    "long_sentinels": ["<extra_id_7>", 5_000],
}


def digest(ids):
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def golden_row(name, text):
    """Returns a row of tokens.json: the ids of both tokenizers, or a digest of them from 200 ids on."""
    whole = text[0] * text[1] if isinstance(text, list) else text
    ids_by_tokenizer = {key: tokenizer.encode(whole) for key, tokenizer in SLOW.items()}
    golden = {
        key: {"count": len(ids), "ids": ids} if len(ids) < 200 else {"count": len(ids), "sha256": digest(ids)}
        for key, ids in ids_by_tokenizer.items()
    }
    return {"what": name, "text": text, **golden}


if __name__ == "__main__":
    SLOW = {
        "reader": transformers.T5Tokenizer.from_pretrained(ASSETS / "reader"),
        "retriever": transformers.BertTokenizer.from_pretrained(ASSETS / "retriever"),
    }
    assert not any(tokenizer.is_fast for tokenizer in SLOW.values())
    rows = ",\n".join(json.dumps(golden_row(*item)) for item in TEXTS.items())
    Path(__file__).with_name("tokens.json").write_text(f"[\n{rows}\n]\n")

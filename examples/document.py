"""Questions about one document: its blocks are computed and saved once, and loaded for each question.

``python -m examples.document`` fetches a small model (93 MB, once), reads a document of 1,500 tokens, asks five questions, and
shows how soon the first token came with every prompt computed whole (cold), and with the document loaded by kvortex (warm).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from examples.lm.download import fetch_weights
from examples.lm.gguf_file import Chat, read_gguf
from examples.side_by_side import Pair, SideBySide, arguments, table

DOCUMENT = Path(__file__).resolve().parents[1] / "LICENSE"  # a text that stays as it is
PREFIX_TOKENS = 1500
QUESTIONS = (
    "What does this license say about patents?",
    "May I sell copies of the work?",
    "Who is the Licensor?",
    "What must I do when I redistribute the work?",
    "What is a Derivative Work?",
)


def prompts(chat: Chat) -> tuple[list[int], list[list[int]]]:
    """The prefix that all prompts share, exactly ``PREFIX_TOKENS``, and the prompts."""
    before = chat.turn("system", "You answer questions about a document.")
    prefix = (before + chat.encode("<|im_start|>user\n" + DOCUMENT.read_text(encoding="utf-8")))[:PREFIX_TOKENS]
    return prefix, [prefix + chat.encode(f"\n\n{text}<|im_end|>\n") + chat.opening() for text in QUESTIONS]


def ask(sides: SideBySide, chat: Chat, tokens: int) -> Iterator[Pair]:
    """Reads the document once, and asks."""
    prefix, all_prompts = prompts(chat)
    read = sides.warm.generate(prefix, 1)
    print(f"{len(prefix)} tokens were read and saved in {read.seconds:.1f} s\n", flush=True)
    for number, prompt in enumerate(all_prompts, 1):
        yield sides.ask(f"question {number}", prompt, tokens, stop=(chat.end,))


def main() -> None:
    options = arguments(__doc__, tokens=64)
    model, chat = read_gguf(options.weights or fetch_weights())
    with SideBySide(model, name="SmolLM2-135M-Instruct") as sides:
        rows = []
        for text, pair in zip(QUESTIONS, ask(sides, chat, options.tokens), strict=True):
            print(f"> {text}\n{chat.decode(pair.warm.tokens)}\n", flush=True)
            rows.append(pair.row())
        print(table(rows))


if __name__ == "__main__":
    main()

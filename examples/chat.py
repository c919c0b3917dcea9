"""A chat over several turns: each turn's prompt is all that was said before, and only what is new is computed.

``python -m examples.chat`` fetches a small model (93 MB, once), talks to it, and shows for each turn how soon the first token
came with every prompt computed whole (cold), and with all earlier turns loaded by kvortex (warm).

Earlier answers are loaded as decoding has saved them, token by token; a cold prompt computes them anew, many at a time. So that
this makes no difference, the chat decodes exactly (see ``Server``), which takes twice as long.
"""

from __future__ import annotations

from examples.lm.download import fetch_weights
from examples.lm.gguf_file import Chat, read_gguf
from examples.side_by_side import Pair, SideBySide, arguments, table

SYSTEM = "You are a friendly teacher. You explain things in full sentences, and give an example for each."
TURNS = (
    "What is photosynthesis?",
    "Why are leaves green?",
    "What happens to a leaf in autumn?",
    "How does a tree know that winter comes?",
    "Do plants sleep at night?",
    "Which animals live from leaves?",
    "Please say in one sentence what we talked about.",
)


def talk(sides: SideBySide, chat: Chat, tokens: int) -> list[Pair]:
    """All turns; what the warm server answers is what the next turn's prompt goes on with."""
    history, pairs = chat.turn("system", SYSTEM), []
    for number, text in enumerate(TURNS, 1):
        history += chat.turn("user", text) + chat.opening()
        pairs.append(sides.ask(f"turn {number}", history, tokens, stop=(chat.end,)))
        print(f"> {text}\n{chat.decode(pairs[-1].warm.tokens)}\n", flush=True)
        history += pairs[-1].warm.tokens + chat.closing()
    return pairs


def main() -> None:
    options = arguments(__doc__, tokens=64)
    model, chat = read_gguf(options.weights or fetch_weights())
    with SideBySide(model, name="SmolLM2-135M-Instruct", exact=True) as sides:
        print(table([pair.row() for pair in talk(sides, chat, options.tokens)]))


if __name__ == "__main__":
    main()

"""What a tier has, as far as requests have asked: answers come behind the step that asked, and last as long as its requests."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class _Answer:
    """``there`` is None until somebody knows, at ``deadline`` at the latest; the answer then is no."""

    deadline: float
    there: bool | None = None
    requests: set[str] = field(default_factory=set)


class Questions:
    """One thread asks, and takes answers in. A request is told the same for as long as it lives, but for blocks that turn out
    not to be there: those it would be promised again and again.

    Parameters
    ----------
    patience_s
        Seconds until a question counts as answered with no.
    clock
    """

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s, self._clock = patience_s, clock
        self._answers: dict[bytes, _Answer] = {}
        self._of_request: dict[str, set[bytes]] = defaultdict(set)
        self._new: list[bytes] = []

    def ask(self, name: bytes, request: str) -> bool | None:
        """Whether a block is there; None where the answer is still to come."""
        answer = self._answers.get(name)
        if answer is None:
            answer = self._answers[name] = _Answer(self._clock() + self._patience_s)
            self._new.append(name)
        answer.requests.add(request)
        self._of_request[request].add(name)
        if answer.there is None and self._clock() > answer.deadline:
            answer.there = False
        return answer.there

    def take(self) -> list[bytes]:
        """Names that nobody was asked about yet."""
        taken, self._new = [name for name in self._new if name in self._answers], []
        return taken

    def learn(self, answers: Mapping[bytes, bool]) -> None:
        """What somebody found out. What is known is left as it is."""
        for name, there in answers.items():
            answer = self._answers.get(name)
            if answer is not None and answer.there is None:
                answer.there = there

    def correct(self, names: Iterable[bytes], there: bool) -> None:
        """These turned out to be there, or not."""
        for name in names:
            if (answer := self._answers.get(name)) is not None:
                answer.there = there

    def forget(self, request: str) -> None:
        """A request is over."""
        for name in self._of_request.pop(request, ()):
            answer = self._answers[name]
            answer.requests.discard(request)
            if not answer.requests:
                del self._answers[name]

    def __len__(self) -> int:
        return len(self._answers)

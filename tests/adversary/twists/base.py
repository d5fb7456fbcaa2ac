"""What a twist is, and how it is registered."""

from collections.abc import Callable

from ..draft import Draft

Twist = Callable[[Draft], bool | None]


def into(twists: list[Twist]) -> Callable[[Twist], Twist]:
    """A decorator that registers a twist in ``twists``."""

    def register(made: Twist) -> Twist:
        twists.append(made)
        return made

    return register


def pick(draft: Draft, part: str, *texts: str) -> bool:
    """Add one of the texts, by chance."""
    return draft.say(part, draft.rng.choice(texts))

"""What the ``meta`` of a node holds, by functions with types.

``val``
    The node's value on the example inputs: fake tensors, or numbers. Absent where it is not known.
``location``, ``nn_module_stack``
    The user's line, and the module, that the node came from.
``writes``
    Whether the call was seen to write a tensor that it is given.
``reads``
    Of a guard: who read the size that it holds.
``frames``
    Of a tensor of folded frames: how many there are.
``no_frame``
    A slice that a rewrite made, which is no frame of a loop, however it looks.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = [
    "copy_meta",
    "forget_value",
    "frames_of",
    "has_value",
    "is_no_frame",
    "mark_no_frame",
    "needed_value",
    "readers_of",
    "seen_writing",
    "set_frames",
    "set_value",
    "set_writes",
    "value_of",
]


def has_value(node: fx.Node) -> bool:
    """Whether the value of ``node`` on the example inputs is known."""
    return "val" in node.meta


def value_of(node: fx.Node) -> Any:
    """The value of ``node`` on the example inputs; None where it is not known."""
    return node.meta.get("val")


def needed_value(node: fx.Node) -> Any:
    """The same, where it has to be known.

    Raises:
        KeyError: it is not.
    """
    return node.meta["val"]


def set_value(node: fx.Node, value: Any) -> None:
    """Note the value of ``node`` on the example inputs."""
    node.meta["val"] = value


def forget_value(node: fx.Node) -> None:
    """The value of ``node`` is to be computed anew."""
    node.meta.pop("val", None)


def copy_meta(new: fx.Node, old: fx.Node) -> None:
    """``new`` stands for ``old``: all but the value, which is computed anew, is the same."""
    new.meta.update({name: entry for name, entry in old.meta.items() if name != "val"})


def set_writes(node: fx.Node, writes: bool) -> None:
    """Note whether a call of ``node`` wrote a tensor that it was given."""
    node.meta["writes"] = writes


def seen_writing(node: fx.Node) -> bool | None:
    """Whether it did; None where it was never run."""
    writes: bool | None = node.meta.get("writes")
    return writes


def readers_of(guard: fx.Node) -> tuple[str, ...]:
    """Who read the size that a guard holds: kinds of readers, ``"?"`` where that is not known."""
    return tuple(guard.meta.get("reads", ("?",)))


def set_frames(folded: fx.Node, frames: int) -> None:
    """Note how many frames ``folded`` holds in dimension 0."""
    folded.meta["frames"] = frames


def frames_of(folded: fx.Node) -> int | None:
    """How many frames a tensor holds in dimension 0; None where nobody folded them here."""
    frames: int | None = folded.meta.get("frames")
    return frames


def mark_no_frame(node: fx.Node) -> None:
    """A slice that is no frame of a loop: nothing is to be re-rolled from it."""
    node.meta["no_frame"] = True


def is_no_frame(node: fx.Node) -> bool:
    """Whether :func:`mark_no_frame` was told of it."""
    return bool(node.meta.get("no_frame"))

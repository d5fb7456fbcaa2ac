"""Typed access to the entries of a node's ``meta``.

``val``
    The node's value on the example inputs: fake tensors, or numbers. Absent if it is not known.
``location``, ``nn_module_stack``
    The user's line, and the module, that the node came from.
``writes``
    Whether the call wrote one of its input tensors when it was run.
``reads``
    For a guard: the kinds of code that read the size it holds.
``frames``
    For a tensor of folded frames: the number of frames.
``no_frame``
    Marks a slice that a rewrite made: it is not a frame of a loop, although it looks like one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = [
    "copy_meta",
    "forget_value",
    "frames_of",
    "has_value",
    "is_clip",
    "is_no_frame",
    "mark_clip",
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
    """The value of ``node`` on the example inputs; None if it is not known."""
    return node.meta.get("val")


def needed_value(node: fx.Node) -> Any:
    """The value of ``node`` on the example inputs, which must be known.

    Raises:
        KeyError: the value is not known.
    """
    return node.meta["val"]


def set_value(node: fx.Node, value: Any) -> None:
    """Set the value of ``node`` on the example inputs."""
    node.meta["val"] = value


def forget_value(node: fx.Node) -> None:
    """Drop the value of ``node``, so that it is computed again."""
    node.meta.pop("val", None)


def copy_meta(new: fx.Node, old: fx.Node) -> None:
    """Copy all entries of ``old`` to ``new``, which replaces it, except the value."""
    new.meta.update({name: entry for name, entry in old.meta.items() if name != "val"})


def set_writes(node: fx.Node, writes: bool) -> None:
    """Record whether a call of ``node`` wrote one of its input tensors."""
    node.meta["writes"] = writes


def seen_writing(node: fx.Node) -> bool | None:
    """Whether a call of ``node`` wrote one of its input tensors; None if it was never run."""
    writes: bool | None = node.meta.get("writes")
    return writes


def readers_of(guard: fx.Node) -> tuple[str, ...]:
    """The kinds of code that read the size a guard holds; ``"?"`` for an unknown kind."""
    return tuple(guard.meta.get("reads", ("?",)))


def set_frames(folded: fx.Node, frames: int) -> None:
    """Record the number of frames that are folded into dimension 0 of ``folded``."""
    folded.meta["frames"] = frames


def frames_of(folded: fx.Node) -> int | None:
    """The number of frames folded into dimension 0; None if no rewrite folded frames here."""
    frames: int | None = folded.meta.get("frames")
    return frames


def mark_no_frame(node: fx.Node) -> None:
    """Mark a slice as no frame of a loop, so that it is not re-rolled."""
    node.meta["no_frame"] = True


def mark_clip(node: fx.Node) -> None:
    """Mark a node as a clip: loops over its frames are re-rolled, whatever it was made of."""
    node.meta["clip"] = True


def is_clip(node: fx.Node) -> bool:
    """Whether ``node`` was marked by :func:`mark_clip`."""
    return bool(node.meta.get("clip"))


def is_no_frame(node: fx.Node) -> bool:
    """Whether ``node`` was marked by :func:`mark_no_frame`."""
    return bool(node.meta.get("no_frame"))

"""What people do in a loop besides layers: state, control by t, aliasing, hooks, writes, chance.

Each twist adds a few lines to a draft, or returns False where it does not fit. A new kind of fault
is a new twist in one of these files: one function, a dozen lines.
"""

from . import carried, control, gradients, model, world, writes
from .base import Twist as Twist

ALL: list[Twist] = [
    *control.TWISTS,
    *carried.TWISTS,
    *writes.TWISTS,
    *model.TWISTS,
    *gradients.TWISTS,
    *world.TWISTS,
]
"""Seeds pick by place: a twist that moves gives every seed another program."""

ENDINGS = (
    "out = out * 2",
    "out = out.mean(1)",
    "out = out.flatten(0, 1)",
    "out = out[:, -1]",
    "out = out.transpose(0, 1)",
    "out += 1",
    "out = out.view(out.size(0), -1)",
    "out = out.relu_()",
    "self.seen = out",
    "assert not out.isnan().any()",
    "out = out.softmax(1) if out.shape[1] > 4 else out",
    "out = torch.cat([out, out.detach()])",
)

"""One description for each op, however the node is spelled.

    conv = nn.Conv3d(3, 8, 3)           a module called as ``call_module``
    F.conv3d(x, weight, bias)           a function
    torch.ops.aten.conv3d.default(...)  an ATen overload
    x.relu_(), F.relu(x, inplace=True)  methods; in place or not
    x[:, t], x.shape[1], 1 - x          Python's operators

all become an :class:`Op`: the ATen name, with every argument bound by name, defaults filled in, in
one form (``stride=2`` is ``(2, 2, 2)``, ``dim=-1`` counts from the front if the rank is known).
Equal ops are equal; this package is the only place that looks at ``node.target``.

``table.py`` has a line for each op, ``modules.py`` one for each module type.
"""

from fxtemporal.ir.ops.describer import Blocker, Describer, blocked, describe
from fxtemporal.ir.ops.op import WHOLE, Attr, Op, Trait
from fxtemporal.ir.ops.table import ops_with

__all__ = [
    "WHOLE",
    "Attr",
    "Blocker",
    "Describer",
    "Op",
    "Trait",
    "blocked",
    "describe",
    "ops_with",
]

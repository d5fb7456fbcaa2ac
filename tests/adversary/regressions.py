"""Shrunk cases that once failed, kept as tests.

``python -m tests.adversary --show program:130`` prints such a case for a seed that fails.
"""

from .case import Call, Case, Input

_LAYER_NORM = """
class Net(nn.Module):
    def forward(self, x):
        return torch.stack([F.layer_norm(x[:, t], x[:, t].shape[1:]) for t in range(x.size(1))], 1)
"""
_LAYER_NORM_SHAPE = """
class Net(nn.Module):
    def forward(self, x):
        outs = []
        for t in range(x.size(1)):
            f = x[:, t]
            outs.append(F.layer_norm(f, f.shape))
        return torch.stack(outs, 1)
"""
_BUFFER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
    def forward(self, x):
        self.seen += 1
        return x + self.seen
"""
_PYTHON_RANDOM = """
class Net(nn.Module):
    def forward(self, x):
        return x * random.random()
"""
_HOLDER = """
class Holder:
    h = None
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = Holder()
    def forward(self, x):
        self.cache.h = x.detach()
        return x * 2
"""
_FUNCTIONAL_CALL = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
    def forward(self, x):
        outs = []
        for t in range(x.size(1)):
            f = x[:, t]
            f = torch.func.functional_call(self.a, dict(self.b.named_parameters()), (f,))
            outs.append(f - f.detach())
        return torch.stack(outs, 1)
"""
_FLAT_CONV = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (1, 2, 2))
    def forward(self, x):
        f = self.conv(x)
        return f.view(f.size(0), -1)
"""
_GLOBALS = """
class Net(nn.Module):
    def forward(self, x):
        globals()["LAST"] = x
        return x * 2
"""
_UNBOUND = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (1, 2, 2))
    def forward(self, x):
        return self.conv(x).unbind(2)
"""
_IN_PLACE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (1, 2, 2))
        self.act = nn.ReLU(inplace=True)
    def forward(self, x):
        f = self.act(self.conv(x))
        return f, f.view(f.size(0), -1)
"""
_WIDE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (3, 1, 1))
    def forward(self, x):
        return F.softmin(self.conv(x), 2, dtype=torch.float64)
"""
_WINDOWS = """
class Net(nn.Module):
    def forward(self, x):
        outs = []
        for t in range(2):
            f = x[:, t : t + 2]
            outs.append(f.expand_as(f))
        return outs
"""
_CONV = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 2, (1, 1, 2))
        self.norm = nn.BatchNorm3d(2)
    def forward(self, x):
        return self.norm(self.conv(x))
"""
_FRAMES = Call(frames=(3,), gradients="parameters")
_X = (Input("x", ("B", "T0", 4), 1),)
_CLIP = (Input("x", ("B", 3, "T0", 4, 4), 2),)


_EXPANDED = (Input("x", ("B", 3, "T0", 4, 4), 2, layout="v[:, :1].expand_as(v)"),)
_PIXELS = (Input("x", ("B", 3, "T0", 1, 2), 2),)
_LAST = "Net().to(memory_format=torch.channels_last_3d).eval()"


def _case(
    name: str,
    source: str,
    inputs: tuple[Input, ...] = _X,
    build: str = "Net()",
    given: bool = True,
    frames: int = 3,
) -> Case:
    example = Call(frames=(frames,), seed=0)
    one = Call(frames=(1,), gradients="inputs", seed=3)
    calls = (_FRAMES, Call(batch=3, frames=(3,)), Call(frames=(4,)), one)
    return Case(name, source, build, inputs, calls, example, given=given)


def _short(init: str, forward: str, before: str = "") -> str:
    """A model of a few lines: what it holds, and what it computes of ``x``."""
    lines = [
        before,
        "class Net(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
    ]
    lines += [f"        {line}" for line in init.splitlines()]
    lines += ["    def forward(self, x):", *(f"        {line}" for line in forward.splitlines())]
    return "\n".join(lines) + "\n"


_STRAIGHT = """
class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.view_as(v)
    @staticmethod
    def backward(ctx, g):
        return g
"""
_EVAL = "Net().eval()"
_SHORT = (
    _case(
        "a gradient of zero, and none at all",
        _short(
            "self.layer = nn.Linear(4, 4)",
            "return Straight.apply(self.layer(x)).angle()",
            _STRAIGHT,
        ),
    ),
    _case(
        "a product by mm",
        _short(
            "self.layer = nn.Linear(4, 2)",
            "outs = []\nfor t in range(x.size(1)):\n    f = self.layer(x[:, t])\n"
            "    outs.append(f.mm(self.layer.weight))\nreturn outs",
        ),
    ),
    _case(
        "a parameter that is replaced",
        _short(
            "self.gain = nn.Parameter(torch.ones(1))",
            "self.gain = nn.Parameter(self.gain.detach() * 0.9)\nreturn x * self.gain",
        ),
    ),
    *(
        _case(
            f"other memory behind a buffer, {'shapes known' if given else 'shapes unknown'}",
            _short(
                'self.register_buffer("seen", torch.zeros(1))',
                "self.seen.data = self.seen.data + 1\nreturn x + self.seen",
            ),
            given=given,
        )
        for given in (True, False)
    ),
    _case(
        "an attribute of a parameter",
        _short(
            "self.gain = nn.Parameter(torch.ones(1))",
            "x = x * getattr(self.gain, 'times', 1)\nself.gain.times = 3\nreturn x * self.gain",
        ),
    ),
    _case(
        "an attribute of the class that is not there yet",
        _short(
            "pass", "type(self).count = getattr(type(self), 'count', 0) + 1\nreturn x * self.count"
        ),
        given=False,
    ),
    _case(
        "an output of rounding errors alone",
        _short(
            "self.conv = nn.Conv3d(3, 3, (3, 1, 1), padding=1)",
            "f = self.conv(self.conv(x))\nreturn (f - f.mean(2, keepdim=True)).mean((2, 3, 4))",
        ),
        _CLIP,
        _EVAL,
    ),
    _case(
        "memory from its start",
        _short(
            "self.layer = nn.Linear(4, 4)",
            "outs = []\nfor t in range(x.size(1)):\n    f = self.layer(x[:, t])\n"
            "    r = torch.as_strided(f, (2, 2), (2, 1), storage_offset=0)\n"
            "    outs.append(f * r.sum())\nreturn torch.stack(outs).amax(0)",
        ),
    ),
    _case(
        "gradients that are switched on",
        _short(
            "self.layer = nn.Linear(4, 4)",
            "with torch.enable_grad():\n    x = self.layer(x)\nreturn x * 2",
        ),
    ),
    _case(
        "a counter that torch.export puts back",
        _short(
            "self.calls = 0",
            "self.calls += 1\nx = x * self.calls\nx = x.requires_grad_(x.requires_grad)\n"
            "return x * 2",
        ),
    ),
    _case(
        "a forward that seeds",
        _short("pass", "torch.manual_seed(3)\nreturn x + torch.randn(1)"),
        given=False,
    ),
    _case(
        "guards of torch.export",
        _short(
            "self.layer = nn.Linear(4, 4)",
            "total = 0\nfor t in range(x.shape[1] // 2):\n    f = self.layer(x[:, t])\n"
            "    total = total + (f * 1 if f.requires_grad else f)\nreturn total",
        ),
    ),
    _case(
        "reentrant checkpoint of parameters alone",
        _short(
            "self.layer = nn.Linear(4, 4)\nself.pos = nn.Parameter(torch.randn(3, 4))",
            "return x[..., :1] * 0 + checkpoint(self.layer, self.pos).sum()",
        ),
    ),
    _case(
        "a view of bits as another dtype",
        _short("self.conv = nn.Conv3d(3, 2, 1)", "return self.conv(x).view(torch.float32)"),
        _CLIP,
        _EVAL,
    ),
    _case(
        "a batch of one that is squeezed",
        _short(
            "self.conv = nn.Conv3d(3, 2, (2, 1, 1))", "return torch.squeeze_copy(self.conv(x), 0)"
        ),
        _CLIP,
        _EVAL,
    ),
    *(
        _case(name, _short(init, forward), _CLIP, build, given=False)
        for name, init, forward, build in (
            (
                "dropout behind a form, shapes unknown",
                "self.conv = nn.Conv3d(3, 2, (1, 2, 2))\nself.drop = nn.Dropout(0.3)",
                "return self.drop(self.conv(x))",
                "Net()",
            ),
            (
                "a write into what may be a copy, shapes unknown",
                "self.conv = nn.Conv3d(3, 2, (1, 2, 2))",
                "f = self.conv(x)\nf.contiguous().relu_()\nreturn f",
                _EVAL,
            ),
            (
                "a form and a cat, shapes unknown",
                "self.conv = nn.Conv3d(3, 2, (1, 2, 2), padding='same')",
                "return torch.cat([self.conv(x)])",
                _EVAL,
            ),
            (
                "a pooling before channels_last_3d weights, shapes unknown",
                "self.conv = nn.Conv3d(3, 2, 2)\nself.pool = nn.AvgPool3d((1, 2, 2))",
                "return self.conv(self.pool(x))",
                _LAST,
            ),
            (
                "two forms, a residual, and padding to the same size, shapes unknown",
                "self.a = nn.Conv3d(3, 3, (1, 3, 3), padding='same')\n"
                "self.b = nn.Conv3d(3, 3, (2, 1, 1), padding='same')",
                "f = self.a(x).relu()\nreturn [self.b(f) + f, self.b(f)]",
                _LAST,
            ),
        )
    ),
)
CASES = {
    case.name: case
    for case in (
        *_SHORT,
        _case("layer_norm", _LAYER_NORM),
        _case("layer_norm over a whole frame", _LAYER_NORM_SHAPE),
        _case("a buffer that is written", _BUFFER),
        _case("Python's random numbers", _PYTHON_RANDOM),
        _case("a plain object as a cache", _HOLDER),
        _case("functional_call with other weights", _FUNCTIONAL_CALL),
        _case("a view of a flat convolution", _FLAT_CONV, _CLIP, "Net().eval()"),
        _case("a global that a forward makes", _GLOBALS),
        _case("frames of a flat convolution", _UNBOUND, _CLIP, "Net().eval()"),
        _case("the same in channels_last_3d", _UNBOUND, _CLIP, _LAST),
        _case(
            "the same of a clip whose channels share memory", _UNBOUND, _EXPANDED, "Net().eval()"
        ),
        _case(
            "a view after an in-place op, shapes unknown", _IN_PLACE, _CLIP, "Net().eval()", False
        ),
        _case("a view after an in-place op", _IN_PLACE, _CLIP, "Net().eval()"),
        _case("float64 of what float32 computed", _WIDE, _CLIP, "Net().eval()"),
        _case("views of the input", _WINDOWS, _CLIP),
        _case("weights in channels_last_3d, shapes unknown", _CONV, _CLIP, _LAST, False),
        _case("gradients through one frame of one column", _CONV, _PIXELS, "Net().eval()", True, 1),
    )
}

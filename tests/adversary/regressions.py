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


CASES = {
    case.name: case
    for case in (
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

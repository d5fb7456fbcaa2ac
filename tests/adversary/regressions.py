"""Shrunk cases that once failed, kept as tests.

``python -m tests.adversary --show program:130`` prints such a case for a seed that fails. ``OPEN``
names those that still fail: take a name out once its fault is mended, and the test holds it.
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
_FRAMES = Call(frames=(3,), gradients="parameters")
_X = (Input("x", ("B", "T0", 4), 1),)
_CLIP = (Input("x", ("B", 3, "T0", 4, 4), 2),)


def _case(name: str, source: str, inputs: tuple[Input, ...] = _X, build: str = "Net()") -> Case:
    example = Call(frames=(3,), seed=0)
    calls = (_FRAMES, Call(batch=3, frames=(3,)), Call(frames=(4,)))
    return Case(name, source, build, inputs, calls, example)


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
    )
}
OPEN = set(CASES)

"""Randomness, types, nested loops, odd Python, and frames that see the whole clip."""

from ..draft import Draft
from .base import Twist, into, pick

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def randomness(draft: Draft) -> bool:
    """Random numbers of torch, NumPy and Python."""
    return pick(
        draft,
        "body",
        "f = f + torch.randn(1)",
        "f = f + torch.rand_like(f)",
        "f = f * random.random()",
        "f = f * float(np.random.rand())",
        "if random.random() < 0.3:\n    f = f * 2",
        "f = f * random.choice([1, 2])",
        "f = f + torch.normal(0.0, 1.0, (1,))",
        "f = F.dropout(f, 0.5)",
        "f = f * torch.bernoulli(torch.full((1,), 0.5))",
        "f = f[torch.randperm(f.size(0))]",
        "f = F.gumbel_softmax(f, dim=-1)",
        "f = f + torch.empty_like(f).uniform_()",
        "torch.manual_seed(t)\nf = f + torch.randn(1)",
        "f = f + torch.randn(1, generator=torch.Generator().manual_seed(3))",
    )


@twist
def dtypes(draft: Draft) -> bool:
    """Casts, constants, NumPy, numbers read from tensors."""
    return pick(
        draft,
        "body",
        "f = f.double()",
        "f = f.double().float()",
        "f = f.bfloat16().float()",
        "f = f.half().float()",
        "f = f.to(torch.float64).mean(-1, keepdim=True).to(f.dtype) + f",
        "f = f + torch.arange(f.size(-1))",
        "f = f + torch.from_numpy(np.ones(1)).to(f.dtype)",
        "f = f * torch.tensor([0.5])",
        "f = f + f.new_tensor([t * 0.1])",
        "f = f * f.mean().item()",
        "f = f + torch.tensor(f.detach().numpy().mean())",
        "f = f.int().float()",
        "f = (f > 0).to(f.dtype) * f",
        "f = torch.nan_to_num(f / f)",
        "f = f * torch.finfo(f.dtype).eps",
        "f = torch.complex(f, f).abs()",
        "f = f + torch.ones(1, dtype=torch.int64)",
        "f = f * x.dim()",
        "f = f.view(torch.int32).view(torch.float32)",
        "f = torch.tensor(f.tolist())",
        "f = f + torch.eye(f.size(-1))",
        "f = f * torch.tensor(len(f))",
        "f = f + len(str(t))",
    )


@twist
def nested_loop(draft: Draft) -> bool:
    """A loop in the loop: over rows, channels, samples or repetitions."""
    return pick(
        draft,
        "body",
        "f = torch.stack([v * 2 for v in f.unbind(1)], 1)",
        "f = torch.stack([f[i] + i for i in range(f.size(0))])",
        "for k in range(3):\n    f = f + f.mean(-1, keepdim=True) * k",
        "f = torch.cat([c.tanh() for c in f.split(1, -1)], -1)",
        "f = sum(f * k for k in range(1, 3))",
        "f = torch.stack([F.normalize(v, dim=0) for v in f], 0)",
        "for i in range(f.size(1)):\n    f = f + f[:, i:i + 1] * 0.1",
        "for _ in range(t):\n    f = f * 0.9",
        "while f.dim() > 3:\n    f = f.mean(-1)",
        "f = torch.stack([v.relu() for v in f.flip(0)])",
    )


@twist
def odd_python(draft: Draft) -> bool:
    """Helpers, closures, comprehensions, try, lambdas, functools."""
    draft.say("prelude", "def helper(v, *, scale=2.0):\n    return v * scale if v.dim() > 1 else v")
    return pick(
        draft,
        "body",
        "f = helper(f)",
        "f = helper(f, scale=t)",
        "f = (lambda v: v + t)(f)",
        "try:\n    f = f.view(2, -1, 2)\nexcept RuntimeError:\n    f = f * 2",
        "f = {'a': f}['a']",
        "f, *rest = [f, f]",
        "f = [f, f * 2][bool(t)]",
        "f = f if isinstance(f, torch.Tensor) else 0",
        "assert f.dim() > 0, f.shape",
        "f = next(iter([f]))",
        "f = torch.jit.script(torch.relu)(f) if False else f",
        "f = eval('f * 2')",
        "f = max((f, f * 0), key=lambda v: v.dim())",
        "del t\nt = 1\nf = f * t",
        "f = f.__mul__(2)",
        "f = torch.ops.aten.mul.Tensor(f, 2)",
        "f = torch.ops.aten.relu_.default(f * 1)",
        "f = torch._C._nn.gelu(f)",
        "f = getattr(F, 'relu')(f)",
        "f = f.apply_(abs) if False else f.abs()",
        "f = torch.stack([f, f])[0]",
        "f = torch.sum(torch.stack((f, f), dim=-1), dim=-1)",
        "f = torch.cat((f, f if f.dim() == 2 else f * 2), -1)",
    )


@twist
def all_frames(draft: Draft) -> bool:
    """A frame that looks at the whole clip, or at other frames."""
    return pick(
        draft,
        "body",
        "f = f + x.mean()",
        "f = f - x[:, 0].mean()",
        "f = f * x[:, -1].mean()",
        "f = f + x[:, :t + 1].mean()",
        "f = f + x[:, t:].sum()",
        "f = f + x.sum(1).mean()",
        "f = f * x[:, (t + 1) % x.size(1)].mean()",
        "f = f + x.flip(1)[:, t].mean()",
        "f = f + x[:, ::2].mean()",
        "f = f * x.std()",
        "f = f + x.cumsum(1)[:, t].mean()",
    )

"""Writes to the model and to the world, hooks, and weights that are shared."""

from ..draft import Draft
from .base import Twist, into, pick

TWISTS: list[Twist] = []
twist = into(TWISTS)


@twist
def buffer_written(draft: Draft) -> bool:
    """A buffer that the forward updates."""
    draft.say("init", 'self.register_buffer("seen", torch.zeros(1))')
    return pick(
        draft,
        "body",
        "self.seen += 1\nf = f + self.seen",
        "self.seen.copy_(f.detach().mean().view(1))\nf = f + self.seen",
        "self.seen = self.seen * 0.9 + f.detach().mean()\nf = f * self.seen",
        "f = f + self.seen",
        "if self.training:\n    self.seen.add_(1)\nf = f / (1 + self.seen)",
        "self.seen.fill_(t)\nf = f + self.seen",
        "f = f + self.seen\nself.seen.data = self.seen.data + 1",
        "with torch.no_grad():\n    self.seen.mul_(0.5).add_(f.mean())\nf = f - self.seen",
    )


@twist
def parameter_written(draft: Draft) -> bool:
    """A parameter that the forward scales."""
    draft.say("init", "self.gain = nn.Parameter(torch.ones(1))")
    return pick(
        draft,
        "body",
        "f = f * self.gain\nwith torch.no_grad():\n    self.gain.mul_(0.9)",
        "self.gain.data.mul_(0.9)\nf = f * self.gain",
        "self.gain.data = torch.full((1,), float(t + 1))\nf = f * self.gain",
        "f = f * self.gain\nself.gain.data.clamp_(max=0.5)",
        "f = f * self.gain.detach()",
        "self.gain.requires_grad_(bool(t % 2))\nf = f * self.gain",
        "f = f * self._parameters['gain']",
        "f = f * dict(self.named_parameters())['gain']",
        "f = f * sum(p.mean() for p in self.parameters())",
        "self.gain = nn.Parameter(self.gain.detach() * 0.9)\nf = f * self.gain",
    )


@twist
def counter(draft: Draft) -> bool:
    """An attribute that counts."""
    draft.say("init", "self.calls = 0")
    return pick(
        draft,
        "body",
        "self.calls += 1\nf = f * self.calls",
        "self.calls += 1",
        "self.calls += 1\nf = f * (2 if self.calls > 10 else 1)",
        "f = f * (1 + self.calls)\nself.calls = t",
        "self.last = f.detach()",
        "f = f + getattr(self, 'old', 0)\nself.old = t",
        "self.calls = self.calls + x.size(0)",
    )


_CACHES = {
    "self.cache = []": ("self.cache.append(f.detach())", "len(self.cache)"),
    "self.cache = {}": ("self.cache[t] = f.detach()", "len(self.cache)"),
    'self.cache = {"k": []}': ('self.cache["k"].append(f.detach())', 'len(self.cache["k"])'),
    "self.cache = collections.deque(maxlen=3)": (
        "self.cache.append(f.detach())",
        "len(self.cache)",
    ),
    "self.cache = Holder()": ("self.cache.h = f.detach()", "(self.cache.h is not None)"),
    "self.cache = [None]": ("self.cache[0] = f", "1"),
    "self.cache = collections.defaultdict(int)": ("self.cache[t] += 1", "sum(self.cache.values())"),
    "self.cache = set()": ("self.cache.add(t)", "len(self.cache)"),
    "self.cache = np.zeros(3)": ("self.cache += 1", "float(self.cache.sum())"),
    "self.cache = torch.zeros(3)": ("self.cache += 1", "float(self.cache.sum())"),
    "self.cache = bytearray(3)": ("self.cache.append(t % 200)", "len(self.cache)"),
}


@twist
def cache(draft: Draft) -> bool:
    """A container or a plain object of the model that the forward writes."""
    init, (write, read) = draft.rng.choice(list(_CACHES.items()))
    if "Holder" in init:
        draft.say("prelude", "class Holder:\n    h = None")
    draft.say("init", init)
    lines = draft.rng.choice(
        (f"{write}", f"{write}\nf = f * {read}", f"f = f + {read}\n{write}", f"f = f + {read}")
    )
    return draft.say("body", lines)


@twist
def global_state(draft: Draft) -> bool:
    """A global, a default argument or a class attribute that the forward writes."""
    draft.say("prelude", "SEEN = []\nSTEP = {'n': 0}")
    return pick(
        draft,
        "body",
        "SEEN.append(t)\nf = f + len(SEEN)",
        "STEP['n'] += 1",
        "STEP['n'] += 1\nf = f * STEP['n']",
        "SEEN.append(f.detach())",
        "globals()['LAST'] = t",
        "type(self).count = getattr(type(self), 'count', 0) + 1\nf = f * type(self).count",
    )


@twist
def hooked(draft: Draft) -> bool:
    """Hooks of a layer, with and without state."""
    value = draft.get("f")
    size = value.shape[-1]
    m = draft.name("hooked")
    draft.say("init", f"self.{m} = nn.Linear({size}, {size}); self.log = []")
    hook = draft.rng.choice(
        (
            "register_forward_hook(lambda m, i, o: self.log.append(o.detach()))",
            "register_forward_hook(lambda m, i, o: o * 2)",
            "register_forward_hook(lambda m, i, o: None)",
            "register_forward_pre_hook(lambda m, i: (i[0] + 1,))",
            "register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,))",
            "register_full_backward_hook(lambda m, i, o: self.log.append(1))",
            "register_full_backward_pre_hook(lambda m, o: (o[0] * 0.5,))",
            "weight.register_hook(lambda g: g * 0.5)",
            "weight.register_hook(lambda g: self.log.append(1))",
            "register_state_dict_post_hook(lambda *a: None)",
        )
    )
    draft.parts["init"].append(f"self.{m}.{hook}")
    return draft.say("body", f"f = self.{m}(f)")


@twist
def shared_weights(draft: Draft) -> bool:
    """A layer that is used twice, tied parameters, a weight that is used by hand."""
    size = draft.get("f").shape[-1]
    a, b = draft.name("a"), draft.name("b")
    draft.say("init", f"self.{a} = nn.Linear({size}, {size}); self.{b} = nn.Linear({size}, {size})")
    extra = draft.rng.choice(
        (
            "pass",
            f"self.{b} = self.{a}",
            f"self.{b}.weight = self.{a}.weight",
            f"self.{b}.bias = None",
            f"self.{a}.weight.requires_grad_(False)",
            f"self.{a}.extra = self.{b}",
            f"nn.init.zeros_(self.{a}.weight)",
        )
    )
    draft.say("init", extra)
    return pick(
        draft,
        "body",
        f"f = self.{b}(self.{a}(f))",
        f"f = self.{a}(f) + self.{b}(f)",
        f"f = F.linear(f, self.{a}.weight) + self.{b}(f)",
        f"f = self.{a}(f) if t % 2 else self.{b}(f)",
        f"f = f @ self.{a}.weight.t()",
        f"f = [self.{a}, self.{b}][t % 2](f)",
        f"f = torch.func.functional_call(self.{a}, dict(self.{b}.named_parameters()), (f,))",
        f"f = self.{a}.forward(f)",
    )

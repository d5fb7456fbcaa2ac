"""What people do in a loop besides layers: state, control by t, aliasing, hooks, writes, chance.

Each twist adds a few lines to a draft, or returns False where it does not fit. A new kind of fault
is a new twist here: one function, a dozen lines.
"""

from collections.abc import Callable

import torch

from .draft import Draft

Twist = Callable[[Draft], bool | None]
ALL: list[Twist] = []
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


def twist(made: Twist) -> Twist:
    """Register a twist."""
    ALL.append(made)
    return made


def _pick(draft: Draft, part: str, *texts: str) -> bool:
    return draft.say(part, draft.rng.choice(texts))


# ---- control by t


@twist
def branch_on_t(draft: Draft) -> bool:
    """A branch on the number of the frame."""
    test = draft.rng.choice(
        (
            "t % 2",
            "t >= 5",
            "t == 0",
            "t > 2",
            "t < 1",
            "t >= 40",
            "t and t % 3 == 0",
            "t in (1, 3)",
            "t == SIZE - 1",
            "t > SIZE // 2",
            "bool(t)",
            "t * t > 30",
            "self.training and t",
        )
    )
    does = draft.rng.choice(("f = f * 2", "f = f.relu()", "f = f + t", "f = -f", "f = f.detach()"))
    draft.write("body", f"if {test}:\n    {does}")
    return True


@twist
def number_from_t(draft: Draft) -> bool:
    """A number that is computed from t."""
    return _pick(
        draft,
        "body",
        "f = f * t",
        "f = f + 0.1 * t",
        "f = f / (t + 1)",
        "f = f * 0.9 ** t",
        "f = f * math.sin(t)",
        "f = f * float(t > 3)",
        "f = f + min(t, 3)",
        "f = f * (2 if t % 2 else 1)",
        "f = f * [1.0, 2.0, 0.5][t % 3]",
        "f = f * ([1.0] * 40 + [0.5] * 100)[t]",
        "f = f + torch.tensor(float(t))",
        "f = f + torch.full_like(f, t)",
        "f = f.roll(t, -1)",
        "f = f * (1 << min(t, 4))",
        "f = f + int(f'{t}')",
    )


@twist
def parameter_by_t(draft: Draft) -> bool:
    """A parameter or a module of each frame."""
    value = draft.get("f")
    size = value.shape[-1] if value.dim() > 1 else 1
    if not draft.say("init", f"self.pos = nn.Parameter(torch.randn(100, {size}))"):
        return False
    row = draft.rng.choice(("t", "t", "min(t, 3)", "t % 2", "t // 2", "-1 - t", "99 - t", "t * 2"))
    if draft.chance(0.2) and value.dim() > 1:
        draft.say(
            "init", f"self.many = nn.ModuleList([nn.Linear({size}, {size}) for _ in range(8)])"
        )
        return draft.say("body", f"f = self.many[{row}](f)")
    return draft.say("body", f"f = f + self.pos[{row}]")


@twist
def leave_early(draft: Draft) -> bool:
    """break and continue."""
    test = draft.rng.choice(("t == 3", "t > 4", "t >= 40", "t == 2"))
    word = draft.rng.choice(("break", "continue", "break"))
    draft.write("body", f"if {test}:\n    {word}")
    return True


@twist
def branch_on_values(draft: Draft) -> bool:
    """A branch on what a tensor holds."""
    test = draft.rng.choice(
        ("f.sum() > 0", "f.mean().item() > 0", "f.isnan().any()", "f.max() > 50")
    )
    draft.write("body", f"if {test}:\n    f = f * 0.5")
    return True


@twist
def branch_on_shape(draft: Draft) -> bool:
    """A branch on a size, the batch's among them."""
    test = draft.rng.choice(
        (
            "f.size(0) > 2",
            "f.shape[0] == 1",
            "f.shape[-1] > 3",
            "x.size(1) > 4",
            "x.numel() > 500",
            "x.is_contiguous()",
            "x.dtype == torch.float32",
            "len(f) == 2",
            "x.shape[1] % 2 == 0",
            "x.requires_grad",
            "torch.is_grad_enabled()",
            "f.stride(0) > 20",
            "self.training",
        )
    )
    draft.write("body", f"if {test}:\n    f = f * 3")
    return True


@twist
def number_of_size(draft: Draft) -> bool:
    """A number that is a size."""
    return _pick(
        draft,
        "body",
        "f = f / x.size(1)",
        "f = f * x.size(0)",
        "f = f / math.sqrt(f.size(-1))",
        "f = f * (x.numel() // x.size(0))",
        "f = f + torch.arange(f.size(0)).view(-1, *[1] * (f.dim() - 1))",
        "f = f * torch.ones(x.size(0), *[1] * (f.dim() - 1))",
        "f = f * (t / x.size(1))",
        "f = f * torch.linspace(0, 1, x.size(1))[t]",
        "f = f * max(x.size(0), 2)",
        "f = f.sum(0, keepdim=True) / f.size(0) + f",
    )


# ---- state


@twist
def carried(draft: Draft) -> bool:
    """State that a frame hands on to the next."""
    start = draft.rng.choice(
        ("h = 0", "h = 0.0", "h = torch.zeros(())", "h = None", "h = torch.zeros(1)")
    )
    draft.write("before", start)
    draft.scope["h"] = torch.zeros_like(draft.get("f"))
    if "None" in start:
        draft.write("body", "if h is None:\n    h = torch.zeros_like(f)")
    step = draft.rng.choice(
        (
            "h = h + f",
            "h = 0.5 * h + f",
            "h = torch.tanh(h + f)",
            "h = f - h",
            "h = h * 0.9 + f * 0.1",
            "h = f + h.detach() if t else f",
            "h = torch.maximum(f, h + f * 0)",
            "h = (h + f).relu()",
            "h = f",
            "h = f if t % 2 else h + f",
            "h = h + f.mean()",
            "h = h + 1",
        )
    )
    use = draft.rng.choice(("f = f + h", "f = h", "f = f * h", "f = h + 0"))
    lines = [step, use] if draft.chance(0.7) else [use, step]
    if draft.chance(0.3):
        lines = [f"if t % {draft.rng.choice((2, 3))} == 0:", *("    " + line for line in lines)]
    kept = draft.get("f")
    if not draft.say("body", "\n".join(lines)):
        return False
    draft.scope["f"] = draft.get("f") if draft.fits("f") else kept
    return True


@twist
def recurrent_cell(draft: Draft) -> bool:
    """An LSTMCell, a GRUCell or an RNNCell over the frames."""
    value = draft.get("f")
    if value.dim() != 2 and not draft.say("body", "f = f.flatten(1)"):
        return False
    value = draft.get("f")
    if value.dim() != 2 or value.size(1) > 64 or value.size(0) != 2:
        return False
    n = draft.rng.choice((3, 4))
    kind = draft.rng.choice(("LSTMCell", "GRUCell", "RNNCell"))
    bias = ", bias=False" * draft.chance(0.2)
    if not draft.say("init", f"self.cell = nn.{kind}({value.size(1)}, {n}{bias})"):
        return False
    start = draft.rng.choice((f"hc = x.new_zeros(f.size(0), {n})", "hc = None"))
    if kind == "LSTMCell":
        start = draft.rng.choice(
            ("hc = None", f"hc = (x.new_zeros(f.size(0), {n}), x.new_zeros(f.size(0), {n}))")
        )
    if "None" in start or draft.chance(0.3):
        draft.write("before", "hc = None")
    else:
        draft.write("before", "hc = None")
        draft.write("body", f"if hc is None:\n    {start}")
    draft.scope["hc"] = None
    pick = "[0]" if kind == "LSTMCell" else ""
    between = ""
    if draft.chance(0.25):
        between = draft.rng.choice(
            (
                "hc = hc if t % 2 else hc",
                "hc = tuple(v * 0.5 for v in hc)" if pick else "hc = hc * 0.5",
                "hc = tuple(v.detach() for v in hc)" if pick else "hc = hc.detach()",
                "hc = None if t == 2 else hc",
            )
        )
    call = "hc = self.cell(f, hc)"
    if draft.chance(0.15):
        call = "if t % 2 == 0 or hc is None:\n    hc = self.cell(f, hc)"
    text = f"{call}\n{between}\nf = hc{pick} if hc is not None else f[:, :{n}]"
    return draft.say("body", text)


@twist
def conv_lstm(draft: Draft) -> bool:
    """A convolution of the frame and the state."""
    value = draft.get("f")
    if value.dim() != 4:
        return False
    c, n = value.size(1), 3
    draft.say("init", f"self.gate = nn.Conv2d({c + n}, {2 * n}, 3, padding=1)")
    draft.write("before", "s = None")
    draft.scope["s"] = None
    order = draft.rng.choice(("[f, s]", "[s, f]", "(f, s)"))
    return draft.say(
        "body",
        f"""
        if s is None:
            s = f.new_zeros(f.size(0), {n}, f.size(2), f.size(3))
        i, j = self.gate(torch.cat({order}, 1)).chunk(2, 1)
        s = torch.sigmoid(i) * s + torch.tanh(j)
        f = s
        """,
    )


@twist
def previous_frame(draft: Draft) -> bool:
    """What the frame before gave."""
    draft.write("before", "prev = None")
    draft.scope["prev"] = None
    use = draft.rng.choice(
        (
            "now = f\nif prev is not None:\n    f = f - prev\nprev = now",
            "if prev is None:\n    prev = f\nf = f + prev",
            "if prev is None:\n    prev = f * 0\nnow = f\nf = (f - prev).abs()\nprev = now",
            "f, prev = (f if prev is None else f * prev), f",
            "f, prev = (f if prev is None else torch.cat([f, prev], -1)[..., ::2]), f.detach()",
        )
    )
    return draft.say("body", use)


@twist
def memory(draft: Draft) -> bool:
    """A list or a deque of the last features."""
    start = draft.rng.choice(("mem = []", "mem = collections.deque(maxlen=3)"))
    draft.say("before", start)
    return draft.say(
        "body",
        "mem.append(f)\n"
        + draft.rng.choice(
            (
                "f = torch.stack(list(mem)[-3:]).mean(0)",
                "f = f + mem[0]",
                "f = f + mem[-2] if len(mem) > 1 else f",
                "f = sum(mem) / len(mem)",
                "f = f * (2 if len(mem) > 4 else 1)",
                "f = max(mem, key=len)",
                "if len(mem) > 2:\n    f = f + mem.pop()",
                "f = torch.cat(list(mem)[:1], 0)",
            )
        ),
    )


@twist
def running(draft: Draft) -> bool:
    """A running maximum, minimum or total beside the features."""
    draft.write("before", "best = None")
    draft.scope["best"] = draft.get("f")
    op = draft.rng.choice(
        (
            "torch.maximum(best, f)",
            "torch.min(best, f)",
            "best + f",
            "torch.fmax(f, best)",
            "best * f",
            "torch.where(best > f, best, f)",
            "torch.logaddexp(best, f)",
            "torch.cat([best, f])[:len(f)]",
        )
    )
    return draft.say("body", f"best = f if best is None else {op}\nf = f - best")


# ---- aliasing and writes in place


@twist
def write_through_alias(draft: Draft) -> bool:
    """A write through another name of the same storage, and a read of the first."""
    view = draft.rng.choice(
        (
            "f",
            "f.view_as(f)",
            "f[:]",
            "f.detach()",
            "f.flatten(1)",
            "f.contiguous()",
            "f.reshape(f.shape)",
            "f.expand_as(f)",
            "F.dropout(f, 0.5, False)",
            "+f",
            "f.to(f.dtype)",
            "f.float()",
            "f.squeeze(-1)",
            "torch.Tensor.positive(f)",
            "f.real",
            "f.type_as(f)",
            "f.clone()",
            "nn.Identity()(f)",
            "f.data",
            "torch.atleast_2d(f)",
            "f.nan_to_num()",
            "f.unbind(1)[0]",
            "f.split(1, 0)[0]",
            "f.T if f.dim() == 2 else f",
            "nn.Dropout2d().eval()(f)",
            "f.requires_grad_(f.requires_grad)",
            "f.broadcast_to(f.shape)",
            "f.movedim(0, -1)",
            "torch.asarray(f)",
            "f.narrow(0, 0, 1)",
            "f.unfold(-1, 1, 1)",
            "f.diagonal()",
            "f.resolve_conj()",
            "f.chunk(2, -1)[0]",
            "f.cpu()",
            "f.view(f.shape)",
            "f.swapaxes(0, -1)",
        )
    )
    write = draft.rng.choice(
        (
            "a.mul_(2)",
            "a.add_(1)",
            "a.relu_()",
            "a += 1",
            "a[0] = 0",
            "a.zero_()",
            "F.relu(a, inplace=True)",
            "a.fill_(0.3)",
            "a.clamp_(min=0)",
            "a.copy_(a.flip(0))",
            "a[..., 0] *= 3",
            "torch.relu_(a)",
            "a.sub_(a.mean())",
            "torch.add(a, 1, out=a)",
        )
    )
    draft.scope["f"] = draft.get("f").clone()
    if draft.chance(0.5):
        return draft.say("body", f"b = f * 2\na = {view}\n{write}\nf = f + b")
    return draft.say("body", f"a = {view}\nb = f\n{write}\nf = b + 0.5 * f")


@twist
def write_into_input(draft: Draft) -> bool:
    """The caller's tensor is written."""
    text = draft.rng.choice(
        (
            "x[:, t] = 0",
            "x[:, t] *= 2",
            "x.select(1, t).mul_(0.5)",
            "x.mul_(0.9)",
            "x[0] += 1",
            "x[:, t].relu_()",
            "x[:, 0] = x[:, t]",
            "x[..., 0] = t",
        )
    )
    part = draft.rng.choice(("body", "body", "before", "after"))
    draft.scope["x"] = draft.get("x").clone()
    if part != "body":
        text = text.replace("t]", "-1]").replace("= t", "= 1").replace("1, t", "1, -1")
    return draft.say(part, text)


@twist
def copy_of_input(draft: Draft) -> bool:
    """A clone is written frame by frame, and read."""
    draft.write(
        "before", draft.rng.choice(("w = x.clone()", "w = x * 1", "w = torch.zeros_like(x)"))
    )
    draft.scope["w"] = draft.get("x").clone()
    text = draft.rng.choice(
        (
            "w[:, t] = w[:, t] * 2\nf = f + w[:, t].mean()",
            "w[:, t].mul_(0.5)\nf = f + w.mean()",
            "w[:, :t] = 0\nf = f + w[:, t].sum()",
            "w[:, t] = x[:, t] + w[:, t - 1]\nf = f * w[:, t].mean()",
            "f = f + w[:, t - 1].mean()\nw[:, t] += 1",
            "w = w * 0.9\nf = f + w[:, t].mean()",
        )
    )
    return draft.say("body", text)


@twist
def kept_then_written(draft: Draft) -> bool:
    """A kept result is written after it was kept."""
    draft.say("before", "kept = []")
    return draft.say(
        "body",
        draft.rng.choice(
            (
                "f = f * 1\nkept.append(f)\nf.relu_()",
                "f = f * 1\nkept.append(f)\nf = f.add_(1) + kept[0].mean()",
                "kept.append(f * 1)\nkept[-1].mul_(2)\nf = kept[-1]",
                "kept.append(f * 1)\nkept[0] += 1\nf = kept[0] + f",
                "f = f.unsqueeze(1) * 1\nf.relu_()",
                "f = f + 0\nf[:, 0] = 0",
                "f = f + 0\nf[f < 0] = 0.5",
                "f = f + 0\nf[0].fill_(1)",
                "f = f.clone()\nf.index_fill_(-1, torch.tensor([0]), 0.5)",
                "f = f * 1\nf.masked_fill_(f > 1, 1.0)",
                "f = f * 1\nf.t_() if f.dim() == 2 else f",
                "f = f * 1\nf.unsqueeze_(0)\nf.squeeze_(0)",
                "f = f * 1\nf.data.mul_(2)",
                "f = f * 1\ntorch.nn.init.constant_(f, 0.1)",
                "f = f * 1\nf.resize_(f.shape)",
                "buf = torch.empty_like(f)\ntorch.mul(f, 2, out=buf)\nf = buf",
                "f = f * 1\nf.requires_grad_(False) if not f.requires_grad else f",
            )
        ),
    )


# ---- writes to the model


@twist
def buffer_written(draft: Draft) -> bool:
    """A buffer that the forward updates."""
    draft.say("init", 'self.register_buffer("seen", torch.zeros(1))')
    return _pick(
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
    return _pick(
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
    return _pick(
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
    return _pick(
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
    return _pick(
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


# ---- autograd


@twist
def autograd(draft: Draft) -> bool:
    """Parts without gradients, custom functions, checkpoints, hooks of tensors."""
    draft.say(
        "prelude",
        """
        class Reverse(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v):
                ctx.save_for_backward(v)
                return v * 1
            @staticmethod
            def backward(ctx, g):
                return -0.5 * g
        class Straight(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v):
                return v.view_as(v)
            @staticmethod
            def backward(ctx, g):
                return g * 3
        """,
    )
    size = draft.get("f").shape[-1]
    m = draft.name("part")
    draft.say("init", f"self.{m} = nn.Linear({size}, {size})")
    return _pick(
        draft,
        "body",
        f"with torch.no_grad():\n    f = self.{m}(f)",
        f"f = self.{m}(f).detach()",
        f"f = self.{m}(f) + f.detach()",
        f"with torch.set_grad_enabled(t > 1):\n    f = self.{m}(f)",
        f"with torch.set_grad_enabled(self.training):\n    f = self.{m}(f)",
        f"f = Reverse.apply(self.{m}(f))",
        f"f = Straight.apply(self.{m}(f))",
        f"f = checkpoint(self.{m}, f, use_reentrant=True)",
        f"f = checkpoint(self.{m}, f, use_reentrant=False)",
        f"f = self.{m}(f)\nif f.requires_grad:\n    f.register_hook(lambda g: g * 0.5)",
        f"f = self.{m}(f)\nif f.requires_grad:\n    f.retain_grad()",
        f"f = self.{m}(f)\nf = f + (f.round() - f).detach()",
        f"with torch.enable_grad():\n    f = self.{m}(f)",
        f"with torch.inference_mode():\n    g2 = self.{m}(f)\nf = f + g2.clone()",
        f"f = torch.no_grad()(self.{m})(f)",
        f"with torch.enable_grad():\n    v = f.detach().requires_grad_()\n"
        f"    f = f + torch.autograd.grad(self.{m}(v).sum(), v)[0]",
        f"f = torch.vmap(self.{m})(f)",
        f"f = torch.func.jvp(self.{m}, (f,), (torch.ones_like(f),))[1]",
        f'with torch.autocast("cpu", torch.bfloat16):\n    f = self.{m}(f)\nf = f.float()',
        f"f = torch.utils.checkpoint.checkpoint_sequential([self.{m}], 1, f, use_reentrant=False)",
    )


@twist
def modes(draft: Draft) -> bool:
    """Train and eval mode of a part, and changes of it in the forward."""
    size = draft.get("f").shape[-1]
    if draft.get("f").dim() != 2:
        return False
    m = draft.name("norm")
    draft.say("init", f"self.{m} = nn.BatchNorm1d({size})")
    return _pick(
        draft,
        "body",
        f"self.{m}.eval()\nf = self.{m}(f)",
        f"f = self.{m}(f)\nself.{m}.train(self.training)",
        f"f = F.batch_norm(f, self.{m}.running_mean, self.{m}.running_var, training=True)",
        "f = F.batch_norm(f, None, None, training=True)",
        f"self.{m}.eps = 0.1\nf = self.{m}(f)",
        f"self.{m}.momentum = 0.1 * t\nf = self.{m}(f)",
        f"self.{m}.running_mean.zero_()\nf = self.{m}(f)",
        f"f = (f - self.{m}.running_mean) / (self.{m}.running_var + 1).sqrt()",
    )


@twist
def lazy(draft: Draft) -> bool:
    """A layer whose sizes are found by the first call."""
    if not draft.chance(0.2):
        return False
    return draft.say("init", "self.lazy = nn.LazyLinear(3)") and draft.say(
        "body", "f = self.lazy(f)"
    )


# ---- randomness, types, the world


@twist
def randomness(draft: Draft) -> bool:
    """Random numbers of torch, NumPy and Python."""
    return _pick(
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
    return _pick(
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
    return _pick(
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
    return _pick(
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
    return _pick(
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

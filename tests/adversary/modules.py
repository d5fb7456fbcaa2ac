"""Layers that take a frame, as text, and the user's own modules around them."""

from .draft import Draft

_IMAGE = """\
nn.Conv2d({c}, {n}, 3, padding=1)
nn.Conv2d({c}, {n}, 3, padding=1)
nn.Conv2d({c}, {n}, 1, bias=False)
nn.Conv2d({c}, {c}, 3, padding=1, groups={c})
nn.Conv2d({c}, {n}, 3, stride=2, padding=1, padding_mode="circular")
nn.ConvTranspose2d({c}, {n}, 2, stride=2)
nn.BatchNorm2d({c})
nn.BatchNorm2d({c}, affine=False)
nn.BatchNorm2d({c}, track_running_stats=False)
nn.GroupNorm(1, {c})
nn.InstanceNorm2d({c})
nn.InstanceNorm2d({c}, affine=True, track_running_stats=True)
nn.LayerNorm([{c}, {h}, {w}])
nn.LayerNorm({w})
nn.RMSNorm({w})
nn.LocalResponseNorm(2)
nn.Linear({w}, {n})
nn.MaxPool2d(2)
nn.MaxPool2d(3, stride=1, padding=1)
nn.AvgPool2d(2, ceil_mode=True)
nn.LPPool2d(2, 2)
nn.AdaptiveAvgPool2d(2)
nn.AdaptiveMaxPool2d((1, 2))
nn.Upsample(scale_factor=2)
nn.Upsample(scale_factor=2, mode="bilinear")
nn.ZeroPad2d(1)
nn.ReflectionPad2d(1)
nn.PixelUnshuffle(2)
nn.Unfold(2)
nn.Softmax2d()
nn.Dropout2d(0.3)
nn.FeatureAlphaDropout(0.3)
nn.Flatten()
nn.Flatten(2)
nn.PReLU({c})
"""
_VECTOR = """\
nn.Linear({c}, {n})
nn.Linear({c}, {n})
nn.Linear({c}, {c}, bias=False)
nn.LayerNorm({c})
nn.BatchNorm1d({c})
nn.RMSNorm({c})
nn.GroupNorm(1, {c})
nn.GLU()
nn.Unflatten(1, (-1, 1))
nn.Linear({c}, {c}).requires_grad_(False)
"""
_TOKENS = """\
nn.Linear({h}, {n})
nn.Linear({h}, {n})
nn.LayerNorm({h})
nn.Conv1d({c}, {n}, 3, padding=1)
nn.BatchNorm1d({c})
nn.MultiheadAttention({h}, 1, batch_first=True)
nn.TransformerEncoderLayer({h}, 1, 8, batch_first=True)
nn.GRU({h}, {n}, batch_first=True)
nn.LSTM({h}, {n}, batch_first=True, bidirectional=True)
nn.MaxPool1d(2)
nn.Flatten()
"""
_ANY = """\
nn.ReLU()
nn.ReLU(inplace=True)
nn.Hardtanh(inplace=True)
nn.ELU(inplace=True)
nn.SiLU()
nn.GELU()
nn.Tanh()
nn.Sigmoid()
nn.LeakyReLU(0.1)
nn.RReLU()
nn.Softmax(-1)
nn.Threshold(0.1, 0.0)
nn.Dropout(0.2)
nn.Dropout(0.2, inplace=True)
nn.AlphaDropout(0.2)
nn.Identity()
nn.Softplus()
"""
_WRAPS = {
    "plain": "self.{m} = {layer}",
    "sequential": "self.{m} = nn.Sequential({layer}, {other})",
    "listed": "self.{m}s = nn.ModuleList([{layer}, {other}])",
    "dict": 'self.{m}s = nn.ModuleDict({{"a": {layer}}})',
    "own": "self.{m} = Own({layer})",
    "residual": "self.{m} = Residual({layer})",
    "wide": "self.{m} = Wide({layer}, {other})",
    "weight norm": "self.{m} = nn.utils.parametrizations.weight_norm({layer})",
    "spectral norm": "self.{m} = nn.utils.parametrizations.spectral_norm({layer})",
    "old weight norm": "self.{m} = nn.utils.weight_norm({layer})",
    "parametrized": (
        "self.{m} = {layer}; "
        'nn.utils.parametrize.register_parametrization(self.{m}, "weight", nn.Hardtanh())'
    ),
}
_OWN = {
    "own": """
        class Own(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer
                self.scale = nn.Parameter(torch.full((1,), 0.7))
            def forward(self, v):
                return self.layer(v) * self.scale
        """,
    "residual": """
        class Residual(nn.Module):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer
            def forward(self, v):
                w = self.layer(v)
                return v + w if w.shape == v.shape else w
        """,
    "wide": """
        class Wide(nn.Module):
            def __init__(self, layer, other):
                super().__init__()
                self.layer, self.other = layer, other
            def forward(self, v, flag=True):
                a = self.layer(v)
                return self.other(a) if flag else {"a": a}
        """,
}


def table(rank: int) -> list[str]:
    """Layers for frames of a rank, the batch included."""
    special = {4: _IMAGE, 2: _VECTOR, 3: _TOKENS}.get(rank, "")
    return (special * 2 + _ANY).strip().splitlines()


def add(draft: Draft, f: str = "f") -> bool:
    """One more layer, applied to ``f`` in the body."""
    value = draft.get(f)
    rng = draft.rng
    sizes = [*value.shape, 1, 1, 1, 1]
    fill = {"c": sizes[1], "h": sizes[2], "w": sizes[3], "n": rng.choice((2, 3, 4))}
    layer = rng.choice(table(value.dim())).format(**fill)
    other = rng.choice(_ANY.strip().splitlines())
    wrap = "plain" if draft.chance(0.6) else rng.choice(list(_WRAPS))
    if wrap in _OWN and f"class {wrap.title()}" not in "".join(draft.parts["prelude"]):
        draft.say("prelude", _OWN[wrap])
    m = draft.name("m")
    if not draft.say("init", _WRAPS[wrap].format(m=m, layer=layer, other=other, n=fill["n"])):
        return False
    callee = {"listed": f"self.{m}s[0]", "dict": f'self.{m}s["a"]'}.get(wrap, f"self.{m}")
    statement = f"{f} = {callee}({f})"
    if "MultiheadAttention" in layer and wrap == "plain":
        statement = f"{f} = {callee}({f}, {f}, {f})[0]"
    elif layer.startswith(("nn.GRU(", "nn.LSTM(")) and wrap == "plain":
        statement = f"{f} = {callee}({f})[0]"
    if wrap == "listed" and draft.chance(0.5):
        statement = f"for layer in self.{m}s:\n    {f} = layer({f})"
    if not (draft.say("body", statement) and draft.fits(f)):
        draft.parts["init"].pop()
        if draft.parts["body"] and draft.parts["body"][-1] in statement:
            draft.parts["body"].pop()
        draft.scope[f] = value
        return False
    return True

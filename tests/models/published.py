"""The published Vim as plain formulas over the authors' own key names; slow, for tests only.

Independent of the package: numbers go through no code of visionmamba.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def drawn_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Draw every tensor from its own numpy stream; key i of the sorted keys uses [seed, i]."""
    drawn = {}
    for i, key in enumerate(sorted(shapes)):
        stream, shape = np.random.default_rng([seed, i]), tuple(shapes[key])
        if key.endswith(("A_log", "A_b_log")):
            states = np.arange(1, shape[1] + 1)
            value = np.log(states)[None] + 0.2 * stream.standard_normal(shape)
        elif key.endswith((".D", ".D_b")) or ("norm" in key and key.endswith("weight")):
            value = 1 + 0.2 * stream.standard_normal(shape)
        elif "dt_proj" in key and key.endswith("bias"):
            dt = np.exp(stream.uniform(np.log(1e-3), np.log(0.1), shape))
            value = dt + np.log(-np.expm1(-dt))
        elif key.endswith("gamma"):
            value = 0.5 + 0.1 * stream.standard_normal(shape)
        elif key in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
            value = 0.5 * stream.standard_normal(shape)
        elif key.endswith("bias"):
            value = 0.1 * stream.standard_normal(shape)
        else:
            value = stream.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        drawn[key] = torch.from_numpy(value.astype(np.float32))
    return drawn


def golden_names() -> list[str]:
    return list(json.loads((GOLDEN / "golden.json").read_text()))


def golden_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return meta, weights, images (2, C, H, W), logits and the loss's factors of one case."""
    meta = json.loads((GOLDEN / "golden.json").read_text())[name]
    logits = torch.from_numpy(np.load(GOLDEN / "golden.npz")[f"{name}/logits"])
    side = meta["config"]["img_size"]
    images = np.random.default_rng(meta["x_seed"]).standard_normal((2, 3, side, side))
    factors = np.random.default_rng(meta["loss_seed"]).standard_normal(tuple(logits.shape))
    return (
        meta,
        drawn_weights(meta["shapes"], meta["seed"]),
        torch.from_numpy(images.astype(np.float32)),
        logits,
        torch.from_numpy(factors.astype(np.float32)),
    )


def published_shapes(options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return key names and shapes of the authors' state_dict for their options."""
    width, patch, state = options["embed_dim"], options["patch_size"], options.get("d_state", 16)
    inner, rank = 2 * width, -(-width // 16)
    height, columns = _size(options)
    stride = options.get("stride", 16)
    tokens = ((height - patch) // stride + 1) * ((columns - patch) // stride + 1)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, options.get("channels", 3), patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (options["num_classes"], width),
        "head.bias": (options["num_classes"],),
        "norm_f.weight": (width,),
    }
    if options.get("if_cls_token", True):
        double = options.get("use_double_cls_token", False)
        names = ("cls_token_head", "cls_token_tail") if double else ("cls_token",)
        shapes |= {name: (1, 1, width) for name in names}
        tokens += len(names)
    if options.get("if_abs_pos_embed", True):
        shapes["pos_embed"] = (1, tokens, width)
    kind = "v1" if options.get("if_bimamba") else options.get("bimamba_type", "v2")
    for i in range(options["depth"]):
        mixer = f"layers.{i}.mixer."
        shapes |= {
            f"layers.{i}.norm.weight": (width,),
            f"{mixer}in_proj.weight": (2 * inner, width),
            f"{mixer}out_proj.weight": (width, inner),
        }
        for suffix in ("", "_b") if kind == "v2" else ("",):
            shapes |= {
                f"{mixer}conv1d{suffix}.weight": (inner, 1, 4),
                f"{mixer}conv1d{suffix}.bias": (inner,),
                f"{mixer}x_proj{suffix}.weight": (rank + 2 * state, inner),
                f"{mixer}dt_proj{suffix}.weight": (inner, rank),
                f"{mixer}dt_proj{suffix}.bias": (inner,),
                f"{mixer}D{suffix}": (inner,),
            }
        for name in ("A_log", "A_b_log") if kind != "none" else ("A_log",):
            shapes[mixer + name] = (inner, state)
        if options.get("init_layer_scale") is not None:
            shapes[mixer + "gamma"] = (width,)
    if not options.get("rms_norm", True):
        norms = [key for key in shapes if "norm" in key]
        shapes |= {key.replace("weight", "bias"): (width,) for key in norms}
    return shapes


def published_logits(options: dict[str, Any], weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return the logits of the authors' model in evaluation mode, in the dtype of `images`."""
    weights = {key: value.to(images.dtype) for key, value in weights.items()}
    stride, width = options.get("stride", 16), options["embed_dim"]
    projected = F.conv2d(
        images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=stride
    )
    x = projected.flatten(2).transpose(1, 2)
    batch, patches = x.shape[:2]
    position: int | None = None
    has_token, double = (
        options.get("if_cls_token", True),
        options.get("use_double_cls_token", False),
    )
    if has_token and double:
        head = weights["cls_token_head"].expand(batch, -1, -1)
        tail = weights["cls_token_tail"].expand(batch, -1, -1)
        x = torch.cat((head, x, tail), dim=1)
    elif has_token:
        position = patches // 2 if options.get("use_middle_cls_token", True) else 0
        token = weights["cls_token"].expand(batch, -1, -1)
        x = torch.cat((x[:, :position], token, x[:, position:]), dim=1)
    if options.get("if_abs_pos_embed", True):
        x = x + weights["pos_embed"]
    if options.get("flip_img_sequences_ratio", -1) >= 1:
        x = x.flip(1)

    def rotate(tokens: Tensor) -> Tensor:
        if options.get("flip_img_sequences_ratio", -1) >= 1:
            return _published_rope(tokens.flip(1), options, width).flip(1)
        return _published_rope(tokens, options, width)

    hidden, residual = x, None
    step = 2 if options.get("if_bidirectional", False) else 1
    for i in range(0, options["depth"], step):
        if options.get("if_rope", False):
            hidden = rotate(hidden)
            if residual is not None and options.get("if_rope_residual", False):
                residual = rotate(residual)
        ahead = _layer(options, weights, i, hidden, residual)
        if step == 1:
            hidden, residual = ahead
            continue
        flipped = None if residual is None else residual.flip(1)
        back = _layer(options, weights, i + 1, hidden.flip(1), flipped)
        hidden, residual = ahead[0] + back[0].flip(1), ahead[1] + back[1].flip(1)
    hidden = _norm(options, weights, "norm_f", residual + hidden)
    weight, bias = weights["head.weight"], weights["head.bias"]
    if has_token and double:
        return F.linear((hidden[:, 0] + hidden[:, -1]) / 2, weight, bias)
    if has_token:
        return F.linear(hidden[:, position], weight, bias)
    pool = options.get("final_pool_type", "none")
    if pool == "max":
        return F.linear(hidden, weight, bias).max(dim=1)[0]
    return F.linear(hidden.mean(1) if pool == "mean" else hidden[:, -1], weight, bias)


def _layer(options, weights, i, hidden, residual):
    residual = hidden if residual is None else residual + hidden
    return _mixer(
        options, weights, i, _norm(options, weights, f"layers.{i}.norm", residual)
    ), residual


def _norm(options, weights, name, x):
    eps = options.get("norm_epsilon", 1e-5)
    if options.get("rms_norm", True):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return (
        centred * torch.rsqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    )


def _mixer(options, weights, i, h):
    own = {
        key.split(".mixer.")[1]: v
        for key, v in weights.items()
        if key.startswith(f"layers.{i}.mixer.")
    }
    kind = "v1" if options.get("if_bimamba") else options.get("bimamba_type", "v2")
    x, z = F.linear(h, own["in_proj.weight"]).chunk(2, dim=-1)
    y = _direction(own, x, z, "", own["A_log"])
    if kind == "v1":
        y = y + _direction(own, x, z, "", own["A_b_log"], scan_flipped=True)
    elif kind == "v2":
        y = y + _direction(own, x.flip(1), z.flip(1), "_b", own["A_b_log"]).flip(1)
        if options.get("if_divide_out", options.get("if_devide_out", True)):
            y = y / 2
    out = F.linear(y, own["out_proj.weight"])
    return out * own["gamma"] if "gamma" in own else out


def _direction(own, x, z, suffix, A_log, scan_flipped=False):
    length, inner = x.shape[1:]
    padded = F.pad(x.transpose(1, 2), (3, 0))
    u = F.silu(
        F.conv1d(padded, own[f"conv1d{suffix}.weight"], own[f"conv1d{suffix}.bias"], groups=inner)
    ).transpose(1, 2)
    rank, state = own[f"dt_proj{suffix}.weight"].shape[1], A_log.shape[1]
    low, B, C = F.linear(u, own[f"x_proj{suffix}.weight"]).split([rank, state, state], dim=-1)
    raw = F.linear(low, own[f"dt_proj{suffix}.weight"]) + own[f"dt_proj{suffix}.bias"]
    delta = torch.log1p(torch.exp(-raw.abs())) + raw.clamp(min=0)
    if scan_flipped:
        u, delta, B, C, z = (t.flip(1) for t in (u, delta, B, C, z))
    A = -torch.exp(A_log)
    h = torch.zeros(x.shape[0], inner, state, dtype=x.dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + own[f"D{suffix}"] * u[:, t])
    y = torch.stack(outputs, dim=1) * z * torch.sigmoid(z)
    return y.flip(1) if scan_flipped else y


def _published_rope(tokens, options, width):
    side, scaled = options["img_size"] // options["patch_size"], options.get("pt_hw_seq_len", 14)
    half = width // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2).double() / half)
    t = torch.arange(side).double() / side * scaled
    angles = torch.outer(t, frequencies).repeat_interleave(2, dim=-1)
    rows = angles[:, None].expand(side, side, half)
    columns = angles[None].expand(side, side, half)
    angle = torch.cat((rows, columns), dim=-1).reshape(side * side, width).to(tokens.dtype)
    first, rest = (tokens[:, :1], tokens[:, 1:]) if tokens.shape[1] % 2 else (tokens[:, :0], tokens)
    halves = rest.unflatten(-1, (-1, 2))
    swapped = torch.stack((-halves[..., 1], halves[..., 0]), dim=-1).flatten(-2)
    return torch.cat((first, rest * angle.cos() + swapped * angle.sin()), dim=1)


def _size(options):
    size = options["img_size"]
    return tuple(size) if isinstance(size, list | tuple) else (size, size)

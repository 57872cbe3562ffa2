"""Naive answers in float64 from the whole X: numpy and SciPy on the rows themselves, full models with plain hooks.

Imports nothing from the library, so that the two can only agree by being right.
"""

from __future__ import annotations

import copy

import numpy as np
import scipy.linalg
import torch


def centred(rows: np.ndarray, affine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows less their mean, and the mean (zeros if not affine)."""
    mean = rows.mean(0) if affine else np.zeros(rows.shape[1])
    return rows - mean, mean


def moments(z: np.ndarray, t: np.ndarray, affine: bool, weight: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """With weights: a row counts as if it stood there so many times."""
    weight = np.ones(len(z)) if weight is None else weight
    mean_z, mean_t = (np.average(rows, 0, weight) if affine else np.zeros(rows.shape[1]) for rows in (z, t))
    z, t = (np.sqrt(weight)[:, None] * (rows - mean) for rows, mean in ((z, mean_z), (t, mean_t)))
    return {"gram": z.T @ z, "cross": z.T @ t, "power": (t * t).sum(), "mean_z": mean_z, "mean_t": mean_t}


def absolute(ridge: float, z: np.ndarray, affine: bool) -> float:
    """A relative ridge in units of the objective: times the mean diagonal of the Gram matrix."""
    z, _ = centred(z, affine)
    return ridge * float((z * z).sum(0).mean())


def least_squares(
    z: np.ndarray, t: np.ndarray, start: np.ndarray, bias: np.ndarray, *, affine: bool, ridge: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """min |t - z V - b|^2 + ridge |V - start|^2 by SVD on the rows themselves (augmented by sqrt(ridge) 1): (V, b).

    `ridge` is absolute. Where many V are equally good, the one nearest to `start`. Without `affine`, b stays `bias`, and is
    not subtracted from t (as a layer without bias has none).
    """
    (zc, mean_z), (tc, mean_t) = centred(z, affine), centred(t, affine)
    left = np.concatenate([zc, np.sqrt(ridge) * np.eye(z.shape[1])])
    right = np.concatenate([tc - zc @ start, np.zeros_like(start)])
    change = scipy.linalg.lstsq(left, right, cond=1e-9, lapack_driver="gelsd")[0]
    weight = start + change
    return weight, mean_t - mean_z @ weight if affine else bias


def squares(z: np.ndarray, t: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    return float(np.square(t - z @ weight - bias).sum())


def interpolation(x: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q = C_uu^-1 C_um and P = mu_m - mu_u Q: how removed input channels follow from kept ones (docs: theory, section 1)."""
    covariance = np.cov(x, rowvar=False, bias=True).reshape(x.shape[1], x.shape[1])
    q = np.linalg.solve(covariance[np.ix_(kept, kept)], covariance[np.ix_(kept, ~kept)])
    mean = x.mean(0)
    return q, mean[~kept] - mean[kept] @ q


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).cpu().numpy()


# Where a consumer's output is added to the residual stream: what is listened to is not what the library's tables name.
# kind -> (consumer, module, "in" or "out": the residual is what goes into or comes out of it); "" is the block itself.
RESIDUALS = {
    "bert": {"heads": ("attention.output.dense", "", "in"), "neurons": ("output.dense", "attention", "out")},
    "llama": {"heads": ("self_attn.o_proj", "", "in"), "neurons": ("mlp.down_proj", "post_attention_layernorm", "in")},
}


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    base = model.base_model
    return base.encoder.layer if model.config.model_type == "bert" else base.layers


def units(model: torch.nn.Module, kind: str) -> int:
    if kind == "neurons":
        return model.config.intermediate_size
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def kept_channels(model: torch.nn.Module, layer: int, kind: str, keep: list[bool]) -> np.ndarray:
    """Which input channels of the consumer stay: bool [channels]."""
    consumer = blocks(model)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
    return np.repeat(np.asarray(keep, dtype=bool), consumer.in_features // units(model, kind))


def look(model: torch.nn.Module, batches: list[dict], layer: int, kind: str) -> dict[str, np.ndarray]:
    """Run the full model on all batches; consumer input "x", output "y" and residual "r" at the real tokens, stacked."""
    block = blocks(model)[layer]
    consumer, owner, side = RESIDUALS[model.config.model_type][kind]
    seen: dict[str, list] = {"x": [], "y": [], "r": []}
    consumer = block.get_submodule(consumer)
    owner = block.get_submodule(owner) if owner else block
    real = None

    def note(name, value):
        value = value[0] if isinstance(value, tuple) else value
        seen[name].append(numpy(value[real]))

    def note_consumer(_module, args, output):
        note("x", args[0])
        note("y", output)

    handles = [consumer.register_forward_hook(note_consumer)]
    if side == "in":
        handles.append(owner.register_forward_pre_hook(lambda _module, args: note("r", args[0])))
    else:
        handles.append(owner.register_forward_hook(lambda _module, _args, output: note("r", output)))
    with torch.no_grad():
        for batch in batches:
            real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
            model.base_model(**batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def masked(model: torch.nn.Module, keep: dict[str, list[list[bool]]]) -> torch.nn.Module:
    """A copy of the full model in which the weights that read removed units are zero."""
    model = copy.deepcopy(model)
    for kind, rows in keep.items():
        for layer, row in enumerate(rows):
            consumer = blocks(model)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
            consumer.weight.data[:, torch.from_numpy(~kept_channels(model, layer, kind, row))] = 0
    return model


PRODUCERS = {
    "bert": {"heads": [f"attention.self.{name}" for name in ("query", "key", "value")], "neurons": ["intermediate.dense"]},
    "llama": {"heads": [f"self_attn.{name}_proj" for name in "qkv"], "neurons": ["mlp.gate_proj", "mlp.up_proj"]},
}


def through(model: torch.nn.Module, batches: list[dict], layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What one linear layer of the full model reads and writes at the real tokens, stacked."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = blocks(model)[layer].get_submodule(name)
    handle = module.register_forward_hook(lambda _module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for batch in batches:
            model.base_model(**batch)
    handle.remove()
    real = [batch["attention_mask"].bool() for batch in batches]
    return tuple(
        np.concatenate([numpy(value[keep]) for value, keep in zip(values, real, strict=True)])
        for values in zip(*seen, strict=True)
    )


def refit(pruned: torch.nn.Module, dense: torch.nn.Module, batches: list[dict], layer: int, name: str, keep: np.ndarray,
          ridge: float) -> None:  # fmt: skip
    """One producer: what it reads in the pruned model to what it writes in the dense one, for the kept output channels."""
    module = blocks(pruned)[layer].get_submodule(name)
    (z, _), (_, target) = through(pruned, batches, layer, name), through(dense, batches, layer, name)
    kept, affine = np.repeat(keep, module.out_features // len(keep)), module.bias is not None
    start, bias = numpy(module.weight).T[:, kept], numpy(module.bias)[kept] if affine else np.zeros(kept.sum())
    weight, bias = least_squares(z, target[:, kept], start, bias, affine=affine, ridge=absolute(ridge, z, affine))
    module.weight.data[torch.from_numpy(kept)] = torch.from_numpy(weight.T.copy())
    if affine:
        module.bias.data[torch.from_numpy(kept)] = torch.from_numpy(bias)


def repeated(z: np.ndarray, t: np.ndarray, weight: np.ndarray, affine: bool) -> tuple:
    """Weighted rows as plain rows: both sides centred by their weighted means and multiplied by the roots of the weights;
    and the mean of z and t, joined."""
    mean_z, mean_t = (np.average(rows, 0, weight) if affine else np.zeros(rows.shape[1]) for rows in (z, t))
    root = np.sqrt(weight)[:, None]
    return root * (z - mean_z), root * (t - mean_t), (mean_z, mean_t)


def dense_stream(
    model: torch.nn.Module,
    keep: dict[str, list[list[bool]]],
    batches: list[dict],
    ridge: float,
    *,
    producers: bool = True,
    weighted: bool = True,
) -> torch.nn.Module:
    """Site after site on full models in float64: the pruned model's consumer is refitted to
    T = residual_dense + output_dense - residual_pruned on the pruned model's inputs, each producer before it to its dense
    output; in LLaMA a token counts by 1 / mean square of its dense residual stream after the site. Removed weights stay
    zero."""
    dense = copy.deepcopy(model).double().eval()
    pruned = masked(dense, keep)
    changed = False
    for layer in range(len(blocks(dense))):
        for kind in ("heads", "neurons"):
            row = keep.get(kind, [[True] * units(model, kind)] * len(blocks(dense)))[layer]
            if all(row) and not changed:
                continue
            if changed and producers:
                for name in PRODUCERS[model.config.model_type][kind]:
                    refit(pruned, dense, batches, layer, name, np.asarray(row, dtype=bool), ridge)
            changed = True
            kept = kept_channels(model, layer, kind, row)
            want, have = look(dense, batches, layer, kind), look(pruned, batches, layer, kind)
            total = want["r"] + want["y"]
            target, z = total - have["r"], have["x"][:, kept]
            consumer = blocks(pruned)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
            start, affine = numpy(consumer.weight).T[kept], consumer.bias is not None
            bias = numpy(consumer.bias) if affine else np.zeros(consumer.out_features)
            weigh = weighted and model.config.model_type == "llama"
            counts = 1 / (np.square(total).mean(1) + 1e-6) if weigh else np.ones(len(z))
            z, target, (mean_z, mean_t) = repeated(z, target, counts, affine)
            weight, _ = least_squares(z, target, start, bias, affine=False, ridge=absolute(ridge, z, False))
            bias = mean_t - mean_z @ weight
            consumer.weight.data[:, torch.from_numpy(kept)] = torch.from_numpy(weight.T.copy())
            if affine:
                consumer.bias.data = torch.from_numpy(bias)
    return pruned

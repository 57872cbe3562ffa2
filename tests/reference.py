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
    return {"gram": z.T @ z, "cross": z.T @ t, "target_energy": (t * t).sum(), "mean_z": mean_z, "mean_t": mean_t}


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
    "gpt2": {"heads": ("attn.c_proj", "", "in"), "neurons": ("mlp.c_proj", "ln_2", "in")},
}
BLOCKS = {"bert": "encoder.layer", "llama": "layers", "gpt2": "h", "opt": "decoder.layers"}
NEURONS = {"bert": "intermediate_size", "llama": "intermediate_size", "gpt2": "n_inner"}
PRE_NORM = ("llama", "gpt2")


def blocks(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.base_model.get_submodule(BLOCKS[model.config.model_type])


def matrix(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer as [in, out], sharing its memory: GPT-2 stores it so, other models transposed."""
    return layer.weight.data if hasattr(layer, "nx") else layer.weight.data.T


def units(model: torch.nn.Module, kind: str) -> int:
    if kind == "neurons":
        return getattr(model.config, NEURONS[model.config.model_type]) or 4 * model.config.hidden_size
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def kept_channels(model: torch.nn.Module, layer: int, kind: str, keep: list[bool]) -> np.ndarray:
    """Which input channels of the consumer stay: bool [channels]."""
    consumer = blocks(model)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
    return np.repeat(np.asarray(keep, dtype=bool), len(matrix(consumer)) // units(model, kind))


def activations(model: torch.nn.Module, batches: list[dict], layer: int, kind: str) -> dict[str, np.ndarray]:
    """Run the full model on all batches; consumer input "x", output "y" and residual "r" at the real tokens, stacked."""
    block = blocks(model)[layer]
    consumer, owner, side = RESIDUALS[model.config.model_type][kind]
    rows: dict[str, list] = {"x": [], "y": [], "r": []}
    consumer = block.get_submodule(consumer)
    owner = block.get_submodule(owner) if owner else block
    real = None

    def note(name, value):
        value = value[0] if isinstance(value, tuple) else value
        rows[name].append(numpy(value[real]))

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
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def masked(model: torch.nn.Module, keep: dict[str, list[list[bool]]]) -> torch.nn.Module:
    """A copy of the full model in which the weights that read removed units are zero."""
    model = copy.deepcopy(model)
    for kind, rows in keep.items():
        for layer, row in enumerate(rows):
            consumer = blocks(model)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
            matrix(consumer)[torch.from_numpy(~kept_channels(model, layer, kind, row))] = 0
    return model


PRODUCERS = {
    "bert": {"heads": [f"attention.self.{name}" for name in ("query", "key", "value")], "neurons": ["intermediate.dense"]},
    "llama": {"heads": [f"self_attn.{name}_proj" for name in "qkv"], "neurons": ["mlp.gate_proj", "mlp.up_proj"]},
    "opt": "decoder.layers",
    "gpt2": {"heads": ["attn.c_attn"], "neurons": ["mlp.c_fc"]},
}


def kept_outputs(module: torch.nn.Module, keep: np.ndarray) -> np.ndarray:
    """Which output channels of a producer belong to kept units: bool [out]. One layer of GPT-2 has query, key and value."""
    out = matrix(module).shape[1]
    parts = 3 if out == 3 * len(matrix(module)) and hasattr(module, "nx") else 1
    return np.tile(np.repeat(keep, out // parts // len(keep)), parts)


def reads_and_writes(model: torch.nn.Module, batches: list[dict], layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
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
          counts: np.ndarray, ridge: float) -> None:  # fmt: skip
    """One producer: what it reads in the pruned model to what it writes in the dense one, for the kept output channels; a token
    counts as often as `counts` says."""
    module = blocks(pruned)[layer].get_submodule(name)
    (z, _), (_, target) = reads_and_writes(pruned, batches, layer, name), reads_and_writes(dense, batches, layer, name)
    kept, affine = kept_outputs(module, keep), module.bias is not None
    start, bias = numpy(matrix(module))[:, kept], numpy(module.bias)[kept] if affine else np.zeros(kept.sum())
    z, target, (mean_z, mean_t) = repeated(z, target[:, kept], counts, affine)
    weight, _ = least_squares(z, target, start, bias, affine=False, ridge=absolute(ridge, z, False))
    matrix(module)[:, torch.from_numpy(kept)] = torch.from_numpy(weight)
    if affine:
        module.bias.data[torch.from_numpy(kept)] = torch.from_numpy(mean_t - mean_z @ weight)


def own_output(pruned: torch.nn.Module, dense: torch.nn.Module, batches: list[dict], layer: int, kind: str) -> np.ndarray:
    """What the dense model's consumer gives on the pruned stream, with all that comes before it as it is there."""
    whole = copy.deepcopy(pruned)
    name = RESIDUALS[dense.config.model_type][kind][0]
    blocks(whole)[layer].get_submodule(name).load_state_dict(blocks(dense)[layer].get_submodule(name).state_dict())
    return activations(whole, batches, layer, kind)["y"]


def damped(z: np.ndarray, own: np.ndarray, whole: np.ndarray, start: np.ndarray, bias: np.ndarray, *, affine: bool,
           ridge: float) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The own output and three tenths of the drift, with a ridge toward `start`; and half of the drift with a ridge of 1.
    With a bias, of the drift without its mean."""
    drift, zeros = whole - own, np.zeros_like(start)
    drift = drift - affine * drift.mean(0)
    weight, offset = least_squares(z, own + 0.3 * drift, start, bias, affine=affine, ridge=absolute(ridge, z, affine))
    more, moved = least_squares(z, 0.5 * drift, zeros, np.zeros_like(bias), affine=affine, ridge=absolute(1, z, affine))
    return weight + more, offset + moved


def repeated(z: np.ndarray, t: np.ndarray, weight: np.ndarray, affine: bool) -> tuple:
    """Weighted rows as plain rows: both sides centred by their weighted means and multiplied by the roots of the weights;
    and the mean of z and t, joined."""
    mean_z, mean_t = (np.average(rows, 0, weight) if affine else np.zeros(rows.shape[1]) for rows in (z, t))
    root = np.sqrt(weight)[:, None]
    return root * (z - mean_z), root * (t - mean_t), (mean_z, mean_t)


def residual_stream(
    model: torch.nn.Module,
    keep: dict[str, list[list[bool]]],
    batches: list[dict],
    ridge: float,
    *,
    producers: bool = True,
    weighted: bool = True,
    damp: bool = True,
    taught: bool = False,
) -> torch.nn.Module:
    """Site after site on full models in float64: the pruned model's consumer is refitted to
    T = residual_dense + output_dense - residual_pruned on the pruned model's inputs, each producer before it to its dense
    output; there, in pre-norm models, half of all weight is even and half goes to tokens by the length of output_dense. Removed
    weights stay zero. Damped, T is fitted in two parts (see `damped`): what the layer gives with all its units (attention in
    the dense model, neurons on the pruned stream, their producers refitted; with a teacher, both in the dense model), and the
    rest."""
    dense = copy.deepcopy(model).double().eval()
    pruned = masked(dense, keep)
    changed = False
    for layer in range(len(blocks(dense))):
        for kind in ("heads", "neurons"):
            row = keep.get(kind, [[True] * units(model, kind)] * len(blocks(dense)))[layer]
            if all(row) and not changed:
                continue
            target_rows = activations(dense, batches, layer, kind)
            drifted = changed
            if changed and producers:
                size = np.linalg.norm(target_rows["y"], axis=1)
                weigh = weighted and model.config.model_type in PRE_NORM
                counts = 1 + size / size.mean() if weigh else np.ones(len(size))
                for name in PRODUCERS[model.config.model_type][kind]:
                    refitted = np.asarray(row, dtype=bool) | (damp and not taught and kind == "neurons")
                    refit(pruned, dense, batches, layer, name, refitted, counts, ridge)
            changed = True
            kept, pruned_rows = kept_channels(model, layer, kind, row), activations(pruned, batches, layer, kind)
            target, z = target_rows["r"] + target_rows["y"] - pruned_rows["r"], pruned_rows["x"][:, kept]
            consumer = blocks(pruned)[layer].get_submodule(RESIDUALS[model.config.model_type][kind][0])
            start, affine = numpy(matrix(consumer))[kept], consumer.bias is not None
            bias = numpy(consumer.bias) if affine else np.zeros(start.shape[1])
            if damp and drifted:
                own = target_rows["y"] if kind == "heads" or taught else own_output(pruned, dense, batches, layer, kind)
                weight, bias = damped(z, own, target, start, bias, affine=affine, ridge=ridge)
            else:
                weight, bias = least_squares(z, target, start, bias, affine=affine, ridge=absolute(ridge, z, affine))
            matrix(consumer)[torch.from_numpy(kept)] = torch.from_numpy(weight)
            if affine:
                consumer.bias.data = torch.from_numpy(bias)
    return pruned


def lowest(scores: np.ndarray, sparsity: float | str) -> np.ndarray:
    """Row by row (or group by group, for a pattern such as "2:4") which entries have the lowest scores."""
    removed = np.zeros(scores.shape, bool)
    for row in range(len(scores)):
        if isinstance(sparsity, str):
            kept, group = map(int, sparsity.split(":"))
            for start in range(0, scores.shape[1], group):
                order = sorted(range(start, start + group), key=lambda column: scores[row, column])
                removed[row, order[: group - kept]] = True
        else:
            order = sorted(range(scores.shape[1]), key=lambda column: scores[row, column])
            removed[row, order[: round(sparsity * scores.shape[1])]] = True
    return removed


def sparse(criterion: str, weight: np.ndarray, x: np.ndarray, sparsity: float | str) -> tuple[np.ndarray, np.ndarray]:
    """A weight [out, in] without some entries, and which these are, by the papers' formulas on the rows x [tokens, in]."""
    if criterion == "sparsegpt":
        return sparsegpt(weight, x, sparsity)
    scores = np.abs(weight) * (np.sqrt((x * x).sum(0)) if criterion == "wanda" else 1)
    whole = criterion == "magnitude" and not isinstance(sparsity, str)
    removed = lowest(scores.reshape(1, -1) if whole else scores, sparsity).reshape(weight.shape)
    return np.where(removed, 0, weight), removed


def sparsegpt(weight: np.ndarray, x: np.ndarray, sparsity: float | str) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, with the inverse of what is left of the damped Gram matrix computed anew for every column."""
    weight, gram = weight.copy(), x.T @ x
    silent = gram.diagonal() == 0
    gram = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    gram[silent, silent] = 1
    weight[:, silent] = 0
    columns = weight.shape[1]
    inverse = [np.linalg.inv(gram[column:, column:]) for column in range(columns)]
    removed = np.zeros(weight.shape, bool)
    width = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else 128
    for column in range(columns):
        if column % width == 0:
            part = range(column, min(column + width, columns))
            scores = np.stack([weight[:, each] ** 2 / inverse[each][0, 0] for each in part], 1)
            chosen = lowest(scores if isinstance(sparsity, str) else scores.reshape(1, -1), sparsity)
            removed[:, part] = chosen.reshape(scores.shape)
        for row in np.flatnonzero(removed[:, column]):
            weight[row, column:] -= weight[row, column] / inverse[column][0, 0] * inverse[column][0]
    return np.where(removed, 0, weight), removed

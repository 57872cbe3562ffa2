"""The values that options with a few names may have, and what each means."""

from __future__ import annotations

# Tokens per sequence where FLOPs or time are asked for by name.
LENGTH = 128
# The criteria of the library; `liar.selection.register_criterion` adds to them.
CRITERIA: dict[str, str] = {
    "reconstruction": "change of the output when the unit is removed and the rest reconstructed",
    "fluctuation": "variance of the unit's activations times the weights that read them (FLAP)",
    "wanda": "absolute weights times the norm of their input (Wanda)",
    "taylor": "change of the loss to first order, from gradients",
    "fisher": "squared gradients, summed over sequences",
    "snip": "absolute weights times their gradients",
    "magnitude": "root mean square of the weights; needs no data",
    "random": "uniform scores; needs no data",
}
WEIGHT_CRITERIA: dict[str, str] = {
    "magnitude": "absolute weights, compared within a layer; needs no data",
    "wanda": "absolute weights times the norm of their input, compared within an output (Wanda)",
    "sparsegpt": "what the layer's output loses, column by column, with an update of the columns that follow (SparseGPT)",
}
BUDGETS: dict[str, str] = {
    "params": "parameters in the transformer blocks",
    "flops": "matrix products in the blocks for sequences of 128 tokens",
    "latency": "measured time of the whole model for one sequence of 128 tokens",
}
WIDTHS: dict[str, str] = {
    "free": "all units compete for one budget; layers differ in width",
    "balanced": "every layer keeps the same share, as nearly as the budget allows",
    "uniform": "the same widths in every layer, and only those that the stock class can load",
}
HEADS: dict[str, str] = {
    "group": "a key and value head with its query heads",
    "query": "a single query head, equally many of every group; all key and value heads stay",
}
TARGETS: dict[str, str] = {
    "damped_stream": "what the layer gives with all its units, and a damped part of what the pruned stream has lost before it",
    "residual_stream": "the dense model's residual stream after the layer, on the pruned model's own activations",
    "layer_output": "the layer's own output, on the dense model's activations (our reading of LIAR)",
}
SOLVERS: dict[str, str] = {
    "auto": "Cholesky, and an eigendecomposition where it fails",
    "cholesky": "the same",
    "eigh": "eigendecomposition of the Gram matrix",
    "lstsq": "torch.linalg.lstsq on a streamed R factor: slower, for badly conditioned layers",
}
BIASES: dict[str, str] = {
    "preserve": "a bias is refitted where the layer has one",
    "create": "layers without a bias get one; stock classes may then be unable to load the model",
}
GRANULARITIES: dict[str, str] = {
    "matrix": "every matrix by itself, to the teacher's output of it",
    "sublayer": "attention and feed-forward part of every block separately, each to the teacher's residual stream after it",
    "block": "block by block, to the teacher's output of the block",
}
PROPAGATIONS: dict[str, str] = {
    "global": "windows read the model's own activations and are fitted to those of the teacher's own pass",
    "pruned": "windows read the model's own activations and are fitted to what the teacher's window makes of the same ones",
    "dense": "windows read the teacher's activations and are fitted to what the teacher makes of them",
}
ACTIVATIONS: dict[str, str] = {
    "device": "where they are computed",
    "host": "in pinned memory of the host; on a CPU the same as device",
    "disk": "in files of the run folder, or of a temporary one",
    "auto": "the first of these that fits in the memory that is free",
}
PLACES: dict[str, str] = {name: meaning for name, meaning in ACTIVATIONS.items() if name != "auto"}
WEIGHTS: dict[str, str] = {
    "device": "on the device, all of them",
    "host": "in host memory; one block at a time is on the device",
    "disk": "in the files of the model; one block at a time is in memory",
}
DTYPES: dict[str, str] = {
    "auto": "as stored",
    "float32": "32 bits",
    "bfloat16": "16 bits, the range of float32",
    "float16": "16 bits, a small range",
}

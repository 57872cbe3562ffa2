"""A slim model goes through torch.export and to ONNX, with any batch and length."""

import onnxruntime
import pytest
import torch

from liar.testing import tiny_batches

AXES = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
SHAPES = [(1, 7), (5, 23)]


def inputs(model, sequences=3, length=10):
    (batch,) = tiny_batches(model, batches=1, sequences=sequences, length=length)
    return batch


@pytest.mark.parametrize("name", ["slim_bert", "slim_llama"])
def test_torch_export(name, request):
    model = request.getfixturevalue(name)
    example = inputs(model)
    options = {"use_cache": False} if name == "slim_llama" else {}
    shapes = {**dict.fromkeys(example, AXES), **dict.fromkeys(options)}
    exported = torch.export.export(model, (), {**example, **options}, dynamic_shapes=shapes).module()
    for shape in SHAPES:
        batch = {**inputs(model, *shape), **options}
        torch.testing.assert_close(exported(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", ["slim_bert", "slim_minilm"])
def test_onnx(name, request, tmp_path):
    model, file = request.getfixturevalue(name), tmp_path / "model.onnx"
    example = inputs(model)
    program = torch.onnx.export(model, (), kwargs=example, dynamo=True, dynamic_shapes=dict.fromkeys(example, AXES))
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        batch = inputs(model, *shape)
        output = session.run(None, {name: value.numpy() for name, value in batch.items()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(output), model(**batch)[0], rtol=1e-4, atol=1e-5)

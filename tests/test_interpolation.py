"""Q and P: against their formulas on the whole X, against the direct fit, and from a real pass through a model."""

import pytest
import torch

import liar
from liar.statistics import Moments
from liar.testing import tiny_batches, tiny_model


def correlated(rows: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(rows, channels, generator=generator, dtype=torch.float64) @ mixing + 2


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments()
    moments.update(x, x[:, :0])
    return moments


@pytest.mark.parametrize("kept", [[0, 2, 3], [5], [0, 1, 2, 3, 4]])
def test_q_and_p_are_their_formulas(kept: list[int]) -> None:
    x = correlated(400, 6)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[kept] = True
    result = liar.interpolation(moments_of(x), mask)
    u, m = x[:, mask], x[:, ~mask]
    centred = u - u.mean(0)
    q = torch.linalg.solve(centred.T @ centred, centred.T @ (m - m.mean(0)))
    torch.testing.assert_close(result.Q, q)
    torch.testing.assert_close(result.P, m.mean(0) - u.mean(0) @ q)


def test_units_of_several_channels() -> None:
    x = correlated(400, 6)
    result = liar.interpolation(moments_of(x), torch.tensor([True, False, True]))
    assert result.kept.tolist() == [0, 1, 4, 5]
    assert result.removed.tolist() == [2, 3]
    assert result.Q.shape == (4, 2)


def test_interpolated_weights_are_the_best_affine_rule_on_the_data() -> None:
    x, mask = correlated(300, 5), torch.tensor([True, True, False, True, False])
    weight, bias = correlated(5, 4), torch.arange(4.0)
    result = liar.interpolation(moments_of(x), mask)
    new_weight, new_bias = result.interpolate(weight, bias)
    target = x @ weight + bias
    rows = torch.cat([x[:, mask], torch.ones(300, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(rows, target).solution
    torch.testing.assert_close(torch.cat([new_weight, new_bias[None]]), best)


def test_moments_are_those_of_what_the_consumer_reads_without_padding() -> None:
    model = tiny_model("bert")
    batches = tiny_batches(model)
    inputs: list[torch.Tensor] = []
    consumer = model.get_submodule("encoder.layer.1.output.dense")
    handle = consumer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    rows = []
    for batch in batches:
        model(**batch)
        real = batch["attention_mask"].bool()
        rows.append(inputs.pop()[real].double())
    handle.remove()
    x = torch.cat(rows)
    normal = liar.moments(model, batches, sites=["neurons.1"], progress=False)["neurons.1"].normal(affine=True)
    assert normal.count == len(x)
    torch.testing.assert_close(normal.mean_z, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normal.gram, (x - x.mean(0)).T @ (x - x.mean(0)), rtol=1e-4, atol=1e-3)


def test_unknown_site_and_unfit_mask_are_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(liar.LiarError, match=r"no such site: neurons\.99; expected some of heads\.0"):
        liar.moments(model, tiny_batches(model), sites=["neurons.99"])
    with pytest.raises(liar.LiarError, match=r"units that divide 6 channels, got torch\.bool \[4\]"):
        liar.interpolation(moments_of(correlated(9, 6)), torch.ones(4, dtype=torch.bool))

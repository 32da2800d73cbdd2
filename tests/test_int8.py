"""ops/int8.py: layers in 8 bit stay close to the full model."""

import pytest
import torch
from helpers import CPU, generate, random_ids
from torch import nn

from ops.int8 import WAYS, quantize, quantized


@pytest.mark.parametrize("way", WAYS)
def test_int8_stays_close_to_the_full_model(architecture, folder, tiny, way):
    pytest.importorskip("bitsandbytes")
    ids = random_ids(2, 30)
    model = architecture.load(folder, CPU, torch.float32, int8=way)
    for layer in model.model.layers:
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == {"llama": 7, "neox": 4}[architecture.name]
        for linear in linears:
            assert linear.weight.dtype == torch.int8
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        full = tiny(ids)
        assert 1e-5 < (model(ids) - full).norm() / full.norm() < 5e-2
    assert len(generate(model, [ids[0].tolist()], 8, [])[0]) == 8


def test_a_row_s_greatest_weight_is_127_and_no_weight_is_off_by_more_than_half_a_step():
    linear = nn.Linear(24, 10)
    weight, scale = quantize(linear.weight.data)
    assert weight.dtype == torch.int8
    assert (weight.abs().amax(1) == 127).all()
    error = (weight * scale[:, None] - linear.weight).abs()
    assert (error <= scale[:, None] * 0.501).all()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = x @ (weight * scale[:, None]).T + linear.bias
        assert (quantized(linear)(x) - expected).abs().max() < 1e-5

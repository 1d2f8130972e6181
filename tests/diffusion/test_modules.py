"""A UNet of diffusers is quantized layer by layer as any torch module is."""

from __future__ import annotations

import torch
from helpers.diffusion_models import TOKENS, WIDTH, tiny_unet
from torch import nn

from ptqkit.nn import quantize_module


def calls(count=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        {
            "sample": torch.randn(2, 1, 16, 16, generator=draw),
            "timestep": torch.tensor(100 + 300 * i),
            "encoder_hidden_states": torch.randn(2, TOKENS, WIDTH, generator=draw),
        }
        for i in range(count)
    ]


def outputs(unet, data):
    with torch.no_grad():
        return torch.cat([unet(**batch).sample for batch in data])


def test_all_layers_of_a_unet():
    data, floats, nearest, unet = calls(2), tiny_unet(), tiny_unet(), tiny_unet()
    runs = []
    unet.conv_in.register_forward_pre_hook(lambda *_: runs.append(1))
    result = quantize_module(unet, data, "reference", bits=3, group_size=None)
    quantize_module(nearest, None, "rtn", bits=3, group_size=None)
    layers = [n for n, m in floats.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert sorted(result.matrices) == sorted(layers) and len(layers) > 40
    assert {row.kind for row in result.rows} == {"Conv2d", "Linear"}
    # All that read the context, and q, k, v of self-attention, share a pass with others.
    assert len(runs) < 2 * (1 + len(layers) - 8)
    want = outputs(floats, data)
    errors = [float((outputs(x, data) - want).square().mean()) for x in (unet, nearest)]
    assert 0 < errors[0] < 0.9 * errors[1]

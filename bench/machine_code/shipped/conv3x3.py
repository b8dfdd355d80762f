"""The convolutions' launches for every layer of the named heads: ours, and what goes round the library's."""

from collections.abc import Iterator

import torch

from bench.kernels.layers import WORKS, Layer, layers_of
from bench.machine_code.compiling import ARCHITECTURES, cache_key, recorded, replaced
from bench.machine_code.shipped import ShippedLaunch
from bench.shapes import HEADS
from ftfast.kernels import activation, conv3x3, conv3x3_tiles, conv3x3_weight_gradient, pack_weights

DTYPES = (torch.bfloat16, torch.float32)


def run_launchers(layer: Layer, dtype: torch.dtype) -> None:
    """Our kernels of a layer and of its gradients, and what goes round the library's."""
    inputs, outputs = layer.channels_in, layer.channels_out
    place = (layer.samples, layer.height, layer.width)
    x, dz = torch.empty(*place, inputs, dtype=dtype), torch.empty(*place, outputs, dtype=dtype)
    weight = torch.empty(outputs, inputs, 3, 3)
    packed = pack_weights.pack_weights([weight], dtype, backward=True)[0]
    assert packed.backward is not None
    conv3x3.conv3x3_forward(x, packed.forward, torch.empty(outputs), channels_out=outputs, negative_slope=0.1)
    conv3x3.conv3x3_input_gradient(dz, packed.backward, x, channels_out=inputs, negative_slope=0.1)
    conv3x3_weight_gradient.conv3x3_weight_gradient(x, dz, bias=True)
    activation.bias_leaky_relu_(dz, torch.empty(outputs), 0.1)
    activation.sum_partials(activation.leaky_relu_backward_(dz, dz, 0.1))


def shipped_launches() -> Iterator[ShippedLaunch]:
    """Each kernel once; every architecture has tiles of its own."""
    seen = set()
    for architecture in ARCHITECTURES:
        for dtype in DTYPES:
            for layer in layers_of(HEADS.values()):
                with (
                    replaced(conv3x3_tiles, capability=lambda device, found=architecture: found),
                    recorded(pack_weights) as packs,
                    recorded(conv3x3) as convolutions,
                    recorded(conv3x3_weight_gradient) as weight_gradients,
                    recorded(activation) as activations,
                ):
                    run_launchers(layer, dtype)
                for launch in (*packs, *convolutions, *weight_gradients, *activations):
                    key = (architecture, *cache_key(launch, architecture))
                    if key not in seen:
                        seen.add(key)
                        what = launch.kernel.__name__.removesuffix("_kernel").replace("_conv3x3", "").replace("_", " ")
                        name = f"{what.strip()} {layer} {str(dtype).removeprefix('torch.')}"
                        multiplies = what.strip() in WORKS
                        yield ShippedLaunch(name, launch, (architecture,), multiplies)

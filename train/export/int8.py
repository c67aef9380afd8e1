"""Static int8 quantisation of a student's convolutions, in ONNX's QDQ form.

In float stay the spectrum, the first convolution (0.9 % of the work of v7, and its input's quiet
bins need more than 8 bits), the projection and the head. Activations are u8, one scale a map;
weights s8, one scale an output channel: what processors with VNNI multiply fastest. ONNX Runtime
rounds a convolution's sums, then what LeakyReLU makes of them, within fixed limits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from data_specs.io.errors import UserError
from train.audio import Wave
from train.export.network import PlainStudent
from train.export.onnx_file import save
from train.export.refit import Int8Convolution, crops, prepare
from train.models.student import Student
from train.scoring.onnx_scorer import INPUT, Facts


@torch.inference_mode()
def calibrated(student: Student, waves: Sequence[Wave]) -> list[Int8Convolution]:
    """Ranges and weights for ONNX from real windows (122880,)."""
    if student.config.ranks:
        raise UserError("a student of low rank has no int8 form: export it in float32")
    plain = PlainStudent(student).eval()
    spectra: Iterator[torch.Tensor] = (plain.spectrum(torch.from_numpy(w)[None]) for w in waves)
    return prepare(plain.convolutions, crops(spectra))


def write_int8(
    path: Path, float_path: Path, convolutions: Sequence[Int8Convolution], wave: Wave, facts: Facts
) -> None:
    """Quantise an exported file, given its convolutions as int8 shall have them."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load(str(float_path))
    ranges, quantised = _quantised(model, convolutions)
    _put_weights(model, convolutions)
    one_clip = iter([{INPUT: wave[None]}])  # enough: all ranges are given
    with tempfile.TemporaryDirectory() as folder:
        moved, made = Path(folder) / "moved.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, str(moved))
        quantize_static(
            str(moved),
            str(made),
            SimpleNamespace(get_next=lambda: next(one_clip, None)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "LeakyRelu"],
            nodes_to_quantize=quantised,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"TensorQuantOverrides": ranges},
        )
        save(path, onnx.load(str(made)), facts)


def _quantised(
    model: Any, convolutions: Sequence[Int8Convolution]
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """Ranges of the maps by name, and the names of the nodes that become int8."""
    behind = {name: node for node in model.graph.node for name in node.input[:1]}
    layers = [
        node
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].startswith("convolutions.")
    ]
    ranges, names = {}, []
    for layer, made in zip(layers, convolutions, strict=True):
        leaky = behind[layer.output[0]]
        for node, limits in ((layer, made.before), (leaky, made.after)):
            if limits:
                low, high = map(np.float32, limits)
                ranges[node.output[0]] = [{"rmin": low, "rmax": high}]
        if made.before:
            names += [layer.name, *([leaky.name] if made.after else [])]
    return ranges, names


def _put_weights(model: Any, convolutions: Sequence[Int8Convolution]) -> None:
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for number, made in enumerate(convolutions):
        for part in ("weight", "bias"):
            name = f"convolutions.{2 * number}.{part}"
            array = getattr(made, part).contiguous().numpy()
            stored[name].CopyFrom(numpy_helper.from_array(array, name))

"""Towers as graphs: ONNX and torch.export.

Shape legend: B images, S side of the input, N tokens, d width, E embedding.

Notable: a graph has a fixed number of tokens and size of images, and any batch size. For whole images their sizes are a second input,
`image_sizes`. Tracers record source files of this machine for every node; these records are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_vlm.export.exporter import OUTPUTS, TowerExporter
from sparse_vlm.tower import SparseFormer

# protobuf is limited to 2 GB; above that the weights are stored beside the graph
ONNX_BYTES = 1_900_000_000
OPSET = 20  # torch's default; onnxruntime supports it from 1.17 on


class TowerGraph(nn.Module):
    """The traced function: (B, 3, S, S) normalised pixels, and for whole images their sizes (B, 2), to `visual_tokens` (B, N, d) and
    `image_embeds` (B, E).

    Args:
        tower: not copied.
    """

    def __init__(self, tower: SparseFormer) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`SparseFormer.visual_tokens` and `image_embeds`."""
        out = self.tower(pixel_values, image_sizes=image_sizes)
        return out.last_hidden_state[:, -self.tower.config.visual_tokens :], out.image_embeds

    def example_inputs(self) -> dict[str, Tensor]:
        """Two images, by input names; torch would specialise the graph on a batch of one."""
        side = self.tower.config.image_size
        pixels = torch.zeros(2, 3, side, side)
        if self.tower.config.fit == "crop":
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "image_sizes": torch.full((2, 2), side)}

    def trace_arguments(self) -> dict[str, object]:
        """Arguments of `torch.export.export` and `torch.onnx.export`, for any batch size."""
        inputs, batch = self.example_inputs(), torch.export.Dim("batch", min=1)
        return {"args": tuple(inputs.values()), "dynamic_shapes": {name: {0: batch} for name in inputs}}


class TorchExportTower(TowerExporter):
    """Exports a tower to `model.pt2`."""

    holds = "the tower as a graph of torch.export, for any batch size"

    def write(self, folder: Path) -> None:
        graph = TowerGraph(self.tower)
        program = torch.export.export(graph, **graph.trace_arguments())
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)
        torch.export.save(program, folder / "model.pt2")

    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        return torch.export.load(folder / "model.pt2").module()

    def example(self) -> str:
        c = self.config
        return f"""\
import torch
from sparse_vlm import load_image
from sparse_vlm.images.preprocess import Preprocessor

tower = torch.export.load("model.pt2").module()
prepare = Preprocessor({c.image_size}, {tuple(c.image_mean)}, {tuple(c.image_std)}, "{c.fit}")
inputs = prepare(load_image("photo.jpg"), square=True)
visual_tokens, image_embeds = tower({"inputs.pixels" if c.fit == "crop" else "*inputs"})
print(visual_tokens.shape, image_embeds.shape)"""


class OnnxTower(TowerExporter):
    """Exports a tower to `model.onnx`."""

    holds = "the tower as an ONNX graph, for any batch size"

    def write(self, folder: Path) -> None:
        graph = TowerGraph(self.tower)
        size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
        names = {"input_names": list(graph.example_inputs()), "output_names": list(OUTPUTS)}
        program = torch.onnx.export(graph, dynamo=True, opset_version=OPSET, verbose=False, **names, **graph.trace_arguments())
        for node in program.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        program.save(folder / "model.onnx", external_data=size > ONNX_BYTES)

    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(*inputs: Tensor) -> list[Tensor]:
            outputs = session.run(list(OUTPUTS), {name: one.numpy() for name, one in zip(names, inputs, strict=True)})
            return [torch.from_numpy(output) for output in outputs]

        return run

    def example(self) -> str:
        c = self.config
        side = c.image_size
        whole = f"""\
scale = min(1, {side} / max(image.size))
image = image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)
pixels = np.float32(image) / 255"""
        square = f"""\
image = image.resize([max({side}, int({side} * length / min(image.size))) for length in image.size], Image.Resampling.BICUBIC)
left, top = (round((length - {side}) / 2) for length in image.size)
pixels = np.float32(image.crop((left, top, left + {side}, top + {side}))) / 255"""
        inputs = '"pixel_values": canvas' + ("" if c.fit == "crop" else ', "image_sizes": np.int64([pixels.shape[:2]])')
        return f"""\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
{square if c.fit == "crop" else whole}
pixels = (pixels - np.float32({list(c.image_mean)})) / np.float32({list(c.image_std)})
canvas = np.zeros((1, 3, {side}, {side}), np.float32)
canvas[0, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
session = onnxruntime.InferenceSession("model.onnx")
visual_tokens, image_embeds = session.run(None, {{{inputs}}})
print(visual_tokens.shape, image_embeds.shape)"""

"""Towers as graphs: ONNX and torch.export.

Shape legend: B pictures, S side of the square input, N tokens, d width, E embedding.

Notable: a graph has one number of tokens and one size of pictures, and takes any number of pictures. How often a cropping glance samples
each pixel depends on the values of the RoIs, which nothing in a graph can; it is counted before. Tracers note for every node in which
file of this machine it was written; those notes are taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_vlm.export.exporter import OUTPUTS, TowerExporter
from sparse_vlm.geometry import sizes_on
from sparse_vlm.tower import SparseFormer

# protobuf, which ONNX is, holds 2 GB; above it the weights lie beside the graph
ONNX_BYTES = 1_900_000_000
OPSET = 20  # what torch's exporter writes itself; onnxruntime reads it from 1.17 on


class TowerGraph(nn.Module):
    """What is traced: (B, 3, S, S) normalised pixels to `visual_tokens` (B, N, d) and `image_embeds` (B, E).

    Args:
        tower: not copied, and serves this size of pictures alone from then on.
    """

    def __init__(self, tower: SparseFormer) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """As `SparseFormer.visual_tokens` and `image_embeds` say."""
        out = self.tower(pixel_values, image_sizes=sizes_on(pixel_values, self.tower.config.fit))
        return out.last_hidden_state[:, -self.tower.config.visual_tokens :], out.image_embeds

    def trace_arguments(self) -> dict[str, object]:
        """Of `torch.export.export` and `torch.onnx.export`: any number of pictures from one on."""
        side = self.tower.config.image_size
        # torch takes an example of one picture for a graph of one picture
        return {"args": (torch.zeros(2, 3, side, side),), "dynamic_shapes": {"pixel_values": {0: torch.export.Dim("batch", min=1)}}}


class TorchExportTower(TowerExporter):
    """`model.pt2`."""

    holds = "the tower as a graph of torch.export, for any number of pictures at a time"

    def write(self, folder: Path) -> None:
        graph = TowerGraph(self.tower)
        program = torch.export.export(graph, **graph.trace_arguments())
        for module in program.graph_module.modules():
            if isinstance(module, torch.fx.GraphModule):
                for node in module.graph.nodes:
                    node.meta.pop("stack_trace", None)
        torch.export.save(program, folder / "model.pt2")

    def load(self, folder: Path) -> Callable[[Tensor], Sequence[Tensor]]:
        return torch.export.load(folder / "model.pt2").module()

    def example(self) -> str:
        c = self.config
        return f"""\
import torch
from sparse_vlm import load_image
from sparse_vlm.preprocess import Preprocessor

tower = torch.export.load("model.pt2").module()
prepare = Preprocessor({c.image_size}, {tuple(c.image_mean)}, {tuple(c.image_std)}, "{c.fit}")
pixels = prepare(load_image("photo.jpg"), square=True).pixels
visual_tokens, image_embeds = tower(pixels)
print(visual_tokens.shape, image_embeds.shape)"""


class OnnxTower(TowerExporter):
    """`model.onnx`."""

    holds = "the tower as an ONNX graph, for any number of pictures at a time"

    def write(self, folder: Path) -> None:
        graph = TowerGraph(self.tower)
        size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
        names = {"input_names": ["pixel_values"], "output_names": list(OUTPUTS)}
        program = torch.onnx.export(graph, dynamo=True, opset_version=OPSET, verbose=False, **names, **graph.trace_arguments())
        for node in program.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        program.save(folder / "model.onnx", external_data=size > ONNX_BYTES)

    def load(self, folder: Path) -> Callable[[Tensor], Sequence[Tensor]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        return lambda pixels: [torch.from_numpy(output) for output in session.run(list(OUTPUTS), {"pixel_values": pixels.numpy()})]

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
visual_tokens, image_embeds = session.run(None, {{"pixel_values": canvas}})
print(visual_tokens.shape, image_embeds.shape)"""

"""The tower's image processor for transformers; images are preprocessed by `sparse_vlm.images.preprocess`."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from sparse_vlm.errors import UserError
from sparse_vlm.hf.configuration import SparseFormerHostConfig
from sparse_vlm.images.preprocess import Fit, Preprocessor, Triple
from sparse_vlm.tower import SparseFormerConfig


class SparseFormerImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (B, 3, S, S) as `sparse_vlm.images.preprocess` makes them; for whole images also `image_sizes` (B, 2).

    Args:
        size: side of the square input in pixels, or transformers' dict form of it.
        image_mean, image_std: of each channel, for values in 0..1.
        fit: `crop` for the centre square, `whole` for the whole image at the top left of a square canvas.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        size: int | dict[str, int] = 224,
        image_mean: Triple = (0.5, 0.5, 0.5),
        image_std: Triple = (0.5, 0.5, 0.5),
        fit: Fit = "crop",
        **kwargs: Any,
    ) -> None:
        kwargs.pop("crop_size", None)  # follows from size
        super().__init__(**kwargs)
        side = size if isinstance(size, int) else size["height"]
        self.size = {"height": side, "width": side}
        self.crop_size = dict(self.size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.fit = fit

    @classmethod
    def of(cls, config: SparseFormerConfig) -> SparseFormerImageProcessor:
        """The image processor of a tower."""
        return cls(size=config.image_size, image_mean=config.image_mean, image_std=config.image_std, fit=config.fit)

    @property
    def preprocessor(self) -> Preprocessor:
        """The equivalent `Preprocessor`."""
        return Preprocessor(self.size["height"], tuple(self.image_mean), tuple(self.image_std), self.fit)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """PIL images of any mode, arrays or tensors (uint8, channels first or last), one or many, nested or not.

        Raises:
            UserError: an array that is not an image, or an image that cannot be decoded.
        """
        flat = [_to_image(image) for image in make_flat_list_of_images(images)]
        inputs = self.preprocessor(flat, square=True)
        data = {"pixel_values": inputs.pixels}
        if inputs.image_sizes is not None:
            data["image_sizes"] = inputs.image_sizes
        return BatchFeature(data, tensor_type=return_tensors)


def _to_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise UserError(f"an image array must hold uint8 values in 0..255, this one holds {array.dtype}")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)) or not array.size:
        raise UserError(f"an image array must be (height, width) with 1, 3 or 4 channels, first or last, this one is {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
    AutoImageProcessor.register(
        SparseFormerHostConfig,
        image_processor_classes=dict.fromkeys(("pil", "torchvision"), SparseFormerImageProcessor),
        exist_ok=True,
    )
else:  # transformers 5.3, whose fast image processors derive from a class that needs torchvision
    AutoImageProcessor.register(SparseFormerHostConfig, slow_image_processor_class=SparseFormerImageProcessor, exist_ok=True)

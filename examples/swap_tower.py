"""Put a tower into a stock `LlavaForConditionalGeneration` and train a new projector for two steps.

    python examples/swap_tower.py --llava llava-hf/llava-1.5-7b-hf --tower tiny

The LLaVA is downloaded (14 GB) unless `--llava` is a folder. Two steps show the mechanics; `sparse-vlm train` (docs/training.md) trains.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from sparse_vlm import SparseFormer, load_image
from sparse_vlm.hf.configuration import processor_counts
from sparse_vlm.hf.image_processing import SparseFormerImageProcessor
from sparse_vlm.hf.model import SparseFormerHostModel


def swap_tower(llava: LlavaForConditionalGeneration, processor: LlavaProcessor, tower: SparseFormer) -> LlavaProcessor:
    """Replace the vision tower and give it a new projector, in place.

    Returns:
        The processor for the tower's images and number of tokens.
    """
    vision = SparseFormerHostModel.wrap(tower)
    tokens = tower.config.visual_tokens
    config = llava.config
    config.vision_config, config.vision_feature_layer, config.vision_feature_select_strategy = vision.config, -1, "full"
    config.image_seq_length = tokens
    llava.model.vision_tower = vision
    llava.model.multi_modal_projector = LlavaMultiModalProjector(config).to(llava.dtype)
    return LlavaProcessor(
        image_processor=SparseFormerImageProcessor.of(tower.config),
        tokenizer=processor.tokenizer,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        **processor_counts(tower.config),
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The loss of each step."""
    parser = argparse.ArgumentParser(description="Swap the tower of a stock LLaVA and train a new projector for a few steps.")
    parser.add_argument("--llava", default="llava-hf/llava-1.5-7b-hf", help="a LLaVA of transformers: folder or hub name")
    parser.add_argument("--tower", default="tiny", help="a tower: folder or name of the zoo")
    parser.add_argument("--image", default="examples/coffee.jpg")
    parser.add_argument("--question", default="What is in this image?")
    parser.add_argument("--answer", default="A cup of coffee on a wooden table.")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args(arguments)

    llava = LlavaForConditionalGeneration.from_pretrained(args.llava, dtype="auto")
    processor = swap_tower(llava, AutoProcessor.from_pretrained(args.llava), SparseFormer.from_pretrained(args.tower, llava.dtype))

    llava.requires_grad_(False)
    projector = llava.model.multi_modal_projector.requires_grad_(True)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": args.answer}]}
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    whole = processor.apply_chat_template([user, assistant])
    image = load_image(args.image)
    inputs = processor(images=image, text=whole, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]] = -100  # the answer alone carries loss
    inputs["pixel_values"] = inputs["pixel_values"].to(llava.dtype)

    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    losses = []
    for step in range(args.steps):
        loss = llava(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

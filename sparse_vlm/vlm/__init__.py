"""The vision-language model: tower, projector and LLM inside transformers' stock `LlavaForConditionalGeneration`."""

from sparse_vlm.vlm.model import VLM
from sparse_vlm.vlm.scoring import Score
from sparse_vlm.vlm.stream import Stream, Timings

__all__ = ["VLM", "Score", "Stream", "Timings"]

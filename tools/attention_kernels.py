"""`python tools/attention_kernels.py --model tiny-chat`: which attention kernel really runs for each part of a VLM on this machine.

Which kernel `scaled_dot_product_attention` takes depends on device, dtype, mask, head size and what is installed, so settings do not say
it. Each part is run once, small and for real, under torch's profiler, and what it recorded is named.

Notable: names are those of torch's operators (its native_functions.yaml) and of flash-attn's, which each call records once whatever kernels
it launches, on a CPU as on a GPU. Attention without such an operator shows as the softmax of a four-dimensional tensor of scores.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from experiments import as_program
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from sparse_vlm.bench.machine import describe, versions
from sparse_vlm.data.samples import Sample
from sparse_vlm.errors import UserError
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.train.loss_module import Collator, LossModule
from sparse_vlm.train.parts import choose_attention, computes_in_bfloat16, prepare
from sparse_vlm.train.vlm import STAGES
from sparse_vlm.utils.devices import own_device, training_attention
from sparse_vlm.utils.files import write_json
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.projectors import make_projector
from sparse_vlm.vlm.prompts import Message, assistant, user
from sparse_vlm.vlm.tree import merge

FORMAT = "sparse-vlm/attention/1"
PLAIN = "matrix products and softmax"
# event of the profiler to what ran; of nested ones the outermost counts
FORWARD = {
    "aten::_scaled_dot_product_attention_math": "SDPA, math",
    "aten::_scaled_dot_product_attention_math_for_mps": "SDPA, math of Metal",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "SDPA, flash for CPUs",
    "aten::_scaled_dot_product_flash_attention": "SDPA, flash",
    "aten::_scaled_dot_product_efficient_attention": "SDPA, memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention": "SDPA, cuDNN",
    "aten::_scaled_dot_product_fused_attention_overrideable": "SDPA, the device's own",
    "aten::_flash_attention_forward": "torch's flash",
    "aten::_efficient_attention_forward": "torch's memory-efficient",
    "aten::_cudnn_attention_forward": "torch's cuDNN",
    "FlashAttnFunc": "flash-attn",
    "FlashAttnVarlenFunc": "flash-attn, packed",
    "flash_attn::_flash_attn_forward": "flash-attn",
    "flash_attn::_flash_attn_varlen_forward": "flash-attn, packed",
    "aten::_softmax": PLAIN,
}
BACKWARD = {
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "SDPA, flash for CPUs",
    "aten::_scaled_dot_product_flash_attention_backward": "SDPA, flash",
    "aten::_scaled_dot_product_efficient_attention_backward": "SDPA, memory-efficient",
    "aten::_scaled_dot_product_cudnn_attention_backward": "SDPA, cuDNN",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": "SDPA, the device's own",
    "aten::_flash_attention_backward": "torch's flash",
    "aten::_efficient_attention_backward": "torch's memory-efficient",
    "aten::_cudnn_attention_backward": "torch's cuDNN",
    "FlashAttnFuncBackward": "flash-attn",
    "FlashAttnVarlenFuncBackward": "flash-attn, packed",
    "flash_attn::_flash_attn_backward": "flash-attn",
    "flash_attn::_flash_attn_varlen_backward": "flash-attn, packed",
    "aten::_softmax_backward_data": PLAIN,
}
SCORES = 4  # dimensions of attention's scores; the router of a mixture of experts has fewer


@dataclass(frozen=True)
class Attended:
    """What ran in one pass through a part.

    Attributes:
        forward, backward: kernel to the number of its calls.
    """

    part: str
    forward: dict[str, int]
    backward: dict[str, int]


def kernels(call: Callable[[], Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Run something under the profiler; (forward, backward) kernels of attention with the number of their calls."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    found = Counter(), Counter()
    for event in profiler.events():
        for known, counter in zip((FORWARD, BACKWARD), found, strict=True):
            kernel = known.get(event.name)
            if kernel is None or any(ancestor in known for ancestor in _ancestors(event)):
                continue
            if kernel != PLAIN or len(event.input_shapes[0]) == SCORES:
                counter[kernel] += 1
    return dict(found[0]), dict(found[1])


def _ancestors(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def attended(vlm: VLM) -> Iterator[Attended]:
    """Each part of a VLM with what ran in it; afterwards the VLM is one that is being trained.

    Args:
        vlm: with adapters apart (`fold=False`), or none.
    """
    photo = Image.new("RGB", (64, 48), "tan")
    short = [user("What is it?", 1)]
    long = [user("Hello"), assistant("Hello."), user("What is there to be seen in the picture?", 1)]
    inputs = Preprocessor.of(vlm.tower.config)(photo).to(vlm.model.device)
    tokens = vlm.tower.visual_tokens(*inputs).detach()
    yield _used("tower", lambda: vlm.tower.visual_tokens(*inputs))
    yield _used(f"projector, {vlm.projector_kind}", lambda: vlm.projector(tokens.to(vlm.projector.linear_1.weight.dtype)))
    if vlm.projector_kind != "resampler":
        width, square = tokens.shape[2], math.isqrt(tokens.shape[1]) ** 2
        resampler = make_projector("resampler", width, vlm.projector.linear_2.out_features, square, square).to(tokens)
        yield _used("projector, a resampler in its place", lambda: resampler(tokens[:, :square]))
    seen = vlm.projector(tokens.to(vlm.projector.linear_1.weight.dtype)).detach()
    for name, prompts in (("one prompt", [short]), ("two prompts, padded", [short, long])):
        told = _told(vlm, prompts, photo, seen)
        read = torch.inference_mode()(lambda told=told: vlm.model(**told, use_cache=True))
        yield _used(f"LLM, prefill, {name}", read)
        said = read()
        mask = torch.cat([told["attention_mask"], torch.ones_like(told["attention_mask"][:, :1])], dim=1)
        following = {"input_ids": said.logits[:, -1:].argmax(-1), "attention_mask": mask, "past_key_values": said.past_key_values}
        yield _used(f"LLM, decode, {name}", torch.inference_mode()(lambda following=following: vlm.model(**following)))
    prepare(vlm, STAGES["instruct"], lora_rank=2)
    choose_attention(vlm)
    chains = [merge([vlm.renderer.render([*prompt, assistant("A wall.")])]) for prompt in (short, long)]
    tree = merge([vlm.renderer.render([user("What is it?", 1), assistant(answer)]) for answer in ("A wall.", "Sand.")])
    for name, trees in (("two conversations", chains), ("a photo with several, as one tree", [tree])):
        yield Attended(f"LLM, training, {name}", *kernels(lambda trees=trees: _step(vlm, trees, tokens[0])))


def _used(part: str, call: Callable[[], Any]) -> Attended:
    with torch.no_grad():
        return Attended(part, *kernels(call))


def _told(vlm: VLM, prompts: list[list[Message]], photo: Image.Image, seen: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the LLM is told: embeddings of the prompts, padded, in which `seen` (1, N, D) stands for each image."""
    texts = [vlm.renderer.text(prompt, answer_next=True) for prompt in prompts]
    made = vlm.processor(text=texts, images=[photo] * len(prompts), padding=True, add_special_tokens=False, return_tensors="pt")
    ids = made["input_ids"].to(vlm.model.device)
    embeds = vlm.model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == vlm.renderer.image_id)[..., None], seen.expand(len(prompts), -1, -1).to(embeds.dtype))
    return {"inputs_embeds": embeds.detach(), "attention_mask": made["attention_mask"].to(ids.device)}


def _step(vlm: VLM, trees: list[Any], tokens: torch.Tensor) -> None:
    """A training step's forward and backward pass, as `sparse-vlm train` computes it."""
    device = vlm.model.device
    batch = Collator(vlm)([Sample("a photo", (0,), tree, (tokens.cpu(),)) for tree in trees])
    learner = LossModule(vlm).train()
    with training_attention(device), torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(vlm)):
        loss = learner(batch["trees"].to(device), batch["images"].to(device), batch["chains"])["loss"]
    loss.backward()
    learner.zero_grad(set_to_none=True)


def as_table(found: list[Attended]) -> str:
    """Markdown."""

    def named(kernels: dict[str, int]) -> str:
        return ", ".join(f"{kernel} ({count})" for kernel, count in kernels.items())

    rows = [f"| {one.part} | {named(one.forward) or 'does not attend'} | {named(one.backward)} |" for one in found]
    return "\n".join(["| part | kernel (calls) | backward |", "|---|---|---|", *rows]) + "\n"


def main(
    model: Annotated[str, typer.Option(help="A VLM: a folder or zoo name.")] = "tiny-chat",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one unless given.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON instead of a table; - is stdout.")] = None,
) -> None:
    """Which attention kernel really runs for each part of a VLM."""
    where = torch.device(device) if device in ("cpu", "cuda") else own_device()
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device}: known are cpu and cuda")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; leave it out for the CPU")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would warn of GPUs that are not there
    vlm = VLM.from_pretrained(model, where, fold=False)
    dtype = str(vlm.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    found = list(attended(vlm))
    if json_file is None:
        sys.stdout.write(as_table(found))
        return
    about = {"format": FORMAT, "model": model, "dtype": dtype, "machine": describe(where), "versions": versions()}
    write_json(json_file, {**about, "parts": [asdict(one) for one in found]})


if __name__ == "__main__":
    as_program(main, "attention")

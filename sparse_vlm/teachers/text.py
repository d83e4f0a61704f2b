"""Text encoder for a teacher's embedding space, for zero-shot classification and retrieval with a tower.

Shape legend: T texts, L tokens, w width of the text tower, E embedding.
It consists of a public sentence encoder (the text tower, a model of the zoo) and the teacher's projection of its mean-pooled output; only
projection and logit scale are stored.

Notable: needs only torch and transformers. It equals open_clip's `encode_text` of a teacher with a Hugging Face text encoder, except that
open_clip also straightens curly quotes and repairs mis-decoded characters.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError, naming
from sparse_vlm.hub.pretrained import check_size, from_pretrained, model_errors
from sparse_vlm.hub.store import locate
from sparse_vlm.hub.weights import read_tensors
from sparse_vlm.utils.files import atomic_path, write_text

FORMAT = "sparse-vlm/text/1"
BATCH = 64
MOST = 1 << 16  # largest embedding width and context length
TEXT_TOWERS = {
    "sentence-transformers/all-MiniLM-L6-v2": "all-minilm-l6-v2",
}
"""Zoo names of text towers, by the Hugging Face names in teachers' configurations."""


@dataclass(frozen=True)
class TextConfig:
    """Configuration of a text encoder.

    Attributes:
        text_tower: a name of the zoo, or a folder.
        context_length: most tokens of a text (L); longer texts are truncated.
        embed_dim: width of the projection (E).
        pooling: how tokens become one vector; "mean" over the tokens of the text.
    """

    text_tower: str
    embed_dim: int
    context_length: int
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.text_tower, str) or not self.text_tower:
            raise ValueError(f"text_tower is {self.text_tower!r}, no name and no folder")
        for name in ("embed_dim", "context_length"):
            if type(value := getattr(self, name)) is not int or not 1 <= value <= MOST:
                raise ValueError(f"{name} is {value!r}, expected a whole number from 1 to {MOST}")
        if self.pooling != "mean":
            raise ValueError(f"pooling {self.pooling!r}; only 'mean' is supported")


class TextEncoder(nn.Module):
    """Encodes texts into the embedding space of a teacher and its students.

    Args:
        tower: Hugging Face encoder.
        tokenizer: its tokenizer.

    Attributes:
        name: folder or zoo name it was loaded from.
        width: of its embeddings (E).
        logit_scale: (), log of the factor from cosine to logit.
    """

    def __init__(self, config: TextConfig, tower: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.name, self.width = config.text_tower, config.embed_dim
        self.text_tower = tower
        self.projection = nn.Linear(tower.config.hidden_size, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self._tokenizer = tokenizer
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (T, E), not normalised.

        Raises:
            ValueError: no text.
        """
        if not texts:
            raise ValueError("no text to encode")
        return torch.cat([self._encode_batch(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])

    def _encode_batch(self, texts: Sequence[str]) -> Tensor:
        cleaned = [" ".join(html.unescape(html.unescape(text)).split()) for text in texts]
        tokens = self._tokenizer(cleaned, padding=True, truncation=True, max_length=self.config.context_length, return_tensors="pt")
        ids, mask = (tokens[key].to(self.projection.weight.device) for key in ("input_ids", "attention_mask"))
        states = self.text_tower(input_ids=ids, attention_mask=mask).last_hidden_state  # (T, L, w)
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.projection((states * weights).sum(1) / weights.sum(1))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (projection and logit scale)."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "model.safetensors") as part:
            save_file(self._own_tensors(), part, metadata={"format": "pt"})
        write_text(folder / "config.json", json.dumps({"format": FORMAT, **asdict(self.config)}, indent=1) + "\n")

    def _own_tensors(self) -> dict[str, Tensor]:
        return {"projection.weight": self.projection.weight.data.contiguous(), "logit_scale": self.logit_scale.data}

    def _load_own_tensors(self, tensors: dict[str, Tensor], where: str) -> None:
        for name, target in self._own_tensors().items():
            if name not in tensors:
                raise UserError(f"{where}: tensor {name} is missing")
            if tensors[name].shape != target.shape:
                raise UserError(f"{where}: {name} is {tuple(tensors[name].shape)}, expected {tuple(target.shape)}")
            target.copy_(tensors[name])
        if unexpected := set(tensors) - set(self._own_tensors()):
            raise UserError(f"{where}: unexpected tensor {', '.join(sorted(unexpected))}")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> TextEncoder:
        """Load from a folder or a zoo name; the text tower is downloaded if necessary.

        Raises:
            UserError: no such folder or name, not a text side, or weights that do not fit.
        """
        folder = locate(name_or_path, kind="text")
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError(f"config.json is no object but a {type(data).__name__}")
            if (found := data.pop("format", None)) != FORMAT:
                raise ValueError(f"format is {found!r}, expected {FORMAT!r}")
            config = TextConfig(**data)
            tensors = read_tensors(folder / "model.safetensors")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{name_or_path}: not a text side ({error})") from error
        with naming(folder / "config.json"):
            tower = locate(config.text_tower, kind="text-tower")
        encoder = cls(config, *_load_text_tower(tower))
        encoder._load_own_tensors(tensors, str(name_or_path))
        encoder.name = str(name_or_path)
        return encoder

    @classmethod
    def from_teacher(cls, teacher: str) -> TextEncoder:
        """Extract the text encoder of a teacher in an open_clip folder, `local-dir:PATH`.

        Raises:
            UserError: no such folder, another kind of text encoder, or a text tower that differs from the public one.
        """
        folder = Path(teacher.removeprefix("local-dir:"))
        if not teacher.startswith("local-dir:") or not (folder / "open_clip_config.json").is_file():
            raise UserError(f"{teacher}: the text side is taken from an open_clip folder; give local-dir:PATH of one")
        text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        expected = {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
        for key, value in expected.items():
            if text.get(key) != value:
                raise UserError(f"{teacher}: its text side has {key} {text.get(key)!r}; only {value!r} is supported")
        tower_name = TEXT_TOWERS.get(text["hf_tokenizer_name"])
        if tower_name is None:
            raise UserError(f"{teacher}: the zoo has no text tower {text['hf_tokenizer_name']}; known are {', '.join(TEXT_TOWERS)}")
        try:
            tensors = read_tensors(folder / "open_clip_model.safetensors")
        except UserError as error:
            raise UserError(f"{teacher}: no weights ({error})") from error

        tower, tokenizer = _load_text_tower(locate(tower_name, kind="text-tower"))
        prefix = "text.transformer."
        tuned = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for name, tensor in tower.named_parameters():
            if name not in tuned or not torch.equal(tuned[name], tensor):
                raise UserError(f"{teacher}: its text tower differs from {tower_name} in {name}; only a projection can be stored")
        projection = tensors["text.proj.weight"]
        encoder = cls(TextConfig(tower_name, projection.shape[0], text["context_length"]), tower, tokenizer)
        encoder._load_own_tensors({"projection.weight": projection, "logit_scale": tensors["logit_scale"]}, teacher)
        return encoder


def _load_text_tower(folder: Path) -> tuple[nn.Module, Any]:
    """Load a text tower and its tokenizer; only an unused pooler may be left over."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with model_errors(folder, "a text tower"):
        config = from_pretrained(AutoConfig, folder)
        check_size(folder, config, AutoModel)
        tensors = read_tensors(folder / "model.safetensors")
        tower = AutoModel.from_config(config, add_pooling_layer=False, trust_remote_code=False)
        tokenizer = from_pretrained(AutoTokenizer, folder)
    used = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.") and not name.endswith("position_ids")}
    try:
        tower.load_state_dict(used, strict=True)
    except RuntimeError as error:
        raise UserError(f"{folder}: weights do not fit the text tower: {' '.join(str(error).split())}") from None
    return tower, tokenizer

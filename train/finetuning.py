"""Supervised fine-tuning of a VLM: a tower, an LLM and conversations about images become a folder that `VLM.from_pretrained` loads.

    from sparse_vlm.train import SFTConfig, sft

    result = sft(SFTConfig(data=["photos/*.tar"], out="build/aligned", stage="align", tower="build/tower"))
    print(result.completed, result.metrics["loss"])

The pipeline: read the conversations (`data.dataset`); load or build the VLM; tokenize a part of the data and check its label masks
(`data.samples`); cache the image features of a frozen tower; pretrain a new projector on words (`train.vocabulary`); train (`train.vlm`).
`sparse-vlm train` is this function, `sparse-vlm train --check` is `check_data`.
An interrupted run (Ctrl-C saves a checkpoint first) continues when it is called again with the same config.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sparse_vlm.data.bad_images import DECISIONS, ON_BAD_IMAGE, resolve_bad_images
from sparse_vlm.data.check import Checker, Report
from sparse_vlm.data.conversations import MIXTURES
from sparse_vlm.data.dataset import ConversationDataset, files_of, photos_of, read_conversations
from sparse_vlm.data.llava import LlavaFile
from sparse_vlm.data.samples import ALL_AHEAD, SOME_AHEAD, FeatureCache, TokenizedDataset, arrange, build_samples
from sparse_vlm.data.words import words_about
from sparse_vlm.errors import UserError
from sparse_vlm.train.cost import describe
from sparse_vlm.train.loss_module import LiveImages
from sparse_vlm.train.parts import choose_attention, prepare
from sparse_vlm.train.reporter import Reporter
from sparse_vlm.train.run import check_reporters, finished, marked_checkpoints
from sparse_vlm.train.text_images import WordImages
from sparse_vlm.train.vlm import STAGES, Engine, Stage, train
from sparse_vlm.train.vocabulary import pretrain_projector, words_of
from sparse_vlm.train.zero import find_config
from sparse_vlm.utils.devices import own_device, rank, set_cpu_threads
from sparse_vlm.utils.files import locked
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.config import parts_of
from sparse_vlm.vlm.projectors import MLP
from sparse_vlm.vlm.tokenization import load_renderer

RECORDED_AS = {"text_as_images": "pictures_of_words"}  # settings of a run by the names that earlier versions gave them


@dataclass(frozen=True)
class SFTConfig:
    """A fine-tuning run.

    Attributes:
        data: images with captions or questions (tars, globs, URLs, `hf:ORG/NAME:SPLIT`), or a LLaVA json or jsonl. `=0.5` after an entry
            takes half of it, `=2` all of it twice.
        out: folder of the VLM; `check_data` needs none.
        stage: name in `train.vlm.STAGES`: `read` trains the LLM on text in the place of images, `align` the projector, `instruct` both.
        tower: folder or zoo name; `tiny` by default, or the tower of `init`.
        llm: folder or zoo name, for a VLM without `init`.
        tokens: token budget of an image, for a tower that serves several, or what `projector` reduces the tower's tokens to.
        init: VLM to start from. With `tower`, its tower is replaced and its projector new.
        keep_projector: with `init` and `tower`, keep the projector: for a tower of the same teacher.
        projector: kind of a new projector, as `VLM.build` takes it.
        images: folder of the images that a LLaVA json names.
        allow_outside: whether these may lie outside of it.
        on_bad_image: `raise`, `skip` (leave its samples out) or `blank` (show a grey image).
        epochs: visits to each photo, each with other captions and questions; passes over a LLaVA json.
        samples: number of samples, drawn at random; all by default.
        max_steps: maximum number of steps.
        batch_size: samples a step, of all processes; the stage's by default.
        at_once: samples that a process computes at a time (micro batch); all by default, at most four on a CPU.
        lr, lr_llm, lr_tower: learning rates of the projector, the LLM and the tower; the stage's by default.
        lora_rank: of the LLM's adapters.
        full: train the LLM itself instead of adapters.
        tune_tower: train the tower.
        tower_lora_rank: train adapters of this rank on the tower instead.
        quantize: `4bit` or `8bit`: hold the LLM so under its adapters (QLoRA).
        gradient_checkpointing: recompute activations in the backward pass.
        deepspeed: name in `train.zero.CONFIGS` or a json file of DeepSpeed's; needs torchrun.
        report_to: names in `train.run.REPORTERS` that also log the run.
        max_bad_steps: number of consecutive steps with a non-finite loss or gradient that ends the run.
        cache: folder of cached image features, shared by all runs.
        seed: of data, order and new weights.
        threads: CPU threads; torch's number by default.
    """

    data: Sequence[str]
    out: str | Path | None = None
    stage: str = "align"
    tower: str | None = None
    llm: str = "smollm2-135m-instruct"
    tokens: int | None = None
    init: str | None = None
    keep_projector: bool = False
    projector: str = MLP
    images: str | Path | None = None
    allow_outside: bool = False
    on_bad_image: str = "raise"
    epochs: int = 1
    samples: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    at_once: int | None = None
    lr: float | None = None
    lr_llm: float | None = None
    lr_tower: float | None = None
    lora_rank: int = 32
    full: bool = False
    tune_tower: bool = False
    tower_lora_rank: int | None = None
    quantize: str | None = None
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    report_to: Sequence[str] = ()
    max_bad_steps: int = 3
    cache: str | Path = Path("build/token-cache")
    seed: int = 0
    threads: int | None = None

    @property
    def trains_tower(self) -> bool:
        """Whether the tower or adapters on it are trained, so that its features cannot be cached."""
        return self.tune_tower or self.tower_lora_rank is not None

    def check(self) -> None:
        """Refuse names that are unknown and projectors that do not go with the rest.

        Raises:
            UserError: naming the option of the command line.
        """
        if self.keep_projector and not (self.init and self.tower):
            raise UserError("--keep-projector: says what becomes of the model's projector under another tower; give --init and --tower")
        if self.projector != MLP and (self.keep_projector or (self.init and not self.tower)):
            raise UserError(f"--projector {self.projector}: is for a new projector, which comes with a new tower; give --tower")
        if self.stage not in STAGES:
            raise UserError(f"--stage {self.stage}: no such stage; known are {', '.join(STAGES)}")
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise UserError(f"--on-bad-image {self.on_bad_image}: unknown; known are {', '.join(ON_BAD_IMAGE)}")

    def resolve(self) -> Stage:
        """The stage with this run's changes.

        Raises:
            UserError: a change that the stage has no use for.
        """
        stage = STAGES[self.stage]
        changes: dict[str, Any] = {}
        if self.lr is not None:
            changes["lr_projector"] = self.lr
        if self.lr_llm is not None:
            if stage.lr_lora is None:
                raise UserError(f"--lr-llm: stage {self.stage} leaves the LLM frozen")
            changes |= {"lr_lora": self.lr_llm, "lr_full": self.lr_llm}
        if self.tune_tower and self.tower_lora_rank is not None:
            raise UserError("--tune-tower and --tower-lora: train the tower itself or adapters on it, not both")
        if self.trains_tower and stage.text_as_images:
            raise UserError(f"--tune-tower, --tower-lora: stage {self.stage} shows words in the place of images and does not run the tower")
        if self.lr_tower is not None:
            if not self.trains_tower:
                raise UserError("--lr-tower: the tower is frozen; give --tune-tower or --tower-lora")
            changes |= {"lr_tower_lora": self.lr_tower, "lr_tower_full": self.lr_tower}
        if self.batch_size is not None:
            changes["batch_size"] = self.batch_size
        return dataclasses.replace(stage, **changes)

    def engine(self) -> Engine:
        """How the run is carried out.

        Raises:
            UserError: packages that are missing, or DeepSpeed without torchrun.
        """
        check_reporters(self.report_to)
        deepspeed = find_config(self.deepspeed, "train") if self.deepspeed else None
        return Engine(deepspeed, self.gradient_checkpointing, tuple(self.report_to), self.max_bad_steps, self.at_once)


@dataclass(frozen=True)
class SFTResult:
    """What became of a run.

    Attributes:
        out: folder of the VLM.
        completed: False where the run was interrupted and a checkpoint saved; the same config continues it.
        metrics: `loss`, the last that was logged: negative log-likelihood a token; empty unless the run was completed.
    """

    out: Path
    completed: bool = True
    metrics: dict[str, float] = field(default_factory=dict)


def sft(config: SFTConfig, reporter: Reporter | None = None) -> SFTResult:
    """Train a VLM on conversations; continue or skip what an earlier call has done.

    Args:
        reporter: called with messages and progress; without one, only training progress is printed, to stderr. Under torchrun every process
            calls this function; the first fills the cache and writes the VLM.

    Raises:
        UserError: an input that is wrong or does not fit, or `out` holds another run.
    """
    reporter = reporter or Reporter()
    config.check()
    if config.out is None:
        raise UserError("--out is missing; name the folder of the model (--check alone needs none)")
    out, stage, engine, first = Path(config.out), config.resolve(), config.engine(), rank() == 0
    set_cpu_threads(config.threads)
    dataset = _read(config, stage, reporter)
    vlm = load_vlm(config)
    context = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
    with reporter.counting("rendering", "samples", len(dataset) if len(dataset) <= ALL_AHEAD else SOME_AHEAD) as advance:
        samples = build_samples(dataset, vlm.renderer, context, config.seed, advance)
    groups = prepare(vlm, stage, None if config.full else config.lora_rank, config.seed, config.tune_tower, config.tower_lora_rank)
    describe(samples, groups, vlm, min(stage.batch_size, len(samples)), config.seed, reporter)
    reporter.message(f"attention of the LLM: {choose_attention(vlm)}")

    features: FeatureCache | LiveImages | WordImages | None = None
    if config.trains_tower:
        features = LiveImages(vlm.tower.config, dataset.photos, owner=first, threads=config.threads or 1)
    elif not stage.text_as_images:
        features = FeatureCache(Path(config.cache), vlm.tower, dataset.photos, owner=first)
    with locked(out) if first else nullcontext():  # from here on something is written to it
        samples, bad = _load_images(config, samples, features, out, reporter)
        dataset = samples.examples
        if features is None:
            features = WordImages(vlm, dataset, config.seed)
        samples = arrange(samples.with_images(features), stage.batch_size, config.seed)
        settings = _settings(config, stage, engine, vlm, samples, bad)
        fresh = first and vlm.new_projector and not marked_checkpoints(out / "checkpoints") and not finished(out, settings)
        if fresh and stage.word_epochs:
            _pretrain_on_words(config, stage, vlm, dataset, features, bad, reporter)
        history = train(vlm, groups, stage, samples, out, settings, config.max_steps, config.seed, engine)
    if history is None:
        reporter.message(f"interrupted and saved; give the same command again to continue ({out})")
        return SFTResult(out, completed=False)
    reporter.message(f"model written to {out}; its curve is {out / 'loss.png'}")
    if bad:
        reporter.message(f"of the images {len(bad):,} could not be used: {out / 'training.json'} names them (bad_images)")
    return SFTResult(out, metrics={"loss": [float(entry["loss"]) for entry in history if "loss" in entry][-1]})


def load_vlm(config: SFTConfig) -> VLM:
    """The VLM that a run starts from, on this process's device.

    Raises:
        UserError: a part that cannot be loaded, or parts that do not fit.
    """
    parts: dict[str, Any] = {"num_tokens": config.tokens, "quantize": config.quantize, "projector": config.projector}
    if config.init:
        new = {"new_tower": config.tower, "keep_projector": config.keep_projector}
        return VLM.from_pretrained(config.init, own_device(), fold=False, **new, **parts)
    return VLM.build(config.tower or "tiny", config.llm, own_device(), seed=config.seed, **parts)


def check_data(config: SFTConfig, reporter: Reporter | None = None) -> Report:
    """Read all data of a run and report every problem in it; no model is started.

    Args:
        config: `out` and all that concerns the training are not needed.

    Raises:
        UserError: data, tower or LLM that cannot be read at all.
    """
    reporter = reporter or Reporter()
    config.check()
    tower, llm, tokens, projector = config.tower, config.llm, config.tokens, config.projector
    if config.init:
        own_tower, llm, own_tokens, own_projector = parts_of(config.init)
        if tower is None:
            tower, tokens, projector = own_tower, tokens or own_tokens, own_projector
    renderer, context = load_renderer(tower or "tiny", llm, tokens, projector)
    with reporter.fetching() as on_fetched:
        photos = [photo for some in photos_of(config.data, on_fetched).values() for photo in some]
    files = [path for path, _ in files_of(config.data)]
    checker = Checker(files, photos, config.images and Path(config.images), MIXTURES[config.stage], config.allow_outside)
    with reporter.reading(files) as on_bytes:
        checker.read(on_bytes)
    with reporter.counting("decoding", "images", checker.report.images) as advance:
        checker.look(advance, config.threads or os.cpu_count() or 1)
    with reporter.counting("rendering", "samples", len(checker.examples)) as advance:
        checker.render(renderer, context, advance)
    return checker.report


def _read(config: SFTConfig, stage: Stage, reporter: Reporter) -> ConversationDataset:
    """The conversations that the run trains on."""
    with reporter.fetching() as on_fetched:
        photos = photos_of(config.data, on_fetched)
    files = files_of(config.data)
    with reporter.reading([path for path, _ in files]) as on_bytes:
        open_file = partial(LlavaFile, on_bytes=on_bytes, allow_outside=config.allow_outside)
        folder, mix = config.images and Path(config.images), MIXTURES[config.stage]
        dataset = read_conversations(files, photos, folder, mix, config.epochs, config.seed, open_file)
    if stage.text_as_images:
        described = [index for index, example in enumerate(dataset) if not example.photos or words_about(example)]
        if not described:
            raise UserError(f"--stage {config.stage}: no word is said about any photo; give captions, or answers in words")
        if left := len(dataset) - len(described):
            reporter.message(f"left out: {left:,} of {len(dataset):,} samples, because there are no words about their photo")
        dataset = dataset.select(described)
    if config.samples is not None and config.samples < len(dataset):
        dataset = dataset.select(random.Random(config.seed).sample(range(len(dataset)), config.samples))
    return dataset


def _load_images(
    config: SFTConfig, samples: TokenizedDataset, features: FeatureCache | LiveImages | None, out: Path, reporter: Reporter
) -> tuple[TokenizedDataset, dict[int, str]]:
    """Encode the images whose features are not cached yet or, where the tower is trained, make sure that all can be read.

    Returns:
        The samples that remain, and why the other images cannot be used, by their numbers.
    """
    label = "reading" if config.trains_tower else "encoding"

    def load(wanted: Sequence[int], on_bad: Any) -> None:
        if features is None:
            return
        if missing := len(features.missing(wanted)):
            with reporter.counting(label, "photos", missing) as advance:
                features.fill(wanted, advance, on_bad)
        else:
            reporter.message(f"{label}: {len(wanted)} photos, all done before")

    skip = config.on_bad_image == "skip"
    bad = resolve_bad_images(samples.examples, config.on_bad_image, out, rank() == 0, load)
    kept = samples.without(bad) if skip else samples
    if not len(kept):
        raise UserError(f"--on-bad-image skip: no sample is left, as {len(bad):,} images cannot be used; {out / DECISIONS} says why")
    if bad:
        done = f"{len(samples) - len(kept):,} of {len(samples):,} samples are left out" if skip else "shown as grey"
        reporter.message(f"bad images: {len(bad):,}, {done}; {out / DECISIONS} names all")
        for why in list(bad.values())[:5]:
            reporter.message(f"  {why}")
    if features is not None:
        features.stand_in(bad)
        features.fill([photo for photo in kept.examples.used_photos() if photo not in bad])
    return kept, bad


def _settings(config: SFTConfig, stage: Stage, engine: Engine, vlm: VLM, samples: TokenizedDataset, bad: dict[int, str]) -> dict[str, Any]:
    """What identifies a run, as JSON: a folder is resumed only with the same."""
    optional = {
        "keep_projector": config.keep_projector,
        "projector": None if vlm.projector_kind == MLP else vlm.projector_kind,
        "tune_tower": config.tune_tower,
        "tower_rank": config.tower_lora_rank,
        "quantize": config.quantize,
        "at_once": config.at_once,
        "deepspeed": engine.deepspeed,
    }
    return {
        "stage": config.stage,
        **{RECORDED_AS.get(name, name): value for name, value in dataclasses.asdict(stage).items()},
        "tower": vlm.tower_name,
        "tokens": vlm.tokens_per_image,
        "llm": vlm.llm_name,
        "init": config.init,
        "rank": None if config.full or stage.lr_lora is None else config.lora_rank,
        "photos": len(samples.examples.photos),
        "samples": len(samples),
        "data": samples.examples.fingerprint(),
        "on_bad_image": config.on_bad_image,
        "bad_images": bad,
        "epochs": config.epochs,
        "max_steps": config.max_steps,
        "seed": config.seed,
        **{name: value for name, value in optional.items() if value},
    }


def _pretrain_on_words(
    config: SFTConfig,
    stage: Stage,
    vlm: VLM,
    dataset: ConversationDataset,
    features: FeatureCache | LiveImages | WordImages,
    bad: dict[int, str],
    reporter: Reporter,
) -> None:
    """Vocabulary pretraining of a new projector."""
    words = words_of(dataset, vlm.tokenizer)
    if not words.names:
        return
    if not isinstance(features, FeatureCache):  # features of the tower as it begins
        features = FeatureCache(Path(config.cache), vlm.tower, dataset.photos)
        features.stand_in(bad)
        with reporter.counting("encoding", "photos", len(features.missing(words.photos))) as advance:
            features.fill([photo for photo in words.photos if photo not in bad], advance)
    with reporter.counting(f"pretraining on {len(words.names):,} words", "photos", len(words.photos) * stage.word_epochs) as advance:
        accuracy = pretrain_projector(vlm, words, features, stage.word_epochs, config.seed, advance)
    if accuracy:
        reporter.message(
            f"the likeliest word of a held-out photo is right in {accuracy['first']:.0%} of the cases "
            f"(the most common word in {accuracy['commonest']:.0%})"
        )

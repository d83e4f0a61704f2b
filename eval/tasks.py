"""All tasks by name. To add one, write a class (`sparse_vlm.eval.task`, `sparse_vlm.eval.questions`) and add it here."""

from __future__ import annotations

from sparse_vlm.errors import UserError
from sparse_vlm.eval.agreement import Agreement
from sparse_vlm.eval.captions import Captions
from sparse_vlm.eval.multiple_choice import AOKVQA, MMBench, ScienceQA
from sparse_vlm.eval.paired_statements import LikelierCaption, NearerSentence
from sparse_vlm.eval.probes import LinearProbe, NearestNeighbours
from sparse_vlm.eval.questions import AOKVQA_FILES, POPE_FILES, tar_records
from sparse_vlm.eval.rendered_words import RenderedWords
from sparse_vlm.eval.retrieval import Retrieval
from sparse_vlm.eval.small_objects import SmallObjects
from sparse_vlm.eval.task import Task
from sparse_vlm.eval.vqa import GQA, AOKVQADirect, Counting, MMVet, TextVQA, VQAv2
from sparse_vlm.eval.yes_no import VSR, Pope, PopeInWords, YesNo
from sparse_vlm.eval.zero_shot import ZeroShot
from sparse_vlm.eval.zoom import Zoom

TASKS: dict[str, Task] = {
    "imagenet": ZeroShot("eval/imagenet1k_one_per_class.tar"),
    "cifar10": ZeroShot("eval/cifar10_test.tar"),
    "flickr8k": Retrieval("eval/flickr8k_retrieval.tar"),
    "coco": Retrieval("eval/coco_vqa.tar"),
    "cosine": Agreement(),
    "knn": NearestNeighbours(),
    "probe": LinearProbe(),
    "zoom": Zoom(),
    "small-objects": SmallObjects(),
    "rendered-words": RenderedWords(),
    "sugarcrepe": NearerSentence("sugarcrepe"),
    "valse": NearerSentence("valse"),
    "captions": Captions(),
    "pope": Pope(tar_records("pope")),
    "pope-words": PopeInWords(tar_records("pope")),
    "pope-coco": PopeInWords(POPE_FILES),
    "aokvqa": AOKVQA(tar_records("aokvqa")),
    "aokvqa-direct": AOKVQADirect(tar_records("aokvqa")),
    "aokvqa-val": AOKVQA(AOKVQA_FILES),
    "aokvqa-val-direct": AOKVQADirect(AOKVQA_FILES),
    "existence": YesNo(tar_records("qa", "gvt_mci")),
    "counting": Counting(tar_records("qa", "gvt_oc")),
    "vsr": VSR(tar_records("vsr")),
    "sugarcrepe-captions": LikelierCaption("sugarcrepe"),
    "valse-captions": LikelierCaption("valse"),
    "vqav2": VQAv2(),
    "gqa": GQA(),
    "textvqa": TextVQA(),
    "scienceqa": ScienceQA(),
    "mmbench": MMBench(),
    "mmvet": MMVet(),
}


def find_tasks(names: list[str]) -> dict[str, Task]:
    """The tasks of these names, in this order.

    Raises:
        UserError: not the name of a task.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"{name}: no such task; there are {', '.join(TASKS)}")
    return {name: TASKS[name] for name in names}

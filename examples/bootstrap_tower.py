"""Bootstrap a tower from a teacher and photos, from Python.

    python examples/bootstrap_tower.py --teacher ViT-B-16-quickgelu@openai --data photos/ --views 40000 --out build/tower

The weights of an open_clip name such as this one are downloaded; `photos/` is a folder of your own images, no labels needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparse_vlm import SparseFormer
from sparse_vlm.train import BootstrapConfig, BootstrapResult, bootstrap


def main(arguments: Sequence[str] | None = None) -> BootstrapResult:
    """Train or continue; the same arguments continue an interrupted run."""
    parser = argparse.ArgumentParser(description="Bootstrap a tower from a teacher and photos.")
    parser.add_argument("--teacher", required=True, help="a teacher's name, as docs/bootstrapping.md lists them")
    parser.add_argument("--data", nargs="+", required=True, help="folders, tars or globs of photos")
    parser.add_argument("--recipe", default="adaptive")
    parser.add_argument("--views", type=int, help="views to train on; the recipe's number by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="numbers of the recipe to change")
    parser.add_argument("--cache", default="build/teacher-cache")
    parser.add_argument("--out", default="build/tower")
    args = parser.parse_args(arguments)

    config = BootstrapConfig(args.teacher, args.data, args.recipe, args.set, args.views, out=args.out, cache=args.cache)
    result = bootstrap(config)
    if result.completed:
        tower = SparseFormer.from_pretrained(result.out)
        print(f"{result.out}: {tower.config.visual_tokens} tokens of width {tower.config.width}")
        print(f"centred cosine to the teacher, held-out photos: {result.metrics['cosine']:.3f}")
    return result


if __name__ == "__main__":
    main()

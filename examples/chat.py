"""Ask questions about an image, from Python; each answer is printed while it is written.

    python examples/chat.py --image examples/coffee.jpg "What is in this image?" "Is there a spoon?"

The language model of `tiny-chat` is downloaded at first use.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sparse_vlm import VLM, load_image


def main(arguments: Sequence[str] | None = None) -> list[str]:
    """The answers."""
    parser = argparse.ArgumentParser(description="Ask questions about an image.")
    parser.add_argument("questions", nargs="*", default=["What is in this image?"])
    parser.add_argument("--model", default="tiny-chat", help="a VLM: folder or name of the zoo")
    parser.add_argument("--image", default="examples/coffee.jpg")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(arguments)

    vlm = VLM.from_pretrained(args.model)
    messages, answers = [], []
    content = [{"type": "image", "image": load_image(args.image)}]  # belongs to the first question
    for question in args.questions:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        content = []
        answer = ""
        for piece in vlm.stream(messages, args.max_new_tokens):  # the image and earlier turns are not computed again
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        answers.append(answer)
    return answers


if __name__ == "__main__":
    main()

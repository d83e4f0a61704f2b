"""Steps whose loss or gradient is not finite: no update, counted, named; several in a row end the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from sparse_vlm.devices import rank
from sparse_vlm.errors import UserError
from sparse_vlm.train.run import of_all_processes

NAMED = 8  # samples a line names at most


class NotFinite(Exception):
    """The loss of a step is not finite in some process.

    Args:
        loss: what to report of the step in all of them.
    """

    def __init__(self, loss: Tensor) -> None:
        super().__init__("the loss is not finite")
        self.loss = loss


class FiniteSteps(TrainerCallback):
    """Watches the steps of a run.

    Args:
        at_most: bad steps in a row that end the run.
        in_one: whether a step's update cannot be left out any more once a part of its batch went through, so that a bad part ends the run.
    """

    def __init__(self, at_most: int, in_one: bool = False) -> None:
        self.at_most, self.in_one = at_most, in_one
        self.names: list[str] = []  # of this step
        self.what = ""  # that is not finite in this step
        self.row: list[list[str]] = []
        self.count = 0

    def check(self, loss: Tensor, names: Sequence[str]) -> None:
        """Called with the loss and the samples of a step, or of each part of it.

        Raises:
            NotFinite: in every process when it is not finite in one.
            UserError: naming the samples, where the step cannot be left out.
        """
        self.names += names
        bad = (~torch.isfinite(loss.detach())).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():
            self.what = "loss is not finite"
            if self.in_one:
                raise UserError(
                    f"the loss is not finite ({_listed(self._all_names())}), and DeepSpeed cannot leave out a step that is computed in "
                    "parts; the last checkpoint is as it was. Look at these samples, lower the rates, or leave --at-once out"
                )
            raise NotFinite(torch.full_like(loss.detach(), torch.nan))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """No update where a part of the step was not finite, nor where a finite loss has a gradient that is not. All processes hold the
        same gradient.

        Under DeepSpeed this comes too late: accelerate lets its engine update within the backward pass.
        """
        gradients = [p.grad for group in kwargs["optimizer"].param_groups for p in group["params"] if p.grad is not None]
        if not self.what and gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self.what = "gradient is not finite"
        if self.what:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Count.

        Raises:
            UserError: naming the samples of the last steps, when as many in a row as are allowed were bad.
        """
        if not self.what:
            self.row.clear()
            self.names.clear()
            return
        names = self._all_names()
        self.names.clear()
        self.row.append(names)
        self.count += 1
        state.log_history.append({"step": state.global_step, "not_finite": self.what, "samples": names})
        if rank() == 0:
            print(f"step {state.global_step}: the {self.what}, no update ({_listed(names)})", file=sys.stderr)
        self.what = ""
        if len(self.row) >= self.at_most:
            samples = "; ".join(f"step {state.global_step - len(self.row) + i + 1}: {_listed(each)}" for i, each in enumerate(self.row))
            raise UserError(
                f"{len(self.row)} steps in a row were not finite; nothing was learnt from them, and the last checkpoint is as it was. "
                f"Look at their samples ({samples}), or lower the rates"
            )

    def _all_names(self) -> list[str]:
        return [name for each in of_all_processes(self.names) for name in each]

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Say how many there were."""
        if self.count and rank() == 0:
            print(
                f"{self.count} of {state.global_step} steps were not finite and taught nothing; training.json names them", file=sys.stderr
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more

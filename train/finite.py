"""Steps whose loss or gradient is not finite: skipped, counted and named; several in a row end the run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from sparse_vlm.errors import UserError
from sparse_vlm.train.run import of_all_processes
from sparse_vlm.utils.devices import rank

NAMED = 8  # samples a line names at most


class NotFinite(Exception):
    """The loss of a step is not finite in some process.

    Args:
        loss: the loss to log, in every process.
    """

    def __init__(self, loss: Tensor) -> None:
        super().__init__("the loss is not finite")
        self.loss = loss


class FiniteSteps(TrainerCallback):
    """Watches the steps of a run.

    Args:
        at_most: bad steps in a row that end the run.
        engine: whether DeepSpeed updates, within its backward pass, and leaves out steps whose gradient is not finite.
        in_parts: whether a step is computed in several parts.
    """

    def __init__(self, at_most: int, engine: bool = False, in_parts: bool = False) -> None:
        self.at_most, self.engine, self.in_parts = at_most, engine, in_parts
        self.names: list[str] = []  # of this step
        self.what = ""  # that is not finite in this step
        self.row: list[list[str]] = []
        self.count = 0

    def check(self, loss: Tensor, names: Sequence[str]) -> None:
        """Called with the loss and the samples of a step, or of each part of it.

        Raises:
            NotFinite: in every process when it is not finite in one; not where DeepSpeed holds gradients of other parts, which it drops
                with the whole step where this part's loss goes through its backward pass as it is.
        """
        self.names += names
        bad = (~torch.isfinite(loss.detach())).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():
            self.what = "loss is not finite"
            if not (self.engine and self.in_parts):
                raise NotFinite(torch.full_like(loss.detach(), torch.nan))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """No update where a part of the step was not finite, nor where a finite loss has a gradient that is not. All processes hold the
        same gradient.

        Under DeepSpeed this comes too late, and its engine has done the same by now.
        """
        gradients = [p.grad for group in kwargs["optimizer"].param_groups for p in group["params"] if p.grad is not None]
        if not self.what and gradients and not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            self.what = "gradient is not finite"
        if self.what:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Count.

        Raises:
            UserError: naming the samples of the last steps, when as many in a row as are allowed were bad; or DeepSpeed did not leave out
                a step that was.
        """
        left_out = self.engine and kwargs["optimizer"].step_was_skipped
        if self.what and self.engine and self.in_parts and not left_out:
            raise UserError(
                f"step {state.global_step}: the {self.what} ({_listed(self._all_names())}), and DeepSpeed did not leave out the step: "
                "the weights are spoilt. Go on from the last checkpoint, without --at-once"
            )
        if left_out and not self.what:
            self.what = "gradient is not finite"
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
                f"{len(self.row)} steps in a row were not finite; they updated no weights, and the last checkpoint is unchanged. "
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

"""The check as a callback of the Trainer, before its first step."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerCallback

from irl_ops.debug.check import check
from irl_ops.debug.report import CheckError, Report


class CheckCallback(TrainerCallback):
    """Checks the first step of a Trainer, and stops it there if the loss is wrong.

    ::

        CheckCallback(eos_token_id=2).attach(trainer)
        trainer.train()

    The step itself is not touched: its micro-batches are read from the data loader once more, and
    random numbers, gradients and metrics are as without the callback.

    Args:
        stop: whether a wrong loss raises; False prints the report and goes on.
        **options: those of ``check``: what you expect.

    Attributes:
        report: of the last check; None before.

    Raises:
        CheckError: before the first step, if the loss is wrong.
        RuntimeError: when training starts, without ``attach``.
    """

    def __init__(self, *, stop: bool = True, **options: Any) -> None:
        self.stop, self.options = stop, options
        self.report: Report | None = None
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Adds this callback to those of ``trainer``, which a callback otherwise does not see."""
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses to watch over nothing."""
        if self._trainer is None:
            raise RuntimeError(
                "CheckCallback knows no Trainer; accepted: CheckCallback(...).attach(trainer), in "
                "the place of callbacks=[...]"
            )
        self.report = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks before the first step of a run."""
        if self.report is not None:
            return
        self.report = check(self._trainer, **self.options)
        from accelerate.utils import gather_object  # type: ignore[import-untyped]

        # all processes stop, or none: the others would wait for one that has raised
        oks = gather_object([self.report.ok]) if args.world_size > 1 else [self.report.ok]
        if all(oks):
            return
        where = f"process {args.process_index}"
        if not self.stop:
            if not self.report.ok:
                print(f"{where}: {self.report}" if args.world_size > 1 else self.report)
            return
        self.report.raise_if_wrong()
        wrong = ", ".join(str(rank) for rank, ok in enumerate(oks) if not ok)
        raise CheckError(f"the loss is right on {where}, and wrong on process {wrong}")

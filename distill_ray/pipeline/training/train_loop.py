"""The training loop of one worker: DeepSpeed around `student.module`, checkpoints through Ray Train.

Every worker runs `train_worker`. They differ only in which micro-batches they take:

    step -> train.workers.max x accumulation micro-batches -> worker r takes r, r + workers, r + 2 workers, ...

Everything that decides a step is a function of (tokens, config, step): the examples, their micro-batches, the learning
rate, the dropout of each micro-batch. So a run that is resumed from a checkpoint goes on exactly as if it had not
stopped, and on fewer workers it does the same sums in another order.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from distill_ray.config.train import StudentConfig, TrainConfig
from distill_ray.errors import DistillError, TrainingError
from distill_ray.pipeline.folder import RunFolder
from distill_ray.pipeline.training.resharding import is_sharded_otherwise, make_universal
from distill_ray.pipeline.training.tokenise import local_tokens
from distill_ray.student.batches import Ints, parts_of, plan_epoch, plan_in_order, split_step
from distill_ray.student.export import base_model_name, gather_weights, save_model
from distill_ray.student.load import load_student
from distill_ray.student.module import Batch, StudentModule, collate
from distill_ray.student.schedule import learning_rate
from distill_ray.student.tokens import Tokens

T = TypeVar("T")

STATE = "state"  # folder of DeepSpeed's state inside a checkpoint


@dataclasses.dataclass(slots=True)
class WorkerTask:
    """What every worker is given."""

    student: StudentConfig
    train: TrainConfig
    folder: RunFolder
    tokens: str  # name of the folder of tokens, inside train/
    pad_id: int
    use_gpu: bool
    metrics: Any  # handle of the actor that takes metrics to the driver


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Entry point for Ray Train. Returns the figures, or {"error": ...} where a retry would only meet it again."""
    try:
        return Worker(config["task"]).run()
    except DistillError as error:  # all workers agree on these (see `_together`), so all of them return
        return {"error": error}


class Worker:
    """One worker's part of the training."""

    def __init__(self, task: WorkerTask) -> None:
        self.task, self.config = task, task.train
        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.place = (context.get_node_rank(), context.get_local_rank())
        self.checkpoint = ray.train.get_checkpoint()  # the latest of this run, if there is one
        self.is_resharded = is_sharded_otherwise(self.checkpoint, STATE, self.num_workers)
        threads = self.config.threads_per_worker or max(1, int(self.config.cpus_per_worker))
        if not task.use_gpu:
            os.environ["DS_ACCELERATOR"] = "cpu"
            torch.set_num_threads(threads)  # fixed: sums in another order differ in the last bits
        folder = local_tokens(task.folder, task.tokens)
        self.train_tokens, self.validation_tokens = Tokens(folder / "train"), Tokens(folder / "validation")
        self.device = ray.train.torch.get_device()  # the GPU that Ray gave this worker, else the CPU
        self.use_bf16 = self.config.precision == "bf16" or (self.config.precision == "auto" and task.use_gpu)
        model = _together(self._load)
        self.decoder_start_id = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
        self.engine = self._engine(StudentModule(model, self.config.loss))
        self.tokens_seen = 0  # of all attempts
        self.step_began = 0.0

    def _load(self) -> Any:
        return load_student(
            self.task.student,
            dtype=torch.bfloat16 if self.use_bf16 else torch.float32,
            seed=self.config.seed,
            gradient_checkpointing=self.config.gradient_checkpointing,
        )

    def _engine(self, module: StudentModule) -> Any:
        import deepspeed

        # The op is not needed and would be compiled with a C++ compiler for half a minute on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._deepspeed_config(), dist_init_required=False
        )
        return engine

    def _deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.config.deepspeed.zero_stage}
        if self.config.deepspeed.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,  # not used: batches are cut by tokens
            "gradient_accumulation_steps": self.config.num_parts // self.num_workers,
            "gradient_clipping": self.config.max_grad_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # CPUAdam is compiled on first use
            "bf16": {"enabled": self.use_bf16},
            "checkpoint": {"load_universal": self.is_resharded},
        }

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end; returns figures of the whole run."""
        total_steps = self._total_steps()
        done = self._resume()
        self._tell({"total_steps": total_steps, "resumed_at": done})
        self.step_began = time.perf_counter()
        for step, epoch, is_last_of_epoch, examples in self._steps(done, total_steps):
            self._train_step(step, epoch, examples, total_steps)
            every = self.config.validate_every
            due = is_last_of_epoch if every is None else (step + 1) % every == 0
            if due or step + 1 == total_steps:
                validation_loss = self._validate(step + 1)
                self._checkpoint(step + 1, epoch, validation_loss)
                self.step_began = time.perf_counter()
        return {"steps": total_steps, "tokens": self.tokens_seen, "workers": self.num_workers}

    def _total_steps(self) -> int:
        total = 0
        for epoch in range(self.config.epochs):
            total += len(self._plan(epoch))
            if self.config.max_steps is not None and total >= self.config.max_steps:
                return self.config.max_steps
        return total

    def _plan(self, epoch: int) -> list[Ints]:
        return plan_epoch(
            self.train_tokens.lengths_E,
            self.train_tokens.rows_E,
            max_tokens=self.config.max_tokens_per_batch,
            num_parts=self.config.num_parts,
            seed=self.config.seed,
            epoch=epoch,
        )

    def _steps(self, done: int, total_steps: int) -> Iterator[tuple[int, int, bool, Ints]]:
        """(step, epoch, whether it is the epoch's last, examples) of all steps that are not done yet."""
        step = 0
        for epoch in range(self.config.epochs):
            plan = self._plan(epoch)
            for index, examples in enumerate(plan):
                if step == total_steps:
                    return
                if step >= done:
                    yield step, epoch, index + 1 == len(plan), examples
                step += 1

    def _train_step(self, step: int, epoch: int, examples: Ints, total_steps: int) -> None:
        loss_sum = torch.zeros((), device=self.device)
        tokens = self.train_tokens
        num_parts = self.config.num_parts
        for part, batch in self._batches(tokens, examples, tokens.task_tokens(examples), num_parts):
            # Dropout repeats when a step is run again after a resume, whichever worker has the micro-batch then.
            torch.manual_seed(int(np.random.SeedSequence([self.config.seed, step, part]).generate_state(1)[0]))
            loss = self.engine(batch)
            loss_sum += loss.detach()
            # The sum over all micro-batches is the step's loss (see `student.losses`). DeepSpeed divides each
            # by the number of accumulation rounds and averages gradients over workers, so both are multiplied
            # back:   1/W sum_r 1/A sum_a grad(W A loss_ra)  =  sum_ra grad(loss_ra)
            self.engine.backward(loss * num_parts)
            if not self.engine.is_gradient_accumulation_boundary():
                self.engine.step()
        if self.num_workers > 1:
            dist.all_reduce(loss_sum)
        step_loss = float(loss_sum)
        if not math.isfinite(step_loss):  # the same number on all workers: all of them stop, before the weights change
            raise TrainingError(self._not_finite(step_loss, step, examples))
        rate = self._set_learning_rate(step, total_steps)
        self.engine.step()
        num_tokens = int(tokens.lengths_E[examples].sum())
        self.tokens_seen += num_tokens
        norm = self.engine.get_global_grad_norm()
        now = time.perf_counter()
        self._tell(
            {
                "step": step + 1,
                "epoch": epoch,
                "loss": step_loss,
                "learning_rate": rate,
                "grad_norm": None if norm is None else float(norm),
                "tokens": num_tokens,
                "tokens_per_second": round(num_tokens / (now - self.step_began), 1),
                "workers": self.num_workers,
            }
        )
        self.step_began = now

    def _batches(
        self, tokens: Tokens, examples: Ints, task_tokens: Ints, num_parts: int
    ) -> Iterator[tuple[int, Batch]]:
        """This worker's share of the micro-batches of a step, with their numbers."""
        parts = split_step(examples, tokens.lengths_E, max_tokens=self.config.max_tokens_per_batch, num_parts=num_parts)
        for part in parts_of(self.rank, num_workers=self.num_workers, num_parts=num_parts):
            batch = collate(
                tokens, parts[part], task_tokens, pad_id=self.task.pad_id, decoder_start_id=self.decoder_start_id
            )
            yield part, batch.to(self.device)

    def _set_learning_rate(self, step: int, total_steps: int) -> float:
        rate = learning_rate(
            step,
            total_steps=total_steps,
            peak=self.config.learning_rate,
            warmup_ratio=self.config.warmup_ratio,
            schedule=self.config.schedule,
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _not_finite(self, loss: float, step: int, examples: Ints) -> str:
        rows = self.train_tokens.row_ids(examples)
        shown = ", ".join(rows[:10]) + (f" and {len(rows) - 10} more" if len(rows) > 10 else "")
        return (
            f"the loss became {loss} at step {step + 1}, before the weights changed (rows {shown}); lower "
            f"train.learning_rate (now {self.config.learning_rate:g}) or look at these rows, then run again"
        )

    # -- validation and checkpoints --------------------------------------------------------------------------

    @torch.no_grad()
    def _validate(self, step: int) -> float | None:
        """Loss on the validation split, normalised like the training loss; None where the split is empty."""
        tokens = self.validation_tokens
        if not len(tokens):
            return None
        task_tokens = tokens.task_tokens(np.arange(len(tokens)))
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        num_parts = self.config.workers.max
        for examples in plan_in_order(
            tokens.lengths_E, max_tokens=self.config.max_tokens_per_batch, num_parts=num_parts
        ):
            for _, batch in self._batches(tokens, examples, task_tokens, num_parts):
                loss_sum += self.engine(batch)
        self.engine.train()
        if self.num_workers > 1:
            dist.all_reduce(loss_sum)
        loss = float(loss_sum)
        if not math.isfinite(loss):  # the last step had a finite loss and a gradient that was not
            raise TrainingError(
                f"the validation loss became {loss} after step {step}; lower train.learning_rate (now "
                f"{self.config.learning_rate:g}) and run again"
            )
        self._tell({"step": step, "validation_loss": loss})
        return loss

    def _checkpoint(self, step: int, epoch: int, validation_loss: float | None) -> None:
        """Save everything needed to go on exactly (`state/`), and the model for others to load (`model/`)."""
        with tempfile.TemporaryDirectory() as folder:
            self.engine.save_checkpoint(
                folder,
                tag=STATE,
                client_state={"step": step, "tokens_seen": self.tokens_seen},
                save_latest=False,
                exclude_frozen_parameters=self._has_adapters,
            )
            for script in Path(folder).glob("*.py"):  # DeepSpeed's converters: `model/` needs none
                script.unlink()
            model = self.engine.module.model
            weights = gather_weights(model, keep=self.rank == 0, trainable_only=self._has_adapters)
            if self.rank == 0:
                save_model(model, weights, Path(folder) / "model", base=base_model_name(self.task.student))
            ray.train.report(
                {"step": step, "epoch": epoch, "validation_loss": validation_loss},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{step:07d}",
            )

    def _resume(self) -> int:
        """Load the latest checkpoint of this run, if there is one; returns the steps that are done."""
        if self.checkpoint is None:
            return 0
        with self.checkpoint.as_directory() as stored, self._for_this_gang(Path(stored)) as folder:
            path, state = self.engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=not self._has_adapters)
        if path is None:
            raise TrainingError(f"{self.checkpoint.path}: cannot be resumed from; delete it and run again")
        self.tokens_seen = state["tokens_seen"]
        return int(state["step"])

    @contextmanager
    def _for_this_gang(self, stored: Path) -> Iterator[Path]:
        """The folder with DeepSpeed's state for as many workers as there are: made once per node, by its first one."""
        if not self.is_resharded:
            yield stored
            return
        with tempfile.TemporaryDirectory() as made:
            node, local_rank = self.place
            _together(lambda: make_universal(stored / STATE, Path(made) / STATE) if local_rank == 0 else None)
            places: list[Any] = [None] * self.num_workers
            dist.all_gather_object(places, (self.place, made))
            yield Path(dict(places)[node, 0])
            dist.barrier()  # until all have loaded it

    @property
    def _has_adapters(self) -> bool:
        return self.task.student.lora is not None

    def _tell(self, record: dict[str, Any]) -> None:
        """Send figures to the driver, which alone writes files and the display."""
        if self.rank == 0:
            self.task.metrics.put.remote(record)


def _together(build: Callable[[], T]) -> T:
    """Run `build` on all workers; where it fails on one of them, all raise that error instead of waiting for it."""
    value, error = None, None
    try:
        value = build()
    except DistillError as raised:
        error = raised
    errors: list[DistillError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for other in errors:
        if other is not None:
            raise other
    return value  # type: ignore[return-value]

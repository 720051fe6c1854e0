"""transformers' Trainer with what Dynamic-LLaVA adds: temperature, noise keys, global denominators and its own logs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from dynamic_llava.config import LoraConfig, SparsityConfig, TrainConfig
from dynamic_llava.config.run import target_of
from dynamic_llava.costs import llava_shape, training_flops
from dynamic_llava.data import FILLER, EpochSampler, SftDataset
from dynamic_llava.data.prepare import BROKEN
from dynamic_llava.engine.decide import asked_by, decided_tokens
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.layout import TokenLayout
from dynamic_llava.model.outputs import DynamicLlavaOutput
from dynamic_llava.model.switches import choose_method
from dynamic_llava.sparsity.noise import fold_key
from dynamic_llava.sparsity.training import scheduled_keep_rate, temperature
from dynamic_llava.train.checkpoints import Checkpoints, least_bytes
from dynamic_llava.train.failures import agree_on_failure, handle_unread
from dynamic_llava.train.health import check_finite, trained_weights
from dynamic_llava.train.meter import SCHEDULED, Meter, batch_flops, peak_flops
from dynamic_llava.train.optimizer import build_optimizer, clip_separately

Batch = dict[str, Tensor]
_NOTHING: Batch = {name: torch.zeros(0, 1) for name in ("input_ids", "attention_mask", "output_mask", "labels")}
"""A batch without samples."""


@dataclass(frozen=True)
class Denominators:
    """What the losses of one optimizer step are divided by: counts over all its batches on all ranks, () float32."""

    tokens: Tensor
    """Learned tokens."""
    samples: dict[str, Tensor]
    """Samples of each of the method's own losses, by its name."""


class DynamicLlavaTrainer(Trainer):
    """Trains a DynamicLlavaForConditionalGeneration on batches of `data.Collator`.

    Losses, noise and gradients of an optimizer step depend on its samples alone, not on how they are spread over
    accumulation steps and processes: every loss is a sum divided by a count over the whole step, and noise is drawn per
    sample from (seed, epoch, step, sample id).
    """

    # transformers >= 5.2x asks this attribute, earlier ones model_accepts_loss_kwargs: compute_loss scales by itself.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, train_config: TrainConfig, lora: LoraConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, which would split batches by DataParallel; start one "
                "process per GPU (torchrun --nproc_per_node), or make one GPU visible"
            )
        self.model_accepts_loss_kwargs = True
        self.train_config = train_config
        config = self.accelerator.unwrap_model(self.model).config
        self.settings: SparsityConfig = config.sparsity
        self.method = choose_method(self.settings, **train_config.switches)
        shape = llava_shape(config)
        learned = learned_costs(self.settings, shape.decoder.hidden, self.method)
        self.flops = training_flops(shape, self.settings, learned, train_config, lora)
        self.peak = peak_flops(train_config, self.args.device)
        self.meter = Meter()
        self.checkpoints: Checkpoints | None = None
        """Where checkpoints go; a trainer that is to write any needs it."""
        self._tau = train_config.tau_start
        self._denominators: Denominators | None = None
        self._record: SparsityRecord | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Build AdamW with the learning rates of `train_config`, once."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.accelerator.unwrap_model(self.model), self.train_config)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Fetch the batches of one optimizer step and count over them, and over all ranks, what losses divide by.

        What goes wrong here in one process is raised in all of them, before anything is computed: DataError for a
        sample whose image cannot be decoded, unless data.broken is skip.
        """
        batches: list[Batch] = []
        failure: Exception | None = None
        try:
            batches += islice(epoch_iterator, num_batches)
            unread = [sample for batch in batches for sample in batch.pop("unread", ())]
            if unread:
                failure = handle_unread(unread, self.train_dataset.config, Path(self.args.output_dir) / BROKEN)
        except Exception as error:
            failure = error
        agree_on_failure(failure)
        self._denominators = self._count(batches, device)
        return batches, self._denominators.tokens

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward on one batch and note the gradient that entered the keep mask."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._record is not None:
            largest = self._record.mask_gradient
            scaled = loss.new_zeros(()) if largest is None else largest / self.accelerator.num_processes
            self.meter.add_peak("mask_gradient", scaled)
            self._record = None
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's part of the step's loss, times the number of ranks that the gradients are averaged over.

        The model divides its sums by counts over the whole step: of learned tokens, and of the samples that each of the
        method's own losses is a mean over (Eq. 10; docs/method.md, section 3).
        """
        counts = self._denominators
        if counts is None or not model.training:
            raise RuntimeError("compute_loss belongs to training; evaluate with the model itself")
        inputs = dict(inputs)
        self._tau = self.tau()
        sample_ids = inputs.pop("sample_ids")
        sample_key = self.sample_key(sample_ids)
        targets = self.targets()
        outputs: DynamicLlavaOutput = model(
            **inputs,
            **self.switches(),
            distill=self.train_config.distill,
            tau=self._tau,
            sample_key=sample_key,
            num_items_in_batch=counts.tokens,
            num_samples_in_batch=counts.samples,
            loss_scale=self.accelerator.num_processes,
            skip_logits=True,
            use_cache=False,
        )
        loss = outputs.loss
        assert loss is not None and outputs.lm_loss is not None
        self.meter.add_share("lm_loss", outputs.lm_loss)
        if outputs.distill_loss is not None:
            self.meter.add_share("distill_loss", outputs.distill_loss)
        for name, rate in targets.items():
            exact = loss.new_tensor(rate, dtype=torch.float64)
            self.meter.add_ratio(target_of(name), exact, torch.ones_like(exact))
        lengths = inputs["attention_mask"].sum(1) * (sample_ids != FILLER)
        self.meter.add_tokens(lengths.sum())
        self.meter.add_flops(batch_flops(self.flops, inputs, lengths))
        if outputs.method_losses is not None:
            self._note(outputs, outputs.method_losses)
        check_finite("the loss", loss, self.state.global_step + 1)
        loss = loss.float() * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def tau(self) -> float:
        """Return the temperature of the current step: a function of the step, so that a resumed run continues it."""
        config = self.train_config
        return temperature(self.state.global_step, self.state.max_steps, config.tau_start, config.tau_end)

    def targets(self) -> dict[str, float]:
        """Return the keep rates that the current step aims at, where a schedule moves them: those of `SCHEDULED`.

        They are a function of the step alone, so that a resumed run continues them.
        """
        schedule = self.train_config.keep_rate_schedule
        if schedule is None:
            return {}
        place = self.state.global_step, self.state.max_steps
        rates = self.method.keep_rates(self.settings)
        return {
            name: scheduled_keep_rate(*place, rates[name], schedule.share, schedule.shape)
            for name in SCHEDULED
            if name in rates
        }

    def switches(self) -> dict[str, Any]:
        """Return what a training call decides by, as arguments of `forward`: the method, at the rates it aims at."""
        targets = self.targets()
        own: dict[str, Any] = {name: rate for name, rate in targets.items() if name == "image_keep_rate"}
        method = replace(self.method, **own) if own else self.method
        return {"method": method, "output_keep_rate": targets.get("output_keep_rate")}

    def on_device(self, batch: Batch) -> Batch:
        """Return a batch as training hands it to the model: on the device, and in DeepSpeed's number format."""
        return self._prepare_inputs(batch)  # type: ignore[no-any-return]

    def sample_key(self, sample_ids: Tensor) -> Tensor:
        """Return (B,) int64 noise keys from (seed, epoch, step, sample id)."""
        return fold_key(self.args.seed, self.epoch(), self.state.global_step, sample_ids)

    def epoch(self) -> int:
        """Return the epoch that the next step belongs to; a resumed run continues it."""
        return int(self.state.epoch or 0)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the window's own values to the line of a training step; leave out means over the latest start alone."""
        for name in ("train_loss", "train_samples_per_second", "train_steps_per_second"):
            logs.pop(name, None)
        if "loss" in logs:
            logs.update(self.meter.collect(self.accelerator, self.state.global_step, self.peak))
            self.meter = Meter(step=self.state.global_step)
            if not (self.method.is_dense or self.method.training_free):
                logs["tau"] = self._tau
        super().log(logs, *args, **kwargs)

    def restart_meter(self) -> None:
        """Begin the log's first window at the current step, which is not 0 in a resumed run."""
        self.meter = Meter(step=self.state.global_step)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient's norm before clipping; a DeepSpeed engine has already used the gradient by now."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            check_finite("the gradient's norm", torch.as_tensor(norm), self.state.global_step + 1)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, which counts only once it is complete; none is written of weights that are not finite."""
        assert self.checkpoints is not None
        self.check_weights()
        save = partial(super()._save_checkpoint, model, trial)
        self.checkpoints.write(self.state.global_step, save, least_bytes(self.model, optimizer=True))

    def check_weights(self) -> None:
        """Raise NotFinite in every process unless all trained weights are finite."""
        check_finite("a trained weight", trained_weights(self.model), self.state.global_step)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the current step; every process calls it."""
        self._save_checkpoint(self.model, trial=None)

    def clip_separately(self) -> None:
        """Clip each predictor's gradient by itself and log the norms (`train.clip_predictors_separately`)."""
        norms = clip_separately(self.accelerator.unwrap_model(self.model), self.train_config.max_grad_norm)
        for part, norm in norms.items():
            self.meter.add_peak(f"grad_norm_{part}", norm)

    def _get_train_sampler(self, train_dataset: SftDataset | None = None) -> EpochSampler:
        """Return the order of the samples, which every process computes for itself."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(
            len(dataset),
            step_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.seed,
            epoch=self.epoch,
            lengths=dataset.lengths if self.train_config.group_by_length else None,
        )

    def _note(self, outputs: DynamicLlavaOutput, terms: dict[str, Tensor]) -> None:
        record = outputs.sparsity
        assert record is not None
        for name, value in terms.items():
            self.meter.add_share(name, value)
        for name, where in tokens_of_rates(record).items():
            self.meter.add_ratio(name, (record.keep_mask * where).sum(), where.sum())
        self._record = record

    def _count(self, batches: list[Batch], device: torch.device) -> Denominators:
        names = list(self._samples(_NOTHING))
        local = torch.zeros(1 + len(names), dtype=torch.float64, device=device)
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            real_B = batch["sample_ids"] != FILLER
            counts = [(where_B & real_B).sum() for where_B in self._samples(batch).values()]
            local += torch.stack([(batch["labels"][:, 1:] != -100).sum(), *counts]).double()
        # At least 1, so that a step without any learned token or applicable sample gives 0 and not NaN.
        total = self.accelerator.reduce(local, reduction="sum").clamp(min=1).float()
        return Denominators(total[0], dict(zip(names, total[1:], strict=True)))

    def _samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return (B,) bool for each of the method's own losses: the samples of a batch that it is a mean over."""
        model = self.accelerator.unwrap_model(self.model)
        image = batch["input_ids"] == model.config.image_token_id
        layout = TokenLayout.build(image, batch["attention_mask"], batch["output_mask"], image_lengths=1)
        prompt = any(cut.prompt for cut in self.method.cuts(model.config.text_config.num_hidden_layers))
        asked = asked_by(batch["labels"], batch["output_mask"])
        decided = decided_tokens(layout, self.settings, asked, prompt=prompt)
        return self.method.loss_samples(layout, decided, self.settings)


def tokens_of_rates(record: SparsityRecord) -> dict[str, Tensor]:
    """Return (B, N) bool for each keep rate: the tokens of a training pass that it is a share of."""
    return {
        "image_keep_rate": record.layout.is_image,
        "output_keep_rate": record.sparsified_output,
        "prompt_keep_rate": record.sparsified_prompt,
    }

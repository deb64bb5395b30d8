"""DreamBooth-LoRA: teach a text-to-image pipeline one subject from a few pictures.

DreamBooth (Ruiz et al. 2023, arXiv:2208.12242) binds a rare token to the subject; LoRA (Hu et al. 2022,
arXiv:2106.09685) trains low-rank updates of the weights. The result is one file that `pipe.load_lora_weights(folder)`
loads exactly.

Every random draw is a function of (seed, step, process): a resumed run ends at the weights of an uninterrupted one.
"""

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, offload_models
from torch import Tensor, nn
from tqdm import tqdm

from nearid_personalize.attention import check_attention, using_attention
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.lora.files import WEIGHTS_NAME, load_lora, read_metadata
from nearid_personalize.training.checkpoints import checkpoint_step
from nearid_personalize.training.lora.adapters import (
    PromptedDenoiser,
    add_adapters,
    make_optimizer,
    make_schedule,
    parameter_groups,
    trained_text,
)
from nearid_personalize.training.lora.base_model import load_base_model
from nearid_personalize.training.lora.checkpoints import (
    checkpoint_folder,
    find_checkpoint,
    save_checkpoint,
    save_only_adapters,
)
from nearid_personalize.training.lora.families import Family, Table
from nearid_personalize.training.lora.noising import Noising, noising_of
from nearid_personalize.training.lora.options import ComputeOptions, LoraOptions
from nearid_personalize.training.lora.pictures import (
    Batch,
    Picture,
    TrainingSet,
    batch_loss,
    draw_class_pictures,
    encode_all,
    fingerprint,
    make_batch,
    read_class_pictures,
    read_references,
    training_sizes,
)
from nearid_personalize.training.lora.publishing import finish_trackers, start_trackers, tracker_arguments
from nearid_personalize.training.lora.reward import Enrolled, IdentityTerm, enroll_reward
from nearid_personalize.training.lora.saving import save_lora
from nearid_personalize.training.lora.sharding import (
    average_gradients,
    everywhere,
    follow,
    lead,
    requested_sharding,
    same_everywhere,
    shard_frozen,
)
from nearid_personalize.training.lora.validation_plan import asked_steps

__all__ = ["WEIGHTS_NAME", "LoraOptions", "Snapshot", "load_lora", "read_metadata", "save_lora", "train_lora"]


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


LOSS_DRAWS = 16  # noised pictures of a validation loss, at least; more would cost what drawing pictures needs


@dataclass(frozen=True)
class Snapshot:
    """What a validation sees of a run."""

    pipe: DiffusionPipeline
    """Ready to draw, with the LoRA as it would be saved now."""
    step: int
    """Optimizer steps done."""
    loss: float
    """Of the last step."""
    save: Callable[..., None]
    """Writes the LoRA into a folder, with more metadata if given."""
    loss_on: Callable[[list[Picture]], float]
    """See `LoraRun.loss_on`."""
    guard_reward: Callable[..., str] = lambda **values: ""
    """Called with adherence=… and diversity=…; ends the reward where they lost too much, and returns why, else ""."""
    log: Callable[..., None] = lambda values, step: None
    """Called with figures by name and `step`, for the trackers."""


OnStep = Callable[[int, float], bool | None]
"""Told of every step, counted from 1, and its loss; False ends the training there. All processes must answer alike."""


Validate = Callable[[Snapshot], bool | None]
"""Called by the main process every `validate_every` steps and after the last; False ends the training there."""


@runtime_checkable
class PlannedValidate(Protocol):
    """A `Validate` that says itself after which steps it is called."""

    clock: Callable[[], float]
    """Tells seconds."""

    def plan(self, snapshot: Snapshot, training_step: float) -> Sequence[int]:
        """The steps, asked once by the main process before training begins. training_step: seconds of a step."""

    def __call__(self, snapshot: Snapshot) -> bool | None:
        """Look at a step; False ends the training there."""


# --- base model ------------------------------------------------------------------------------------------------------
def load_family(options: LoraOptions, half: torch.dtype | None = None, device: str = "cpu") -> Family:
    """Load the base model onto the CPU. half: type of the frozen weights where `base_precision` asks for half
    precision.
    """
    return load_base_model(options, frozen_precision(options.compute, half, device))


def frozen_precision(options: ComputeOptions, half: torch.dtype | None, device: str) -> torch.dtype:
    """The type of the frozen weights. half: of the arithmetic."""
    halves = options.base_precision == "same" or (options.base_precision == "auto" and device != "cpu")
    return half if half and halves else torch.float32


def choose_autocast(precision: str, accelerator: Accelerator) -> torch.dtype | None:
    """The precision of our own autocast; float32: none, not even accelerate's; None: accelerate's, or none.

    "auto" is accelerate's choice; where it has none, bf16 if the hardware multiplies it.
    """
    if precision != "auto":
        return HALF.get(precision, torch.float32)
    if accelerator.mixed_precision != "no":  # which accelerate leaves undone for float16 on a CPU
        return None if accelerator.native_amp else HALF.get(accelerator.mixed_precision)
    if accelerator.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities: dict[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # torch 2.7 cannot tell; fp32 is never wrong
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else None


# --- what a run holds -----------------------------------------------------------------------------------------------
def prepare_data(
    family: Family, options: LoraOptions, references: list[Picture], accelerator: Accelerator
) -> tuple[TrainingSet, Table]:
    """Draw missing class pictures, encode pictures and prompts, leave the pipeline on the CPU."""
    device = accelerator.device
    if options.data.prior_pictures:
        sizes = training_sizes(options.data, family, references)
        with offload_models(family.denoiser, device=device), family.ready_to_draw(device), torch.random.fork_rng():
            draw_class_pictures(family, options, sizes, accelerator.process_index, accelerator.num_processes)
        accelerator.wait_for_everyone()
    with offload_models(family.pipe.vae, device=device):
        data = encode_all(family, options.data, references, read_class_pictures(options), options.reward.texts)
    with offload_models(*family.text_encoders().values(), device=device), torch.no_grad():
        table = family.encode_prompts(data.prompts, device)
    if trained_text(family, options.adapter, options.data.token)[0]:
        table |= family.tokenize(data.prompts)
    return data, {name: tensor.cpu() for name, tensor in table.items()}


def adapt(family: Family, options: LoraOptions, device: torch.device, autocast: torch.dtype | None) -> PromptedDenoiser:
    """Put the LoRA into the pipeline, and its UNet into the form that trains fastest."""
    if family.denoiser_name == "unet" and device.type == "cpu":
        family.pipe.unet.set_attn_processor(AttnProcessor())  # SDPA's backward pass is never faster there
    if family.denoiser_name == "unet" and autocast in HALF.values():
        family.pipe.unet.to(memory_format=torch.channels_last)  # half-precision convolutions want channels last
    return add_adapters(family, options.adapter, options.data.token, autocast)


def prepare_training(
    adapted: PromptedDenoiser,
    options: LoraOptions,
    accelerator: Accelerator,
    sharding: FullyShardedDataParallelPlugin | None,
) -> tuple[nn.Module, Any, Any]:
    """The model as accelerate runs it, its optimizer and its schedule."""
    optimizer = make_optimizer(parameter_groups(adapted, options.optimization), options.optimization)
    schedule = make_schedule(optimizer, options.optimization, options.steps)
    save_only_adapters(accelerator, adapted)
    if sharding:
        shard_frozen(adapted.denoiser, accelerator.device, sharding)
        adapted.text.to(accelerator.device)
    # The loop itself averages the gradients: memory may run out in one process, and then all begin the step anew
    model = accelerator.prepare_model(adapted, None if not sharding else False, evaluation_mode=True)
    return model, *accelerator.prepare(optimizer, schedule)


@dataclass
class LoraRun:
    """All that lasts from one step to the next; made by `open`."""

    options: LoraOptions
    accelerator: Accelerator
    family: Family
    noising: Noising
    data: TrainingSet
    table: Table
    """What the denoiser is told of each prompt, a row for each."""
    reward: IdentityTerm | None
    stock_processors: Mapping[str, Any]
    """The UNet's attention processors as they were loaded."""
    adapted: PromptedDenoiser
    """The model itself, with its LoRA."""
    model: nn.Module
    """What accelerate made of `adapted`."""
    trained: list[nn.Parameter]
    optimizer: Any
    schedule: Any
    scaler: torch.amp.GradScaler
    """Of our own float16 autocast; switched off under any other precision, and where accelerate scales."""
    ema: EMAModel | None
    micro_batch: int
    """Pictures on the device at once; halved where memory runs out."""
    sharding: FullyShardedDataParallelPlugin | None = None

    @classmethod
    def open(
        cls,
        options: LoraOptions,
        accelerator: Accelerator,
        references: list[Picture],
        enrolled: Enrolled | None = None,
        sharding: FullyShardedDataParallelPlugin | None = None,
    ) -> "LoraRun":
        """Load the base model, encode pictures and prompts, add the LoRA, and prepare it for training."""
        if accelerator.num_processes == 1:
            sharding = None
        device, autocast = accelerator.device, choose_autocast(options.compute.precision, accelerator)
        half = autocast or HALF.get(accelerator.mixed_precision)
        family = load_family(options, half, device.type)
        trained_text(family, options.adapter, options.data.token)  # may refuse: better now than after the pictures
        data, table = prepare_data(family, options, references, accelerator)
        reward = IdentityTerm.open(options, family, data, *enrolled) if enrolled else None
        stock_processors = getattr(family.denoiser, "attn_processors", {})
        adapted = adapt(family, options, device, autocast)
        if checkpoints_gradients(options.compute, family, device.type):
            family.denoiser.enable_gradient_checkpointing()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        model, optimizer, schedule = prepare_training(adapted, options, accelerator, sharding)
        same_everywhere(trained)
        adapted.drop(True)
        ours = autocast == torch.float16 and accelerator.scaler is None  # accelerate scales under its own float16
        decay = options.optimization.ema_decay
        run = cls(
            options=options,
            accelerator=accelerator,
            family=family,
            noising=noising_of(family.pipe.scheduler, options.noise),
            data=data,
            table=table,
            reward=reward,
            stock_processors=stock_processors,
            adapted=adapted,
            model=model,
            trained=trained,
            optimizer=optimizer,
            schedule=schedule,
            scaler=torch.amp.GradScaler(device.type, enabled=ours),
            ema=EMAModel(trained, decay=decay) if decay else None,
            micro_batch=micro_batch_size(options, family, largest_picture(data)),
            sharding=sharding,
        )
        run.register_for_checkpointing()
        return run

    def register_for_checkpointing(self) -> None:
        """Let accelerate keep and restore what is neither model nor optimizer. The order is that of its files."""
        if self.scaler.is_enabled():
            self.accelerator.register_for_checkpointing(self.scaler)
        if self.ema:
            self.accelerator.register_for_checkpointing(self.ema)
        if self.reward:
            self.accelerator.register_for_checkpointing(self.reward.guard)

    def predict(self, batch: Batch) -> Tensor:
        """The model's answer [B,C,h,w] to a batch."""
        return self.ask(self.model, self.table, batch)

    def ask(self, model: nn.Module, table: Table, batch: Batch) -> Tensor:
        """What `model` answers [B,C,h,w] to a batch whose prompts are rows of `table`."""
        device = self.accelerator.device
        rows = {name: tensor[batch.prompts].to(device) for name, tensor in table.items()}
        asked = (batch.noised.noisy, batch.noised.timesteps, rows, batch.prompt_index, batch.frame)
        return model(*(a if isinstance(a, dict) else a.to(device) for a in asked))

    def take_step(self, step: int) -> float:
        """Do optimizer step number `step`, counted from 1; return the loss of its last batch."""
        accelerator = self.accelerator
        loss = self.make_gradients(step)
        if accelerator.num_processes > 1:
            average_gradients(self.trained, accelerator)
        self.scaler.unscale_(self.optimizer)
        accelerator.clip_grad_norm_(self.trained, self.options.optimization.max_gradient_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.step(self.trained)
        return loss

    def make_gradients(self, step: int) -> float:
        """Make this process's gradients of a step, as often as it takes until they fit; the last batch's loss."""
        while (loss := self.try_gradients(step)) is None:
            self.use_less_memory()
        return loss

    def try_gradients(self, step: int) -> float | None:
        """Make this process's gradients of a step; the last batch's loss, None where memory ran out in any process."""
        loss = None
        try:
            loss = self.add_gradients(step)
        except RuntimeError as error:
            # Sharded processes wait for each other inside the passes: none could begin anew
            if self.sharding or not should_reduce_batch_size(error):
                raise
        if everywhere(loss is not None, self.accelerator):
            return loss
        self.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)  # outside the handler: the traceback keeps what the failed pass had
        return None

    def add_gradients(self, step: int) -> float:
        """Add up the gradients of a step's batches, a micro-batch at a time; the last batch's loss."""
        accelerator, passes = self.accelerator, self.options.optimization.gradient_accumulation_steps
        if self.reward and self.reward.due(step):
            self.add_reward(self.reward, step)
        for index in range((step - 1) * passes, step * passes):
            turn = index * accelerator.num_processes + accelerator.process_index
            batch = make_batch(self.data, self.noising, self.options, turn)
            total = torch.zeros((), device=accelerator.device)
            for micro_batch in batch.cut(self.micro_batch):
                loss = batch_loss(self.predict(micro_batch), micro_batch)
                accelerator.backward(self.scaler.scale(loss / passes))
                total += loss.detach()
        return total.item()

    def seconds_per_step(self, clock: Callable[[], float]) -> float:
        """The time of an optimizer step, on average over the run, from passes that leave no trace; in every process."""
        options = self.options
        with torch.random.fork_rng():
            self.seconds_of(1, clock)  # the first is slower
            plain = self.seconds_of(1, clock)
            if self.reward is None:
                return plain
            rewarded = self.seconds_of(options.first_reward_step, clock)
        share = (1 - options.reward.reward_warmup) / options.reward.reward_every
        return plain + share * (rewarded - plain)

    def seconds_of(self, step: int, clock: Callable[[], float]) -> float:
        """The time of the passes of a step, whose gradients are thrown away."""
        began, device = clock(), self.accelerator.device
        self.make_gradients(step)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        self.optimizer.zero_grad()
        return clock() - began

    def add_reward(self, reward: IdentityTerm, step: int) -> None:
        """Add the reward's gradient of optimizer step number `step`."""
        accelerator = self.accelerator
        place, places = accelerator.process_index, accelerator.num_processes
        self.adapted.drop(False)  # the pictures are those that the LoRA draws
        try:
            for loss in reward.losses(self.predict, step, place, places, self.micro_batch):
                accelerator.backward(self.scaler.scale(loss))
        finally:
            self.adapted.drop(True)

    def use_less_memory(self) -> None:
        """Halve the micro-batch; at one picture, checkpoint the gradients. InputError when neither is left."""
        denoiser = self.family.denoiser
        if self.micro_batch > 1:
            self.micro_batch = math.ceil(self.micro_batch / 2)
        elif self.options.compute.gradient_checkpointing == "auto" and not denoiser.is_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        else:
            raise InputError(
                "out of memory with one picture at a time: try --gradient-checkpointing on, a smaller --resolution, "
                "or --base-precision same"
            )
        if self.accelerator.is_main_process:
            recomputed = ", gradient checkpointing" if denoiser.is_gradient_checkpointing else ""
            tqdm.write(f"out of memory: going on with micro-batches of {self.micro_batch}{recomputed}", sys.stderr)

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        """Put the average of the LoRA, where one is kept, in the place of the LoRA."""
        kept = [parameter.detach().clone() for parameter in self.trained]
        if self.ema:
            self.ema.copy_to(self.trained)
        try:
            yield
        finally:
            for parameter, value in zip(self.trained, kept):
                parameter.data.copy_(value)

    @contextmanager
    def ready_to_draw(self) -> Iterator[DiffusionPipeline]:
        """Lend the pipeline: it draws as a freshly loaded one with the LoRA as saved, and training notices nothing."""
        pipe, unet = self.family.pipe, getattr(self.family.pipe, "unet", None)
        with ExitStack() as stack:
            stack.enter_context(self.as_saved())
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.no_grad())
            sharded = self.sharding is not None
            stack.enter_context(self.family.ready_to_draw(self.accelerator.device, sharded))
            if unet is not None:
                stack.callback(unet.set_attn_processor, unet.attn_processors)
                unet.set_attn_processor(dict(self.stock_processors))  # it empties what it is given
            self.adapted.drop(False)
            stack.callback(self.adapted.drop, True)
            if self.sharding:
                stack.enter_context(lead(self.family.denoiser))
            yield pipe

    @torch.no_grad()
    def loss_on(self, pictures: list[Picture]) -> float:
        """The denoising loss of pictures, on the same noise at every step. Main process alone, inside
        `ready_to_draw`.
        """
        plain = {"prior_pictures": 0, "class_prompts": (), "caption_dropout": 0.0, "noise_offset": 0.0}
        options = self.options.but(**plain, batch_size=len(pictures))
        data, table = prepare_data(self.family, options, pictures, self.accelerator)
        passes = math.ceil(LOSS_DRAWS / len(pictures))
        batches = [make_batch(data, self.noising, options, turn) for turn in range(passes)]
        micro_batches = [micro_batch for batch in batches for micro_batch in batch.cut(self.micro_batch)]
        losses = [batch_loss(self.ask(self.adapted, table, one), one) for one in micro_batches]
        return float(torch.stack(losses).sum()) / passes

    def write_lora(self, folder: Path, step: int, **metadata: Any) -> None:
        """Write the LoRA file, and in it how it was made."""
        options = self.options
        told = {
            "base_model": options.base_model,
            "prompt": options.data.prompt,
            "token": options.data.token,
            "rank": options.adapter.rank,
            "alpha": options.adapter.alpha or options.adapter.rank,
            "steps": step,
            "references": self.data.fingerprint,
        }
        if self.reward:
            ended = self.reward.guard.stopped_at
            model, weight = options.reward.reward_model, options.reward.reward_weight
            told["reward"] = {"model": model, "weight": weight, "ended_after": ended}
        with self.as_saved():
            save_lora(self.adapted, folder, {**told, **metadata})


def largest_picture(data: TrainingSet) -> int:
    """Pixels of the largest picture that is trained on."""
    return max(int(sample.frame[4] * sample.frame[5]) for sample in data.samples)


def micro_batch_size(options: LoraOptions, family: Family, pixels: int) -> int:
    """How many pictures of so many pixels go through at once; with "auto", as many as the family allows."""
    if options.compute.micro_batch_size != "auto":
        return min(options.compute.micro_batch_size, options.data.batch_size)
    return min(max(1, family.pixels_at_once // pixels), options.data.batch_size)


def checkpoints_gradients(options: ComputeOptions, family: Family, device: str) -> bool:
    """Whether gradients are checkpointed from the first step on."""
    if options.gradient_checkpointing == "auto":
        return family.checkpointed and device != "cpu"
    return options.gradient_checkpointing == "on"


# --- the loop --------------------------------------------------------------------------------------------------------
def ask_main_process(run: LoraRun, look: Callable[[DiffusionPipeline], Any]) -> Any:
    """What `look` answers in the main process, lent the pipeline; every process learns it."""
    answer: list[Any] = [None]
    if run.accelerator.is_main_process:
        with run.ready_to_draw() as pipe:
            answer[0] = look(pipe)
    elif run.sharding:
        follow(run.family.denoiser, run.accelerator.device)
    return broadcast_object_list(answer)[0]


def snapshot_of(run: LoraRun, pipe: DiffusionPipeline, step: int, loss: float) -> Snapshot:
    """What a validation sees of a run."""
    looks = {"guard_reward": partial(run.reward.guard.look, step)} if run.reward else {}
    return Snapshot(
        pipe=pipe,
        step=step,
        loss=loss,
        save=partial(run.write_lora, step=step),
        loss_on=run.loss_on,
        log=run.accelerator.log,
        **looks,
    )


def steps_to_validate(run: LoraRun, validate: Validate | None, step: int) -> frozenset[int]:
    """After which steps the main process validates a run with `step` steps behind it; every process learns them."""
    asked = asked_steps(run.options.validate_every, run.options.steps)
    if validate is None or not asked:
        return frozenset()
    if not isinstance(validate, PlannedValidate):
        return frozenset(asked)
    planned, seconds = validate, run.seconds_per_step(validate.clock)
    return frozenset(
        ask_main_process(run, lambda pipe: tuple(planned.plan(snapshot_of(run, pipe, step, math.nan), seconds)))
    )


def goes_on(run: LoraRun, validate: Validate, step: int, loss: float) -> bool:
    """Let the main process validate; every process learns whether training goes on, and whether its reward does."""
    guard = run.reward.guard if run.reward else None

    def look(pipe: DiffusionPipeline) -> tuple[bool, int | None]:
        going = validate(snapshot_of(run, pipe, step, loss)) is not False
        return going, guard.stopped_at if guard else None

    going, stopped_at = ask_main_process(run, look)
    if guard:
        guard.stopped_at = stopped_at
    return going


def train_lora(options: LoraOptions, validate: Validate | None = None, on_step: OnStep | None = None) -> Path:
    """Train a LoRA; returns the folder that holds `pytorch_lora_weights.safetensors`.

    validate: called every `validate_every` steps and after the last, or as it plans; may end the run. on_step: may end
    it at any step, without a last validation.

    Raises InputError for unusable references, base model, token, checkpoint or output folder.
    """
    with requested_sharding() as sharding, ExitStack() as undo:
        accelerator = Accelerator(step_scheduler_with_optimizer=False, **tracker_arguments(options))
        check_attention(options.compute.attention, accelerator.device)
        references = read_references(options.data)
        same = {"references": fingerprint(references), "number of processes": accelerator.num_processes}
        checkpoint = find_checkpoint(options, same)
        check_writable(options.output, "--output")
        set_seed(options.seed)
        enrolled = enroll_reward(options, references, accelerator.device, validate)
        run = LoraRun.open(options, accelerator, references, enrolled, sharding)
        undo.enter_context(using_attention(run.family.denoiser, options.compute.attention, accelerator.device))
        start_trackers(accelerator, options)
        step, every = 0, options.checkpoints.checkpoint_every
        if checkpoint is not None:
            accelerator.load_state(str(checkpoint))
            step = checkpoint_step(checkpoint)
        looked_at = steps_to_validate(run, validate, step)

        progress = tqdm(initial=step, total=options.steps, desc="LoRA", disable=not accelerator.is_local_main_process)
        while step < options.steps:
            step += 1
            rate = run.schedule.get_last_lr()[0]
            loss = run.take_step(step)
            accelerator.log({"loss": loss, "learning_rate": rate}, step=step)  # to the trackers, if any
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            progress.update()
            if on_step is not None and on_step(step, loss) is False:
                break
            # Before the checkpoint, which keeps what the validation made of the reward
            if validate and step in looked_at and not goes_on(run, validate, step, loss):
                break
            if every and step % every == 0 and step < options.steps:
                save_checkpoint(accelerator, options, step, same, partial(run.write_lora, step=step))

        progress.close()
        finish_trackers(accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            run.write_lora(options.output, step)
            if not options.checkpoints.keep_checkpoints:
                shutil.rmtree(checkpoint_folder(options), ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    return options.output

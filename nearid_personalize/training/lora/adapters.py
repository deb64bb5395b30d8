"""What a LoRA run trains: layers in the denoiser and the text encoders, the token's row, and their optimizer."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from nearid_personalize.errors import InputError
from nearid_personalize.lora.check import check_peft
from nearid_personalize.training.lora.families import Family, Table
from nearid_personalize.training.lora.options import AdapterOptions, OptimizerOptions

TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


TOKEN_LAYER = "token_embedding"


class PromptedDenoiser(nn.Module):
    """Denoiser and trained text encoders as one module, so that one `prepare` covers both. autocast: see
    `autocast_to`.
    """

    def __init__(self, family: Family, text_names: Sequence[str] = (), autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.family = family
        self.denoiser = family.denoiser
        self.text = nn.ModuleDict({name: getattr(family.pipe, name) for name in text_names})
        self.autocast = autocast

    def forward(self, noisy: Tensor, timesteps: Tensor, table: Table, prompt_index: Tensor, frame: Tensor) -> Tensor:
        """Predict the target [B,C,h,w]; see `Family.denoise`. prompt_index: [B], rows of `table`."""
        # accelerate's own precision is fixed once for a whole process
        with autocast_to(self.autocast, noisy.device.type):
            embedded = self.family.embed(dict(self.text.items()), table) if self.text else table
            rows = {name: tensor[prompt_index] for name, tensor in embedded.items()}
            return self.family.denoise(self.denoiser, noisy, timesteps, rows, frame)

    def drop(self, on: bool) -> None:
        """Switch the LoRA layers' dropout; all else stays as in sampling, where a dropout of 0 would only cost time."""
        for name, module in self.named_modules():
            if ".lora_dropout." in name:
                module.train(on)


def autocast_to(dtype: torch.dtype | None, device: str) -> AbstractContextManager[Any]:
    """Autocast in half precision; for float32, none at all, not even one around it; None: as it is outside."""
    if dtype is None:
        return nullcontext()
    if dtype == torch.float32:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype)


def trained_text(family: Family, options: AdapterOptions, token: str) -> tuple[tuple[str, ...], int]:
    """Which text encoders are trained, and their LoRA's rank; InputError when family, token and options disagree, or
    releases."""
    rank = family.text_rank if options.text_rank is None else options.text_rank
    if rank and not family.text_names:
        raise InputError(f"--text-rank {rank}: {type(family.pipe).__name__} takes no text encoder LoRA; give 0")
    if options.token_init and not rank:
        raise InputError("--token-init needs a trained token: give a --text-rank above 0, e.g. 8")
    names = family.text_names if rank else ()
    if names:
        check_peft()
    for name in names if options.train_token else ():
        token_id(family.tokenizer(name), token, "token")
    return names, rank


def add_adapters(
    family: Family, options: AdapterOptions, token: str, autocast: torch.dtype | None = None
) -> PromptedDenoiser:
    """Freeze the pipeline's models and put LoRA layers into them, float32 whatever the frozen weights are."""
    names, rank = trained_text(family, options, token)
    denoiser = family.denoiser
    for module in (denoiser, *family.text_encoders().values()):
        module.requires_grad_(False)
    layers = options.target_modules or family.attention_layers
    if options.layers == "attention+convolutions" and not options.target_modules:
        layers += family.convolution_layers
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or options.rank,
        lora_dropout=options.dropout,
        use_dora=options.dora,
        target_modules=list(layers),
    )
    try:
        denoiser.add_adapter(config)
    except ValueError as error:
        raise InputError(f"--target-modules {layers}: {str(error).splitlines()[0]}") from error
    cast_training_params(denoiser, torch.float32)
    for name in names:
        add_text_adapter(getattr(family.pipe, name), family.tokenizer(name), rank, options, token)
    return PromptedDenoiser(family, names, autocast)


def add_text_adapter(text_encoder: Any, tokenizer: Any, rank: int, options: AdapterOptions, token: str) -> None:
    """Put LoRA layers into one CLIP text encoder, the token's row included when it is to be trained."""
    layers = TEXT_LAYERS + ((TOKEN_LAYER,) if options.train_token else ())
    # One rank for all: diffusers reads it so from files that lost their metadata
    text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)))
    cast_training_params(text_encoder, torch.float32)
    if options.train_token:
        free_token_row(text_encoder, tokenizer, token, options.token_init)


def token_id(tokenizer: Any, word: str, flag: str) -> int:
    """Return the one id of `word`; InputError naming `flag` when the tokenizer splits or does not know it."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(f"--{flag} {word!r} is {len(ids)} pieces of this tokenizer; choose a one-piece word, e.g. sks")
    return ids[0]


def free_token_row(text_encoder: Any, tokenizer: Any, token: str, init: Sequence[str]) -> None:
    """Train one row of the token embedding, by its LoRA (A `[rank,vocabulary]`, B `[D,rank]`).

    The update of row i is `B A[:, i]`. With A frozen to a single 1 in the token's column, B's first column is the
    change of the token's row.
    """
    row = token_id(tokenizer, token, "token")
    layer = text_encoder.get_input_embeddings()
    with torch.no_grad():
        layer.lora_embedding_A["default"].zero_()[0, row] = 1
        layer.lora_embedding_B["default"].zero_()
        if init:
            words = layer.base_layer.weight[[token_id(tokenizer, word, "token-init") for word in init]]  # [words,D]
            layer.lora_embedding_B["default"][:, 0] = words.mean(0) - layer.base_layer.weight[row]
    layer.lora_embedding_A["default"].requires_grad_(False)


# --- optimizer -------------------------------------------------------------------------------------------------------
def parameter_groups(model: PromptedDenoiser, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Sort trained parameters by learning rate: denoiser, text layers, token rows."""
    text = {name: p for name, p in model.text.named_parameters() if p.requires_grad}
    family = model.family
    rates = {
        "denoiser": options.learning_rate or family.learning_rate,
        "text": options.text_learning_rate or family.text_learning_rate,
        "token": options.token_learning_rate or family.token_learning_rate,
    }
    parameters = {
        "denoiser": [p for p in model.denoiser.parameters() if p.requires_grad],
        "text": [p for name, p in text.items() if TOKEN_LAYER not in name],
        "token": [p for name, p in text.items() if TOKEN_LAYER in name],
    }
    return [{"params": parameters[name], "lr": rate} for name, rate in rates.items() if parameters[name]]


def make_optimizer(groups: Sequence[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Build the optimizer; InputError when its package is not installed."""
    if options.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise InputError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit(groups, weight_decay=options.weight_decay)
    if options.optimizer == "prodigy":
        try:
            from prodigyopt import Prodigy  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise InputError("--optimizer prodigy needs prodigyopt: pip install prodigyopt") from error
        found = [{**group, "lr": 1.0} for group in groups]  # it scales the rate itself, by one factor for all
        return Prodigy(
            found, lr=1.0, weight_decay=options.weight_decay, use_bias_correction=True, safeguard_warmup=True
        )
    return torch.optim.AdamW(groups, weight_decay=options.weight_decay)


def learning_rate_factor(step: int, warmup: int, decay: Callable[[int], float]) -> float:
    """Factor of the learning rates at a step, counted from 0: linear warm-up, then `decay`."""
    if step < warmup:
        return (step + 1) / warmup  # diffusers' own begins at 0, where a step teaches nothing
    return decay(step - warmup)


def make_schedule(optimizer: torch.optim.Optimizer, options: OptimizerOptions, steps: int) -> LambdaLR:
    """Build the schedule of the learning rates: warm-up, then as diffusers' schedule of that name."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # some schedules ask their optimizer for its rate
    warmup = options.warmup(steps)
    left = max(1, steps - warmup)
    decay = get_scheduler(options.lr_scheduler, stand_in, num_warmup_steps=0, num_training_steps=left).lr_lambdas[0]
    return LambdaLR(optimizer, partial(learning_rate_factor, warmup=warmup, decay=decay))

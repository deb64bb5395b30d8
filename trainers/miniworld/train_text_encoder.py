"""Pretrain the denoiser's text tower to carry attributes: `accelerate launch trainers/miniworld/train_text_encoder.py`.

A causal tower trained only through the denoiser lets early tokens soak up its attention and binds words late; one
that already predicts every attribute and the context from the caption binds from the start.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from captions import MAX_LENGTH, WORDS, load_tokenizer, tokenize, words_of
from loop import LoopOptions, train
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from nearid_personalize.miniworld.dataset import picture_facts
from nearid_personalize.miniworld.subjects import caption


@dataclass(frozen=True)
class TextEncoderOptions(LoopOptions):
    """Options of the text tower's pretraining."""

    state: Path = Path("runs/text_encoder")
    steps: int = 500
    batch_size: int = 128
    ema: float = 0.98
    output: Path = Path("runs/pipeline")
    """Pipeline folder; `tokenizer/` and `text_encoder/` are written there."""


class AttributeReader(nn.Module):
    """The text tower under one linear classifier per attribute."""

    def __init__(self, tower: CLIPTextModel) -> None:
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in WORDS.items()})

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits of each attribute, `[B, values]`, from token ids `[B, L]`."""
        pooled = self.tower(ids).pooler_output
        return {name: head(pooled) for name, head in self.heads.items()}


def build(vocab_size: int, end_token: int) -> CLIPTextModel:
    """A text tower 128 wide, two layers deep."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=end_token - 1,
            eos_token_id=end_token,
            pad_token_id=end_token,
        )
    )


def main(options: TextEncoderOptions) -> None:
    """Train on captions of training subjects; report accuracy on captions of validation subjects."""
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options.output / "tokenizer")
    model = AttributeReader(build(len(tokenizer), tokenizer.eos_token_id))

    def batch(split: str, start: int, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        facts = [picture_facts(split, i) for i in range(start, start + count)]  # type: ignore[arg-type]
        ids = tokenize(tokenizer, [caption(pet, context) for pet, context in facts])
        labels = torch.tensor([words_of(pet, context) for pet, context in facts])
        return ids, dict(zip(WORDS, labels.unbind(1), strict=True))

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        device = next(model.parameters()).device
        ids, labels = batch("train", step * options.batch_size, options.batch_size)
        logits = model(ids.to(device))
        return sum(F.cross_entropy(logits[n], labels[n].to(device)) for n in WORDS) / len(WORDS)  # type: ignore

    def check(model: nn.Module, step: int) -> str:
        device = next(model.parameters()).device
        ids, labels = batch("val", 0, 512)
        logits = model(ids.to(device))
        right = {n: (logits[n].argmax(1).cpu() == labels[n]).float().mean().item() for n in WORDS}
        return "accuracy on validation captions " + ", ".join(f"{n} {v:.3f}" for n, v in right.items())

    train(model, loss_of, options, lambda m: m.tower.save_pretrained(options.output / "text_encoder"), check)


if __name__ == "__main__":
    main(tyro.cli(TextEncoderOptions))

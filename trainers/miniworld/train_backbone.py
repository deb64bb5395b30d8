"""Train the mini-world's SigLIP-style backbone on captions: `accelerate launch trainers/miniworld/train_backbone.py`.

Contrast with terse captions ("a photo of a red dog with a hat in space"), such as the web's, entangles the subject
with its context, as it does in CLIP and SigLIP: the pooled embedding must carry where a picture was taken and needs
little of who is in it. What the patch tokens know comes from a reader that predicts every word of the full caption
from them in parallel (CapPa, Tschannen et al., arXiv 2306.07915); the reader is thrown away afterwards. A decoder that
writes word after word (CoCa) never learnt the rare shapes here: guessing from the words before it was enough.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from captions import MAX_LENGTH, WORDS, load_tokenizer, tokenize, training_caption, words_of
from loop import LoopOptions, rng_of, train
from pictures import Pictures
from torch import nn
from torch.nn import functional as F
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTextConfig, SiglipVisionConfig

from nearid_personalize.miniworld.dataset import picture, picture_facts
from nearid_personalize.miniworld.subjects import caption


@dataclass(frozen=True)
class BackboneOptions(LoopOptions):
    """Options of the backbone's training."""

    state: Path = Path("runs/backbone")
    steps: int = 14000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.05
    ema: float = 0.998
    save_every: int = 500
    pictures: tuple[Path, ...] = (
        Path("runs/pictures_wide"),
        Path("runs/pictures"),
        Path("runs/pictures_reconstructed"),
    )
    """Folders of rendered pictures; each is drawn from in proportion to its size."""
    terse_drop: float = 0.8
    """Probability of leaving an attribute out of the captions that are contrasted."""
    reading_weight: float = 4.0
    """Weight of the reader's loss, a mean over the caption's words, beside the contrast's."""
    tokenizer: Path = Path("runs/pipeline/tokenizer")
    output: Path = Path("runs/siglip")


def build(vocab_size: int, end_token: int) -> SiglipModel:
    """A SigLIP of 2.9 M parameters: 64 px, patch 8, width 192, five layers; a two-layer text tower."""
    vision = SiglipVisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=5,
        num_attention_heads=6,
    )
    text = SiglipTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_size=192,
        bos_token_id=end_token - 1,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )
    config = SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    # On a CPU the plain attention trains 1.75 times as fast as the fused one (bf16, one thread, batch 64).
    config._attn_implementation = "eager"
    return SiglipModel(config)


class CaptionReader(nn.Module):
    """Predicts all of a full caption's words at once: a query per word reads the patch tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(WORDS), width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, 6, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1, nn.LayerNorm(width))
        self.outputs = nn.ModuleList(nn.Linear(width, len(choices)) for choices in WORDS.values())

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Tokens `[B, T, D]` -> for each word its logits `[B, choices]`."""
        hidden = self.decoder(self.queries.expand(len(tokens), -1, -1), tokens)
        return [output(hidden[:, i]) for i, output in enumerate(self.outputs)]


class Captioner(nn.Module):
    """The SigLIP model and, for training alone, a reader of its patch tokens."""

    def __init__(self, siglip: SiglipModel, reading_weight: float) -> None:
        super().__init__()
        self.siglip = siglip
        self.reader = CaptionReader(siglip.config.vision_config.hidden_size)
        self.reading_weight = reading_weight

    def forward(self, pixels: torch.Tensor, terse: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Contrast of pictures `[B,3,64,64]` and terse captions `[B,L]` plus the reader's loss on words `[B,W]`."""
        output = self.siglip(input_ids=terse, pixel_values=pixels)
        image, text = (F.normalize(x.float(), dim=-1) for x in (output.image_embeds, output.text_embeds))
        logits = image @ text.T * self.siglip.logit_scale.exp().clamp(max=100)
        labels = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        read = self.reader(output.vision_model_output.last_hidden_state)
        losses = [F.cross_entropy(guess.float(), right) for guess, right in zip(read, words.unbind(1), strict=True)]
        return contrast + self.reading_weight * torch.stack(losses).mean()


def held_out_check(tokenizer: object) -> Callable[[nn.Module, int], str]:
    """Reports how often a held-out picture finds its caption among 256, and which of its words are read right."""
    held_out = [picture("val", i, wide=True) for i in range(256)]
    pixels = torch.from_numpy(np.stack([p.rendering.image for p in held_out])).permute(0, 3, 1, 2) / 127.5 - 1
    ids = tokenize(tokenizer, [caption(p.pet, p.context) for p in held_out])  # type: ignore[arg-type]
    words = torch.tensor([words_of(p.pet, p.context) for p in held_out])

    def check(model: nn.Module, step: int) -> str:
        device = next(model.parameters()).device
        output = model.siglip(input_ids=ids.to(device), pixel_values=pixels.to(device))
        best = output.logits_per_image.argmax(1).cpu()
        guesses = torch.stack([x.argmax(1) for x in model.reader(output.vision_model_output.last_hidden_state)], 1)
        right = (guesses.cpu() == words).float().mean(0)
        named = ", ".join(f"{name} {share:.2f}" for name, share in zip(WORDS, right.tolist(), strict=True))
        return f"caption found {(best == torch.arange(256)).float().mean():.3f}; read right: {named}"

    return check


def main(options: BackboneOptions) -> None:
    """Train on pictures of training subjects."""
    torch.manual_seed(options.seed)
    folders = [Pictures(folder) for folder in options.pictures]
    tokenizer = load_tokenizer(options.tokenizer)
    model = build(len(tokenizer), tokenizer.eos_token_id)
    model.logit_scale.data.fill_(2.66)  # temperature .07
    total = sum(map(len, folders))

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        device = next(model.parameters()).device
        numbers, _ = rng_of(options, step, device)
        # Picture number i shows the same subject in the same context in every folder.
        shares = numbers.multinomial(options.batch_size, [len(folder) / total for folder in folders])
        drawn = [np.sort(numbers.integers(0, len(folder), n)) for folder, n in zip(folders, shares, strict=True)]
        pixels = torch.cat([folder.pixels(i, device) for folder, i in zip(folders, drawn, strict=True)])
        indices = [int(i) for i in np.concatenate(drawn)]
        terse = tokenize(tokenizer, [training_caption(i, step, options.terse_drop, 0.0, 0.0) for i in indices])
        words = torch.tensor([words_of(*picture_facts("train", i)) for i in indices])
        return model(pixels, terse.to(device), words.to(device))

    def export(model: nn.Module) -> None:
        model.siglip.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(options.output)

    train(Captioner(model, options.reading_weight), loss_of, options, export, held_out_check(tokenizer))


if __name__ == "__main__":
    main(tyro.cli(BackboneOptions))

"""Captions as token ids: one small CLIP tokenizer for every mini-world model."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from nearid_personalize.miniworld.dataset import picture_facts
from nearid_personalize.miniworld.scene import CONTEXTS
from nearid_personalize.miniworld.subjects import CATEGORIES, RARE_TOKEN, VALUES, Pet, caption, sample_pet

MAX_LENGTH = 32
WORDS: dict[str, tuple[str, ...]] = {**VALUES, "context": CONTEXTS}
"""The words of a full caption that say something, each with its choices."""
SPARE_WORDS = ("my", "the", "photos", "picture", "and", RARE_TOKEN)


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format in which every caption word, and the rare token, is one token."""
    corpus = [caption(sample_pet("train", i), CONTEXTS[i % len(CONTEXTS)]) for i in range(4000)]
    corpus += [" ".join(SPARE_WORDS)] * 50 + [f"a photo of {RARE_TOKEN} {category}" for category in CATEGORIES] * 50
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=[*alphabet, *(f"{c}</w>" for c in alphabet)],
        special_tokens=special,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = dict(model["vocab"])
    for letter in alphabet:  # every byte must be a token at a word's end, too
        vocab.setdefault(f"{letter}</w>", len(vocab))
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def training_caption(index: int, epoch: int, drop: float, short: float, empty: float) -> str:
    """The caption of training picture `index`, its random omissions drawn anew each epoch."""
    pet, context = picture_facts("train", index)
    rng = random.Random(f"caption/{epoch}/{index}")
    return "" if rng.random() < empty else caption(pet, context, rng, drop, short)


def words_of(pet: Pet, context: str) -> list[int]:
    """Which of its choices each of `WORDS` takes in the full caption."""
    return [choices.index(context if name == "context" else getattr(pet, name)) for name, choices in WORDS.items()]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids `[B, 32]`, padded as diffusers pipelines pad."""
    return tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt").input_ids


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`, built and saved there first when absent (its contents depend on the world alone)."""
    if not (folder / "tokenizer_config.json").exists():
        build_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)

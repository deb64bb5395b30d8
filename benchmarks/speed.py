"""How fast heads and LoRAs train and pictures are embedded, each beside the plain way.

`python benchmarks/speed.py head`: steps per second of head training, with the token cache and without. Both loops see
the same batches. The plain loop runs the trunk at every step on padded slots too, as the paper's own implementation
does. Its pictures are ready tensors, which flatters it. The cache is also read in two ways: in place, and mapped.

`python benchmarks/speed.py lora`: steps per second of LoRA training, by turns with a plain loop of the same base model,
layers, batch, size and precision. In every step the plain loop does what diffusers' DreamBooth-LoRA example does:
encode the pictures and prompts, noise, predict, step AdamW. Its pictures are ready tensors, which flatters it. On a CPU
our UNet uses another attention processor: `--attention ours` gives it to the plain loop too. The default base model is
Stable Diffusion 1.5 at a fifth of its width.

`python benchmarks/speed.py embed`: pictures per second of `IdentityScorer.embed`, from tensors and from files, beside
the bare forward pass. For a GPU: `--shape so400m-384 --device cuda --dtype bfloat16 --num-images 2048 --batch-size 128
--peak-tflops 989`.

Weights are random, which cost what trained ones cost.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, SiglipVisionConfig, SiglipVisionModel

from nearid_personalize import IdentityScorer
from nearid_personalize.data.cache import (
    CacheKey,
    CachePart,
    LiveTokens,
    TokenCache,
    TokenSource,
    Trunk,
    cache_on_disk,
    plan_cache,
)
from nearid_personalize.data.shards import TokenRows, open_shard, write_shard
from nearid_personalize.encoder.checkpoints import trunk_fingerprint
from nearid_personalize.encoder.model import NearIDConfig, NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.images import to_tensor
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.training.head import HeadOptions, Pooling, batch_loss
from nearid_personalize.training.lora.families import ATTENTION
from nearid_personalize.training.lora.loop import LoraOptions, LoraRun, load_family
from nearid_personalize.training.lora.noising import Noising, noising_of
from nearid_personalize.training.lora.pictures import read_references


def seconds(action: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call, all that it started on the device included."""
    started = time.perf_counter()
    action()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The median, then the smallest and the largest."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}, n {len(values)})"


# --- heads


@dataclass(frozen=True)
class HeadSpeed:
    """Head training: cached tokens against the trunk at every step."""

    batch_size: int = 8
    """Identities per step; each has up to three views and as many distractors."""
    cached_steps: int = 20
    plain_steps: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    device: str = "cpu"
    reading_gigabytes: float = 4.0
    """Size of the cache that is read in two ways: in place, and mapped into memory."""
    reading_batch: int = 32
    """Identities in each batch of that."""


class RandomRows(Dataset[dict[str, Tensor]]):
    """Identities of noise; two of three have two views only, as in the paper's data set."""

    def __init__(self, num_rows: int, image_size: int) -> None:
        self.num_rows, self.image_size = num_rows, image_size

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        pictures = torch.rand(2, 3, 3, self.image_size, self.image_size, generator=generator)
        mask = torch.tensor([True, True, index % 3 == 0])
        return {"views": pictures[0], "distractors": pictures[1], "view_mask": mask, "distractor_mask": mask.clone()}


class PaddedTokens:
    """Tokens as the reference makes them: the trunk runs at every step, on padded slots as well."""

    def __init__(self, live: LiveTokens) -> None:
        self.live, self.view_mask = live, live.view_mask

    def __len__(self) -> int:
        return len(self.live)

    @torch.no_grad()
    def read(self, rows: Tensor, variant: int) -> tuple[Tensor, Tensor]:
        """See `TokenSource`."""
        items = [self.live.variants(variant)[int(row)] for row in rows]
        pictures = torch.stack([torch.stack([item["views"], item["distractors"]]) for item in items])
        valid = torch.stack([torch.stack([item["view_mask"], item["distractor_mask"]]) for item in items])
        pixels = pictures.flatten(0, 2).to(self.live.model.device) * 2 - 1
        tokens = self.live.model.tokens(pixels)
        return tokens[valid.flatten().to(tokens.device)], valid

    def anchor_weights(self, rows: Tensor, variant: int) -> Tensor:
        """See `TokenSource`."""
        return self.live.anchor_weights(rows, variant)


def step_times(steps: int, source: TokenSource, pooling: Pooling, options: HeadSpeed) -> list[float]:
    """Seconds of each optimizer step."""
    accelerator = Accelerator(cpu=options.device == "cpu")
    optimizer = torch.optim.AdamW(pooling.parameters(), lr=1e-4)
    head_options = HeadOptions(Path("unused"), batch_size=options.batch_size)
    times = []
    for step in range(steps):
        rows = torch.arange(options.batch_size) + (step % (len(source) // options.batch_size)) * options.batch_size

        def take_step(rows: Tensor = rows, step: int = step) -> None:
            batch_loss(pooling, source, rows, 0, head_options, step, accelerator).backward()
            optimizer.step()
            optimizer.zero_grad()

        times.append(seconds(take_step, options.device))
    return times


def reading_speed(options: HeadSpeed, folder: Path) -> None:
    """Print how long a random batch of a cache takes, read in place or gathered from files mapped into memory.

    The cache holds tokens of the so400m trunk at 384 pixels, 729 x 1152, of five pictures an identity on average. It is
    read twice from beginning to end in the same order, each way first in one half of the batches; before, the system
    is asked to let go of its pages.
    """
    shape, rows_per_shard = (729, 1152), 256
    num_rows = int(options.reading_gigabytes * 1e9 / (5 * shape[0] * shape[1] * 2))
    paths = []
    for start in range(0, num_rows, rows_per_shard):
        stop = min(start + rows_per_shard, num_rows)
        paths.append(folder / f"rows-{start:08d}.safetensors")
        write_shard(paths[-1], stop - start, (random_tokens(shape, row) for row in range(start, stop)))
    files = tuple(open_shard(path) for path in paths)
    slots, start = [], 0
    for shard in files:
        slots.append(torch.where(shard.slots >= 0, shard.slots + start, -1))
        start += len(shard)
    in_place = TokenCache((files,), torch.cat(slots)[None])
    mapped = TokenCache((tuple(load_file(path)["tokens"] for path in paths),), in_place.slots)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    for state in ("from disk", "from memory"):
        if state == "from disk":
            let_go(paths)
        found: dict[str, list[float]] = {"in place": [], "mapped": []}
        for number, rows in enumerate(order.split(options.reading_batch)):
            name, cache = ("in place", in_place) if number % 2 else ("mapped", mapped)
            found[name].append(seconds(partial(cache.read, rows)) / len(rows))
        for name, times in found.items():
            print(f"{state}, {name}: {spread([1000 * t for t in times], digits=2)} ms an identity")
        print(f"ratio   {statistics.median(found['mapped']) / statistics.median(found['in place']):8.2f}")


def let_go(paths: Sequence[Path]) -> None:
    """Ask the system to read files from the disk again."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def random_tokens(shape: tuple[int, int], row: int) -> TokenRows:
    """An identity's tokens: two views and their distractors, every other row three."""
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    valid[:, :, 2] = row % 2 == 1
    tokens = torch.full((int(valid.sum()), *shape), float(row), dtype=torch.float16)
    return TokenRows(tokens, valid, valid[:, 0].float())


def head_speed(options: HeadSpeed, scratch: Path) -> None:
    """Print both rates, their ratio, and what the cache cost."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=options.image_size,
        patch_size=options.patch_size,
        hidden_size=options.hidden_size,
        intermediate_size=4 * options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
    )
    model = NearIDModel.from_vision_model(SiglipVisionModel(config)).freeze_trunk().to(options.device)
    preprocessing = Preprocessing(options.image_size)
    rows = RandomRows(2 * options.batch_size, options.image_size)
    masks = torch.stack([rows[i]["view_mask"] for i in range(len(rows))])
    live = LiveTokens(model, lambda variant: rows, masks, preprocessing)
    trunk = Trunk(model, preprocessing)
    plan = plan_cache(
        scratch / "tokens", trunk, [CachePart(CacheKey(trunk_fingerprint(model), preprocessing, "random"), rows)]
    )
    started = time.perf_counter()
    cache = cache_on_disk(plan, trunk)
    writing = time.perf_counter() - started
    pooling = Pooling(model)
    step_times(2, cache, pooling, options)  # warm up
    cached = step_times(options.cached_steps, cache, pooling, options)
    plain = step_times(options.plain_steps, PaddedTokens(live), pooling, options)
    for name, times in (("cached", cached), ("plain", plain)):
        print(f"{name:7} {1 / statistics.median(times):8.3f} steps/s, seconds a step {spread(times)}")
    print(f"ratio   {statistics.median(plain) / statistics.median(cached):8.1f}")
    print(f"writing {int(masks.sum()) * 2 / writing:8.2f} pictures/s, once; {torch.get_num_threads()} threads")
    (scratch / "reading").mkdir()
    reading_speed(options, scratch / "reading")


# --- LoRAs


@dataclass(frozen=True)
class LoraSpeed:
    """LoRA training against a plain loop."""

    base_model: str = "random"
    """A StableDiffusionPipeline: folder, Hub id, "miniworld", or "random"."""
    resolution: int | None = 128
    """Picture side, pixels. None: the base model's own."""
    batch_size: int = 2
    rank: int = 4
    rounds: int = 8
    """Turns of both loops; one more comes before, unmeasured."""
    steps: int = 3
    """Steps of each loop in a round."""
    attention: Literal["stock", "ours"] = "stock"
    """Attention processor of the plain loop."""


def save_random_pipeline(folder: Path) -> None:
    """Stable Diffusion 1.5 at a fifth of its width, with the mini-world's tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(weights_dir("pipeline") / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=max(77, tokenizer.model_max_length),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    levels: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=16, **levels)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(64, 128, 256, 256), cross_attention_dim=160, attention_head_dim=8
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def plain_loop(
    pipe: StableDiffusionPipeline, noising: Noising, pixels: Tensor, options: LoraOptions
) -> Callable[[], None]:
    """One step of the example script: encode pictures, encode prompts, noise, predict, step.

    pixels: [B,3,H,W] in [-1, 1].
    """
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    adapter = options.adapter
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=list(adapter.target_modules))
    pipe.unet.add_adapter(config)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    device, batch = pipe.device, len(pixels)

    def step() -> None:
        with torch.no_grad():
            encoded = pipe.vae.encode(pixels.to(device))
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.sample()
            ids = pipe.tokenizer(
                [options.data.prompt] * batch, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            embedded = pipe.text_encoder(ids.to(device))[0]
        latents = latents * pipe.vae.config.scaling_factor
        noised = noising(latents.cpu(), torch.randn(latents.shape), torch.rand(batch))
        predicted = pipe.unet(noised.noisy.to(device), noised.timesteps.to(device), embedded).sample
        F.mse_loss(predicted.float(), noised.target.to(device)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def repeat(step: Callable[[], object], count: int) -> None:
    """Call `step` so many times."""
    for _ in range(count):
        step()


def lora_speed(options: LoraSpeed, scratch: Path) -> None:
    """Measure both loops by turns and print their speeds and ratio."""
    photos = scratch / "photos"
    photos.mkdir()
    for index in range(4):
        noise = np.random.default_rng(index).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{index}.png")
    base_model = options.base_model
    if base_model == "random":
        base_model = str(scratch / "base")
        save_random_pipeline(Path(base_model))
    lora = LoraOptions.of(
        base_model=base_model,
        references=photos,
        output=scratch / "lora",
        rank=options.rank,
        text_rank=0,
        target_modules=ATTENTION,
        batch_size=options.batch_size,
        resolution=options.resolution,
        learning_rate=1e-4,
        steps=10**6,
        precision="fp32",
    )
    references = read_references(lora.data)
    run = LoraRun.open(lora, Accelerator(), references)
    plain = load_family(lora)
    side = lora.data.resolution or plain.picture_size
    pixels = to_tensor([picture.image.resize((side, side)) for picture in references])[
        torch.arange(options.batch_size) % 4
    ]
    plain.pipe.to(run.accelerator.device)
    if options.attention == "ours":
        plain.pipe.unet.set_attn_processor(dict(run.family.denoiser.attn_processors))
    plain_step = plain_loop(plain.pipe, noising_of(plain.pipe.scheduler, lora.noise), pixels * 2 - 1, lora)

    device = str(run.accelerator.device)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for turn in tqdm(range(options.rounds + 1)):
        ours = seconds(lambda: repeat(partial(run.take_step, 1), options.steps), device) / options.steps
        theirs = seconds(lambda: repeat(plain_step, options.steps), device) / options.steps
        if turn:
            times["ours"].append(ours)
            times["plain"].append(theirs)
    print(
        f"{options.rounds} rounds of {options.steps} steps, batch {options.batch_size}, {side} px, rank {options.rank}"
    )
    for name, found in times.items():
        print(f"{name:>6}  {spread([1 / t for t in found])} steps/s")
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["plain"])]
    print(f" ratio  {spread(ratios)}")


# --- embedding


SHAPES = {
    "base-224": SiglipVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    "so400m-384": SiglipVisionConfig(
        image_size=384,
        patch_size=14,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
    ),
}


@dataclass(frozen=True)
class EmbedSpeed:
    """Embedding: from tensors and files, against the bare forward pass."""

    shape: Literal["base-224", "so400m-384"] = "base-224"
    """The trunk: ViT-B/16 at 224 pixels, or the released model's."""
    device: str = "cpu"
    """Where the model is."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the trunk; the head is in float32."""
    num_images: int = 8
    """Pictures per repeat."""
    batch_size: int = 4
    """Pictures per forward pass."""
    repeats: int = 7
    """Rounds; each times every way once, in turn, so that a busy machine slows all of them."""
    file_side: int = 512
    """Pixels of the side of the JPEG files."""
    compile_backend: str | None = None
    """A `torch.compile` backend for both, such as inductor."""
    peak_tflops: float | None = None
    """The device's peak for this dtype, in 1e12 floating-point operations per second: prints the ceiling it sets."""


def flops_per_image(config: SiglipVisionConfig) -> int:
    """Floating-point operations of the trunk's matrix products for one picture, counted on a run without data."""
    with torch.device("meta"):
        model = NearIDModel._from_config(NearIDConfig(vision_config=config), attn_implementation="eager")
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        model.tokens(pixels)
    return counter.get_total_flops()


def photo(seed: int, side: int) -> Image.Image:
    """Coarse blocks under fine noise: a JPEG of it decodes at about a photo's cost."""
    random = np.random.default_rng(seed)
    blocks = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
    noise = random.normal(0, 8, (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(blocks) + noise, 0, 255).astype(np.uint8))


def embed_speed(options: EmbedSpeed, scratch: Path) -> None:
    """Print pictures per second of each way: median, minimum, maximum, and the median ratio to the bare forward."""
    torch.manual_seed(0)
    config = SHAPES[options.shape]
    side = config.image_size
    scorer = IdentityScorer(
        NearIDModel(NearIDConfig(vision_config=config)),
        side,
        (0.5,) * 3,
        (0.5,) * 3,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        batch_size=options.batch_size,
        compile_backend=options.compile_backend,
    )
    tensors = torch.randint(0, 256, (options.num_images, 3, side, side), dtype=torch.uint8)
    ready = [scorer.preprocessing(batch, options.device) for batch in tensors.split(options.batch_size)]

    @torch.no_grad()
    def bare() -> None:
        for pixels in ready:
            scorer._features(pixels)

    files = [scratch / f"{index}.jpg" for index in range(options.num_images)]
    for index, path in enumerate(files):
        photo(index % 32, options.file_side).save(path, quality=90)
    ways: dict[str, Callable[[], object]] = {
        "bare forward": bare,
        "embed, uint8 tensors": lambda: scorer.embed(tensors),
        f"embed, JPEG files {options.file_side}x{options.file_side}": lambda: scorer.embed(files),
    }
    for action in ways.values():  # warm up: allocators, compilation, the files' pages
        action()
    rounds = [
        {name: options.num_images / seconds(action, options.device) for name, action in ways.items()}
        for _ in tqdm(range(options.repeats), desc="repeats")
    ]

    print(f"{options.shape}, {options.dtype}, {options.device}, batch {options.batch_size}, n = {options.repeats}")
    print(f"{'images/s':32}{'median':>10}{'min':>10}{'max':>10}{'to bare':>10}")
    for name in ways:
        rates = [rates[name] for rates in rounds]
        ratio = np.median([rates[name] / rates["bare forward"] for rates in rounds])
        print(f"{name:32}{np.median(rates):10.2f}{min(rates):10.2f}{max(rates):10.2f}{ratio:10.3f}")
    flops = flops_per_image(config)
    print(f"trunk: {flops / 1e9:.1f} GFLOP per image")
    if options.peak_tflops:
        ceiling = options.peak_tflops * 1e12 / flops
        shares = ", ".join(f"{name} {np.median([r[name] for r in rounds]) / ceiling:.1%}" for name in ways)
        print(f"ceiling at {options.peak_tflops:g} TFLOP/s: {ceiling:.1f} images/s; reached: {shares}")


Measured = (
    Annotated[HeadSpeed, tyro.conf.subcommand("head")]
    | Annotated[LoraSpeed, tyro.conf.subcommand("lora")]
    | Annotated[EmbedSpeed, tyro.conf.subcommand("embed")]
)


def main(options: HeadSpeed | LoraSpeed | EmbedSpeed) -> None:
    """Measure what was named."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(options, HeadSpeed):
            head_speed(options, Path(folder))
        elif isinstance(options, LoraSpeed):
            lora_speed(options, Path(folder))
        else:
            embed_speed(options, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Measured, description=__doc__))

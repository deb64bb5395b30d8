"""What each part of the objective and of the data buys: `python benchmarks/objective_ablation.py --out runs/ablation`.

The paper's ablation (arXiv 2604.01973) on the mini-world: the weight alpha of the ranking tier, plain InfoNCE, and one
source of distractors against several. Every head starts at random on the packaged trunk's cached tokens, three seeds
each, the last head counts; figures are on test subjects, the mean over seeds with their smallest and largest value.
Part edits change one attribute (Mind-the-Glitch's task): SSR, PA and M-O tell how fine the head looks.
"""

import copy
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import tyro

from nearid_personalize.data import IdentityDataset, Rows
from nearid_personalize.data.cache import CacheKey, CachePart, TokenCache, Trunk, cache_on_disk, plan_cache
from nearid_personalize.encoder.checkpoints import load_encoder, trunk_fingerprint
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.evaluation import Retrieval, evaluate_tokens
from nearid_personalize.files import write_atomically
from nearid_personalize.miniworld import part_edits, rows, weights_dir
from nearid_personalize.training.head import HeadOptions, train_head

PART = {"part": (1, 1)}
SIMILAR = {"similar": (2, 4)}


@dataclass(frozen=True)
class Options:
    """What is trained and measured."""

    out: Path = Path("runs/ablation")
    """Folder for results and token caches; finished runs are not repeated."""
    num_identities: int = 3000
    num_test: int = 500
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    trunk: str = ""
    """Folder of the frozen trunk. Default: the packaged one."""


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    name: str
    sources: dict[str, tuple[int, int]]
    objective: str = "two-tier"
    alpha: float = 0.5


ARMS = (
    *(Arm(f"two-tier, alpha {alpha:g}", SIMILAR | PART, alpha=alpha) for alpha in (0, 0.25, 0.5, 1, 2)),
    Arm("plain InfoNCE, no distractors", SIMILAR, "info-nce"),
    Arm("two-tier, similar subjects only", SIMILAR),
    Arm("two-tier, part edits only", PART),
)


@dataclass(frozen=True)
class Bench:
    """Trunk, preprocessing and where caches lie."""

    model: NearIDModel
    preprocessing: Preprocessing
    folder: Path

    def tokens(self, data: Rows, num_slots: int, variants: int = 1) -> TokenCache:
        """Cached tokens of some rows; with several sources, a variant draws one per row."""
        dataset = IdentityDataset(data, self.preprocessing.size, num_slots, source_per="row")
        versions = [replace(dataset, variant=variant) for variant in range(variants)]
        parts = []
        for variant, version in enumerate(versions):
            key = CacheKey(trunk_fingerprint(self.model), self.preprocessing, version.fingerprint)
            parts.append(CachePart(key, version, variant))
        trunk = Trunk(self.model, self.preprocessing)
        return cache_on_disk(plan_cache(self.folder, trunk, parts), trunk)


def run(options: Options, bench: Bench, arm: Arm, seed: int, tests: dict[str, tuple[TokenCache, torch.Tensor | None]]):
    """Train one head and measure it on each test set."""
    model = copy.deepcopy(bench.model)
    torch.manual_seed(seed)
    model.reset_head()
    data = rows("train", options.num_identities, sources=arm.sources)
    head = HeadOptions(
        options.out / "unused",
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        objective=arm.objective,  # type: ignore[arg-type]
        alpha=arm.alpha,
        seed=seed,
        evaluate_every=0,
    )
    train_head(head, model, bench.tokens(data, 3, variants=2 if len(arm.sources) > 1 else 1))
    return {name: evaluate_tokens(model, cache, oracle) for name, (cache, oracle) in tests.items()}


def cell(values: list[float]) -> str:
    """Mean over seeds, smallest and largest."""
    return f"{mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def table(results: dict[str, list[dict[str, dict]]]) -> str:
    """Markdown: a line per arm."""
    lines = ["| | SSR | PA | part SSR | part PA | M-O |", "|---|---|---|---|---|---|"]
    for name, seeds in results.items():
        columns = [("similar", "ssr"), ("similar", "pa"), ("edit", "ssr"), ("edit", "pa"), ("edit", "m_o")]
        cells = [cell([found[test][figure] for found in seeds]) for test, figure in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(options: Options) -> None:
    """Train what is missing, print the table."""
    options.out.mkdir(parents=True, exist_ok=True)
    model, preprocessing, _ = load_encoder(options.trunk or weights_dir("siglip"))
    bench = Bench(model, preprocessing, options.out / "tokens")
    edits = part_edits("test", options.num_test)
    oracle = torch.tensor([list(row.oracle or ()) for row in edits])
    tests: dict[str, tuple[TokenCache, torch.Tensor | None]] = {
        "similar": (bench.tokens(rows("test", options.num_test), 3), None),
        "edit": (bench.tokens(edits, 2), oracle),
    }
    frozen: dict[str, Retrieval] = {
        name: evaluate_tokens(model, cache, oracle, frozen=True) for name, (cache, oracle) in tests.items()
    }
    results: dict[str, list[dict[str, dict]]] = {"frozen trunk": [{k: asdict(v) for k, v in frozen.items()}]}
    for arm in ARMS:
        for seed in options.seeds:
            path = options.out / f"{arm.name.replace(' ', '_').replace(',', '')}-{seed}.json"
            if not path.exists():
                found = run(options, bench, arm, seed, tests)
                write_atomically(path, json.dumps({name: asdict(value) for name, value in found.items()}))
            results.setdefault(arm.name, []).append(json.loads(path.read_text()))
            print(f"{arm.name} seed {seed}: {results[arm.name][-1]['similar']['ssr']:.3f}", flush=True)
    print(f"n {options.num_test} test subjects; {options.num_identities} identities, {options.steps} steps")
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options))

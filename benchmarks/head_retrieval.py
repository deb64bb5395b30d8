"""SSR and PA of the shipped head beside the frozen backbone's: `python benchmarks/head_retrieval.py`.

Rows are mini-world test subjects: three views in wide poses and, on each view's background, a similar subject. Two
tiers: distractors that differ in two to four of eight attributes, and the same measured with exactly two.
"""

from dataclasses import dataclass

import tyro

from nearid_personalize.encoder import load_encoder
from nearid_personalize.evaluation import evaluate_retrieval
from nearid_personalize.miniworld import MiniWorldDataset, weights_dir


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_subjects: int = 600
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    backbone: str = ""
    """Folder of its frozen backbone. Default: the packaged one."""


def main(options: Options) -> None:
    """Print one line per encoder and tier."""
    folders = {
        "frozen backbone": options.backbone or weights_dir("siglip"),
        "NearID head": options.scorer or weights_dir("nearid"),
    }
    for changes in ((2, 4), (2, 2)):
        rows = MiniWorldDataset("test", options.num_subjects, changes=changes)
        for name, folder in folders.items():
            model, preprocessing, _ = load_encoder(str(folder))
            found = evaluate_retrieval(model, rows, preprocessing)
            print(
                f"{changes[0]}-{changes[1]} attributes differ  {name:16} n {found.num_identities}  "
                f"SSR {found.ssr:.3f} [{found.ssr_interval[0]:.3f}, {found.ssr_interval[1]:.3f}]  "
                f"PA {found.pa:.3f} [{found.pa_interval[0]:.3f}, {found.pa_interval[1]:.3f}]",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options))

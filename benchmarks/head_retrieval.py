"""How well the shipped head tells identities apart, beside its frozen trunk: `python benchmarks/head_retrieval.py`.

On mini-world test subjects: three views in wide poses and, on each view's background, a similar subject that differs in
two to four of eight attributes, or in exactly two; and part edits, where one attribute of the subject itself changes.
"""

from dataclasses import dataclass

import tyro

from nearid_personalize.data import Rows
from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.evaluation import evaluate_rows, with_interval
from nearid_personalize.miniworld import part_edits, rows, weights_dir


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_subjects: int = 600
    model: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    trunk: str = ""
    """Folder of its frozen trunk. Default: the packaged one."""


def main(options: Options) -> None:
    """Print one line per encoder and kind of distractor."""
    count = options.num_subjects
    tests: dict[str, Rows] = {
        "2 to 4 attributes": rows("test", count),
        "2 attributes": rows("test", count, sources={"similar": (2, 2)}),
        "part edits": part_edits("test", count),
    }
    encoders = {
        "frozen trunk": (options.trunk or weights_dir("siglip"), True),
        "NearID head": (options.model or weights_dir("nearid"), False),
    }
    for test, data in tests.items():
        for name, (folder, frozen) in encoders.items():
            model, preprocessing, _ = load_encoder(folder)
            (found,) = evaluate_rows(model, preprocessing, data, frozen=frozen).values()
            print(
                f"{test:18} {name:13} n {found.num_identities}  SSR {with_interval(found.ssr, found.ssr_interval)}  "
                f"PA {with_interval(found.pa, found.pa_interval)}  M-O {with_interval(found.m_o, found.m_o_interval)}  "
                f"M-O pair {with_interval(found.m_o_pair, found.m_o_pair_interval)}",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Options))

"""`nearid embed`: embeddings of any number of pictures, in shards."""

import sys

from tqdm import tqdm

from nearid_personalize.commands.console import DONE, Stopwatch, say
from nearid_personalize.commands.options import Embed
from nearid_personalize.errors import InputError
from nearid_personalize.loading import choose_device
from nearid_personalize.report import rounded, to_json, versions


def run_embed(options: Embed) -> int:
    """`nearid embed`."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputError("embed: PyArrow is not installed; pip install 'nearid-personalize[bulk]'") from None
    from nearid_personalize.bulk import EncoderOptions, embed_pictures

    encoder = EncoderOptions(
        model=options.model,
        trunk=options.trunk,
        device=str(choose_device(options.device)),
        batch_size=options.batch_size,
    )
    say(options.json, f"plan: embed {options.images} into {options.out} with {options.model}, engine {options.engine}")
    clock = Stopwatch()
    with clock.stage("embed"), tqdm(desc="embed", unit="part", disable=None) as bar:

        def report_progress(done: int, parts: int) -> None:
            bar.total = parts
            bar.update(done - bar.n)

        result = embed_pictures(
            options.images,
            options.out,
            encoder,
            engine=options.engine,
            workers=options.workers,
            gpus_per_worker=options.gpus_per_worker,
            column=options.column,
            report_progress=report_progress,
        )
    report = {
        "pictures": result.pictures,
        "errors": result.errors,
        "shards": result.parts,
        "shards_from_before": result.already,
        "cost": {"seconds": rounded(clock.seconds)},
        "models": {"scorer": options.model},
        "versions": versions(),
    }
    if options.json:
        sys.stdout.write(to_json(report))
        return DONE
    seconds = clock.seconds["embed"]
    print(
        f"embedded {result.pictures} pictures ({result.errors} could not be read) in {seconds:.1f} s, "
        f"{result.pictures / seconds:.1f} a second; {result.already} parts were there before"
    )
    return DONE

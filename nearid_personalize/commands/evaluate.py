"""`nearid evaluate`: how well an encoder tells identities from their near-identity distractors."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from nearid_personalize.commands.console import DONE, Stopwatch, say
from nearid_personalize.commands.options import Evaluate
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.loading import choose_device
from nearid_personalize.report import evaluation_report

if TYPE_CHECKING:
    from nearid_personalize.data import Rows
from nearid_personalize.commands.console import deliver
from nearid_personalize.names import packaged


def run_evaluate(options: Evaluate) -> int:
    """`nearid evaluate`."""
    if options.out is not None:
        check_writable(options.out)
    if options.benchmark is not None:
        from nearid_personalize.commands.benchmark import run_benchmark

        return run_benchmark(options)
    from nearid_personalize.encoder.checkpoints import load_encoder
    from nearid_personalize.evaluation import INTERVALS, evaluate_rows

    rows = evaluation_rows(options)
    encoders = {"encoder": options.model}
    if options.trunk is not None or options.model == "miniworld":
        encoders["frozen trunk"] = options.trunk or "miniworld"
    say(options.json, f"plan: {len(rows)} identities of {rows.name}, distractors {', '.join(rows.sources)}")
    clock = Stopwatch()
    results = []
    for name, place in encoders.items():
        with clock.stage(name):
            folder = packaged(place, "nearid" if name == "encoder" else "siglip")
            model, preprocessing, _ = load_encoder(folder)
            model = model.to(choose_device(options.device))
            frozen = name != "encoder"
            measured = evaluate_rows(model, preprocessing, rows, options.num_views, frozen, not options.json)
        results += [{"encoder": name, "source": source, **asdict(found)} for source, found in measured.items()]
    intervals = INTERVALS.format(unit="identities")
    report = evaluation_report(rows.name, options.split, results, encoders, clock.seconds, intervals)
    deliver(options, report, f"{evaluation_table(results)}\n[low, high]: {intervals}")
    return DONE


def evaluation_rows(options: Evaluate) -> "Rows":
    """The rows that `nearid evaluate` measures; at least one of them has distractors."""
    from nearid_personalize.data import load_rows

    if options.data == "miniworld":
        from nearid_personalize import miniworld

        if options.split == "all":
            raise InputError("--split all: the toy world is endless; give train, val or test")
        return miniworld.rows(options.split, options.limit or 500, options.num_views)
    split = None if options.split == "all" else options.split
    rows = load_rows(options.data, options.distractors, split, options.hash_splits)
    if not rows.sources:
        raise InputError(f"{options.data}: no distractors to tell the identities from; name sets with --distractors")
    return rows[: options.limit] if options.limit else rows


def evaluation_table(results: Sequence[dict]) -> str:
    """Measurements as aligned text: one line per encoder and distractor source."""
    from nearid_personalize.evaluation import with_interval

    lines = [f"{'encoder':13} {'distractors':12} {'n':>6}  {'SSR':24} {'PA':24} {'M-O':24} M-O pair"]
    for found in results:
        cells = [with_interval(found[name], found[f"{name}_interval"]) for name in ("ssr", "pa", "m_o", "m_o_pair")]
        lines.append(
            f"{found['encoder']:13} {found['source']:12} {found['num_identities']:6}  "
            + " ".join(f"{cell:24}" for cell in cells).rstrip()
        )
    return "\n".join(lines)

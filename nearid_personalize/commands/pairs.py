"""`nearid pairs`: winner/loser pairs from what `nearid generate` left."""

import sys

from nearid_personalize.commands.console import DONE, say
from nearid_personalize.commands.options import Pairs
from nearid_personalize.files import check_writable
from nearid_personalize.report import to_json


def run_pairs(options: Pairs) -> int:
    """`nearid pairs`."""
    from nearid_personalize.preferences import find_runs, pairs_of, write_pairs

    runs = find_runs(options.runs)
    check_writable(options.out)
    say(options.json, f"plan: pairs from {len(runs)} runs, {len({run.prompt for run in runs})} prompts")
    found = [pairs_of(run, options.min_margin, options.max_pairs, not options.any_status) for run in runs]
    pairs = [pair for pairs in found for pair in pairs]
    written = [str(path) for path in write_pairs(pairs, options.out, options.seed)]
    margin = sum(pair.margin for pair in pairs) / len(pairs)
    if options.json:
        sys.stdout.write(to_json({"pairs": len(pairs), "mean_margin": margin, "written": written}))
    else:
        print(f"{len(pairs)} pairs, mean margin {margin:.3f}: {', '.join(written)}")
    return DONE

"""How a command races: by a learnt plan, by one beside the base model, or carefully; and what it records."""

from dataclasses import dataclass
from pathlib import Path

from nearid_personalize.commands.console import say
from nearid_personalize.commands.options import Generate, Quickstart
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.guard.policy import DEFAULT_POLICY, StoppingPolicy
from nearid_personalize.guard.records import FILE_NAME, RECORDED_SHARE, RaceRecords, RecordingPolicy
from nearid_personalize.guard.result import GuardResult
from nearid_personalize.hub import split_revision
from nearid_personalize.names import packaged


@dataclass(frozen=True)
class Racing:
    """What the guard is given, and what is recorded."""

    policy: StoppingPolicy | None
    num_candidates: int
    records: RaceRecords | None = None
    """What the race is added to; None: it is not recorded."""
    shown: str = ""
    """For people."""


def choose_racing(options: Generate | Quickstart, base_model: str, encoder: str) -> Racing:
    """How to race. Raises InputError for a plan that cannot be read or written."""
    if not options.race:
        return Racing(None, options.num_candidates)
    if options.learn_plan is not None:
        check_writable(options.learn_plan.parent, "--learn-plan")
        return _learning(options, options.learn_plan, encoder)
    beside = Path(split_revision(packaged(base_model, "pipeline"))[0]) / FILE_NAME
    if beside.is_file():
        records = RaceRecords.load(beside)
        if records.encoder == encoder and records.plan is not None:
            return _by_plan(options, records)
    return Racing(DEFAULT_POLICY, options.num_candidates)


def _learning(options: Generate | Quickstart, path: Path, encoder: str) -> Racing:
    records = RaceRecords.load(path) if path.exists() else RaceRecords(encoder)
    if records.encoder != encoder:
        raise InputError(f"--learn-plan {path}: was learnt with --model {records.encoder}; give another file name")
    if records.plan is not None and records.plan.is_certified:
        return _by_plan(options, records)
    recorded = round(RECORDED_SHARE * options.num_candidates)
    shown = f"race: {recorded} candidates run to the end and are recorded ({len(records.races)} prompts so far)"
    return Racing(RecordingPolicy(), recorded, records, shown)


def _by_plan(options: Generate | Quickstart, records: RaceRecords) -> Racing:
    """As many are begun as the plan says, where it is for as many wanted ones of as many candidates."""
    plan = records.plan
    assert plan is not None, "the caller looked"
    if (plan.num_images, plan.baseline_candidates) != (options.num_images, options.num_candidates):
        return Racing(plan.policy, options.num_candidates)
    return Racing(plan.policy, plan.num_candidates, shown=f"race: {plan.advice}")


def record(racing: Racing, result: GuardResult, options: Generate | Quickstart) -> None:
    """Add a race to the file of `--learn-plan` and plan again."""
    if racing.records is None or options.learn_plan is None:
        return
    try:
        records = racing.records.added(result.candidates)
    except InputError as error:
        # What was drawn is worth more than the record
        say(options.json, f"--learn-plan {options.learn_plan}: not recorded, {error}")
        return
    records = records.planned(options.num_images, options.num_candidates)
    records.save(options.learn_plan)
    assert records.plan is not None, "it was planned just now"
    say(options.json, f"race: recorded; from now on: {records.plan.advice}")

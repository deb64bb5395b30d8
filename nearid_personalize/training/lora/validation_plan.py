"""How often a LoRA in training is validated, and with how many pictures, within a share of the run's time.

Every validation draws the same, so that checkpoints can be compared. Its cost is measured before the first training
step. What does not fit the budget is cut in a fixed order (`ORDER`). The last step is always validated. Pure; times
in seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nearid_personalize.errors import InputError

RESERVE = 0.15  # share of the budget left for what the measurement before the run does not see


ORDER = (
    ("denoising_steps", 15),  # costs the least in what pictures tell
    ("prompts", 4),
    ("denoising_steps", 10),
    ("validations", 4),  # or more, for patience
    ("prompts", 2),
    ("seeds", 1),  # without a second there is no diversity, and no floor on it
    ("validations", 1),
)
"""What is given up, and down to which number, one after the other."""


@dataclass(frozen=True)
class Size:
    """The pictures of one validation: `prompts` times `seeds` of them, of so many denoising steps each."""

    prompts: int
    seeds: int
    denoising_steps: int


@dataclass(frozen=True)
class Cost:
    """Measured seconds."""

    fixed: float
    """Of a validation, whatever it draws."""
    picture: float
    """Of decoding and scoring one picture."""
    denoising_step: float
    """Of one picture."""
    training_step: float
    """Of one optimizer step."""

    def of(self, size: Size) -> float:
        """Seconds of one validation."""
        return self.fixed + size.prompts * size.seeds * (self.picture + size.denoising_steps * self.denoising_step)


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    steps: tuple[int, ...]
    """After which to validate; the last is the run's last."""
    prompts: tuple[str, ...]
    seeds: int
    denoising_steps: int
    budget: float
    """Largest share of the run's time, in (0, 1]."""
    patience: int = 0
    """As the option."""
    least: int = 1
    """Fewest validations that will do."""
    done: int = 0
    """Training steps already taken."""

    @property
    def size(self) -> Size:
        """The size of a validation as asked for."""
        return Size(prompts=len(self.prompts), seeds=self.seeds, denoising_steps=self.denoising_steps)

    @property
    def enough(self) -> int:
        """Fewest validations worth having: patience needs one to be the best, `patience` without a better, and one more
        that is saved."""
        return max(self.least, self.patience + 2 if self.patience else 1)

    def seconds_for(self, training_step: float) -> float:
        """Seconds that all validations together may take."""
        if self.budget == 1:
            return float("inf")
        return training_step * (self.steps[-1] - self.done) * self.budget / (1 - self.budget)


@dataclass(frozen=True)
class ValidationPlan:
    """What the validations of a run draw, and when."""

    steps: tuple[int, ...]
    """Training steps that are validated, besides the base model."""
    prompts: tuple[str, ...]
    """Each drawn from seeds 0, 1, …."""
    seeds: int
    denoising_steps: int
    seconds: float
    """Predicted, of one validation."""
    share: float
    """Predicted, of all of them in the run's time."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "steps": list(self.steps), "prompts": list(self.prompts)}

    @classmethod
    def from_dict(cls, told: Any) -> "ValidationPlan":
        """Read what `to_dict` wrote; InputError where it is nothing of the kind."""
        try:
            return cls(**{**told, "steps": tuple(told["steps"]), "prompts": tuple(told["prompts"])})
        except (TypeError, KeyError) as error:
            raise InputError("--resume: validation.jsonl holds no plan; start without --resume") from error


def asked_steps(every: int, steps: int) -> tuple[int, ...]:
    """Every so many steps, and the last; none where `every` is 0."""
    return (*range(every, steps, every), steps) if every else ()


def plan_validations(wanted: Wanted, cost: Cost, spent: float = 0.0) -> ValidationPlan:
    """Fit what is wanted to the budget; where nothing fits, the smallest validation after the last step alone.

    spent: seconds taken so far. The base model's pictures cost what any validation costs.
    """
    size = fitted(wanted, cost, spent)
    plan = ValidationPlan(
        steps=wanted.steps,
        prompts=spread(wanted.prompts, size.prompts),
        seeds=size.seeds,
        denoising_steps=size.denoising_steps,
        seconds=cost.of(size),
        share=0.0,
    )
    return spaced(plan, wanted, cost.training_step, plan.seconds, spent + plan.seconds)


def spaced(plan: ValidationPlan, wanted: Wanted, training_step: float, seconds: float, spent: float) -> ValidationPlan:
    """The same pictures at as many steps as can still be paid, evenly spaced.

    seconds: of one validation. spent: so far, the base model included.
    """
    left = wanted.seconds_for(training_step) - spent
    steps = wanted.steps
    if left < len(steps) * seconds:
        steps = evenly(wanted.done, steps[-1], min(len(steps), max(wanted.least, int(left / seconds))))
    total = spent + len(steps) * seconds
    share = total / (total + training_step * (wanted.steps[-1] - wanted.done))
    return replace(plan, steps=steps, seconds=seconds, share=share)


def fitted(wanted: Wanted, cost: Cost, spent: float) -> Size:
    """The first of `ever_less` that can be paid, else the smallest."""
    allowed = (1 - RESERVE) * wanted.seconds_for(cost.training_step) - spent
    for size, validations in ever_less(wanted):
        if (validations + 1) * cost.of(size) <= allowed:  # the base model's is one more
            return size
    return size


def ever_less(wanted: Wanted) -> Iterator[tuple[Size, int]]:
    """Size and number of validations, from what is wanted down to the smallest, in the order of `ORDER`."""
    size, validations = wanted.size, len(wanted.steps)
    yield size, validations
    for name, lowest in ORDER:
        if name == "validations":
            floor = max(lowest, wanted.enough) if lowest > 1 else wanted.least
            while validations > floor:
                validations -= 1
                yield size, validations
        else:
            while getattr(size, name) > lowest:
                size = replace(size, **{name: getattr(size, name) - 1})
                yield size, validations


def evenly(done: int, last: int, count: int) -> tuple[int, ...]:
    """`count` whole steps in (done, last], evenly spaced, the last among them; fewer where there are not so many."""
    steps = {done + round((last - done) * (number + 1) / count) for number in range(count)}
    return tuple(sorted(steps - {done}))


def spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` of the prompts, from the first to the last: default prompts grow ever less like the photos."""
    if count == 1:
        return (prompts[0],)
    return tuple(prompts[round(number * (len(prompts) - 1) / (count - 1))] for number in range(count))


def least_before(first: int, steps: int) -> int:
    """How many evenly spaced validations it takes for one to come before step `first`, which is above 1."""
    return -(-steps // (first - 1))


# --- in words --------------------------------------------------------------------------------------------------------
def of_wanted(have: int, wanted: int, unit: str) -> str:
    """For example "8 prompts", "4 of 8 prompts"."""
    return f"{have} {unit}" if have == wanted else f"{have} of {wanted} {unit}"


def listed(steps: Sequence[int]) -> str:
    """For example "step 80", "steps 50, 100, …, 400"."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    shown = [str(step) for step in steps]
    return "steps " + ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]])


def duration(seconds: float) -> str:
    """For example "0.42 s", "95 s", "12 min"."""
    if seconds >= 180:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def describe(plan: ValidationPlan, wanted: Wanted) -> str:
    """The plan in a line or two: when and how much is drawn, what it costs, and which option that defeats."""
    pictures = [
        of_wanted(len(plan.prompts), len(wanted.prompts), "prompts"),
        of_wanted(plan.seeds, wanted.seeds, "seeds"),
        of_wanted(plan.denoising_steps, wanted.denoising_steps, "denoising steps"),
    ]
    fewer = "" if len(plan.steps) == len(wanted.steps) else f" ({len(plan.steps)} of the {len(wanted.steps)} asked for)"
    budget = f"--validation-budget {wanted.budget:g}"
    text = f"validation: base model and {listed(plan.steps)}{fewer}, each {' × '.join(pictures)}"
    text += f"; about {duration(plan.seconds)} each, {plan.share:.0%} of the run ({budget})"
    if plan.share > wanted.budget:
        text += f"\nvalidation: this exceeds {budget}; the last step is measured all the same"
    if wanted.patience and len(plan.steps) < wanted.enough:
        text += f"\nvalidation: --patience {wanted.patience} cannot end a run of so few validations"
    return text

"""The guard: candidates are drawn, looked at on their way, stopped, scored and ranked."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.guard.guard import IdentityGuard as IdentityGuard
    from nearid_personalize.guard.plan import RacePlan as RacePlan
    from nearid_personalize.guard.plan import plan_race as plan_race
    from nearid_personalize.guard.policy import FixedSchedule as FixedSchedule
    from nearid_personalize.guard.policy import RacingPolicy as RacingPolicy
    from nearid_personalize.guard.policy import StoppingPolicy as StoppingPolicy
    from nearid_personalize.guard.profile import PreviewProfile as PreviewProfile
    from nearid_personalize.guard.profile import RunFacts as RunFacts
    from nearid_personalize.guard.race import Race as Race
    from nearid_personalize.guard.replays import Limits as Limits
    from nearid_personalize.guard.replays import Replay as Replay
    from nearid_personalize.guard.replays import replay as replay
    from nearid_personalize.guard.result import Candidate as Candidate
    from nearid_personalize.guard.result import Cost as Cost
    from nearid_personalize.guard.result import GuardResult as GuardResult
    from nearid_personalize.guard.result import GuardResults as GuardResults
    from nearid_personalize.guard.result import RaceProgress as RaceProgress
    from nearid_personalize.guard.result import Status as Status

_HOME_OF = {
    "Candidate": "result",
    "Cost": "result",
    "FixedSchedule": "policy",
    "Limits": "replays",
    "Race": "race",
    "RacePlan": "plan",
    "RaceProgress": "result",
    "GuardResult": "result",
    "GuardResults": "result",
    "IdentityGuard": "guard",
    "PreviewProfile": "profile",
    "RacingPolicy": "policy",
    "Replay": "replays",
    "RunFacts": "profile",
    "Status": "result",
    "StoppingPolicy": "policy",
    "plan_race": "plan",
    "replay": "replays",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)

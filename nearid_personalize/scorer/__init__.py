"""The scorer: pictures against a subject, accept thresholds with stated error rates, and the order of candidates."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.scorer.calibration import CalibrationBank as CalibrationBank
    from nearid_personalize.scorer.ranking import Ranking as Ranking
    from nearid_personalize.scorer.ranking import Verdict as Verdict
    from nearid_personalize.scorer.scorer import IdentityScorer as IdentityScorer
    from nearid_personalize.scorer.subject import Subject as Subject
    from nearid_personalize.scorer.subject import identity_scores as identity_scores

_HOME_OF = {
    "CalibrationBank": "calibration",
    "IdentityScorer": "scorer",
    "Ranking": "ranking",
    "Subject": "subject",
    "Verdict": "ranking",
    "identity_scores": "subject",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)

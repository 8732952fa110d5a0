"""A task's temperature, fitted anew to what was said of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from abmll.calibration import (
    Calibration,
    HeldOut,
    ShotCalibration,
    TemperaturePrior,
    conformal_scores,
    conformal_threshold,
    own_temperature,
    temperature_evidence,
)
from abmll.errors import InvalidRequest
from abmll.metrics import accuracy, brier, expected_calibration_error, negative_log_likelihood
from abmll.predictive import predictive
from abmll.risk import risk_thresholds
from abmll.store import StoredPosterior
from server.task_schemas import Measured, RecalibrationReply

# Fewer judged answers say too little of a temperature.
FEWEST = 20
_FOLDS = 5
# Of log T, where the global posterior does not know how tasks differ.
_SPREAD = 1.0

Labelled = Sequence[tuple[Tensor, int]]


def _by_question(labelled: Labelled) -> list[tuple[Tensor, int]]:
    """The first answer to each question, and so what was said of it last.

    Asked a hundred times, a question says no more of new ones than asked once. It is known by its first draw's
    scores: a draw gives the same question the same.
    """
    found: dict[bytes, tuple[Tensor, int]] = {}
    for scores, label in labelled:
        found.setdefault(scores[0].numpy().tobytes(), (scores, label))
    return list(found.values())


def _groups(labelled: Labelled) -> list[HeldOut]:
    """Answers with as many draws together, options padded: shapes (draws, n, options) and (n,)."""
    groups: list[HeldOut] = []
    for draws in sorted({len(scores) for scores, _ in labelled}):
        own = [(scores, label) for scores, label in labelled if len(scores) == draws]
        padded = torch.full((draws, len(own), max(s.shape[1] for s, _ in own)), float("-inf"))
        for number, (scores, _) in enumerate(own):
            padded[:, number, : scores.shape[1]] = scores
        groups.append((padded, torch.tensor([label for _, label in own])))
    return groups


def _probabilities(labelled: Labelled, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities, shape (n, options) padded with zeros, and right options, shape (n,)."""
    groups = _groups(labelled)
    parts = [predictive(scores, temperature).probabilities for scores, _ in groups]
    return _stacked(parts), torch.cat([answers for _, answers in groups])


def _epistemic(labelled: Labelled, temperature: float) -> float:
    """Mean epistemic uncertainty in nats."""
    parts = [predictive(scores, temperature).epistemic for scores, _ in _groups(labelled)]
    return torch.cat(parts).mean().item()


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Probabilities, shape (n, options) each, as one tensor, padded with zeros."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


def _measured(probabilities: Tensor, answers: Tensor) -> Measured:
    confidence, index = probabilities.max(dim=-1)
    return Measured(
        accuracy=accuracy(probabilities, answers),
        ece=expected_calibration_error(confidence, index == answers),
        nll=negative_log_likelihood(probabilities, answers),
        brier=brier(probabilities, answers),
    )


def _risk(confidence: Tensor, correct: Tensor) -> dict[str, float]:
    """Thresholds for a risk in new questions of the same task; none under all that was judged: unknown there."""
    least = confidence.min().item()
    found = risk_thresholds(confidence.split(1), correct.split(1))
    return {level: max(threshold, least) for level, threshold in found.items()}


def refit(
    stored: StoredPosterior, labelled: Labelled, prior: Calibration | None
) -> tuple[Calibration, RecalibrationReply]:
    """Fits a version's temperature and conformal thresholds to judged answers.

    The temperature is the mode of its posterior, as ``abmll.calibration.task_temperature`` says. What it changes is
    measured on answers that it was not fitted on (five folds).

    Args:
        stored: The version.
        labelled: Scores, shape (draws, options), and right option of judged answers, the newest first; of several
            to one question the newest counts.
        prior: The global posterior's calibration: how tasks' temperatures differ.

    Raises:
        InvalidRequest: Too few answers to different questions.
    """
    labelled = sorted(_by_question(labelled), key=lambda item: len(item[0]))  # in the order of the groups
    if len(labelled) < FEWEST:
        raise InvalidRequest(
            f"answers of version {stored.record.version} to {len(labelled)} different questions have been judged with "
            f"the right option known; at least {FEWEST} are needed, to questions with options: POST /feedback",
            field="version",
        )
    shots = stored.record.shots
    entry = None if stored.calibration is None else stored.calibration.nearest(shots)
    before = 1.0 if entry is None else entry.temperature
    usual = None if prior is None else prior.nearest(shots)
    spread = 0.0 if usual is None else usual.spread
    beliefs = TemperaturePrior(median=before, spread=spread or _SPREAD)
    evidence = torch.cat([temperature_evidence(group) for group in _groups(labelled)], dim=1)
    after = own_temperature(beliefs, evidence)
    held_out: list[tuple[Tensor, Tensor]] = []
    for fold in range(_FOLDS):
        rest = [number for number in range(len(labelled)) if number % _FOLDS != fold]
        held_out.append(_probabilities(labelled[fold::_FOLDS], own_temperature(beliefs, evidence[:, rest])))
    measured_before = _measured(*_probabilities(labelled, before))
    measured_after = _measured(_stacked([p for p, _ in held_out]), torch.cat([a for _, a in held_out]))
    probabilities, answers = _probabilities(labelled, after)
    nonconformity = conformal_scores(probabilities, answers)
    confidence, chosen = probabilities.max(dim=-1)
    coverages = ["0.9"] if entry is None or not entry.conformal else list(entry.conformal)
    fitted = ShotCalibration(
        shots=shots,
        temperature=after,
        support=len(labelled),
        conformal={coverage: conformal_threshold(nonconformity, float(coverage)) for coverage in coverages},
        risk=_risk(confidence, chosen == answers),
        ece_before=measured_before.ece,
        ece_after=measured_after.ece,
        questions=len(labelled),
        scatter=None if entry is None else entry.scatter,
        confidence=confidence.mean().item(),
        epistemic=_epistemic(labelled, after),
    )
    draws = max(len(scores) for scores, _ in labelled)
    texts = [] if stored.calibration is None else stored.calibration.texts
    calibration = Calibration(by_shots=[fitted], texts=texts, fitted_on=[stored.record.task], draws=draws)
    reply = RecalibrationReply(
        task=stored.record.task,
        version=stored.record.version,
        answers=len(labelled),
        temperature_before=before,
        temperature_after=after,
        before=measured_before,
        after=measured_after,
        applied=None,
    )
    return calibration, reply

"""When a question gets no answer."""

from __future__ import annotations

from typing import Any

import pytest

from abmll.calibration import ShotCalibration
from abmll.errors import InvalidRequest
from abmll.text_calibration import TextCalibration
from server.abstention import Limit, limit
from server.schemas import Candidate, GenerateRequest

CANDIDATES = [Candidate(answer="a", probability=0.7), Candidate(answer="b", probability=0.3)]
ENTRY = ShotCalibration(
    shots=0, temperature=1, conformal={}, risk={"0.10": 0.8, "0.20": 0.6}, ece_before=0, ece_after=0, questions=9
)


def request(**fields: Any) -> GenerateRequest:
    return GenerateRequest.model_validate({"prompt": "p", "options": ["a", "b"]} | fields)


def test_a_given_confidence_must_be_reached_and_one_for_a_risk_passed() -> None:
    assert limit(request(), ENTRY) is None
    assert limit(request(abstain_below=0.7), None) == Limit(0.7)
    assert limit(request(target_risk=0.25), ENTRY) == Limit(0.6, 0.25)
    for at, given, risky in ((0.69, True, True), (0.7, False, True), (0.71, False, False)):
        assert (Limit(0.7).abstain(at, CANDIDATES) is not None) == given
        assert (Limit(0.7, 0.1).abstain(at, CANDIDATES) is not None) == risky


def test_a_text_that_was_cut_short_has_no_confidence_to_reach_a_calibrated_one() -> None:
    text = request(options=None, abstain_below=0.1)
    entry = TextCalibration(shots=4, slope=1, offset=0, accuracy=0.5, ece_before=0, ece_after=0, questions=9)
    found = limit(text, entry)
    assert found == Limit(0.1, calibrated=True)
    assert found is not None
    assert found.abstain(0.9, CANDIDATES) is None
    cut = found.abstain(0.9, CANDIDATES, calibrated=False)
    assert cut is not None
    assert "max_tokens" in cut.reason
    plain = limit(text, None)
    assert plain == Limit(0.1)
    assert plain is not None
    assert plain.abstain(0.9, CANDIDATES, calibrated=False) is None


def test_the_reason_tells_a_confidence_that_is_hardly_too_low_from_what_was_asked_for() -> None:
    said = Limit(0.8).abstain(0.79996, CANDIDATES)
    assert said is not None
    assert "79.9 %, below the 80 % asked for" in said.reason
    assert said.candidates == CANDIDATES


@pytest.mark.parametrize(
    ("fields", "entry", "told"),
    [
        ({"target_risk": 0.05}, ENTRY, "0.1 or more"),
        ({"target_risk": 0.1}, None, "abmll calibrate"),
        ({"target_risk": 0.1}, ENTRY.model_copy(update={"risk": {}}), "abmll calibrate"),
        ({"target_risk": 0.1, "options": None}, None, "free text"),
        ({"target_risk": 0.1, "abstain_below": 0.5}, ENTRY, "give one"),
    ],
)
def test_what_cannot_be_promised_is_refused(fields: dict[str, Any], entry: ShotCalibration | None, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        limit(request(**fields), entry)

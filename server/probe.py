"""What `abmll doctor` runs in a process of its own: imports torch, loads the global posterior; a line of JSON each."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from abmll.errors import AbmllError
from server.settings import Settings


def devices() -> dict[str, Any]:
    """Torch's version, and what it sees of this machine."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "gpus": gpus, "threads": torch.get_num_threads()}


def posterior(settings: Settings, compare: bool) -> dict[str, Any]:
    """What the global posterior is, or what is wrong with it.

    Args:
        settings: Name posterior and base model.
        compare: Whether to see if it was made for the base model, which is downloaded where it is not there.
    """
    from abmll.store import load_posterior
    from server.loading import base_check

    try:
        stored = load_posterior(settings.global_posterior)
        if compare:
            base_check(settings, stored.posterior)(stored.posterior)
    except AbmllError as error:
        return {"error": error.message}
    config = stored.posterior.config
    return {"family": config.family, "model": config.base_model, "calibrated": stored.calibration is not None}


if __name__ == "__main__":
    print(json.dumps(devices()), flush=True)
    print(json.dumps(posterior(Settings.model_validate_json(sys.argv[1]), sys.argv[2] == "compare")), flush=True)

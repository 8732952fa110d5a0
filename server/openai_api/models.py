"""Tasks and their versions as models of OpenAI's API."""

from __future__ import annotations

from datetime import datetime

from abmll.errors import StoreFailure, TaskNotFound
from server.openai_api.questions import model_of
from server.openai_api.replies import Model
from server.store import TaskStore, Version


def list_models(store: TaskStore) -> list[Model]:
    """Lists all tasks, each by the version that answers, and then by each version where there are several."""
    found: list[Model] = []
    for name in store.names():
        try:
            found += _models(store, name, fewest=2)
        except (TaskNotFound, StoreFailure):  # deleted meanwhile, or not to be read
            continue
    return found


def find_model(store: TaskStore, name: str) -> Model:
    """Tells one.

    Raises:
        TaskNotFound: There is none of this name, or it is damaged.
    """
    task, _ = model_of(name)
    models = {model.id: model for model in _models(store, task, fewest=1)}
    if name in models:
        return models[name]
    known = ", ".join(models) or "none can be used"
    raise TaskNotFound(f"there is no model {name[:80]!r}; of this task there are: {known}", field="model")


def _models(store: TaskStore, task: str, fewest: int) -> list[Model]:
    """The task, and its versions where there are at least ``fewest``."""
    usable = [version for version in store.versions(task) if version.stored is not None]
    if not usable:
        return []
    serving = store.serving(task)
    answering = [v for v in usable if serving is None or v.number in serving]
    main = [_model(task, answering[-1], None)] if answering else []
    return main + [_model(f"{task}:{version.number}", version, task) for version in usable if len(usable) >= fewest]


def _model(id: str, version: Version, parent: str | None) -> Model:
    stored = version.stored
    assert stored is not None
    created = stored.record.created
    return Model(
        id=id,
        created=0 if created is None else int(datetime.fromisoformat(created).timestamp()),
        root=stored.posterior.config.base_model,
        parent=parent,
        shots=stored.record.shots,
        calibrated=stored.calibration is not None,
    )

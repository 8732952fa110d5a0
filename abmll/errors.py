"""The errors that abmll raises; every message says what was wrong and what would be right."""

from __future__ import annotations


class AbmllError(Exception):
    """Base of all errors that abmll raises on purpose.

    Args:
        message: What was wrong and what would be right.
        field: The name of the input at fault, where there is one.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class InvalidExamples(AbmllError):
    """Labelled examples that cannot be used: empty, malformed, or an answer outside the options."""


class InvalidRequest(AbmllError):
    """A question that cannot be answered as asked: options, draws or lengths out of range."""


class PromptTooLong(InvalidRequest):
    """Prompt and option together exceed the model's context."""


class InvalidPosterior(AbmllError):
    """A stored posterior that is damaged: missing file, wrong shape or dtype, not finite."""


class PosteriorMismatch(InvalidPosterior):
    """A posterior made for another base model, or for layers that this model lacks."""


class TaskNotFound(AbmllError):
    """No posterior is stored under that task name."""


class TaskConflict(AbmllError):
    """The task cannot be changed now: it is reserved, or a job for it is under way."""


class JobNotFound(AbmllError):
    """No adaptation job has that id."""


class AnswerNotFound(AbmllError):
    """No answer is kept under that request id."""


class EngineFailure(AbmllError):
    """The engine is not able to answer at present."""


class StoreFailure(AbmllError):
    """The store cannot be read or written at present: the disk is full, read-only or failing."""


class HubFailure(AbmllError):
    """The Hugging Face hub is out of reach or gives no access, or its cache cannot be written."""


class Overloaded(AbmllError):
    """Too much waits already.

    Args:
        message: What was wrong and what would be right.
        retry_after: Seconds after which to ask again.
        field: The name of the input at fault, where there is one.
    """

    def __init__(self, message: str, retry_after: int, field: str | None = None) -> None:
        super().__init__(message, field)
        self.retry_after = retry_after


class RateLimited(Overloaded):
    """The key has asked more often than it may."""


class Unauthorized(AbmllError):
    """No API key was sent, or one that is unknown."""


class Forbidden(AbmllError):
    """The API key lacks the right."""


class DeadlineExceeded(AbmllError):
    """The answer did not come in the time that the request, or the server, gives it."""


class ClientGone(AbmllError):
    """The client closed the connection before its answer was there."""

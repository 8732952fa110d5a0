"""The engine of a cluster: replicas behind Ray Serve, each one engine of the ordinary kind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from abmll.errors import AbmllError, EngineFailure
from abmll.posterior import Normalize, Posterior, PosteriorConfig
from abmll.sampling import Sampling
from abmll.scoring import Question
from abmll.sequences import TokenScores, no_tokens
from server.background import in_background
from server.cache import ByteCache, tensor_bytes
from server.clock import current_clock
from server.cluster.claim import claim
from server.cluster.ray_process import join, leave, replica_resources
from server.engine import EngineState, Served, Tell
from server.settings import Settings

if TYPE_CHECKING:
    from ray import ObjectRef

    from server.cluster.replica import Asked, Told

logger = logging.getLogger(__name__)

_DEPLOYMENT = "Replica"
_LOOK_SECONDS = 1.0
# Replicas that one question is sent to before it fails: where one dies, another answers.
_TRIES = 4
# Keys of deleted tasks that replicas are told, with their next question.
_RELEASED = 64


class ClusterEngine:
    """Any number of replicas behind the engine protocol.

    A posterior's questions go to the replica that has answered it before; where that dies, or its engine does, another
    answers, and Ray Serve replaces it. Posteriors travel through Ray's object store, once to each replica.

    Args:
        settings: The server's settings, with ``replicas``.
        config: Kind of the posteriors.
    """

    def __init__(self, settings: Settings, config: PosteriorConfig) -> None:
        self.name: str = settings.engine
        self.context = 0
        self._settings, self._config = settings, config
        self._handle: Any = None
        self._running = 0
        self._lost = False
        self._claim: Any = None
        self._states: dict[str, EngineState] = {}
        self._released: tuple[str, ...] = ()
        self._deploying: asyncio.Future[Any] | None = None
        self._watching: asyncio.Task[None] | None = None
        # What Ray has no reference to any more, it frees.
        self._there: ByteCache[str, tuple[ObjectRef[Posterior], Posterior]] = ByteCache(
            settings.cache, lambda pair: tensor_bytes(pair[1].tensors().values())
        )

    async def start(self) -> None:
        """Joins or begins the cluster, and waits until the first replicas answer."""
        try:
            self._deploying = asyncio.ensure_future(asyncio.to_thread(self._deploy))
            self._handle = await asyncio.shield(self._deploying)
            while not self._running:
                await asyncio.sleep(_LOOK_SECONDS / 2)
                self._running = await asyncio.to_thread(self._count, starting=True)
            self.context = int(await self._handle.context.remote())
        except AbmllError:
            raise
        except Exception as error:
            raise EngineFailure(f"the replicas could not be started: {error}") from error
        self._watching = in_background(self._watch(), "the watch over the replicas")

    def _deploy(self) -> Any:
        join(self._settings)
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from server.cluster.replica import Replica
        from server.cluster.router import TaskRouter

        settings = self._settings
        self._claim = claim(settings)
        assert settings.replicas is not None
        count: dict[str, Any] = {"num_replicas": settings.replicas}
        if settings.max_replicas is not None and settings.max_replicas > settings.replicas:
            count = {
                "autoscaling_config": {
                    "min_replicas": settings.replicas,
                    "max_replicas": settings.max_replicas,
                    "target_ongoing_requests": settings.replica_load,
                    # A third of Ray's own, for it takes an engine long enough to start.
                    "metrics_interval_s": 3.0,
                    "look_back_period_s": 10.0,
                    "upscale_delay_s": 10.0,
                }
            }
        text, kind = settings.model_dump_json(), self._config.model_dump_json()
        deployment = serve.deployment(
            Replica,
            name=_DEPLOYMENT,
            ray_actor_options=replica_resources(settings, ray.cluster_resources().get("GPU", 0)),
            max_ongoing_requests=settings.concurrency,
            health_check_period_s=_LOOK_SECONDS,
            graceful_shutdown_timeout_s=10,
            request_router_config=RequestRouterConfig(request_router_class=cast(Any, TaskRouter)),
            logging_config={"log_level": "WARNING"},
            **count,
        )
        serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
        target = serve.RunTarget(
            cast(Any, deployment).bind(text, kind), name=settings.ray_application, route_prefix=None
        )
        if settings.ray_application in serve.status().applications:
            # Of a server that is dead: were they replaced one by one, its model would go on answering meanwhile.
            serve.delete(settings.ray_application)
        # Not until they run: a stop must not have to wait for a large model.
        return serve.run_many([target], wait_for_applications_running=False)[0]

    async def close(self) -> None:
        """Ends the replicas, and the cluster where it was begun here."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._deploying is not None:
            await asyncio.wait({self._deploying})
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        import ray
        from ray import serve

        if ray.is_initialized() and self._claim is not None:
            try:
                serve.delete(self._settings.ray_application)
            except Exception as error:  # a cluster that is gone has no replicas to end
                logger.warning("the replicas could not be ended: %s", error)
        leave(self._settings)

    async def _watch(self) -> None:
        while True:
            try:
                self._running = await asyncio.to_thread(self._count)
                self._lost = False
            except Exception as error:
                if not self._lost:
                    logger.error("Ray does not say how the replicas are: %s", error)
                self._running, self._lost = 0, True
            await asyncio.sleep(_LOOK_SECONDS)

    def _count(self, *, starting: bool = False) -> int:
        """Number of replicas that answer.

        Args:
            starting: Whether Ray is to give up, with ``EngineFailure``, where the first ones cannot be made.
        """
        from ray import serve
        from ray.serve.schema import ApplicationStatus, ReplicaState

        application = serve.status().applications[self._settings.ray_application]
        deployment = application.deployments.get(_DEPLOYMENT)
        if starting and application.status == ApplicationStatus.DEPLOY_FAILED:
            told = deployment.message if deployment is not None else application.message
            raise EngineFailure(f"the replicas could not be started: {told.strip().splitlines()[-1]}; see Ray's log")
        return 0 if deployment is None else deployment.replica_states.get(ReplicaState.RUNNING, 0)

    async def score(
        self, served: Served, question: Question, draws: Sequence[int], seed: int, normalize: Normalize = "sum"
    ) -> Tensor:
        """Scores each option under each draw, see ``Engine.score``."""
        return await self._ask(served, "score", question, tuple(draws), seed, normalize)

    async def generate(
        self, served: Served, prompt: Sequence[int], sampling: Sampling, tell: Tell | None = None
    ) -> list[int]:
        """Decodes under the posterior mean, see ``Engine.generate``."""
        if tell is None:
            return await self._ask(served, "generate", tuple(prompt), sampling)
        told = 0
        for left in reversed(range(_TRIES)):
            at = 0
            try:
                async for item in self._stream(served, prompt, sampling):
                    if not isinstance(item, tuple):
                        return self._read(item)
                    at += 1
                    if at > told:  # after a replica's death another begins anew, with the same seed
                        told = at
                        tell(*item)
            except Exception as error:
                await self._again(error, left)
        raise EngineFailure("the text ended without an end; ask again")

    async def _stream(
        self, served: Served, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[tuple[int, float] | Told]:
        options = self._handle.options(stream=True, multiplexed_model_id=served.key)
        response = options.stream.remote(await self._asked(served), tuple(prompt), sampling)
        try:
            async for item in response:
                yield item
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    async def sample(
        self, served: Served, prompt: Sequence[int], sampling: Sampling, draws: Sequence[int], seed: int
    ) -> list[list[int]]:
        """Decodes one text under each draw, see ``Engine.sample``."""
        return await self._ask(served, "sample", tuple(prompt), sampling, tuple(draws), seed)

    async def score_tokens(
        self,
        served: Served,
        prompt: Sequence[int],
        tokens: Sequence[int],
        draws: Sequence[int],
        seed: int,
        others: int = 0,
    ) -> TokenScores:
        """Scores given tokens one by one under each draw, see ``Engine.score_tokens``."""
        if not tokens:
            return no_tokens(len(draws), others)
        return await self._ask(served, "score_tokens", tuple(prompt), tuple(tokens), tuple(draws), seed, others)

    async def _ask(self, served: Served, method: str, *arguments: Any) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                asked = await self._asked(served)
                response = getattr(self._handle.options(multiplexed_model_id=served.key), method).remote(
                    asked, *arguments
                )
                try:
                    return self._read(await response)
                except asyncio.CancelledError:
                    response.cancel()
                    raise
            except Exception as error:
                await self._again(error, left)
        raise AssertionError

    async def _again(self, error: Exception, left: int) -> None:
        """Waits before another try where a replica, or its engine, has died; else raises what went wrong."""
        from ray.exceptions import RayActorError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        cause = error.cause if isinstance(error, RayTaskError) else error
        died = isinstance(error, RayActorError) or isinstance(cause, EngineFailure)
        if died and left:
            logger.warning("a replica failed on a question, which goes to another: %s", type(cause).__name__)
            await asyncio.sleep(0.1)
            return
        if isinstance(cause, AbmllError):
            raise cause from error
        if isinstance(error, RayServeException | RayError) and not isinstance(error, RayTaskError):
            raise EngineFailure(f"no replica answered: {type(error).__name__}; ask again") from error
        raise error

    async def _asked(self, served: Served) -> Asked:
        from server.cluster.replica import Asked

        found = self._there.find(served.key)
        if found is None:
            import ray

            found = await asyncio.to_thread(ray.put, served.posterior), served.posterior
            self._there.put(served.key, found)
        return Asked(served.key, found[0], self._released)

    def _read(self, told: Told) -> Any:
        self._states.pop(told.replica, None)
        self._states[told.replica] = told.state  # the newest last: the dead are not heard of again
        clock = current_clock()
        if clock is not None:
            clock.queued += told.queued
        return told.value

    async def release(self, key: str) -> None:
        """Forgets a posterior's draws; each replica does with its next question."""
        self._there.pop(key)
        self._released = (*self._released, key)[-_RELEASED:]

    def state(self) -> EngineState:
        """Adds up what the replicas told with their last answers; Ray Serve mends what is not healthy."""
        states = list(self._states.values())
        living = states[-self._running :] if self._running else []
        return EngineState(
            healthy=self._running > 0,
            adapters=sum(state.adapters for state in living),
            loads=sum(state.loads for state in states),
            hits=sum(state.hits for state in states),
            evictions=sum(state.evictions for state in states),
            queued=sum(state.queued for state in living),
            mending=not self._lost,
            running=self._running,
            wanted=self._settings.replicas or 1,
        )

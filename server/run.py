"""Running the server: checks with one-line errors, then uvicorn."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from abmll.errors import AbmllError
from clients.config import InvalidSettings
from server.app import create_app
from server.connections import ImpatientProtocol, allow_connections
from server.keys import Keys
from server.logs import configure
from server.settings import Settings
from server.vllm_setup import check_options
from training.embedded import BASE, NAME
from training.four_bits import NF4, check_installed

logger = logging.getLogger("abmll")


def check(settings: Settings) -> None:
    """Finds what would fail after a long start.

    Raises:
        AbmllError: The embedded model is not there, vLLM or what packs weights cannot be imported, vLLM has no such
            argument, or there are no keys.
    """
    if settings.keys is not None and not Keys(settings.keys).all():
        raise AbmllError(f"{settings.keys} holds no key, nobody could ask; make one with `abmll keys add`")
    if settings.model in (None, NAME):
        if not (BASE / "config.json").exists():
            raise AbmllError(f"the embedded base model is not in {BASE}; name one with --model")
    elif Path(settings.model).is_absolute() and not Path(settings.model).is_dir():
        raise AbmllError(f"there is no model folder {settings.model}; check --model")
    if settings.dtype == NF4:
        check_installed()
    if settings.engine == "vllm":
        try:
            import vllm  # noqa: F401 # pyright: ignore[reportUnusedImport] -- is it there?
        except ImportError as error:
            raise AbmllError(f"vLLM cannot be imported ({error}); install it, or use --engine torch") from error
        check_options(settings.vllm_options)
    elif settings.vllm_options:
        raise AbmllError(f"--vllm-option is for --engine vllm; the engine is {settings.engine}")


def bind(settings: Settings) -> socket.socket:
    """Takes the port.

    Raises:
        InvalidSettings: The host's name leads nowhere.
        AbmllError: The port is taken, or not ours to take.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    taken = socket.socket(family, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((settings.host, settings.port))
    except (socket.gaierror, UnicodeError) as error:
        taken.close()
        raise InvalidSettings(f"there is no host {settings.host} ({error}); choose another --host") from error
    except OSError as error:
        taken.close()
        raise AbmllError(f"cannot listen on {settings.host}:{settings.port}: {error}; choose another --port") from error
    taken.set_inheritable(False)  # engine and worker processes must not keep it
    return taken


def run(settings: Settings) -> int:
    """Serves until interrupted.

    Returns:
        The exit status: 0 after a stop, 1 if the server could not start.

    Raises:
        InvalidSettings: The host's name leads nowhere.
    """
    configure(settings)
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    taken: socket.socket | None = None
    try:
        check(settings)
        taken = bind(settings)
        if settings.keys is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            logger.warning("anybody who reaches %s may ask, teach and delete; --keys asks for API keys", settings.host)
        app = create_app(settings, failed)
    except AbmllError as error:
        if taken is not None:
            taken.close()
        print(f"abmll: {error.message}", file=sys.stderr)
        return 1
    allow_connections()
    config = uvicorn.Config(
        app,
        http=ImpatientProtocol,
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,  # longer than proxies keep one, 60 s: else they send into one that is being closed
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after its own orderly stop
    logger.info("listening on http://%s:%d, not ready yet", *taken.getsockname()[:2])
    try:
        server.run(sockets=[taken])
    except SystemExit:
        pass  # uvicorn's way to say that the app's start failed; its log has said why
    except KeyboardInterrupt:
        return 0
    if failures:
        error = failures[0]
        message = error.message if isinstance(error, AbmllError) else f"{type(error).__name__}: {error}"
        print(f"abmll: the server could not start: {message}", file=sys.stderr)
        if not isinstance(error, AbmllError):
            logger.error("the start failed", exc_info=error)
        return 1
    return 0 if server.started else 1

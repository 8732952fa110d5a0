"""The web page at ``/``, and the files that it loads: the page's own, and the JavaScript client."""

from __future__ import annotations

import os
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import clients

_CLIENTS = Path(clients.__file__).parent
# Nothing from elsewhere, and no script within the page: what a model or a stranger writes cannot run there.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask whether it has changed: a page and a client of two versions would not fit
}


class _Files(StaticFiles):
    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serves the page at ``/``, its files under ``/web`` and the client under ``/js``, with no key asked for."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:  # pyright: ignore[reportUnusedFunction] -- a route
        return FileResponse(_CLIENTS / "web" / "index.html", headers=_HEADERS)

    for name in ("web", "js"):
        app.mount(f"/{name}", _Files(directory=_CLIENTS / name), name=name)

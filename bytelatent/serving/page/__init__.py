"""The page at `/`: static files, which call the API on their own host and no other."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

FOLDER = Path(__file__).parent
NAMES = {".html", ".css", ".js", ".svg"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asks each time whether the file is still the same
}


class Page(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        if path != "." and Path(path).suffix not in NAMES:  # such as this module
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def mount_page(app: FastAPI) -> None:
    """Serve the page at `/`; to be called after all other routes are there."""
    app.mount("/", Page(directory=FOLDER, html=True), name="page")

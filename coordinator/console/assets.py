"""Style sheets, scripts and pictures: files of this package, each known by name when the program starts."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).parent / "static"
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
"""Nothing else is served; licences and notes stay in the package."""
FRESHNESS = "no-cache"
"""May be kept, but is asked for again: a 304 by its ETag costs little, and no browser mixes two versions."""


def make_handler() -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Serves ``{path}`` below FOLDER; no path of the request's reaches the file system."""
    files = {str(path.relative_to(FOLDER)): path for path in FOLDER.rglob("*") if path.suffix in TYPES}

    async def serve(request: web.Request) -> web.StreamResponse:
        path = files.get(request.match_info["path"])
        if path is None:
            return web.Response(status=404, text="There is no such file.\n")
        return web.FileResponse(path, headers={"Content-Type": TYPES[path.suffix], "Cache-Control": FRESHNESS})

    return serve

"""The page at `/`: static files of this package, which call the HTTP interface like any other client."""

from importlib.resources import files

from fastapi import FastAPI, Response

_SCRIPTS = (
    "page.js", "answers.js", "card.js", "cifar10.js", "model_file.js", "picture.js", "request.js",
    "service.js",
)  # fmt: skip
_SAMPLES = "/static/cifar10_samples.png"
_FILES = {
    "/": ("page.html", "text/html"),
    "/static/page.css": ("page.css", "text/css"),
    **{f"/static/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
PAGE_PATHS = (*_FILES, _SAMPLES)
"""Answered without a token, because a browser opens the page before its user can type one."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser that kept some files would mix them with those of a newer version.
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page's files. They are left out of the OpenAPI document, which is about the interface."""
    for path, (name, media_type) in _FILES.items():
        _add_file(app, path, files("serve").joinpath("static", name).read_bytes(), media_type)
    sheet = files("rpg").joinpath("tasks", "data", "cifar10_samples.png").read_bytes()
    _add_file(app, _SAMPLES, sheet, "image/png")


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False, response_class=Response)
    async def file() -> Response:
        return Response(content, headers=_HEADERS, media_type=media_type)

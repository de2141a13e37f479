"""The routes of the server. `docs/http-api.md` is the specification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mexit.errors import BadInput, NotFound, Overloaded
from mexit.serving import model_info, strict_json
from mexit.serving.metrics import CONTENT_TYPE
from mexit.serving.middleware import BearerToken, ErrorBoundary, client_of
from mexit.serving.oip import HEADER_LENGTH, VERSION
from mexit.serving.request_body import read_body
from mexit.serving.request_options import from_query
from mexit.serving.responses import HANDLERS, json_reply
from mexit.serving.service import IncomingRequest, Service
from mexit.serving.strict_json import shown
from mexit.serving.worker_pool import Job

T = TypeVar("T")


def build_app(service: Service, tokens: Sequence[str] = ()) -> Starlette:
    """The application; every route but health wants one of the tokens, if there are any."""
    around = [Middleware(ErrorBoundary, metrics=service.metrics)]
    if tokens:
        around.append(Middleware(BearerToken, tokens=tokens))
    app = Starlette(routes=ROUTES, middleware=around, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def server_metadata(_: Request) -> Response:
    """`GET /v2`"""
    return json_reply(model_info.server())


async def server_live(_: Request) -> Response:
    """`GET /v2/health/live`: the process answers."""
    return json_reply({"live": True})


async def server_ready(request: Request) -> Response:
    """`GET /v2/health/ready`: it takes work; 503 from the moment it was told to stop."""
    ready = not _service(request).stopping
    return json_reply({"ready": ready}, 200 if ready else 503)


async def model_metadata(request: Request) -> Response:
    """`GET /v2/models/{model}`"""
    return json_reply(model_info.model(_of_model(request).runtime))


async def model_ready(request: Request) -> Response:
    """`GET /v2/models/{model}/ready`"""
    service = _of_model(request)
    ready = not service.stopping
    return json_reply({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)


async def model_config(request: Request) -> Response:
    """`GET /v2/models/{model}/config`"""
    service = _of_model(request)
    return json_reply(model_info.config(service.runtime, service.limits))


async def model_statistics(request: Request) -> Response:
    """`GET /v2/models/{model}/stats`"""
    return json_reply(_of_model(request).metrics.statistics())


async def all_statistics(request: Request) -> Response:
    """`GET /v2/models/stats`"""
    return json_reply(_service(request).metrics.statistics())


async def repository_index(request: Request) -> Response:
    """`POST /v2/repository/index`, with an optional `{"ready": true}`."""
    service = _service(request)
    with service.storage.reserve(client_of(request)) as take:
        body = await read_body(request, take, service.limits)
        wanted = strict_json.parse(body, service.limits) if body.strip() else {}
    only_ready = wanted.get("ready", False) if isinstance(wanted, dict) else None
    if not isinstance(only_ready, bool):
        raise BadInput(f'the body must be empty or {{"ready": true}}, found {shown(wanted)}')
    return json_reply(model_info.index(service.runtime, not service.stopping))


async def model_infer(request: Request) -> Response:
    """`POST /v2/models/{model}/infer`"""
    service = _of_model(request)
    lengths = request.headers.getlist(HEADER_LENGTH)
    with _statistics(service):
        content, headers = await _work(request, "infer", partial(service.infer, header_lengths=lengths))
    return Response(content, headers=headers)


async def classify(request: Request) -> Response:
    """`POST /v1/classify`: the bytes of an image in, its answer out."""
    form = request.headers.get("content-type", "")
    if form.startswith("multipart/"):
        raise BadInput("send the bytes of the image as the body (curl --data-binary @image.png), not a form")
    options = from_query(request.query_params)
    prediction = await _work(request, "classify", partial(_service(request).classify, options=options))
    return json_reply(prediction.to_json())


async def metrics(request: Request) -> Response:
    """`GET /metrics`"""
    return Response(_service(request).metrics.exposition(), media_type=CONTENT_TYPE)


async def _work(request: Request, route: str, job: Callable[[IncomingRequest], Job[T]]) -> T:
    """Read the body, then let workers do the job."""
    service, client = _service(request), client_of(request)
    try:
        with service.serving(route), service.storage.reserve(client) as take:
            body = await read_body(request, take, service.limits)
            encoding = request.headers.get("content-encoding", "")
            arrival = IncomingRequest(body, encoding, time.perf_counter_ns(), client)
            return await service.worker_pool.run(job(arrival), request.receive, client)
    except Overloaded:
        if service.refusals is not None and not service.stopping:
            await service.refusals.hold(client)
        raise


@contextmanager
def _statistics(service: Service) -> Iterator[None]:
    """Every inference request that did not succeed counts as failed, wherever it ended."""
    start_ns = time.perf_counter_ns()
    try:
        yield
    except Exception:
        service.metrics.refused(time.perf_counter_ns() - start_ns)
        raise


def _service(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def _of_model(request: Request) -> Service:
    """The service, if the path names its model and version. Raises `NotFound`."""
    service = _service(request)
    name, version = request.path_params["model"], request.path_params.get("version", VERSION)
    own = service.runtime.bundle.manifest.name
    if name != own:
        raise NotFound(f"unknown model {shown(name)}: this server has '{own}'")
    if version != VERSION:
        raise NotFound(f"model '{own}' has no version {shown(version)}: it has version {VERSION}")
    return service


def _model_routes(suffix: str, endpoint: Callable[[Request], object], method: str = "GET") -> list[Route]:
    """One route of a model, without and with its version."""
    paths = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    return [Route(path + suffix, endpoint, methods=[method]) for path in paths]


ROUTES = [
    Route("/v2", server_metadata),
    Route("/v2/health/live", server_live),
    Route("/v2/health/ready", server_ready),
    Route("/v2/models/stats", all_statistics),
    *_model_routes("", model_metadata),
    *_model_routes("/ready", model_ready),
    *_model_routes("/config", model_config),
    *_model_routes("/stats", model_statistics),
    *_model_routes("/infer", model_infer, "POST"),
    Route("/v2/repository/index", repository_index, methods=["POST"]),
    Route("/v1/classify", classify, methods=["POST"]),
    Route("/metrics", metrics),
]

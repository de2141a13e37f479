"""The HTTP routes of the server. `docs/http-api.md` is the specification."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from mexit.errors import BadInput, NotFound
from mexit.serving import model_info
from mexit.serving.asgi import App, Handler, Request, Response, Route, Routes
from mexit.serving.image_body import HOW_TO_SEND
from mexit.serving.metrics import CONTENT_TYPE
from mexit.serving.middleware import BearerTokens, client_id
from mexit.serving.oip import HEADER_LENGTH, VERSION
from mexit.serving.request_body import parse_json, read_body, short_repr
from mexit.serving.request_options import options_from_query
from mexit.serving.responses import json_response, response_to_error
from mexit.serving.service import IncomingRequest, Service
from mexit.serving.worker_pool import Job

T = TypeVar("T")


def build_app(service: Service, tokens: Sequence[str] = ()) -> App:
    """The ASGI application of a service. If there are tokens, every route but health requires one of them."""
    check, count_error = BearerTokens(tokens).check, service.metrics.count_error
    return App(Routes(ROUTES), service, check=check, on_error=response_to_error, count_error=count_error)


async def server_metadata(_: Request) -> Response:
    """`GET /v2`"""
    return json_response(model_info.server_metadata())


async def server_live(_: Request) -> Response:
    """`GET /v2/health/live`: the process answers."""
    return json_response({"live": True})


async def server_ready(request: Request) -> Response:
    """`GET /v2/health/ready`: the server accepts requests; 503 after a stop signal."""
    ready = not _service(request).stopping
    return json_response({"ready": ready}, 200 if ready else 503)


async def model_metadata(request: Request) -> Response:
    """`GET /v2/models/{model}`"""
    service = _service_of_model(request)
    return json_response(model_info.model_metadata(service.runtime, service.name))


async def model_ready(request: Request) -> Response:
    """`GET /v2/models/{model}/ready`"""
    ready = not _service_of_model(request).stopping
    return json_response({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)


async def model_config(request: Request) -> Response:
    """`GET /v2/models/{model}/config`"""
    service = _service_of_model(request)
    return json_response(model_info.model_config(service.runtime, service.name, service.limits))


async def model_statistics(request: Request) -> Response:
    """`GET /v2/models/{model}/stats`"""
    return json_response(_service_of_model(request).metrics.statistics.to_json())


async def all_statistics(request: Request) -> Response:
    """`GET /v2/models/stats`"""
    return json_response(_service(request).metrics.statistics.to_json())


async def repository_index(request: Request) -> Response:
    """`POST /v2/repository/index`, with an optional body `{"ready": true}`."""
    service = _service(request)
    with service.memory.reserve(client_id(request)) as add:
        body = await read_body(request, add, service.limits)
        options = parse_json(body, service.limits) if body.strip() else {}
    if not isinstance(options, dict) or not isinstance(options.get("ready"), bool | None):
        raise BadInput(f'the body must be empty or {{"ready": true}}, found {short_repr(options)}')
    return json_response(model_info.repository_index(service.name, not service.stopping))


async def model_infer(request: Request) -> Response:
    """`POST /v2/models/{model}/infer`: tensors to the outputs of their predictions."""
    service = _service_of_model(request)
    header_lengths = request.header_values(HEADER_LENGTH)
    with _record_failure(service):
        job = partial(service.infer, header_lengths=header_lengths)
        is_short = partial(service.is_short, header_lengths=header_lengths)
        content, headers = await _run_job(request, "infer", job, is_short)
    return Response(content, headers=headers)


async def classify(request: Request) -> Response:
    """`POST /v1/classify`: an encoded image to its prediction."""
    if request.header("content-type").startswith("multipart/"):
        raise BadInput(f"the body is a form (curl -F): {HOW_TO_SEND}")
    options = options_from_query(request.query)
    prediction = await _run_job(request, "classify", partial(_service(request).classify, options=options))
    return json_response(prediction.to_json())


async def metrics(request: Request) -> Response:
    """`GET /metrics`: Prometheus text."""
    return Response(_service(request).metrics.prometheus_text(), headers={"content-type": CONTENT_TYPE})


async def _run_job(
    request: Request,
    route: str,
    job: Callable[[IncomingRequest], Job[T]],
    is_short: Callable[[IncomingRequest], bool] = lambda _: False,
) -> T:
    """Read the body, then run the request's job in the worker pool."""
    service, client = _service(request), client_id(request)
    with service.in_flight(route), service.memory.reserve(client) as add:
        body = await read_body(request, add, service.limits)
        incoming = IncomingRequest(body, request.header("content-encoding"), time.perf_counter_ns(), client)
        short = is_short(incoming)
        return await service.worker_pool.run(job(incoming), request.receive, client, short=short)


@contextmanager
def _record_failure(service: Service) -> Iterator[None]:
    """Record an inference request that ends in an error, in the statistics of the protocol."""
    start_ns = time.perf_counter_ns()
    try:
        yield
    except Exception:
        service.metrics.statistics.record_failure(time.perf_counter_ns() - start_ns)
        raise


def _service(request: Request) -> Service:
    assert isinstance(request.state, Service)
    return request.state


def _service_of_model(request: Request) -> Service:
    """The service, if the path names its model and version. Raises `NotFound`."""
    service = _service(request)
    name, version = request.path_params["model"], request.path_params.get("version", VERSION)
    if name != service.name:
        raise NotFound(f"unknown model {short_repr(name)}: this server has '{service.name}'")
    if version != VERSION:
        raise NotFound(f"model '{service.name}' has no version {short_repr(version)}: it has version {VERSION}")
    return service


def _model_routes(suffix: str, handler: Handler, method: str = "GET") -> list[Route]:
    """The routes of a model, without and with its version."""
    paths = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    return [Route(path + suffix, handler, method) for path in paths]


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
    Route("/v2/repository/index", repository_index, "POST"),
    Route("/v1/classify", classify, "POST"),
    Route("/metrics", metrics),
]

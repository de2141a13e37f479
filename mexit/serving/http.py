"""The HTTP routes of the server. `docs/http-api.md` is the specification."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from mexit.errors import BadInput, NotFound
from mexit.serving import api_page, camera_views, dashboard_files, model_info, openapi, server_stats
from mexit.serving.asgi import App, Handler, Request, Response, Route, Routes, StreamResponse
from mexit.serving.image_body import HOW_TO_SEND
from mexit.serving.metrics import CONTENT_TYPE
from mexit.serving.middleware import BearerTokens, Tokens, check_admin, client_id
from mexit.serving.oip import HEADER_LENGTH
from mexit.serving.repository import ModelRepository
from mexit.serving.request_body import content_encoding, decompress, parse_json, read_body, short_repr
from mexit.serving.request_options import (
    UNLOAD_PARAMETERS,
    budget_from_query,
    check_load_parameters,
    options_from_query,
)
from mexit.serving.responses import json_response, response_to_error
from mexit.serving.service import IncomingRequest, Service
from mexit.serving.worker_pool import Job

T = TypeVar("T")


def build_app(repository: ModelRepository, tokens: Tokens) -> App:
    """The ASGI application of a server. If there are tokens, every route but health requires one of them."""
    check, count_error = BearerTokens(tokens).check, repository.server.metrics.count_error
    return App(Routes(ROUTES), repository, check=check, on_error=response_to_error, count_error=count_error)


async def server_metadata(_: Request) -> Response:
    """`GET /v2`"""
    return json_response(model_info.server_metadata())


async def server_live(_: Request) -> Response:
    """`GET /v2/health/live`: the process answers."""
    return json_response({"live": True})


async def server_ready(request: Request) -> Response:
    """`GET /v2/health/ready`: the server accepts requests; 503 after a stop signal."""
    ready = not _repository(request).server.stopping
    return json_response({"ready": ready}, 200 if ready else 503)


async def model_metadata(request: Request) -> Response:
    """`GET /v2/models/{model}`"""
    return json_response(model_info.model_metadata(_service(request)))


async def model_ready(request: Request) -> Response:
    """`GET /v2/models/{model}/ready`"""
    ready = not _service(request).server.stopping
    return json_response({"name": request.path_params["model"], "ready": ready}, 200 if ready else 503)


async def model_config(request: Request) -> Response:
    """`GET /v2/models/{model}/config`"""
    return json_response(model_info.model_config(_service(request)))


async def model_statistics(request: Request) -> Response:
    """`GET /v2/models/{model}/stats`"""
    return json_response({"model_stats": [_service(request).metrics.statistics.to_json()]})


async def all_statistics(request: Request) -> Response:
    """`GET /v2/models/stats`: of the versions in service."""
    services = _repository(request).services
    return json_response({"model_stats": [service.metrics.statistics.to_json() for service in services]})


async def repository_index(request: Request) -> Response:
    """`POST /v2/repository/index`, with an optional body `{"ready": true}`: only the versions in service."""
    options = await _json_object(request, {"ready": bool}, '{"ready": true}')
    entries = _repository(request).index()
    return json_response([entry for entry in entries if not options.get("ready") or entry["state"] == "READY"])


async def load_model(request: Request) -> Response:
    """`POST /v2/repository/models/{model}/load`: put the newest version into service."""
    await _json_object(request, {"parameters": dict}, "{}", parameters=())
    return await _change(request, _repository(request).load)


async def unload_model(request: Request) -> Response:
    """`POST /v2/repository/models/{model}/unload`: take a model out of service."""
    await _json_object(request, {"parameters": dict}, "{}", parameters=UNLOAD_PARAMETERS)
    return await _change(request, _repository(request).unload)


async def model_infer(request: Request) -> Response:
    """`POST /v2/models/{model}/infer`: tensors to the outputs of their predictions."""
    header_lengths = request.header_values(HEADER_LENGTH)
    with _repository(request).use(*_named(request)) as service, service.record_failure():
        job = partial(service.infer, header_lengths=header_lengths)
        is_short = partial(service.is_short, binary=bool(header_lengths)) if service.may_be_short else None
        content, headers = await _run_job(request, "infer", service, job, is_short)
    return Response(content, headers=headers)


async def classify(request: Request) -> Response:
    """`POST /v1/classify`: an encoded image to its prediction, by the model that the query names."""
    if request.header("content-type").startswith("multipart/"):
        raise BadInput(f"the body is a form (curl -F): {HOW_TO_SEND}")
    query = dict(request.query)
    repository = _repository(request)
    name = query.pop("model", None) or _only_model(repository)
    options = options_from_query(query)
    with repository.use(name) as service:
        job = partial(service.classify, options=options)
        prediction = await _run_job(request, "classify", service, job)
    return json_response(prediction.to_json())


async def explain(request: Request) -> Response:
    """`POST /v1/explain`: an encoded image to the answers of all exits, by the model that the query names."""
    query = dict(request.query)
    repository = _repository(request)
    name = query.pop("model", None) or _only_model(repository)
    budget = budget_from_query(query)
    with repository.use(name) as service:
        explanation = await _run_job(request, "explain", service, partial(service.explain, budget=budget))
    return json_response(explanation)


async def stats(request: Request) -> Response:
    """`GET /v1/stats`: the state of the server and of its models."""
    # Reading the counts of all processes takes milliseconds, which short requests in the event loop would wait for.
    return json_response(await asyncio.to_thread(server_stats.server_stats, _repository(request)))


async def dashboard(_: Request) -> Response:
    """`GET /`: the dashboard."""
    return dashboard_files.dashboard_file(dashboard_files.INDEX)


async def dashboard_part(request: Request) -> Response:
    """`GET /dashboard/{file}`: a file that the dashboard loads."""
    return dashboard_files.dashboard_file(request.path_params["file"])


async def cameras(request: Request) -> Response:
    """`GET /v1/cameras`: the state of each camera."""
    return json_response(_cameras(request).states())


async def camera_picture(request: Request) -> Response:
    """`GET /v1/cameras/{name}/picture.jpg`: the last answered frame, at most 320 x 1280 pixels."""
    content = await _cameras(request).picture(request.path_params["name"])
    return Response(content, headers={"content-type": camera_views.JPEG, **camera_views.HEADERS})


async def camera_stream(request: Request) -> Response:
    """`GET /v1/cameras/{name}/stream.mjpg`: answered frames from now on."""
    headers = {"content-type": camera_views.MJPEG, **camera_views.HEADERS}
    parts = _cameras(request).stream(request.path_params["name"])
    if request.method == "HEAD":
        return Response(headers=headers)
    return StreamResponse(headers=headers, parts=parts, receive=request.receive)


async def metrics(request: Request) -> Response:
    """`GET /metrics`: Prometheus text."""
    return Response(_repository(request).server.metrics.prometheus_text(), headers={"content-type": CONTENT_TYPE})


async def api_description(_: Request) -> Response:
    """`GET /openapi.json`: the OpenAPI description of these routes."""
    return json_response(openapi.description())


async def api_docs(_: Request) -> Response:
    """`GET /docs`: the description as a page."""
    return Response(api_page.api_page(openapi.description()), headers=api_page.HEADERS)


async def _run_job(
    request: Request,
    route: str,
    service: Service,
    job: Callable[[IncomingRequest], Job[T]],
    is_short: Callable[[IncomingRequest], bool] | None = None,
) -> T:
    """Read the body, then run the request's job in the worker pool; without `is_short` it is not short."""
    server, client = service.server, client_id(request)
    with server.in_flight(route, service.name), server.memory.reserve(client) as add:
        if is_short is None:
            server.worker_pool.check_room(client)  # to refuse a request before its body is read is cheaper
        body = await read_body(request, add, server.limits)
        incoming = IncomingRequest(body, content_encoding(request), time.perf_counter_ns(), client)
        short = is_short is not None and is_short(incoming)
        return await server.worker_pool.run(job(incoming), request.receive, client, short=short)


async def _change(request: Request, change: Callable[[str], None]) -> Response:
    """Load or unload the model of the path, in the loader's thread."""
    check_admin(request.scope.get("mexit_admin", True))
    await _repository(request).server.change(partial(change, request.path_params["model"]), request.receive)
    return json_response({})


async def _json_object(
    request: Request, fields: Mapping[str, type], expected: str, parameters: Sequence[str] = ()
) -> dict[str, Any]:
    """The JSON object of a body; empty for an empty body.

    Args:
        request: its body is unread.
        fields: the type of each known field; other fields are ignored.
        expected: an example, for messages.
        parameters: the known parameters. Others, such as Triton's `config`, would change what is loaded.
    """
    server = _repository(request).server
    with server.memory.reserve(client_id(request)) as add:
        sent = await read_body(request, add, server.limits)
        body = decompress(sent, content_encoding(request), server.limits.body_bytes)
        options = parse_json(body, server.limits) if body.strip() else {}
    if not isinstance(options, dict):
        raise BadInput(f"the body must be empty or {expected}, found {short_repr(options)}")
    for name, kind in fields.items():
        if not isinstance(options.get(name), kind | None):
            raise BadInput(f"the body must be empty or {expected}, found {name} {short_repr(options[name])}")
    check_load_parameters(options.get("parameters") or {}, parameters)
    return options


def _repository(request: Request) -> ModelRepository:
    assert isinstance(request.state, ModelRepository)
    return request.state


def _cameras(request: Request) -> camera_views.CameraViews:
    """The cameras of the server. Raises `NotFound` without any."""
    found = _repository(request).server.cameras
    if found is None:
        raise NotFound("this server has no cameras: mexit serve --cameras FILE")
    return found


def _named(request: Request) -> tuple[str, str | None]:
    """The model and the version of the path."""
    return request.path_params["model"], request.path_params.get("version")


def _service(request: Request) -> Service:
    """The service that the path names. Raises `NotFound`, `Overloaded`."""
    return _repository(request).service(*_named(request))


def _only_model(repository: ModelRepository) -> str:
    """The model of requests that name none. Raises `BadInput` if there are several."""
    names = repository.names
    if len(names) > 1:
        raise BadInput(f"this server has several models: name one in the query, such as ?model={names[0]}")
    if not names:
        raise NotFound("no model is in service")
    return names[0]


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
    Route("/v2/repository/models/{model}/load", load_model, "POST"),
    Route("/v2/repository/models/{model}/unload", unload_model, "POST"),
    Route("/v1/classify", classify, "POST"),
    Route("/v1/explain", explain, "POST"),
    Route("/v1/stats", stats),
    Route("/v1/cameras", cameras),
    Route("/v1/cameras/{name}/picture.jpg", camera_picture),
    Route("/v1/cameras/{name}/stream.mjpg", camera_stream),
    Route("/", dashboard),
    Route("/dashboard/{file}", dashboard_part),
    Route("/metrics", metrics),
    Route("/openapi.json", api_description),
    Route("/docs", api_docs),
]

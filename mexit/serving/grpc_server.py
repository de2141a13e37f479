"""The gRPC server: `GRPCInferenceService` with Triton's extensions, in the event loop of the HTTP server.

A method reads its message only when the token is valid, and parses it itself: grpcio would read before a handler
runs, and answer bytes that are no message with an internal error.

    grpc_messages     the messages
    grpc_infer        inference requests and responses
    grpc_port         the port that worker processes share
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn
from urllib.parse import unquote

from mexit.errors import BadInput, Overloaded, TooLarge, requires_extra
from mexit.serving import grpc_infer, grpc_messages, model_info
from mexit.serving.asgi import HTTPError
from mexit.serving.grpc_messages import new
from mexit.serving.middleware import BearerTokens, Tokens, check_admin, client_name
from mexit.serving.repository import ModelRepository
from mexit.serving.request_options import UNLOAD_PARAMETERS, check_load_parameters
from mexit.serving.responses import CLIENT_CLOSED_REQUEST, explain
from mexit.serving.service import IncomingRequest

with requires_extra("grpc", "Serving over gRPC"):
    import grpc
    from grpc import StatusCode
    from grpc.aio import EOF

PUBLIC_METHODS = ("ServerLive", "ServerReady")  # for load balancers, which hold no token
_CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    409: StatusCode.FAILED_PRECONDITION,
    413: StatusCode.RESOURCE_EXHAUSTED,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
}
_RETRY = "grpc-retry-pushback-ms"  # gRPC's counterpart of Retry-After
_ANSWER_SHARE, _MAX_ANSWER_MS = 0.1, 5.0  # of a call's deadline, kept for the way of the answer
_STOP_S = 1.0  # for the last bytes of answers


@dataclass(frozen=True)
class Call:
    """One call of a method.

    Attributes:
        client: identity of the client.
        token: number of its token; None if the server has no tokens.
        context: grpcio's context of the call.
    """

    client: str
    token: int | None
    context: Any

    def deadline_ms(self) -> float | None:
        """Milliseconds in which an answer must be ready so that it arrives before the call's deadline."""
        seconds: float | None = self.context.time_remaining()
        if seconds is None:
            return None
        return max(1e-3, 1e3 * seconds - min(_MAX_ANSWER_MS, 1e3 * seconds * _ANSWER_SHARE))


Answer = Callable[[Any, Call], Any]


class GrpcServer:
    """Answers the calls of `GRPCInferenceService`."""

    def __init__(
        self,
        repository: ModelRepository,
        tokens: Tokens,
        addresses: Sequence[str],
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            repository: the models.
            tokens: if there are any, every method but those of health requires one of them.
            addresses: to listen on, such as "127.0.0.1:8001".
            tls: certificate chain and private key in PEM; None: without TLS.
        """
        self._repository, self._server = repository, repository.server
        self._tokens, self._addresses, self._tls = BearerTokens(tokens), addresses, tls
        self._tasks: set[asyncio.Task[Any]] = set()
        self._grpc: Any = None

    async def start(self) -> None:
        """Accept calls. Called in the event loop."""
        limits = self._server.limits
        options = [
            ("grpc.max_receive_message_length", limits.body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", limits.requests),
            ("grpc.so_reuseport", 1),
            # Identity only: grpcio decompresses without a bound.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ]
        self._grpc = grpc.aio.server(options=options, maximum_concurrent_rpcs=limits.connections)
        handlers = {name: self._handler(name, *entry) for name, entry in self._methods().items()}
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._stream)
        self._grpc.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(grpc_messages.SERVICE, handlers)])
        for address in self._addresses:
            if self._tls is None:
                self._grpc.add_insecure_port(address)
            else:
                chain, key = self._tls
                self._grpc.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)]))
        await self._grpc.start()

    async def stop(self) -> None:
        """End all calls, open streams among them."""
        if self._grpc is not None:
            await self._grpc.stop(min(_STOP_S, self._server.limits.close_s))

    def _methods(self) -> Mapping[str, tuple[str, Answer]]:
        """Method to the message of its request and its implementation."""
        return {
            "ServerLive": ("Empty", lambda _message, _call: new("ServerLiveResponse", live=True)),
            "ServerReady": ("Empty", lambda _message, _call: new("ServerReadyResponse", ready=self._ready)),
            "ServerMetadata": ("Empty", self._server_metadata),
            "ModelReady": ("ModelReadyRequest", self._model_ready),
            "ModelMetadata": ("ModelMetadataRequest", self._model_metadata),
            "ModelConfig": ("ModelConfigRequest", self._model_config),
            "ModelStatistics": ("ModelStatisticsRequest", self._statistics),
            "RepositoryIndex": ("RepositoryIndexRequest", self._index),
            "RepositoryModelLoad": ("RepositoryModelLoadRequest", self._load),
            "RepositoryModelUnload": ("RepositoryModelUnloadRequest", self._unload),
            "ModelInfer": ("ModelInferRequest", self._infer),
        }

    @property
    def _ready(self) -> bool:
        return not self._server.stopping

    def _server_metadata(self, _message: Any, _call: Call) -> Any:
        return grpc_messages.from_json("ServerMetadataResponse", model_info.server_metadata())

    def _model_ready(self, message: Any, _call: Call) -> Any:
        self._repository.service(message.name, message.version or None)
        return new("ModelReadyResponse", ready=self._ready)

    def _model_metadata(self, message: Any, _call: Call) -> Any:
        metadata = model_info.model_metadata(self._repository.service(message.name, message.version or None))
        properties = {name: str(value) for name, value in metadata["parameters"].items()}
        return grpc_messages.from_json("ModelMetadataResponse", {**metadata, "properties": properties})

    def _model_config(self, message: Any, _call: Call) -> Any:
        config = model_info.model_config(self._repository.service(message.name, message.version or None))
        for tensor in (*config["input"], *config["output"]):
            tensor["data_type"] = grpc_messages.DATA_TYPES[tensor["data_type"]]
        return grpc_messages.from_json("ModelConfigResponse", {"config": config})

    def _statistics(self, message: Any, _call: Call) -> Any:
        services = self._repository.services
        if message.name:
            services = [self._repository.service(message.name, message.version or None)]
        entries = [service.metrics.statistics.to_json() for service in services]
        return grpc_messages.from_json("ModelStatisticsResponse", {"model_stats": entries})

    def _index(self, message: Any, _call: Call) -> Any:
        entries = [entry for entry in self._repository.index() if not message.ready or entry["state"] == "READY"]
        return grpc_messages.from_json("RepositoryIndexResponse", {"models": entries})

    async def _load(self, message: Any, call: Call) -> Any:
        return await self._change(message, call, self._repository.load, ())

    async def _unload(self, message: Any, call: Call) -> Any:
        return await self._change(message, call, self._repository.unload, UNLOAD_PARAMETERS)

    async def _change(self, message: Any, call: Call, change: Callable[[str], None], known: Sequence[str]) -> Any:
        check_admin(self._tokens.is_admin(call.token))
        check_load_parameters(message.parameters, known)
        # In KServe's messages, the model has the number that the repository has in Triton's.
        name = message.model_name or message.repository_name
        never: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        await self._server.change(partial(change, name), lambda: never)
        return new("Empty")

    async def _infer(self, content: bytes, call: Call) -> Any:
        """The response to an inference request; a call that the client ends stops waiting."""
        gone: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        task = asyncio.get_running_loop().create_task(self._run(content, call, gone))
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not gone.done():
                gone.set_result(None)
            self._server.metrics.count_error(CLIENT_CLOSED_REQUEST)
            raise

    async def _run(self, content: bytes, call: Call, gone: asyncio.Future[object]) -> Any:
        server, arrival_ns = self._server, time.perf_counter_ns()
        with server.memory.reserve(call.client) as add:
            add(len(content))
            message = grpc_infer.parse_message(content, server.limits)
            named = self._repository.use(message.model_name, message.model_version or None)
            with named as service, service.record_failure(), server.in_flight("infer", service.name):
                raw = bool(message.raw_input_contents)
                parse = partial(
                    grpc_infer.read_request,
                    message,
                    service.runtime.bundle.manifest.input,
                    server.limits,
                    call.deadline_ms(),
                    server.deadline_ms,
                )
                incoming = IncomingRequest(content, "", arrival_ns, call.client)
                job = service.answer(incoming, parse, partial(grpc_infer.write_response, raw=raw))
                short = service.is_short(incoming, binary=raw)
                return await server.worker_pool.run(job, lambda: gone, call.client, short=short)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of a call that the client has ended; else asyncio logs it

    def _handler(self, method: str, request: str, answer: Answer) -> Any:
        """The handler of a method with one request."""

        async def handle(_requests: Any, context: Any) -> bytes:
            try:
                call = self._call(method, context)
                content = await self._read(call)
                if content is EOF:
                    raise BadInput(f"the call has no {request}")
                response = answer(self._parse(request, content), call)
                if isinstance(response, Awaitable):
                    response = await response
            except Exception as error:
                failure = error
            else:
                return bytes(response.SerializeToString())
            await self._refuse(method, failure, context)

        return grpc.stream_unary_rpc_method_handler(handle)  # on the wire the same as one request

    async def _stream(self, _requests: Any, context: Any) -> None:
        """`ModelStreamInfer`: answers one request after the other; an error ends its request, not the stream."""
        method = "ModelStreamInfer"
        try:
            call = self._call(method, context)
            while (content := await context.read()) is not EOF:
                response = new("ModelStreamInferResponse")
                try:
                    response.infer_response.CopyFrom(await self._infer(content, call))
                except Exception as error:
                    response.error_message = self._explain(method, error)[1]
                await asyncio.wait_for(context.write(response.SerializeToString()), self._server.limits.send_s)
        except Exception as error:
            failure = error
        else:
            return
        await self._refuse(method, failure, context)

    def _call(self, method: str, context: Any) -> Call:
        """Check the token of a call. Raises `HTTPError`."""
        token = self._tokens.number([*_authorizations(context)])
        if token == 0 and method not in PUBLIC_METHODS:
            raise HTTPError(401, "send the metadata authorization: Bearer TOKEN")
        return Call(client_name(token, _host(context.peer())), token, context)

    async def _read(self, call: Call) -> Any:
        """The bytes of the next message, or `EOF`."""
        seconds = self._server.limits.body_s
        try:
            return await asyncio.wait_for(call.context.read(), seconds)
        except asyncio.TimeoutError:
            raise HTTPError(408, f"the message did not arrive within {seconds:g} s") from None

    def _parse(self, request: str, content: bytes) -> Any:
        """The message of a request; that of an inference request stays bytes, because its size is bounded by parts."""
        limit = self._server.limits.head_bytes
        if request == "ModelInferRequest":
            return content
        if len(content) > limit:
            raise TooLarge(f"a {request} has at most {limit} bytes, found {len(content)}")
        return grpc_messages.parse(request, content)

    def _explain(self, method: str, error: Exception) -> tuple[int, str]:
        """The status of HTTP of an error, which is counted, and its message."""
        status, message = (error.status, str(error)) if isinstance(error, HTTPError) else explain(error, method)
        self._server.metrics.count_error(status)
        return status, message

    async def _refuse(self, method: str, error: Exception, context: Any) -> NoReturn:
        """End a call with the code and the message of an error."""
        status, message = self._explain(method, error)
        retry = ((_RETRY, str(round(1e3 * error.retry_after_s))),) if isinstance(error, Overloaded) else ()
        await context.abort(_CODES.get(status, StatusCode.INTERNAL), message, retry)
        raise AssertionError("abort raises")


def _authorizations(context: Any) -> Iterator[bytes]:
    """The values of the metadata `authorization`."""
    for name, value in context.invocation_metadata() or ():
        if name == "authorization":
            yield value if isinstance(value, bytes) else value.encode()


def _host(peer: str) -> str | None:
    """The network address of a client, from grpcio's `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`."""
    family, _, address = unquote(peer).partition(":")
    return address.rpartition(":")[0].strip("[]") if family in ("ipv4", "ipv6") else None

"""The HTTP and gRPC server: Open Inference Protocol v2, `POST /v1/classify` and Prometheus metrics.

A request passes these files, from its route to its answer:

    http              routes
    request_body      receives, decompresses and parses the body within limits
    worker_pool       where jobs run, clients in turn, a bounded number of requests
    image_body        images, also as base64 in JSON
    service           answers one request with the runtime
    oip               requests and responses of the Open Inference Protocol
    request_options   budget, deadline, last exit, receipts
    responses         JSON responses and errors

Around them:

    asgi              the application: requests, responses, table of routes
    server_state      what all models share: limits, worker threads, memory, metrics
    model_folder      models and versions on disk
    repository_watch  loads new versions, unloads removed models
    middleware        authentication, client identity
    model_info        server and model metadata
    openapi           the OpenAPI description; openapi_schemas: its JSON values; api_page: it as a page
    metrics           Prometheus series and Triton's statistics
    profile_times     time of answers by the latency profile
    server_stats      state of the server and its models as JSON
    explanation_json  what every exit answers for one image, as JSON
    camera_views      state, pictures and series of cameras beside the server
    dashboard_files   the page at `/`, which shows these two; its files are in `dashboard/`
    limits            sizes, counts and times that bound the server
    secret_file       files of keys and tokens
    tls               certificates
    unix_socket       Unix sockets to listen on
    open_files        the system's limit of open files
    systemd_notify    messages to systemd: ready, alive, stopping
    uvicorn_server    sockets, connection time-outs, signals, graceful shutdown
    supervisor        accepts connections, passes them to worker processes, replaces dead ones
    worker            a worker process
    worker_process    a worker process as the supervisor sees it
    model_changes     loads and unloads in all worker processes
    channel           messages and sockets between the supervisor and a worker
    grpc_server       the methods of gRPC; grpc_messages, grpc_infer, grpc_port

`docs/http-api.md` and `docs/grpc-api.md` are the specification.
"""

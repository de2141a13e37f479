"""The HTTP server: Open Inference Protocol v2, `/v1/classify` and Prometheus metrics.

    listen     the socket, the signals, the way down
    app        the routes
    service    what a worker does with one request
    access     who may ask, and what becomes of whatever breaks
    intake     request bodies, read under limits
    replies    responses and errors
    workshop   inference off the event loop, few at a time
    protocol   the Open Inference Protocol in bytes: `tensors`, `options` and `strict_json` are its parts
    describe   what the server says of itself and of its model
    metrics    what it counts
    limits     every number that bounds it

`protocol` and its parts know nothing of HTTP; only `listen`, `app`, `access`, `intake` and `replies` import
the web framework. `docs/http-api.md` is the specification.
"""

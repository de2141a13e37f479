#!/bin/sh
# Serve the newest bundle to this machine. Without a bundle, mexit demo makes one first (under two minutes).
# Ctrl-C stops the server after the requests in flight.
set -eu
[ -d bundles ] || mexit demo
exec mexit serve --budget low --port "${PORT:-8000}"

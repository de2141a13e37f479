#!/bin/sh
# Serve the newest bundle to this machine; make one first if there is none (mexit demo, under two minutes).
# Stop with Ctrl-C: what is in flight is finished.
set -eu
[ -d bundles ] || mexit demo
exec mexit serve --budget low --port "${PORT:-8000}"

#!/bin/sh
# `detect`, `build`, `serve`, `batch` and `playground` are the project's commands of these names; anything else runs as it is.
set -eu

case "${1:-}" in
  detect | build | serve | batch | playground)
    program="asag-$1"
    shift
    exec "$program" "$@"
    ;;
  "" | -*)
    exec asag-detect "$@"
    ;;
  *)
    exec "$@"
    ;;
esac

#!/bin/sh
# `detect`, `build` and `serve` are the project's commands of these names; anything else runs as it is.
set -eu

case "${1:-}" in
  detect | build | serve)
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

#!/bin/sh
# The server's run over the three devices, or what is left of it.
set -eu
server=/var/lib/fedssl/server out=/var/lib/fedssl/runs/first
if [ -e $out/run.toml ]; then
  exec fedssl server run $server --resume $out
fi
exec fedssl server run $server /model/run.toml --catalogue /model/catalogue.jsonl --out $out

#!/bin/sh
# Once: a server's folder, then to the proxy and to each node what it needs of it.
set -eu
server=/var/lib/fedssl/server
[ -e $server/server.toml ] || fedssl server init $server --host 0.0.0.0 --name superlink --name proxy --node anna --node ben --node cleo
install -m 0600 $server/ca.crt $server/server.crt $server/server.key /handover/proxy/
for name in anna ben cleo; do
  install -m 0600 $server/ca.crt /handover/$name/ca.crt
  install -m 0600 $server/nodes/$name.key /handover/$name/node.key
done

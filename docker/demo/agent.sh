#!/bin/sh
# agent.sh NUMBER: the agent of one person's device, with a policy that lets the demo's server ask.
set -eu
device=/var/lib/fedssl/device
if [ ! -e $device/device.toml ]; then
  fedssl device init $device --user "$1"
  cat > $device/device.toml <<POLICY
user = $1

[consent]
train = true

[allow]
servers = ["demo"]
most_epsilon = inf      # the demo's run has no privacy plan

[gates]
most_busy = 1.0
rounds_a_day = 1000

[agent]
training_socket = "/run/fedssl/train.sock"
POLICY
fi
[ -e $device/model ] || fedssl device import $device --model /model/device
exec fedssl device run $device

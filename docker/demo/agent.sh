#!/bin/sh
# agent.sh NUMBER: the agent of one person's device, with a policy that lets the demo's server ask.
set -eu
device=/var/lib/fedssl/device
if [ ! -e $device/device.toml ]; then
  fedssl device init $device --user "$1"
  {
    echo "user = $1"
    cat /demo/device.toml
    printf '\n[agent]\ntraining_socket = "/run/fedssl/train.sock"\n'
  } > $device/device.toml
fi
[ -e $device/model ] || fedssl device import $device --model /model/device
exec fedssl device run $device

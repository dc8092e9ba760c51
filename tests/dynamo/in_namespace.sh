#!/bin/bash
# in_namespace.sh COMMAND...: run it in a network namespace that holds loopback and one made-up address, and nothing else.
# Dynamo's front ends ask for an address of the machine that is not loopback; this one is seen by nobody.
exec unshare --net bash -c '
  ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.9.9.1/24 dev v0 &&
    ip link set v0 up && ip link set v1 up || exit
  exec "$@"' - "$@"

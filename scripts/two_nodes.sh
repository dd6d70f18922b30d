#!/usr/bin/env bash
# Train on two simulated nodes of one CPU rank each. Each node is a set of namespaces with its own network, processes, hostname and
# /dev/shm; a virtual cable connects them. Needs root or a kernel that allows user namespaces, util-linux and iproute2.
# usage: bash scripts/two_nodes.sh ARGUMENTS OF train_gpt2.py...       example:
#   bash scripts/two_nodes.sh --config configs/tiny_cpu.json --save runs/two_nodes
# To test a node failure, kill -9 the process `unshare` of node-b. The other node ends with an error; rerun the command to resume.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || exec unshare --user --map-root-user --net bash scripts/two_nodes.sh "$@"
python=${PYTHON:-.venv/bin/python}
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" GLOO_SOCKET_IFNAME=cable

node='
hostname "$1"
mount -t tmpfs -o size=512m tmpfs /dev/shm
until ip link show cable >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip address add "$2/24" dev cable
ip link set cable up
shift 2
"$@"'
pids=()
for number in 0 1; do
    name=$([ "$number" = 0 ] && echo node-a || echo node-b)
    # --kill-child: when this process ends, all processes of the node end.
    unshare --mount --uts --ipc --net --pid --fork --kill-child --mount-proc \
        bash -ec "$node" "$name" "$name" "10.77.0.$((number + 1))" \
        "$python" -m torch.distributed.run --nnodes 2 --node_rank "$number" --nproc_per_node 1 \
        --master_addr 10.77.0.1 --master_port 29500 scripts/train_gpt2.py "$@" &
    pids+=($!)
done
trap 'kill -9 "${pids[@]}" 2>/dev/null || true' EXIT
for pid in "${pids[@]}"; do
    while [ "$(readlink "/proc/$pid/ns/net")" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
done
ip link add cable netns "${pids[0]}" type veth peer name cable netns "${pids[1]}"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"

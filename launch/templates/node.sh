#!/usr/bin/env bash
# One node's torchrun. Arguments: how many words start Python here, those words, the program.
# Reads from the batch script: LAUNCH_{NODES,PROCESSES,ADDRESS,PORT,ID,LOGS,LOG_LIMIT,RESTARTS,TIMEOUT}.
set -u
count=$1
shift
python=("${@:1:count}")
shift "$count"
node=$SLURM_PROCID
# torchrun orders the nodes by the text of their local address. Only the first node's has to be an
# address, the one that ranks connect to; a tilde sorts behind every address.
is_host=false
local_addr=$(printf '~%05d' "$node")
tee=()
if [ "$node" -eq 0 ]; then
  # Said outright: a hostname that resolves to the loopback address would make every node wait for a host.
  is_host=true
  local_addr=$LAUNCH_ADDRESS
  tee=(--tee 0:3 --local-ranks-filter 0)
fi
logs=$LAUNCH_LOGS/node-$node
mkdir -p "$logs"
export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=' '
"${python[@]}" -m launch attend --parent "$$" --logs "$logs" --limit "$LAUNCH_LOG_LIMIT" &
# Workers take USR1 and USR2; torchrun knows neither and would die of them. An ignored signal stays ignored.
trap '' USR1 USR2
exec "${python[@]}" -m torch.distributed.run \
  --nnodes="$LAUNCH_NODES" --nproc-per-node="$LAUNCH_PROCESSES" \
  --rdzv-backend=c10d --rdzv-endpoint="$LAUNCH_ADDRESS:$LAUNCH_PORT" --rdzv-id="$LAUNCH_ID" \
  --rdzv-conf="is_host=$is_host,timeout=$LAUNCH_TIMEOUT" --local-addr="$local_addr" \
  --max-restarts="$LAUNCH_RESTARTS" --log-dir="$logs" --redirects=3 ${tee[@]+"${tee[@]}"} \
  "$@" 2>>"$logs/torchrun.log"

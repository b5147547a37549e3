#!/bin/sh
# An interpreter whose torchrun is one worker without torch; a node named in $BAD_NODES fails preflight.
if [ "$2" = torch.distributed.run ]; then
  exec "$REAL_PYTHON" "$STUB_RUN" "$@"
fi
case "$3,$BAD_NODES," in
  preflight,*",$SLURMD_NODENAME,"*) exec "$REAL_PYTHON" "$@" --disk=1000000000000000000 ;;
esac
exec "$REAL_PYTHON" "$@"

#!/usr/bin/env bash
# A Slurm of one node and two CPUs on this machine alone, for tests. It listens on loopback, keeps no accounts (so sacct
# knows nothing) and takes root, who calls it, for its user.
#
#   slurm.sh start FOLDER   installs Debian's slurm-wlm and munge where they are missing, starts munged, slurmctld and
#                           slurmd, waits until the node is idle, and prints SLURM_CONF=...
#   slurm.sh stop FOLDER    ends the jobs and the processes of `start`, and only these
set -euo pipefail

usage() { echo "slurm.sh start FOLDER | stop FOLDER" >&2; exit 2; }
[ $# -eq 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

within() { # SECONDS COMMAND...: whether the command succeeds in time
  local end=$((SECONDS + $1)); shift
  until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.2; done
}
answers() { munge -n >/dev/null 2>&1; }
idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }

configure() {
  mkdir -p "$folder/state" "$folder/spool"
  cat >"$SLURM_CONF" <<END
ClusterName=one_machine
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
# what jobs leave the queue's memory after a minute, the least there is
MinJobAge=60
NodeName=localhost CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=localhost MaxTime=2 State=UP
END
}

start() {
  if ! command -v slurmctld munged >/dev/null; then
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends slurm-wlm munge >/dev/null
  fi
  configure
  if ! answers; then
    install -d -o munge -g munge /run/munge
    runuser -u munge -- munged --force
    within 10 answers || { echo "munged does not answer" >&2; exit 1; }
    cp /run/munge/munged.pid "$folder/munged.pid"
  fi
  slurmctld
  slurmd
  within 30 idle || { echo "the node is not idle; see $folder/slurmctld.log and slurmd.log" >&2; exit 1; }
  echo "SLURM_CONF=$SLURM_CONF"
}

stop() {
  [ -f "$SLURM_CONF" ] || exit 0
  timeout 20 scancel --user="$(id -un)" || true
  gone() { [ -z "$(timeout 5 squeue --noheader --states=running,completing 2>/dev/null)" ]; }
  within 20 gone || true
  for name in slurmd slurmctld munged; do
    [ -s "$folder/$name.pid" ] || continue
    process=$(cat "$folder/$name.pid")
    kill "$process" 2>/dev/null || true
    over() { ! kill -0 "$process" 2>/dev/null; }
    within 10 over || kill -9 "$process" 2>/dev/null || true
  done
}

case $1 in start) start ;; stop) stop ;; *) usage ;; esac

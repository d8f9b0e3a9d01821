#!/usr/bin/env bash
# slurm.sh start FOLDER: a Slurm of two nodes, n1 and n2, of this machine, without systemd and without accounting, in about a second.
# slurm.sh stop FOLDER ends it. Needs Debian's slurmctld slurmd slurm-client munge, and FOLDER a short path (it holds a socket).
# What is to use it sets SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail
if [ "$1" = stop ]; then
  pids=$(cat "$2"/*.pid)
  kill $pids
  for pid in $pids; do while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done; done
  exit 0
fi
folder=$(mkdir -p "$2/state" && cd "$2" && pwd) port=$(shuf -i 20000-30000 -n 1)
(umask 077; head -c 128 /dev/urandom > "$folder/munge.key")
cat > "$folder/slurm.conf" <<CONF
ClusterName=here
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=5
ReturnToService=2
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$(nproc)
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES
CONF
export SLURM_CONF=$folder/slurm.conf
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
  --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 100); do
  [ "$(sinfo --noheader --Node --format=%T | sort -u)" = idle ] && exit 0
  sleep 0.1
done
tail "$folder"/*.log >&2
exit 1

#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, to try sweeps on and for the tests. Root, on Debian or Ubuntu with
# apt-get install slurm-wlm munge:
#
#   scripts/slurm_local.sh start [FOLDER]      munged, slurmctld, slurmd; nothing happens if they run
#   export SLURM_CONF=FOLDER/slurm.conf        sinfo, sbatch and the sweeps find it by this
#   scripts/slurm_local.sh status [FOLDER]
#   scripts/slurm_local.sh stop [FOLDER]       cancels its jobs
#
# Keys, state, logs and sockets lie in FOLDER (/tmp/gptq_awq_slurm unless given); a Slurm that the machine has already
# is left alone: other ports, another munge socket.
set -euo pipefail

folder="${2:-${TMPDIR:-/tmp}/gptq_awq_slurm}"
port="${SLURM_LOCAL_PORT:-26817}"  # the first of two; taken ones are passed over
export SLURM_CONF="$folder/slurm.conf"
PATH="$PATH:/usr/sbin:/sbin"

fail() {
    echo "slurm_local: $*" >&2
    exit 1
}

check() {
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" > /dev/null || fail "$program isn't installed: apt-get install slurm-wlm munge"
    done
    [ "$(id -u)" = 0 ] || fail "slurmd starts jobs as their users and munged guards a key: run this as root"
}

pid() { cat "$folder/$1.pid" 2> /dev/null; }

alive() { pid "$1" > /dev/null && kill -0 "$(pid "$1")" 2> /dev/null; }

answers() { [ -f "$SLURM_CONF" ] && timeout 10 sinfo --noheader --format %T 2> /dev/null | grep -qE '^(idle|mixed|allocated|completing)$'; }

taken() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

# No accounting: what has ended is known from the files it left. cred_expire is also how long a requeued job waits.
configure() {
    while taken "$port" || taken "$((port + 1))"; do port=$((port + 2)); done
    cat > "$SLURM_CONF" << CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
JobRequeue=1
EnforcePartLimits=ALL
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
KillWait=5
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo) State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

start_munge() {
    alive munged && return
    [ -f "$folder/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
    rm -f "$folder/munge.socket"
    # --force: a folder below /tmp is fine where only root can write to it.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>> "$folder/munged.log" \
        || fail "munged did not start; see $folder/munged.log"
}

start() {
    check
    answers && { status; return; }
    mkdir -p "$folder/state" "$folder/spool"
    chmod 755 "$folder"
    alive slurmctld || alive slurmd || configure
    start_munge
    alive slurmctld || slurmctld -f "$SLURM_CONF" || fail "slurmctld did not start; see $folder/slurmctld.log"
    alive slurmd || slurmd -f "$SLURM_CONF" || fail "slurmd did not start; see $folder/slurmd.log"
    for _ in $(seq 60); do
        answers && { status; return; }
        sleep 0.5
    done
    fail "no node came up within 30 s; see $folder/slurmctld.log and $folder/slurmd.log"
}

stop() {
    answers && scancel --quiet --user "$(id -un)" || true
    for daemon in slurmd slurmctld munged; do
        alive "$daemon" || continue
        kill "$(pid "$daemon")" || true
        for _ in $(seq 40); do
            alive "$daemon" || break
            sleep 0.25
        done
        alive "$daemon" && kill -KILL "$(pid "$daemon")" || true
    done
    echo "stopped"
}

status() {
    answers || fail "not running (start it with: $0 start $folder)"
    echo "running: $(sinfo --noheader --format '%D node, %c CPUs, partition %P %T')"
    echo "export SLURM_CONF=$SLURM_CONF"
}

case "${1:-}" in
    start | stop | status) "$1" ;;
    *) fail "usage: $0 start|stop|status [FOLDER]" ;;
esac

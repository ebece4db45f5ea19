#!/usr/bin/env bash
# What a pod does before it is ended (a node that is drained, a spot machine that is taken away): the command that drives
# a run and the workers of one save and end; only then may Ray go. Kubernetes waits for this no longer than the pod's
# terminationGracePeriodSeconds.
set -u

# Python alone: the shell of a RayJob, whose line names the command too, has to hand on the exit code.
running='^ray::GangWorker|^[^ ]*python[0-9.]* [^ ]*grail (pretrain|align|evaluate) '
pkill -TERM -f "$running" || exit 0
while pgrep -f "$running" >/dev/null; do
    sleep 0.5
done

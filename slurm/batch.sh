# What the batch shell of a training job does around srun. Sourced by the job's script; see script.py.
#
# It needs bash, coreutils, sed, grep and awk, and scontrol on this host, not in a container; no Python. What happened is
# read from the run dir: with --kill-on-bad-exit srun's status is that of whichever process it ended first.
#
#   begin                      before srun: notes the start, and goes no further with a run that was cancelled
#   check_setup STATUS LINE    after a line of slurm.setup; where one ends this shell, `end` comes all the same
#   end STATUS                 after srun: ends the job, or has SLURM queue it again
#   check_not_cancelled        before srun, in a job that follows
#   followed COMMAND STATUS    after srun there: notes how it ended
#
# Needs: SUBMISSION (folder of this submission, with `runs`, a run dir a line), MAX_RESTARTS, LIMIT_SECONDS, EXCLUDE.

MOST_IDLE=3     # starts in a row that ended without a new checkpoint
BLAMES=2        # times that a node is at fault before it is left out
MOST_UNKNOWN=120 # seconds; a network's file system may show a new file a minute late

begin() {
  find_run
  JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  JOB=${JOB:-$SLURM_JOB_ID}
  RESTART=${SLURM_RESTART_COUNT:-0}
  FIRST_STEP=$(newest_step)
  STATE_BEFORE=$(fingerprint)
  trap : TERM USR2 # the tasks get them too; what they mean is decided when srun has ended
  if [ -e "$RUN/cancelled" ]; then
    finish 0 cancelled "packtrain cancel"
  fi
  check_submission
  trap 'end $?' EXIT
  printf '{"event":"start","time":%d,"job_id":"%s","restart":%d,"nodes":"%s","step":%d}\n' \
    "$(date +%s)" "$JOB" "$RESTART" "$SLURM_JOB_NODELIST" "$FIRST_STEP" >> "$RUN/attempts.jsonl"
}

end() {
  local status=$1 state blamed
  trap - EXIT
  set +eu
  state=$(field state)
  blamed=
  if [ "$STATE_BEFORE" = "$(fingerprint)" ]; then
    state=unknown # the run never got as far as to say something
    case $status in
      0) finish "$status" failed "the job's shell ended before the run began: see slurm.setup" ;;
      2) finish "$status" failed "refused at its start: packtrain logs shows why" ;;
      75) state=preempted ;;
    esac
  fi
  if [ "$state" = failed ]; then
    blamed=$(field blamed)
    [ -n "$blamed" ] && echo "$blamed" >> "$RUN/blamed"
  fi
  case $state in
    done)
      record "$status" "done" finish ""
      exit 0
      ;;
    cancelled)
      record "$status" cancelled finish ""
      exit 1
      ;;
    failed) [ -n "$blamed" ] || { record "$status" failed finish ""; exit 1; } ;;
  esac
  if [ -e "$RUN/cancelled" ]; then
    finish "$status" cancelled "packtrain cancel"
  fi
  slurm_ends_it "$status" "$state"
  if [ "$RESTART" -ge "$MAX_RESTARTS" ]; then
    finish "$status" failed "given up after $RESTART restarts (slurm.max_restarts)"
  fi
  if is_idle "$state" && [ "$(count_idle)" -ge $((MOST_IDLE - 1)) ]; then
    finish "$status" failed "given up: $MOST_IDLE starts in a row ended without a new checkpoint, the last as $state"
  fi
  requeue "$status" "$state"
}

check_setup() {
  if [ "$1" -ne 0 ]; then
    echo "packtrain: slurm.setup on $(hostname): $2: ended with status $1" >&2
    [ -z "$FIRST_STEP" ] || finish "$1" failed "slurm.setup failed on $(hostname): packtrain logs shows why"
    exit 1
  fi
}

check_not_cancelled() {
  find_run
  [ ! -e "$RUN/cancelled" ] || exit 1
}

# Goes no further with a job that no command knows, or that a later submission has replaced. submit notes the job in
# job.json when sbatch has answered; where it was killed in between, nobody could see, follow or cancel this run.
check_submission() {
  local own=$((10#0${SUBMISSION##*/})) waited=0
  while [ "$(noted_submission)" -lt "$own" ] && [ $((waited++)) -lt $MOST_UNKNOWN ]; do
    sleep 1
  done
  if [ "$(noted_submission)" -gt "$own" ]; then
    echo "packtrain: this run was submitted again; job $JOB leaves it alone" >&2
    exit 1
  elif [ "$(noted_submission)" -lt "$own" ]; then
    echo "packtrain: packtrain submit was ended before it had noted job $JOB, which leaves the run alone: submit it again" >&2
    exit 1
  fi
}

# Number of the submission that job.json tells of; 0: of none.
noted_submission() {
  local newest
  newest=$(sed -n 's/.*"submission": ".*\/\([0-9]*\)".*/\1/p' "$RUN/job.json" 2>/dev/null)
  echo $((10#0$newest))
}

# A line of attempts.jsonl; the job ends as its command has.
followed() {
  printf '{"event":"followed","time":%d,"command":"%s","status":%d}\n' "$(date +%s)" "$1" "$2" >> "$RUN/attempts.jsonl"
  exit "$2"
}

find_run() {
  RUN=$(sed -n "$((${SLURM_ARRAY_TASK_ID:-0} + 1))p" "$SUBMISSION/runs")
}

# Ends the job for good: with what it ends as, and why.
finish() {
  trap - EXIT
  local action="give up"
  [ "$2" != cancelled ] || action=finish
  write_state "$2" "$3"
  record "$1" "$2" "$action" "$3"
  echo "packtrain: $2: $3" >&2
  exit 1
}

# Leaves a job alone that SLURM queues again by itself, and one that somebody has ended with scancel.
slurm_ends_it() {
  local facts restarts
  facts=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null) || return 0
  restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<< "$facts")
  case $facts in
    *" JobState=RUNNING "*) return 0 ;;
  esac
  if [ "${restarts:-0}" -gt "$RESTART" ]; then
    record "$1" "$2" requeue "by SLURM"
    exit 1
  fi
  if [ "$SECONDS" -lt $((LIMIT_SECONDS - 5)) ]; then
    finish "$1" cancelled scancel
  fi
}

requeue() {
  local excluded answer
  excluded=$(sort "$RUN/blamed" 2>/dev/null | uniq -c | awk -v least=$BLAMES '$1 >= least { print $2 }' | paste -sd,)
  record "$1" "$2" requeue "${excluded:+without $excluded}"
  echo "packtrain: $2 at step $(newest_step); queued again${excluded:+ without $excluded}" >&2
  # SLURM ends this shell, and what it has called, from the first command on; within KillWait it has to be done.
  trap '' TERM
  if [ -n "$excluded" ]; then # nodes can be left out only of a job that waits
    answer=$(scontrol requeuehold "$JOB" 2>&1) && answer=$(
      for _ in 1 2 3 4 5; do
        scontrol update "JobId=$JOB" "ExcNodeList=${EXCLUDE:+$EXCLUDE,}$excluded" && break
        sleep 1
      done 2>&1
      scontrol release "$JOB" 2>&1
    )
  else
    answer=$(scontrol requeue "$JOB" 2>&1)
  fi || finish "$1" failed "SLURM does not queue the job again ($(tr -c '[:alnum:] ./:_\n-' ' ' <<< "$answer" | paste -sd' ')): submit it again"
  exit 1
}

# Whether this start brought nothing, and the next may bring no more: it crashed, or had all its time.
is_idle() {
  [ "$(newest_step)" -le "$FIRST_STEP" ] && { [ "$1" != preempted ] || [ "$SECONDS" -ge $((LIMIT_SECONDS * 3 / 4)) ]; }
}

# Ended starts before this one, newest first, that were idle too and at the same step. Those that SLURM ended have no
# end of their own, and count neither way.
count_idle() {
  grep -E '"event":"(submit|end)"' "$RUN/attempts.jsonl" | grep -v '"why":"by SLURM"' | tac |
    awk -v step="\"step\":$FIRST_STEP," '/"idle":true/ && index($0, step) { count++; next } { exit } END { print count + 0 }'
}

# A line of attempts.jsonl: srun's status, the run's state, what is done now and why.
record() {
  local idle=false
  is_idle "$2" && idle=true
  printf '{"event":"end","time":%d,"job_id":"%s","restart":%d,"status":%d,"state":"%s","step":%d,"idle":%s,"action":"%s","why":"%s"}\n' \
    "$(date +%s)" "$JOB" "$RESTART" "$1" "$2" "$(newest_step)" "$idle" "$3" "$4" >> "$RUN/attempts.jsonl"
}

write_state() {
  local temporary="$RUN/.state.json.batch.tmp"
  printf '{\n "state": "%s",\n "step": %d,\n "reason": "%s"\n}\n' "$1" "$(newest_step)" "$2" > "$temporary"
  sync "$temporary" && mv "$temporary" "$RUN/state.json"
}

# Step of the newest checkpoint; its manifest is written last.
newest_step() {
  local newest
  newest=$(cd "$RUN/checkpoints" 2>/dev/null && ls -d step_*/manifest.json 2>/dev/null | tail -n 1)
  newest=${newest#step_}
  echo $((10#0${newest%%/*}))
}

fingerprint() {
  stat -c '%i %z' "$RUN/state.json" 2>/dev/null # it is replaced when it is written
}

field() {
  sed -n "s/^ *\"$1\": *\"\([^\"]*\)\".*/\1/p" "$RUN/state.json" 2>/dev/null | head -n 1
}

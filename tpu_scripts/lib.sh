# shellcheck shell=bash disable=SC2034,SC2153 # the scripts use and the env file sets variables
# What the scripts share: options, the env file, showing and running commands, the machine's state.
# A script sources it, sets `usage` by its own first comment, and calls `begin "$@"`.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
script=$(basename "$0")

known=(PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE RUNTIME_VERSION PROVISIONING SLICES CHIP_HOUR
  MAX_RUN_DURATION VALID_UNTIL SERVICE_ACCOUNT MODELS PLATFORM CLUSTER IMAGE)
poll_seconds=${POLL_SECONDS:-30}    # between two looks at something that takes long
retry_seconds=${RETRY_SECONDS:-10}  # before the first new attempt; doubles
dry_run=false
may_be_billed=false  # a machine may exist: every failure says so
staging=''           # a directory to remove at the end

say() { printf '%s: %s\n' "$script" "$*" >&2; }

# What the user can put right: one sentence, exit code 2.
refuse() {
  say "error: $*"
  exit 2
}

# What went wrong elsewhere: one sentence, exit code 1.
fail() {
  say "error: $*"
  exit 1
}

usage() { sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"; }

# Reads the options every script has; the others are left in `rest`.
begin() {
  local env_file=${TPU_ENV:-$here/env} words=()
  rest=()
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry_run=true ;;
      --env)
        (($# > 1)) || refuse "--env wants a file"
        env_file=$2
        shift
        ;;
      --)
        shift
        words=("$@")
        break
        ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  rest+=(${words[@]+"${words[@]}"})
  read_env "$env_file"
  $dry_run || need_programs
  export TPU_ENV=$env_file
  exec 3>&2 # a signal may come where the script's own words are sent away
  trap at_exit EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

# KEY=value lines, comments; nothing in the file is executed.
read_env() {
  local line number=0 key value place=$1
  unset "${known[@]}" # what else of that name is in the environment is not meant
  [[ -f $place ]] || refuse "$place is not there: cp $here/env.example $here/env, and fill it in"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#.*)?$ ]] && continue
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || refuse "$place:$number: not KEY=value: $line"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ " ${known[*]} " == *" $key "* ]] ||
      refuse "$place:$number: $key is not known; known are ${known[*]}"
    if [[ $value =~ ^\"([^\"]*)\"[[:space:]]*(#.*)?$ || $value =~ ^\'([^\']*)\'[[:space:]]*(#.*)?$ ]]; then
      value=${BASH_REMATCH[1]}
    else
      value=${value%%[[:space:]]#*}
      value=${value%"${value##*[![:space:]]}"}
    fi
    printf -v "$key" '%s' "$value"
  done <"$place"
  PLATFORM=${PLATFORM:-tpu-vm} PROVISIONING=${PROVISIONING:-on-demand} SLICES=${SLICES:-1}
  check_env "$place"
}

need_programs() {
  command -v gcloud >/dev/null || refuse "gcloud is not installed: cloud.google.com/sdk/docs/install"
  ! on_gke || command -v xpk >/dev/null || refuse "xpk is not installed: pip install xpk"
}

check_env() {
  local key needed=(PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE) name='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
  case $PLATFORM in
    tpu-vm) needed+=(RUNTIME_VERSION) ;;
    gke) needed+=(CLUSTER IMAGE) ;;
    *) refuse "$1: PLATFORM is '$PLATFORM', it must be tpu-vm or gke" ;;
  esac
  for key in "${needed[@]}"; do
    [[ -n ${!key-} ]] || refuse "$1: $key is not set; env.example shows it"
  done
  [[ $NAME =~ $name ]] ||
    refuse "$1: NAME is '$NAME', it must be at most 40 of a-z, 0-9 and -, a letter first"
  [[ $BUCKET =~ ^gs://[a-z0-9] ]] || refuse "$1: BUCKET is '$BUCKET', it must start with gs://"
  BUCKET=${BUCKET%/}
  [[ $PROVISIONING =~ ^(on-demand|spot|flex-start)$ ]] ||
    refuse "$1: PROVISIONING is '$PROVISIONING', it must be on-demand, spot or flex-start"
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || refuse "$1: SLICES is '$SLICES', it must be a number above 0"
  [[ -z ${CHIP_HOUR-} || $CHIP_HOUR =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
    refuse "$1: CHIP_HOUR is '$CHIP_HOUR', it must be a number, dollars"
  [[ -z ${MODELS-} || $MODELS =~ ^gs://[a-z0-9] ]] ||
    refuse "$1: MODELS is '$MODELS', it must start with gs://"
  [[ -z ${MODELS-} || $PLATFORM != gke ]] ||
    refuse "$1: MODELS is for TPU VMs; on GKE 'xpk storage create --type=gcsfuse' mounts a bucket"
  [[ $PROVISIONING != flex-start || $PLATFORM == gke || -n ${MAX_RUN_DURATION-} ]] ||
    refuse "$1: PROVISIONING=flex-start wants MAX_RUN_DURATION, such as 24h"
}

no_more() { ((${#rest[@]} == 0)) || refuse "does not know '${rest[0]}'; --help shows how"; }

on_gke() { [[ $PLATFORM == gke ]]; }

# The words as a shell would read them again.
quoted() {
  local word line=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,^-]+$ ]] && line+=("$word") || line+=("${word@Q}")
  done
  printf '%s' "${line[*]}"
}

# Shows a command and runs it; with --dry-run only shows it, on standard output.
execute() {
  if $dry_run; then
    printf '%s\n' "$(quoted "$@")"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

# Up to three times, with longer and longer pauses; for what may fail in passing.
retry() {
  local tried pause_between=$retry_seconds # not `attempt`: "$@" sees this function's variables
  for tried in 1 2 3; do
    "$@" && return 0
    ((tried < 3)) || return 1
    say "attempt $tried of 3 failed; again in $pause_between s"
    sleep "$pause_between"
    pause_between=$((pause_between * 2))
  done
}

# ---- the machine ---------------------------------------------------------------------------------

# queued_resources VERB [options]: one command about NAME.
queued_resources() {
  local verb=$1
  shift
  execute gcloud compute tpus queued-resources "$verb" "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    --quiet "$@"
}

on_workers() { queued_resources ssh --node=all --worker=all --command="$1"; }

ask_state() {
  execute gcloud compute tpus queued-resources describe "$NAME" "--project=$PROJECT" "--zone=$ZONE" \
    '--format=value(state.state)'
}

# Prints ABSENT, DENIED, UNKNOWN or what the service says: WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...
machine_state() {
  local answer
  if answer=$(ask_state 2>&1) && [[ $answer =~ (^|$'\n')([A-Z_]+)($|$'\n') ]]; then
    printf '%s\n' "${BASH_REMATCH[2]}"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    printf 'ABSENT\n'
  elif is_denied "$answer"; then
    printf 'DENIED\n'
  else
    printf '%s\n' "$answer" >&2
    printf 'UNKNOWN\n'
  fi
}

is_denied() { [[ $1 == *PERMISSION_DENIED* || $1 == *"active account"* || $1 == *"gcloud auth login"* ]]; }

refuse_denied() {
  may_be_billed=false
  refuse "gcloud may not use TPUs in $PROJECT: gcloud auth login, with an account that has the role TPU Admin"
}

chips() {
  local count=${ACCELERATOR_TYPE##*-}
  [[ $count =~ ^[0-9]+$ ]] || count=0
  case $ACCELERATOR_TYPE in # the older ones are named by their cores, two a chip
    v2-* | v3-* | v4-* | v5p-*) count=$((count / 2)) ;;
  esac
  printf '%s' $((count * SLICES))
}

cost() {
  local count
  count=$(chips)
  if [[ -n ${CHIP_HOUR-} ]] && ((count > 0)); then
    awk -v n="$count" -v price="$CHIP_HOUR" 'BEGIN {
      printf "%d chips at %.2f dollars are %.2f dollars an hour, %.2f a day", n, price, n * price, 24 * n * price }'
  else
    printf 'every hour costs'
  fi
}

machine() {
  on_gke && printf 'cluster %s' "$CLUSTER" || printf '%s' "$NAME"
  printf ' (%s%s, %s)' "$( ((SLICES > 1)) && printf '%s x ' "$SLICES")" "$ACCELERATOR_TYPE" "$PROVISIONING"
}

# What every script says that leaves a machine behind.
say_billed() { say "$(machine) is billed until you delete it, also when nothing runs: $(cost); end it with $(delete_command)"; }

delete_command() { quoted "$here/delete" --env "$TPU_ENV"; }

at_exit() {
  local code=$?
  [[ -z $staging ]] || rm -rf "$staging"
  if ((code != 0)) && $may_be_billed && ! $dry_run; then
    say "$(machine) may still be there, and billed; see it with $(quoted "$here/list" --env "$TPU_ENV"), end it with $(delete_command)" 2>&3
  fi
}

# ---- a run ---------------------------------------------------------------------------------------

# Reads `[--files DIR] train|pretrain CONFIG [key=value ...]` into files, words and output.
read_run() {
  local word
  files='' words=() output=$BUCKET/runs/$NAME
  while ((${#rest[@]})) && [[ ${rest[0]} == --* ]]; do
    [[ ${rest[0]} == --files ]] || refuse "does not know '${rest[0]}'; --help shows how"
    ((${#rest[@]} > 1)) || refuse "--files wants a directory"
    files=${rest[1]}
    rest=("${rest[@]:2}")
    [[ -d $files ]] || refuse "--files: $files is not a directory"
  done
  [[ ${rest[0]-} == train || ${rest[0]-} == pretrain ]] ||
    refuse "wants train or pretrain, a config and key=value ..., not '${rest[*]}'; --help shows how"
  ((${#rest[@]} > 1)) || refuse "${rest[0]} wants a config: a name that ships, or a file below --files"
  for word in "${rest[@]}"; do
    case $word in
      output_dir=*) output=${word#output_dir=} ;;
      *) words+=("$word") ;;
    esac
  done
  in_bucket
}

# `output` as a place in the bucket: gs://... as it is, anything else below BUCKET.
in_bucket() {
  output=${output%/}
  [[ -n $output ]] || refuse "output_dir is empty"
  [[ $output == gs://* ]] || output=$BUCKET/${output#/}
  [[ $output =~ ^gs://[A-Za-z0-9._/+=-]+$ && $output != *..* ]] ||
    refuse "output_dir is '$output'; in a bucket only letters, digits and . _ / + = - will do here"
}

# An attempt's signs (logs, `done`, `failed-...`) lie here, beside the results, hidden from them.
attempt_place() { printf '%s/.tpu/%s' "$output" "$1"; }

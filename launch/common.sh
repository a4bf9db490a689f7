# What the launchers share.
# shellcheck shell=bash

program=train dry_run="" program_flags=()

# Ends the script with a sentence.
die() {
  echo "Error: $1" >&2
  exit 2
}

# Prints the script's header, which is its usage.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Runs a command, or prints it with --dry_run.
run() {
  if [[ -n "${dry_run:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# need_number --nodes "$nodes": ends the script unless the flag's value is a number above 0.
need_number() {
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1=$2 must be a whole number, at least 1."
}

# read_flags "gpus stops" "spot" "$@": sets the variable of each flag's name, to the value of one in
# the first list and to 1 for one in the second; what follows -- goes into `program_flags`.
read_flags() {
  local valued=" $1 program " switches=" $2 dry_run "
  shift 2
  while (($#)) && [[ "$1" != -- ]]; do
    if [[ "$1" == --help || "$1" == -h ]]; then
      usage
      exit 0
    elif [[ "$1" =~ ^--([a-z_]+)=(.*)$ && "$valued" == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" '%s' "${BASH_REMATCH[2]}"
    elif [[ "$1" =~ ^--([a-z_]+)$ && "$switches" == *" ${BASH_REMATCH[1]} "* ]]; then
      printf -v "${BASH_REMATCH[1]}" 1
    else
      die "There is no flag '$1'; see --help. The program's flags come after --."
    fi
    shift
  done
  [[ "$program" =~ ^(train|eval|infer)$ ]] || die "--program=$program must be train, eval or infer."
  # shellcheck disable=SC2034  # launchers use it
  program_flags=("${@:2}")
  local flag
  for flag in "${@:2}"; do
    [[ "$flag" == --gin_file* ]] && return
  done
  die "Give the program's flags after --, such as -- --gin_file=gin_configs/promot_rte.gin."
}

# shellcheck shell=bash
# Sourced by examples that run on a laptop: steps that run once, logged, and go on where they ended.
# OUT is the folder of the run.

fail() {
    echo "ERROR: $1" >&2
    exit 1
}

# step NAME COMMAND...: run it once, its output on the screen and in OUT/logs/NAME.log. EXPECTED=75
# before it: it stops before its end, as --exit-interval wants.
step() {
    local name=$1 log=$OUT/logs/$1.log code=0 began=$SECONDS
    shift
    [ ! -e "$OUT/done/$name" ] || return 0
    printf '\n=== %s\n' "$name"
    # No pipe: a process that a killed step leaves behind would keep it open, and this script
    # waiting. Bash hides Ctrl-C from what runs in the background: it is passed on as SIGTERM, upon
    # which training saves.
    : >"$log" # before tail looks for it
    rm -f "$log.code"
    EXIT_CODE_FILE=$log.code "$@" >>"$log" 2>&1 &
    local pid=$! stopped=0
    tail -n +1 -f -s 0.2 --pid="$pid" "$log" &
    trap 'stopped=1; kill -TERM "$pid" 2>/dev/null || true' INT TERM
    while :; do
        wait "$pid" && code=0 || code=$?
        kill -0 "$pid" 2>/dev/null || break # a signal ends wait, not the step
    done
    wait
    trap - INT TERM
    [ ! -e "$log.code" ] || code=$(<"$log.code") # torchrun ends with 1 whatever its ranks say
    [ "$code" != "${EXPECTED:-0}" ] || code=0
    printf '%s\t%d\n' "$name" $((SECONDS - began)) >>"$OUT/times.tsv"
    if [ $stopped = 1 ]; then
        printf '\nstopped in step %s; start again to go on\n' "$name" >&2
        exit 130
    elif [ "$code" != 0 ]; then
        printf '\n' >&2
        fail "step $name ended with code $code: $(reason "$log") (all of it: $log)"
    fi
    touch "$OUT/done/$name"
}

# The program's own last word: torchrun prints a long summary after it.
reason() {
    local lines errors
    lines=$(tr '\r' '\n' <"$1" | grep -v -e ChildFailedError -e '^[[:space:]]*$' || true)
    errors=$(grep -a -E '^ERROR: |^(\[rank[0-9]+\]: )?[A-Za-z_.]*(Error|Exception)\b' <<<"$lines" ||
        tail -n 1 <<<"$lines")
    tail -n 1 <<<"$errors" | sed 's/^ERROR: //'
}

# keep_settings NAMES: write them to OUT/settings.txt; what was made with others is not gone on with.
keep_settings() {
    local typed changed
    mkdir -p "$OUT"/{logs,done}
    typed=$(for name in $1; do echo "$name=${!name}"; done)
    if [ -e "$OUT/settings.txt" ]; then
        changed=$(diff "$OUT/settings.txt" - <<<"$typed" | grep '^[<>]' | tr '\n' ' ') || true
        [ -z "$changed" ] ||
            fail "$OUT has results of other settings ($changed): remove it or give another OUT."
    fi
    echo "$typed" >"$OUT/settings.txt"
}

# shellcheck shell=bash
# The parts that .ci/run and .ci/nightly are made of: running a step under a heading, and counting.
#
# What counts: every test of every test binary, every step that is not made of tests, every check of the laboratory. A
# test that prints `SKIPPED name: reason` is a skip and not a pass; an ignored test is a skip too.

export CARGO_TERM_COLOR=never CARGO_INCREMENTAL=0 CARGO_NET_RETRY=5 DEBIAN_FRONTEND=noninteractive
PASSED=0 FAILED=0 SKIPPED=0
TIMES=() FAILURES=() SKIPS=()
LOGS=$PWD/target/ci
mkdir -p "$LOGS"

# attempt NAME MINUTES COMMAND...: runs it under a heading, with no input and a limit. Sets CODE and LOG.
attempt() {
    local name=$1 minutes=$2 started=$SECONDS
    shift 2
    LOG=$LOGS/${name// /-}.log
    printf '\n=== %s ===\n%s\n' "$name" "$*"
    timeout -k 10 "${minutes}m" "$@" </dev/null 2>&1 | tee "$LOG"
    CODE=${PIPESTATUS[0]}
    [ "$CODE" -ne 124 ] || echo "no end after $minutes minutes"
    TIMES+=("$(printf '%5d s  %s' $((SECONDS - started)) "$name")")
}

fail() {
    FAILED=$((FAILED + ${2:-1}))
    FAILURES+=("$1")
    echo "FAILED: $1"
}

skip() {
    SKIPPED=$((SKIPPED + 1))
    SKIPS+=("$1: $2")
    echo "SKIPPED $1: $2"
}

# check NAME MINUTES COMMAND...: a step that passes or fails as a whole.
check() {
    attempt "$@"
    if [ "$CODE" -eq 0 ]; then PASSED=$((PASSED + 1)); else fail "$1 (status $CODE)"; remember; fi
}

# tests NAME MINUTES COMMAND...: a step made of Rust tests, run with --show-output so that skips are seen.
tests() {
    local name=$1 passed failed ignored quiet line
    attempt "$@"
    read -r passed failed ignored < <(awk '
        /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") p += $i; if ($(i + 1) == "failed;") f += $i;
                          if ($(i + 1) == "ignored;") g += $i } }
        END { print p + 0, f + 0, g + 0 }' "$LOG")
    # Tests that passed but said that they had skipped; one may name several things that it left out.
    quiet=$(awk '
        /^successes:$/ { good = 1 } /^(failures:|test result:)/ { good = 0 }
        /^---- .* ----$/ { counted = 0 } good && /^SKIPPED / && !counted { counted = 1; n++ }
        END { print n + 0 }' "$LOG")
    PASSED=$((PASSED + passed - quiet))
    SKIPPED=$((SKIPPED + ignored))
    [ "$ignored" -eq 0 ] || SKIPS+=("$name: $ignored ignored tests")
    while read -r line; do
        SKIPPED=$((SKIPPED + 1))
        SKIPS+=("$line")
    done < <(sed -n 's/^SKIPPED \(.*: .*\)/\1/p' "$LOG" | sort -u)
    if [ "$failed" -gt 0 ]; then
        fail "$name ($failed tests)" "$failed"
        remember
    elif [ "$CODE" -ne 0 ]; then
        fail "$name (status $CODE)"
        remember
    elif [ "$passed" -eq 0 ]; then
        fail "$name (no test was run)"
    fi
}

# remember: what the last step said of its failure, for the end of the run.
remember() {
    FAILURES+=("$(awk '/^failures:$/ { bad = 1 } /^(successes:|test result:)/ { bad = 0 } bad && NF { print "    " $0 }' "$LOG" |
        cut -c1-300 | tail -n 150 | grep . || tail -n 40 "$LOG" | sed 's/^/    /')")
}

# explored NAME: the last tests step was a model checker. If it passed, it must say how much it explored, and never zero.
explored() {
    [ "$CODE" -eq 0 ] || return
    if grep -q -E 'explored 0 executions' "$LOG" || ! grep -q -E 'explored [1-9][0-9]* executions' "$LOG"; then
        fail "$1 (explored nothing)"
    else
        grep -h -o -E '[a-z]+ explored [0-9]+ executions.*' "$LOG" | sort -u
    fi
}

# laboratory NAME MINUTES COMMAND...: a step that ends with a line of counts of its own.
laboratory() {
    local name=$1 passed failed skipped line
    attempt "$@"
    read -r passed failed skipped < <(sed -n 's/^laboratory: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped$/\1 \2 \3/p' "$LOG")
    PASSED=$((PASSED + ${passed:-0}))
    SKIPPED=$((SKIPPED + ${skipped:-0}))
    while read -r line; do SKIPS+=("$line"); done < <(sed -n 's/^SKIPPED \(.*: .*\)/\1/p' "$LOG")
    if [ "${failed:-0}" -gt 0 ]; then
        fail "$name ($failed checks)" "$failed"
        remember
    elif [ "$CODE" -ne 0 ]; then
        fail "$name (status $CODE)"
        remember
    fi
}

# install_packages PACKAGE...: Debian packages that are not there yet, if this is a machine where we may.
install_packages() {
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "not installed, and only root can: ${missing[*]}"
        return 0
    fi
    # A third-party source that does not answer must not end the run; a package that cannot be had will.
    apt-get -q update || true
    apt-get -q install -y --no-install-recommends "${missing[@]}"
}

# has_command NAME: whether the command line, built for release, has this subcommand yet.
has_command() { target/release/anypage --help 2>/dev/null </dev/null | grep -q -E "^ +$1\b"; }

# model_checked MODE: the packages that have tests for this model checker.
model_checked() { grep -rlE "cfg\(all\(test, $1\)\)" hw-model/src odp/src mr/src | cut -d/ -f1 | sort -u; }

# model_check MODE MINUTES: one step a package, in a target directory of its own: the flag changes every crate.
model_check() {
    local mode=$1 minutes=$2 package packages
    packages=$(model_checked "$mode")
    [ -n "$packages" ] || fail "$mode (no test is written for it)"
    for package in $packages; do
        tests "$mode of $package" "$minutes" env RUSTFLAGS="--cfg $mode" CARGO_TARGET_DIR="target/$mode" \
            cargo test -p "$package" --release --lib "$mode" -- --show-output
        explored "$mode of $package"
    done
}

# finish: the closing lines; the status of the run.
finish() {
    printf '\n=== times ===\n'
    printf '%s\n' "${TIMES[@]}"
    if [ ${#SKIPS[@]} -gt 0 ]; then
        printf '\n=== skipped ===\n'
        printf '%s\n' "${SKIPS[@]}"
    fi
    if [ ${#FAILURES[@]} -gt 0 ]; then
        printf '\n=== failed ===\n'
        printf '%s\n' "${FAILURES[@]}"
    fi
    printf '\n%d passed, %d failed, %d skipped\n' "$PASSED" "$FAILED" "$SKIPPED"
    [ "$FAILED" -eq 0 ] && [ "$PASSED" -gt 0 ]
}

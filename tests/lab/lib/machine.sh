# shellcheck shell=bash
# One run of one machine: its job directory, the emulator, and the end of both.
#
# Nothing outlives the script. The emulator gets SIGKILL from the kernel when its parent dies, whatever the parent died
# of, and a watchdog in a session of its own, blocked on the job's lock, removes the job directory then. If even the
# watchdog was killed, the next run sweeps up: a job directory whose lock is free belongs to nobody.

# new_job: makes the job directory. Sets JOB.
new_job() {
    local old
    mkdir -p "$CACHE/run"
    for old in "$CACHE/run"/*; do
        [ -d "$old" ] || continue
        flock -n -x "$old" rm -rf "$old" || true
    done
    JOB=$(mktemp -d "$CACHE/run/XXXXXX")
    exec {JOB_LOCK}<"$JOB"
    flock -x "$JOB_LOCK"
    # shellcheck disable=SC2016 # expanded by the watchdog
    setsid bash -c 'flock -x "$1" rm -rf "$1"' watchdog "$JOB" {JOB_LOCK}<&- </dev/null >/dev/null 2>&1 &
    disown
    mkdir "$JOB/job"
    mkfifo "$JOB/stdout" "$JOB/stderr"
}

# write_job COMMAND ARGS...: what the guest reads.
write_job() {
    local name
    cp "$LAB/guest/network" "$LAB/guest/session" "$JOB/job/"
    printf '%s=%q\n' PEER "$PEER" IOMMU "$IOMMU" MTU "$MTU" >"$JOB/job/options"
    {
        printf 'DIRECTORY=%q\n' "$PWD"
        printf 'COMMAND=('
        printf '%q ' "$@"
        echo ')'
    } >"$JOB/job/command"
    {
        for name in HOME LANG LC_ALL TERM "${ENVIRONMENT[@]}" $(compgen -e | grep -E '^(RUST|ANYPAGE)_' || true); do
            case $name in
            *=*) printf '%s=%q\n' "${name%%=*}" "${name#*=}" ;;
            *) [ -z "${!name+set}" ] || printf '%s=%q\n' "$name" "${!name}" ;;
            esac
        done
        # The tools that the lab adds live in the system's directories.
        printf 'PATH=%q\n' "$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        [ -z "$RESULTS" ] || printf 'ANYPAGE_LAB_RESULTS=%q\n' "$RESULTS"
    } >"$JOB/job/environment"
    printf '%s' "$RESULTS" >"$JOB/job/results"
}

# share TAG PATH OPTIONS: one 9p share, as arguments of the emulator. A comma in a path is doubled.
share() {
    QEMU+=(-virtfs "local,path=${2//,/,,},mount_tag=$1,security_model=none,multidevs=remap$3")
}

# port NAME FILE: one virtio port that writes into a file or pipe.
port() {
    QEMU+=(-chardev "file,id=$1,path=${2//,/,,}" -device "virtserialport,chardev=$1,name=lab.$1")
}

# emulator_arguments ACCELERATOR: sets QEMU.
emulator_arguments() {
    local qemu=$MACHINE/usr/bin/qemu-system-x86_64 libraries=$MACHINE/usr/lib/x86_64-linux-gnu data
    local append="console=ttyS0 loglevel=5 panic=-1 mitigations=off random.trust_cpu=on"
    QEMU=("$libraries/ld-linux-x86-64.so.2" --argv0 qemu-system-x86_64 --library-path "$libraries:$MACHINE/usr/lib" "$qemu")
    for data in share/qemu share/seabios lib/ipxe/qemu; do QEMU+=(-L "$MACHINE/usr/$data"); done
    case $1 in
    kvm) QEMU+=(-accel kvm -cpu host) ;;
    tcg) QEMU+=(-accel "tcg,thread=multi" -cpu max) ;;
    esac
    if [ "$IOMMU" = yes ]; then
        truncate -s 16M "$JOB/nvme.raw"
        QEMU+=(-machine "q35,kernel-irqchip=split" -device "intel-iommu,caching-mode=on")
        QEMU+=(-drive "if=none,id=nvme,format=raw,file=${JOB//,/,,}/nvme.raw" -device "nvme,drive=nvme,serial=anypage")
        append+=" intel_iommu=on lab.iommu=yes"
    else
        QEMU+=(-machine pc)
    fi
    QEMU+=(-m "$MEMORY" -smp "$CPUS" -nodefaults -display none -monitor none -no-reboot -nic none)
    QEMU+=(-kernel "$KERNEL/usr/lib/modules/$KERNEL_VERSION/vmlinuz" -initrd "$INITRAMFS" -append "$append")
    QEMU+=(-serial "file:$JOB/console.log" -device virtio-serial-pci)
    port stdout "$JOB/stdout"
    port stderr "$JOB/stderr"
    port status "$JOB/status"
    port kernel "$JOB/kernel.log"
    share host / ,readonly=on
    share tools "$GUEST" ,readonly=on
    share modules "$KERNEL" ,readonly=on
    share job "$JOB/job" ,readonly=on
    [ -z "$RESULTS" ] || share results "$RESULTS" ""
}

# start_machine ACCELERATOR SECONDS: starts the emulator and the two readers of the command's output.
start_machine() {
    emulator_arguments "$1"
    rm -f "$JOB/status"
    cat "$JOB/stdout" {JOB_LOCK}<&- &
    READERS=($!)
    cat "$JOB/stderr" {JOB_LOCK}<&- >&2 &
    READERS+=($!)
    # MALLOC_ARENA_MAX and the like of the caller are not the emulator's business.
    env -i setpriv --pdeathsig TERM timeout -k 5 "$2" setpriv --pdeathsig KILL "${QEMU[@]}" \
        {JOB_LOCK}<&- </dev/null >"$JOB/emulator.log" 2>&1 &
    EMULATOR=$!
    if [ "$VERBOSE" = yes ]; then
        tail -q -n +1 -F --pid="$EMULATOR" "$JOB/console.log" {JOB_LOCK}<&- 2>/dev/null >&2 &
    fi
}

# ready_within SECONDS: whether the guest says that it is up.
ready_within() {
    local tries=$(($1 * 5))
    while [ $tries -gt 0 ]; do
        if grep -q '^ready' "$JOB/status" 2>/dev/null; then return 0; fi
        kill -0 "$EMULATOR" 2>/dev/null || return 1
        sleep 0.2
        tries=$((tries - 1))
    done
    return 1
}

stop_machine() {
    if [ -n "${EMULATOR:-}" ]; then
        kill -TERM "$EMULATOR" 2>/dev/null || true
        wait "$EMULATOR" 2>/dev/null || true
        EMULATOR=
    fi
    if [ ${#READERS[@]} -gt 0 ]; then
        # A pipe that the emulator never opened has a reader that would wait for ever.
        kill "${READERS[@]}" 2>/dev/null || true
        wait "${READERS[@]}" 2>/dev/null || true
        READERS=()
    fi
}

# run_machine: runs the job to its end and returns what the guest said in VERDICT: `exit N`, `broken ...`, or empty.
run_machine() {
    local code=0
    if [ "$KVM" = yes ]; then
        start_machine kvm "$TIMEOUT"
        if ! ready_within 15 2>/dev/null; then # bash would tell of the emulator that aborted
            say "/dev/kvm is no use here; going on with emulation"
            stop_machine
            start_machine tcg "$TIMEOUT"
        fi
    else
        start_machine tcg "$TIMEOUT"
    fi
    wait "$EMULATOR" || code=$?
    EMULATOR=
    VERDICT=$(grep -m1 -E '^(exit|broken) ' "$JOB/status" 2>/dev/null || true)
    if [ -s "$JOB/status" ]; then wait "${READERS[@]}" || true; else stop_machine; fi
    READERS=()
    [ -z "$KERNEL_LOG" ] || cp "$(if [ -s "$JOB/kernel.log" ]; then echo "$JOB/kernel.log"; else echo "$JOB/console.log"; fi)" "$KERNEL_LOG"
    if [ -z "$VERDICT" ] && [ "$code" -eq 124 ]; then VERDICT="timeout"; fi
}

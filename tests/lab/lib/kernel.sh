# shellcheck shell=bash
# The guest's kernel: Debian's own, by package name. Backports drop old versions, so the version is what
# linux-image-amd64 depends on when it is first needed; after that the cached one is used until --refresh.

# kernel_candidates: every kernel version that the indexes offer, newest last (plain amd64 flavour).
kernel_candidates() {
    apt_private machine apt-cache search --names-only '^linux-image-[0-9][0-9a-z.+~-]*-amd64$' |
        sed -n 's/^linux-image-\([^ ]*-amd64\) .*/\1/p' | grep -v -E -- '-(cloud|rt)-amd64$' | sort -V
}

# resolve_kernel [PREFIX]: prints the full version: the current one, or the newest that begins with PREFIX.
resolve_kernel() {
    local found
    if [ -z "${1:-}" ]; then
        found=$(apt_private machine apt-cache show "linux-image-amd64/$KERNEL_SUITE" |
            sed -n 's/^Depends:.*linux-image-\([0-9][^ ,]*\).*/\1/p' | head -n1)
        [ -n "$found" ] || cannot_run "no linux-image-amd64 in $KERNEL_SUITE"
    else
        # A prefix ends where a component of the version ends: 7.1 is not 7.10.
        found=$(kernel_candidates | awk -v p="$1" 'index($0, p) == 1 && substr($0, length(p) + 1) !~ /^[0-9]/' | tail -n1)
        [ -n "$found" ] || cannot_run "no kernel $1 to be had; there are: $(kernel_candidates | tr '\n' ' ')"
    fi
    printf '%s\n' "$found"
}

# cached_kernel [PREFIX]: prints the version that earlier runs settled on, if it is still there.
cached_kernel() {
    local version
    if [ -z "${1:-}" ]; then
        version=$(cat "$CACHE/kernel-current" 2>/dev/null) || return 1
    else
        version=$(cat "$CACHE/kernel-for-$1" 2>/dev/null) || return 1
    fi
    [ -d "$CACHE/kernel-$version" ] && printf '%s\n' "$version"
}

# prepare_kernel [PREFIX]: downloads and unpacks a kernel. Sets KERNEL (directory) and KERNEL_VERSION.
prepare_kernel() {
    local prefix=${1:-} remember
    if [ -n "$prefix" ]; then remember=$CACHE/kernel-for-$prefix; else remember=$CACHE/kernel-current; fi
    if KERNEL_VERSION=$(cached_kernel "$prefix"); then
        KERNEL=$CACHE/kernel-$KERNEL_VERSION
        return 0
    fi
    [ -f "$CACHE/apt/machine/apt.conf" ] || machine_sources | apt_room machine /dev/null
    apt_update machine
    KERNEL_VERSION=$(resolve_kernel "$prefix")
    KERNEL=$CACHE/kernel-$KERNEL_VERSION
    if [ ! -d "$KERNEL" ]; then
        fetch_kernel
    fi
    printf '%s\n' "$KERNEL_VERSION" >"$remember.new"
    mv "$remember.new" "$remember"
}

# New packaging splits the kernel into linux-binary and linux-modules; older versions are one linux-image.
fetch_kernel() {
    local work package packages=()
    for package in linux-binary linux-modules; do
        if apt_private machine apt-cache show "$package-$KERNEL_VERSION" >/dev/null 2>&1; then
            packages+=("$package-$KERNEL_VERSION")
        fi
    done
    [ ${#packages[@]} -eq 2 ] || packages=("linux-image-$KERNEL_VERSION")
    work=$(mktemp -d "$CACHE/tmp.XXXXXX")
    mkdir "$work/debs"
    say "downloading ${packages[*]}"
    if ! download_named machine "$work/debs" "${packages[@]}"; then
        apt_update machine force
        download_named machine "$work/debs" "${packages[@]}" ||
            cannot_run "the kernel could not be had: $(grep -m1 '^E:' "$CACHE/apt/machine/download.log")"
    fi
    unpack "$work/root" "$work/debs"/*.deb
    local tree=$work/root/usr/lib/modules/$KERNEL_VERSION
    [ -f "$tree/vmlinuz" ] || mv "$work/root/boot/vmlinuz-$KERNEL_VERSION" "$tree/vmlinuz"
    rm -rf "$work/root/boot" "$work/debs"
    machine_tool depmod -b "$work/root/usr" "$KERNEL_VERSION" 2>/dev/null || true
    [ -s "$tree/modules.dep" ] || broken "depmod made no modules.dep for $KERNEL_VERSION"
    chmod 755 "$work/root"
    publish "$work/root" "$KERNEL"
    rm -rf "$work"
}

# module_files LIST_FILE: prints the files of the named modules and all they need, in the order to load them.
# A module that this kernel does not have, or has built in, is passed over: the guest says what it then lacks.
module_files() {
    local name
    while read -r name _; do
        case $name in '' | '#'*) continue ;; esac
        machine_tool modprobe -d "$KERNEL/usr" -S "$KERNEL_VERSION" --show-depends "$name" 2>/dev/null |
            awk '$1 == "insmod" { print $2 }' || true
    done <"$1" | awk '!seen[$0]++'
}

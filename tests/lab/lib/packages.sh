# shellcheck shell=bash
# Packages by name, without touching the host: a private apt reads signed indexes, resolves, downloads into the
# cache, and dpkg-deb unpacks there. Nothing is installed and nothing outside the cache is written, so this runs as
# any user. Signature and hash checks are apt's own and stay on.
#
# Two resolutions, for two readers:
#   machine  what the emulator and the builders need, complete down to the C library, from one fixed Debian suite,
#            run through its own dynamic loader: the host's distribution does not matter;
#   guest    what programs in the guest need beyond the host's files: the RDMA tools, from the host's own suite and
#            resolved against what the host has installed, so that they fit the libraries they will meet.

readonly MACHINE_SUITE=trixie
readonly KERNEL_SUITE=trixie-backports
readonly MACHINE_PACKAGES=(qemu-system-x86 busybox-static kmod)
readonly GUEST_PACKAGES=(ibverbs-utils ibverbs-providers rdmacm-utils perftest iproute2 kmod)
readonly DEBIAN_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# A resolved set older than this is still used; only --refresh looks for a newer one.
readonly INDEX_FRESH_MINUTES=720

# apt_private ROOM apt-get|apt-cache ARGS...: apt with its state, cache and sources in $CACHE/apt/ROOM.
apt_private() {
    local room=$CACHE/apt/$1
    shift
    APT_CONFIG=$room/apt.conf "$@"
}

# apt_room ROOM STATUS_FILE: makes a private apt directory. Its sources come on standard input. The list of what is
# installed is copied: apt locks beside it.
apt_room() {
    local room=$CACHE/apt/$1
    mkdir -p "$room/state/lists/partial" "$room/cache/archives/partial"
    cat >"$room/sources.list"
    cat "$2" >"$room/status"
    {
        # How this host reaches its mirror (proxies, date checks) is kept; its hooks and preferences are not.
        apt-config dump Acquire | grep -v '^Acquire::IndexTargets' || true
        cat <<CONF
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "$room/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$room/state";
Dir::State::status "$room/status";
Dir::Cache "$room/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
APT::Get::AllowUnauthenticated "false";
APT::Sandbox::User "root";
CONF
    } >"$room/apt.conf"
}

# The host's own Debian mirror if it names one, else the public one.
debian_mirror() {
    local found
    # shellcheck disable=SC2016 # apt's own variables
    found=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        grep -m1 -E '/debian/?$' || true)
    printf '%s\n' "${found:-http://deb.debian.org/debian/}"
}

# The sources of the room `machine`.
machine_sources() {
    local mirror suite
    [ -r "$DEBIAN_KEYRING" ] || cannot_run "the package debian-archive-keyring is missing ($DEBIAN_KEYRING)"
    mirror=$(debian_mirror)
    for suite in "$MACHINE_SUITE" "$MACHINE_SUITE-updates" "$KERNEL_SUITE"; do
        echo "deb [arch=amd64 signed-by=$DEBIAN_KEYRING] $mirror $suite main"
    done
}

# The sources of the room `guest`: the host's own, of its own release only. Third-party sources are left out.
guest_sources() {
    local id codename uri release component
    id=$(. /etc/os-release && echo "${ID:-}")
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    [ -n "$codename" ] || cannot_run "/etc/os-release names no VERSION_CODENAME; the lab knows Debian and its relatives"
    local keyring=/usr/share/keyrings/$id-archive-keyring.gpg
    [ -r "$keyring" ] || cannot_run "the package $id-archive-keyring is missing ($keyring)"
    # shellcheck disable=SC2016 # apt's own variables
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        sort -u | while read -r uri release component; do
        case $release in
        "$codename" | "$codename-updates" | "$codename-security" | "$codename/updates")
            echo "deb [arch=amd64 signed-by=$keyring] $uri $release $component"
            ;;
        esac
    done
}

# apt_update ROOM [force]: fetches the signed indexes unless they are fresh.
apt_update() {
    local room=$1 stamp=$CACHE/apt/$1/updated
    if [ "${2:-}" != force ] && [ -n "$(find "$stamp" -mmin "-$INDEX_FRESH_MINUTES" 2>/dev/null)" ]; then
        return 0
    fi
    say "fetching package lists ($room)"
    apt_private "$room" apt-get -q update >"$CACHE/apt/$room/update.log" 2>&1 ||
        cannot_run "the package lists could not be fetched: $(grep -m1 '^[EW]:' "$CACHE/apt/$room/update.log")"
    # To apt-get update, a mirror that does not answer is a warning; an index that is not there is an error here.
    if grep -q '^W: Failed to fetch' "$CACHE/apt/$room/update.log"; then
        cannot_run "a package list could not be fetched: $(grep -m1 '^W: Failed' "$CACHE/apt/$room/update.log")"
    fi
    touch "$stamp"
}

# download_set ROOM PACKAGE...: downloads the packages and all they need that the room's status does not have,
# into the room's archive directory.
download_set() {
    local room=$1 log=$CACHE/apt/$1/download.log
    shift
    apt_private "$room" apt-get -q clean
    apt_private "$room" apt-get -q -y install --download-only "$@" >"$log" 2>&1
}

# download_named ROOM DIRECTORY PACKAGE...: downloads exactly these packages, without what they need.
download_named() {
    local room=$1 into=$2 log=$CACHE/apt/$1/download.log
    shift 2
    (cd "$into" && apt_private "$room" apt-get -q download "$@" >"$log" 2>&1)
}

# unpack DIRECTORY DEB...: unpacks packages over one another, everything below usr/ as on a merged-/usr system:
# a real /lib directory here would hide the host's symbolic link of that name in the guest.
unpack() {
    local root=$1 deb part
    shift
    mkdir -p "$root"
    for deb in "$@"; do
        dpkg-deb -x "$deb" "$root"
        for part in bin sbin lib lib64; do
            if [ -d "$root/$part" ] && [ ! -L "$root/$part" ]; then
                mkdir -p "$root/usr/$part"
                cp -a "$root/$part/." "$root/usr/$part/"
                rm -rf "${root:?}/$part"
            fi
        done
    done
}

# publish TEMPORARY FINAL: makes a finished directory visible in one step.
publish() {
    rm -rf "$2"
    mv -T "$1" "$2"
}

# prepare_set KIND ROOM PACKAGE...: makes $CACHE/KIND, unpacked from the room, in one step.
prepare_set() {
    local kind=$1 room=$2 work
    shift 2
    apt_update "$room"
    say "downloading $*"
    if ! download_set "$room" "$@"; then
        # The index may be older than the mirror: packages are replaced and removed there.
        apt_update "$room" force
        download_set "$room" "$@" ||
            cannot_run "packages could not be had ($*): $(grep -m1 '^E:' "$CACHE/apt/$room/download.log")"
    fi
    work=$(mktemp -d "$CACHE/tmp.XXXXXX")
    find "$CACHE/apt/$room/cache/archives" -maxdepth 1 -name '*.deb' -print0 | sort -z >"$work.debs"
    local debs=()
    mapfile -d '' -t debs <"$work.debs"
    rm -f "$work.debs"
    unpack "$work" "${debs[@]}"
    chmod 755 "$work"
    apt_private "$room" apt-get -q clean
    publish "$work" "$CACHE/$kind"
}

# prepare_machine: the emulator's side, in $CACHE/machine-<suite>. Sets MACHINE.
prepare_machine() {
    local name
    name=machine-$(sha256sum <<<"$MACHINE_SUITE ${MACHINE_PACKAGES[*]}" | cut -c1-12)
    MACHINE=$CACHE/$name
    [ -d "$MACHINE" ] && return 0
    machine_sources | apt_room machine /dev/null
    prepare_set "$name" machine "${MACHINE_PACKAGES[@]}"
    prune machine "$name"
}

# prepare_guest: what the guest adds to the host's files, in $CACHE/guest-<what the host has>. Sets GUEST.
prepare_guest() {
    local name
    # shellcheck disable=SC2016 # dpkg-query's own variables
    name=guest-$({
        echo "${GUEST_PACKAGES[*]}"
        dpkg-query -W -f '${Package}:${Architecture} ${Version} ${db:Status-Abbrev}\n'
    } | sha256sum | cut -c1-12)
    GUEST=$CACHE/$name
    [ -d "$GUEST" ] && return 0
    guest_sources | apt_room guest /var/lib/dpkg/status
    prepare_set "$name" guest "${GUEST_PACKAGES[@]}"
    prune guest "$name"
}

# prune KIND KEEP: removes other sets of this kind that no running machine uses. Each machine holds a shared lock.
prune() {
    local old
    for old in "$CACHE/$1"-*; do
        case $old in
        "$CACHE/$2" | *.lock) continue ;;
        esac
        [ -d "$old" ] || continue
        if flock -n -x "$old.lock" rm -rf "$old"; then rm -f "$old.lock"; fi
    done
}

# machine_tool PROGRAM ARGS...: runs a program of the machine set with its own loader and libraries.
# Its own name is kept as argv[0]: kmod decides by it what it is.
machine_tool() {
    local program=$1
    shift
    local libraries=$MACHINE/usr/lib/x86_64-linux-gnu
    local file=$MACHINE/usr/bin/$program
    [ -e "$file" ] || file=$MACHINE/usr/sbin/$program
    # kmod's other names are absolute or relative symbolic links to it.
    [ ! -L "$file" ] || file=$MACHINE/usr/bin/$(basename "$(readlink "$file")")
    "$libraries/ld-linux-x86-64.so.2" --argv0 "$program" --library-path "$libraries:$MACHINE/usr/lib" "$file" "$@"
}

# shellcheck shell=bash
# The first file system of the guest: a static busybox, the modules to load and guest/init. It does not depend on the
# command, so it is built once for a kernel and a version of these files.

# prepare_initramfs: sets INITRAMFS.
prepare_initramfs() {
    local name
    name=initramfs-$(cat "$LAB/guest/init" "$LAB/modules/"* "$LAB/lib/initramfs.sh" | sha256sum | cut -c1-12).cpio.gz
    INITRAMFS=$KERNEL/$name
    [ -f "$INITRAMFS" ] && return 0
    local work
    work=$(mktemp -d "$CACHE/tmp.XXXXXX")
    mkdir -p "$work"/{bin,dev,proc,sys,job,tools,modules,host,upper,root,load}
    cp "$MACHINE/usr/bin/busybox" "$work/bin/busybox"
    cp "$LAB/guest/init" "$work/init"
    chmod 755 "$work/init" "$work/bin/busybox"
    local set count=100 file plain
    for set in base iommu; do
        module_files "$LAB/modules/$set" | while read -r file; do
            count=$((count + 1))
            plain=$(basename "${file%.[xz]*}")
            # A module of an earlier set is not loaded twice.
            compgen -G "$work/load/*-$plain" >/dev/null && continue
            decompress "$file" >"$work/load/$set-$count-$plain"
        done
    done
    compgen -G "$work/load/base-*-rdma_rxe.ko" >/dev/null || cannot_run "Linux $KERNEL_VERSION comes without rdma_rxe"
    (cd "$work" && find . | "$MACHINE/usr/bin/busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$CACHE/tmp.$$.cpio.gz"
    rm -f "$KERNEL"/initramfs-*.cpio.gz
    mv "$CACHE/tmp.$$.cpio.gz" "$INITRAMFS"
    rm -rf "$work"
}

decompress() {
    case $1 in
    *.xz) "$MACHINE/usr/bin/busybox" xz -dc "$1" ;;
    *.zst) zstd -qdc "$1" ;;
    *.gz) gzip -dc "$1" ;;
    *) cat "$1" ;;
    esac
}

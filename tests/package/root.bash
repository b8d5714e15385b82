# shellcheck shell=bash
# The package in two versions and a clean Debian root to install it in, for tests/package and tests/vm; sourced after
# tests/lab.bash.

PACKAGE_DIR=$LAB_REPOSITORY/target/package
SUITE=bookworm

build_package() {
    local first
    first=$("$LAB_REPOSITORY/packaging/build-deb" | tail -n 1)
    cp "$first" "$PACKAGE_DIR/first.deb"
    newer
}

# newer: the next version, with an ip-up hook of its own.
newer() {
    local dir=$PACKAGE_DIR/newer
    rm -rf "$dir"
    dpkg-deb --raw-extract "$PACKAGE_DIR/first.deb" "$dir"
    sed -i 's/^Version: .*/&.1/' "$dir/DEBIAN/control"
    sed -i '$a# newer' "$dir/etc/ppp/ip-up.d/0mh-hook"
    (cd "$dir" && find etc usr lib -type f -exec md5sum {} + >DEBIAN/md5sums)
    dpkg-deb --root-owner-group --build "$dir" "$PACKAGE_DIR/newer.deb" >/dev/null
}

# bare: Debian's least, with the packages that the tests install in its cache. full: what mh-hook depends on, on top.
# booted: systemd on top of that, and a firewall that it starts.
make_roots() {
    local bare=$PACKAGE_DIR/bare
    mkdir -p "$PACKAGE_DIR"
    # Each comes to its name last, so that what has it is complete.
    if [[ ! -d $bare ]]; then
        rm -rf "$bare.new"
        debootstrap --variant=minbase "$SUITE" "$bare.new" >"$PACKAGE_DIR/debootstrap.log" ||
            lab_die "debootstrap failed, see $PACKAGE_DIR/debootstrap.log"
        chroot "$bare.new" apt-get --quiet=2 update
        chroot "$bare.new" apt-get --quiet=2 --yes --no-install-recommends --download-only install \
            ppp iproute2 iptables conntrack bash-completion zsh fish systemd nftables >/dev/null
        mv "$bare.new" "$bare"
    fi
    make_layer full "$bare" ppp iproute2 iptables conntrack
    make_layer booted "$PACKAGE_DIR/full:$bare" systemd nftables
}

# make_layer NAME LAYERS PACKAGE…: these packages, on top of those layers.
make_layer() {
    local dir=$PACKAGE_DIR/$1
    if [[ -d $dir ]]; then return; fi
    # A run that was stopped here has left it.
    umount --quiet "$PACKAGE_DIR/mounted" 2>/dev/null || true
    rm -rf "$dir.new"
    mkdir -p "$dir.new" "$PACKAGE_DIR/work" "$PACKAGE_DIR/mounted"
    mount -t overlay overlay "$PACKAGE_DIR/mounted" \
        -o "lowerdir=$2,upperdir=$dir.new,workdir=$PACKAGE_DIR/work"
    ROOT=$PACKAGE_DIR/mounted in_root apt_get install "${@:3}" >/dev/null 2>&1
    umount "$PACKAGE_DIR/mounted"
    mv "$dir.new" "$dir"
}

# in_root COMMAND…: as on a booted system: process 1 has the same root, so that nobody takes it for a chroot.
in_root() {
    local -a command=("$@")
    if [[ $1 == apt_get ]]; then
        command=(apt-get --quiet=2 --yes --no-install-recommends "${@:2}")
    fi
    env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive \
        unshare --mount --pid --fork --kill-child --root="$ROOT" --wd=/ --mount-proc -- "${command[@]}" </dev/null
}

# What is on the disk, but for dpkg's, apt's and their kin's own notes.
files() {
    (
        cd "$ROOT" || exit
        find . -xdev \( -path ./packages -o -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path ./var/cache -o -path ./var/log \) \
            -prune -o -printf '%p %y %m %u %g %l\n' | sort
        find etc -type f -exec md5sum {} + | sort
    )
}

# shellcheck shell=bash
# The Debian package on a router that is Debian and nothing else; sourced by tests/vm/story after tests/package/root.bash.

# package_router: from here on the router is a throw-away copy of the clean root, with Debian's own pppd, ip-up and
# iptables. Process 1 has the same root, so that nobody takes it for a chroot; /dev and /run are the lab's.
package_router() {
    router_root full bare
    mount --rbind /dev "$ROOT/dev"
    mount --bind /run "$ROOT/run"
    # A shell, because it collects whatever has ended.
    ip netns exec router unshare --mount --pid --fork --kill-child --root="$ROOT" --wd=/ --mount-proc -- \
        sh -c 'sleep infinity & wait' </dev/null &
    router_starts sh $!
    on_router mount -t sysfs sysfs /sys
}

# booted_router: the same, booted: its process 1 is systemd, with the units that Debian has enabled.
booted_router() {
    local group=/sys/fs/cgroup/router.$SRANDOM
    router_root booted full bare
    mkdir "$group"
    # shellcheck disable=SC2016 # the inner shell's
    sh -c 'echo 0 >"$1/cgroup.procs"; shift; exec "$@"' sh "$group" \
        ip netns exec router unshare --mount --pid --cgroup --ipc --uts --fork --kill-child -- \
        bash -euc "$(declare -f become_systemd); become_systemd \"$ROOT\"" </dev/null &
    router_starts systemd $!
    lab_wait is_booted
    # What fail shows.
    on_router journalctl --follow --no-tail --output=short-iso >>"$LINKS_SYSLOG" &
    expect_equal "units that failed" "" "$(on_router systemctl --failed --plain --no-legend)"
}

is_booted() { on_router systemctl is-system-running 2>/dev/null | grep -xE 'running|degraded'; }

# become_systemd ROOT: as the first process of its namespaces, with a /run and a /dev of its own.
become_systemd() {
    local node
    mount -t proc proc "$1/proc"
    mount -t sysfs sysfs "$1/sys"
    mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
    mount -t tmpfs -o mode=0755 tmpfs "$1/run"
    mkdir "$1/run/lab"
    mount --bind /run/lab "$1/run/lab"
    mount -t tmpfs -o mode=0755 tmpfs "$1/dev"
    mkdir "$1/dev/pts" "$1/dev/shm"
    for node in null zero full random urandom tty ppp; do
        touch "$1/dev/$node"
        mount --bind "/dev/$node" "$1/dev/$node"
    done
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$1/dev/pts"
    ln -s pts/ptmx "$1/dev/ptmx"
    ln -s /proc/self/fd "$1/dev/fd"
    # Not chroot: a unit with ProtectSystem has a root of its own, made by pivot_root(2).
    cd "$1" || return
    pivot_root . .
    umount --lazy .
    # Its container interface: https://systemd.io/CONTAINER_INTERFACE
    exec env -i container=lab /lib/systemd/systemd --log-target=journal
}

# router_root LAYER…: a copy of these of tests/package's layers, the uppermost first.
router_root() {
    local event
    ROOT=$LAB_DIR/root
    ROOT_LAYERS=("${@/#/$PACKAGE_DIR/}")
    mkdir "$LAB_DIR/upper" "$LAB_DIR/work" "$ROOT"
    mount -t overlay overlay "$ROOT" \
        -o "lowerdir=$(IFS=:; echo "${ROOT_LAYERS[*]}"),upperdir=$LAB_DIR/upper,workdir=$LAB_DIR/work"
    cp "$PACKAGE_DIR"/{first,newer}.deb "$LAB_DIR"
    # What an administrator has who means to dial, and the hooks that take notes.
    cp /etc/ppp/peers/isp[01] "$ROOT/etc/ppp/peers"
    LINKS_HOOKS=(up down)
    for event in "${LINKS_HOOKS[@]}"; do cp "/etc/ppp/ip-$event.d/z-note" "$ROOT/etc/ppp/ip-$event.d"; done
    [[ ! -e $ROOT/usr/sbin/mh-hook ]] || fail "the root is not clean: mh-hook is there"
}

# What is on the disk otherwise than in the clean root, but for dpkg's, apt's and their kin's own notes. To look at all of
# it takes a minute here: the layers are the host's.
files() {
    local path
    (
        cd "$LAB_DIR/upper" || exit
        find . \( -path ./var/lib/dpkg -o -path ./var/lib/apt -o -path ./var/cache -o -path ./var/log \) -prune -o -print
    ) | sort | while read -r path; do is_as_in_the_clean_root "$path" || file "$path"; done
}

# A folder is there as soon as something in it has changed, and a file that was written anew may be the same.
is_as_in_the_clean_root() {
    local layer here=$LAB_DIR/upper/$1 there
    for layer in "${ROOT_LAYERS[@]}"; do
        there=$layer/$1
        [[ -e $there || -L $there ]] || continue
        [[ ! -L $here && $(stat --format '%F %a %u %g' "$here") == "$(stat --format '%F %a %u %g' "$there")" ]] || return 1
        if [[ -f $here ]]; then cmp --silent "$here" "$there"; else [[ -d $here ]]; fi
        return
    done
    return 1
}

file() {
    (
        cd "$LAB_DIR/upper" || exit
        find "$1" -maxdepth 0 -printf '%p %y %m %u %g %l\n'
        if [[ -f $1 && ! -L $1 ]]; then md5sum "$1"; fi
    )
}

# router_starts NAME PID: until unshare's child has that name. What runs on the router runs beside it from here on.
router_starts() {
    lab_wait pgrep --exact "$1" --parent "$2"
    ROOT_INIT=$(pgrep --parent "$2")
    on_router() {
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive \
            nsenter --target "$ROOT_INIT" --mount --net --pid --root --wd -- "$@" </dev/null
    }
    # What stands in /run is the number that the process has in there.
    pppd_pid() { pgrep --oldest --full "pppd call $1 "; }
}

dpkg_install() { on_router dpkg --install "$LAB_DIR/$1.deb"; }

package_configure() { install -m 0644 "$LAB_CONFIG" "$ROOT/etc/mh-hook.toml"; }

expect_entries() { expect_equal "the plan" "# nothing to change" "$(on_router mh-hook --dry-run sync)"; }

test_the_package_installed_before_the_first_dial_leaves_what_was_there_before() {
    local before files
    package_router
    files=$(files)
    before=$(lab_dump)
    dpkg_install first
    package_configure
    dial isp0 isp1
    expect_log daemon.notice 'mh-hook.*: isp0 up on ppp0 203\.0\.113\.10: [1-9]'
    expect_source_rule "$X"
    expect_forward_answered
    isp_zero
    expect_answer "client 198.51.100.20" lanhost tcp 192.0.2.9 80
    expect_packets isp0 customer none
    expect_packets isp1 foreign none
    hang_up isp0
    expect_forward_silent
    hang_up isp1
    expect_equal "kernel after both links went down" "$before" "$(lab_dump)"

    on_router dpkg --purge mh-hook
    expect_equal "kernel after purge" "$before" "$(lab_dump)"
    expect_equal "files after purge" "$files" "$(files)"
    [[ ! -e /run/mh-hook.lock ]] || fail "the lock has stayed"
}

test_the_package_installed_upgraded_and_removed_while_links_are_up() {
    local links up pids
    package_router
    dial isp0 isp1
    expect_forward_silent
    links=$(lab_dump)
    pids=$(pppd_pid isp0; pppd_pid isp1)
    dpkg_install first
    expect_equal "kernel by the shipped configuration" "$links" "$(lab_dump)"
    expect_forward_silent
    package_configure
    on_router mh-hook sync
    expect_forward_answered
    up=$(lab_dump)

    chmod -x "$ROOT/etc/ppp/ip-down.d/0mh-hook"
    monitor_start link address route rule
    dpkg_install newer
    expect_equal "what the monitors saw of an upgrade" "" "$(monitor_seen)"
    expect_equal "kernel after an upgrade" "$up" "$(lab_dump)"
    expect_equal "mode after an upgrade" 644 "$(stat --format %a "$ROOT/etc/ppp/ip-down.d/0mh-hook")"
    grep -q newer "$ROOT/etc/ppp/ip-up.d/0mh-hook" || fail "the hook is still the old one"
    expect_forward_answered

    on_router dpkg --remove mh-hook
    [[ $(monitor_seen) == *"from $X lookup 10"* ]] || fail "ip monitor is deaf"
    [[ $(monitor_seen) == *"new generation"* ]] || fail "nft monitor is deaf"
    expect_equal "kernel after removal" "$links" "$(lab_dump)"
    expect_forward_silent
    dpkg_install first
    expect_entries
    expect_forward_answered
    expect_equal "the pppd that dialled" "$pids" "$(pppd_pid isp0; pppd_pid isp1)"
    # That hook is still switched off.
    hang_up isp0
    expect_source_rule "$X"
    on_router dpkg --purge mh-hook
    expect_equal "source rules after purge" "" "$(on_router ip rule list priority 100)"
}

# The package's units on a router that systemd has booted, beside Debian's own nftables.service, whose start flushes.
test_the_package_with_systemd_heals_what_a_firewall_flushed() {
    local before files dir
    booted_router
    files=$(files)
    before=$(lab_dump)
    dpkg_install first
    package_configure
    dial isp0 isp1
    expect_forward_answered
    on_router systemctl restart nftables.service
    expect_forward_silent
    on_router systemctl start mh-hook-sync.service
    expect_entries
    expect_forward_answered

    dir=$ROOT/etc/systemd/system/nftables.service.d
    mkdir "$dir"
    cp "$ROOT/usr/share/doc/mh-hook/examples/sync-after-restart.conf" "$dir/mh-hook.conf"
    on_router systemctl daemon-reload
    on_router systemctl restart nftables.service
    lab_wait is_in_step
    expect_forward_answered
    on_router systemctl reload nftables.service
    expect_forward_silent
    # Its last two lines are for this one.
    sed -Ei 's/^#(\[Service\]|ExecReload)/\1/' "$dir/mh-hook.conf"
    on_router systemctl daemon-reload
    on_router systemctl reload nftables.service
    expect_entries
    rm -r "$dir"

    # With the system calls of a usual service, and no others (systemd.exec(5)).
    dir=$ROOT/etc/systemd/system/mh-hook-sync.service.d
    mkdir "$dir"
    printf '[Service]\n%s\n' SystemCallFilter=@system-service SystemCallErrorNumber=EPERM >"$dir/calls.conf"
    on_router systemctl daemon-reload
    on_router nft flush ruleset
    on_router systemctl start mh-hook-sync.service
    expect_entries
    expect_forward_answered
    rm -r "$dir"

    # By the clock, and faster than as it is installed.
    dir=$ROOT/etc/systemd/system/mh-hook-sync.timer.d
    mkdir "$dir"
    printf '[Timer]\n%s\n' OnBootSec= OnUnitInactiveSec= OnActiveSec=1 OnUnitInactiveSec=3 AccuracySec=100ms >"$dir/fast.conf"
    on_router systemctl daemon-reload
    on_router nft flush ruleset
    sleep 5
    expect_forward_silent
    on_router systemctl enable --quiet --now mh-hook-sync.timer
    lab_wait is_in_step
    on_router nft flush ruleset
    lab_wait is_in_step
    rm -r "$dir"

    expect_equal "units that failed" "" "$(on_router systemctl --failed --plain --no-legend)"
    hang_up isp0 isp1
    on_router dpkg --purge mh-hook
    expect_equal "timers after purge" "" "$(on_router systemctl list-units --all --plain --no-legend 'mh-hook*')"
    expect_equal "kernel after purge" "$before" "$(lab_dump)"
    expect_equal "files after purge" "$files" "$(files)"
}

is_in_step() { on_router mh-hook --dry-run sync | grep -x '# nothing to change'; }

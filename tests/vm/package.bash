# shellcheck shell=bash
# The Debian package on a router that is Debian and nothing else; sourced by tests/vm/story after tests/package/root.bash.

# package_router: from here on the router is a throw-away copy of the clean root, with Debian's own pppd, ip-up and
# iptables. Process 1 has the same root, so that nobody takes it for a chroot; /dev and /run are the lab's.
package_router() {
    local event
    ROOT=$LAB_DIR/root
    mkdir "$LAB_DIR/upper" "$LAB_DIR/work" "$ROOT"
    mount -t overlay overlay "$ROOT" \
        -o "lowerdir=$PACKAGE_DIR/full:$PACKAGE_DIR/bare,upperdir=$LAB_DIR/upper,workdir=$LAB_DIR/work"
    mount --rbind /dev "$ROOT/dev"
    mount --bind /run "$ROOT/run"
    cp "$PACKAGE_DIR"/{first,newer}.deb "$LAB_DIR"
    # What an administrator has who means to dial, and the hooks that take notes.
    cp /etc/ppp/peers/isp[01] "$ROOT/etc/ppp/peers"
    for event in "${LINKS_HOOKS[@]}"; do cp "/etc/ppp/ip-$event.d/z-note" "$ROOT/etc/ppp/ip-$event.d"; done

    # A shell, because it collects whatever has ended.
    ip netns exec router unshare --mount --pid --fork --kill-child --root="$ROOT" --wd=/ --mount-proc -- \
        sh -c 'sleep infinity & wait' </dev/null &
    LAB_WAIT=30 lab_wait pgrep --exact sh --parent $!
    ROOT_INIT=$(pgrep --parent $!)
    on_router() {
        env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive \
            nsenter --target "$ROOT_INIT" --mount --net --pid --root --wd -- "$@" </dev/null
    }
    on_router mount -t sysfs sysfs /sys
    # What stands in /run is the number that the process has in there.
    pppd_pid() { pgrep --oldest --full "pppd call $1 "; }
    LINKS_HOOKS=(up down)
    [[ ! -e $ROOT/usr/sbin/mh-hook ]] || fail "the root is not clean: mh-hook is there"
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
    expect_log daemon.info 'mh-hook.*: isp0 up on ppp0 203\.0\.113\.10: [1-9]'
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
    monitor_start
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

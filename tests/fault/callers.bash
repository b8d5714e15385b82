# shellcheck shell=bash disable=SC2154 # ask_for sets status, said, took
# What a caller, an administrator or a small system may have done to us: signals that are ignored, an umask, streams that
# can't be written, lock files, folders that are missing or read-only, scripts in the place of tools, names that are numbers.

# callers_setup: what up makes, in $wanted, and what was there before, in $nothing.
callers_setup() {
    configure 10 192.168.0.2
    nothing=$(dump)
    mh_hook -q up ppp0
    wanted=$(dump)
    mh_hook -q down ppp0
}

# expect_up COMMAND…: an up in that way makes all that it should.
expect_up() {
    "$@" "$MH_HOOK" --config "$LAB_CONFIG" -q up ppp0 2>/run/lab/said || fail "$*: exit status $?: $(cat /run/lab/said)"
    expect_equal "up, by $*" "$wanted" "$(dump)"
    mh_hook -q down ppp0
    expect_equal "down" "$nothing" "$(dump)"
}

with_umask() {
    (
        umask "$1"
        shift
        "$@"
    )
}

without_sigchld() {
    (
        trap '' CHLD
        # A shell gives what it ignores to its children.
        exec "$@"
    )
}

test_what_a_caller_has_set_stops_nothing() {
    local nothing wanted mask
    callers_setup
    expect_up without_sigchld
    for mask in 777 000; do
        rm -f /run/mh-hook.lock
        expect_up with_umask "$mask"
        expect_equal "mode of the lock with umask $mask" 600 "$(stat -c %a /run/mh-hook.lock)"
    done
    expect_up env -i
}

test_a_stream_that_cannot_be_written_stops_nothing() {
    local nothing wanted
    callers_setup
    "$MH_HOOK" --config "$LAB_CONFIG" -v up ppp0 >/dev/full 2>/dev/full || fail "exit status $? with a full disk"
    expect_equal "up with a full disk" "$wanted" "$(dump)"
    "$MH_HOOK" --config "$LAB_CONFIG" -v down ppp0 2>&1 | head -c 1 >/dev/null
    expect_equal "down with a reader that has gone" "$nothing" "$(dump)"
    "$MH_HOOK" --config "$LAB_CONFIG" up ppp0 >&- 2>&- <&- || fail "exit status $? without streams"
    expect_equal "up without streams" "$wanted" "$(dump)"
}

test_lock_files_of_all_kinds() {
    local nothing wanted holder
    callers_setup
    # One of mode 0000, as a former version made it with umask 777; somebody else's; and one that everybody may open and hold.
    rm -f /run/mh-hook.lock
    (umask 777; : >/run/mh-hook.lock)
    expect_up env
    chown 65534 /run/mh-hook.lock
    expect_up env
    chmod 0666 /run/mh-hook.lock
    hold /run/mh-hook.lock 1000
    expect_up env
    kill "$holder"
    expect_equal "whose the lock is" "0 600" "$(stat -c '%u %a' /run/mh-hook.lock)"
    # Deleted while it is held: two hold locks of one name, and the second call still waits for nobody in vain.
    hold /run/mh-hook.lock 1000
    rm /run/mh-hook.lock
    expect_up env
    kill "$holder"
}

test_a_system_without_a_run_to_write_to() {
    local nothing wanted said
    callers_setup
    mh_hook -q up ppp0
    mount -t tmpfs -o ro tmpfs /run
    # The configuration is not there either.
    said=$("$MH_HOOK" --config /mnt/mh-hook.toml -v down ppp0 2>&1) || true
    umount /run
    [[ $said == *"can't open the lock /run/mh-hook.lock"*'the folder /run is locked instead'* ]] || fail "it said: $said"
    if is_legacy; then
        # It has a lock of its own there, and says so; what it need not be run for is done.
        [[ $said == *"can't open lock file /run/xtables.lock"* ]] || fail "it said: $said"
        expect_equal "rules of ours" "" "$(ip rule | grep 'proto 109' || true)"
        mh_hook -q down ppp0
    fi
    expect_equal "down where /run is read-only" "$nothing" "$(dump)"
}

# An event that can't have the lock in time is not lost: the holder looks at all links when it ends.
test_an_event_that_could_not_have_the_lock_is_seen_to_by_the_holder() {
    local nothing wanted holder
    callers_setup
    fake_tools
    # The holder's iptables-restore takes longer than the other waits.
    fault 3 3 hang
    "$MH_HOOK" --config "$LAB_CONFIG" -q event up ppp1 /dev/null 0 198.51.100.20 198.51.100.1 2>/dev/null &
    holder=$!
    lab_wait is_hanging
    kill -STOP "$holder"
    no_fault
    ask_for "event up ppp0 /dev/null 0 203.0.113.10 203.0.113.1"
    ((status == 1)) || fail "exit status $status while another holds the lock: $said"
    [[ $said == *'the lock /run/mh-hook.lock, which '*'it will look at all links when it ends'* ]] || fail "it said: $said"
    [[ $(dump) != *mh-isp0* ]] || fail "entries were made without the lock"
    kill -CONT "$holder"
    wait "$holder" || true
    lab_wait has_isp0
    lab_wait is_idle
    expect_equal "the next sync" "# nothing to change" "$(mh_hook --dry-run sync)"
    [[ ! -e /run/mh-hook.again ]] || fail "the word is still there"
}

is_hanging() { pgrep -x sleep; }
has_isp0() { iptables-save | grep mh-isp0; }
is_idle() { flock --nonblock /run/mh-hook.lock echo yes; }

test_iptables_as_scripts() {
    local nothing wanted name
    callers_setup
    for name in iptables-save iptables-restore; do
        cat >"/run/lab/$name" <<SCRIPT
#!/bin/sh
exec $(dirname "$(readlink -f /usr/sbin/$name)")/$(is_legacy && echo iptables-legacy || echo iptables-nft)${name#iptables} "\$@"
SCRIPT
        chmod 0755 "/run/lab/$name"
        ln -sfn "/run/lab/$name" "/etc/alternatives/$name"
    done
    expect_up env
    mh_hook -q up ppp0
    mh_hook -q sync
    expect_equal "sync" "$(mh_hook --dry-run sync)" "# nothing to change"
    [[ $(dump) == *mh-isp0* ]] || fail "sync has removed its own entries"
}

test_numbers_that_are_names_to_ip() {
    local nothing wanted folder=/etc/iproute2
    callers_setup
    [[ -d $folder ]] || folder=/usr/share/iproute2
    mkdir -p /run/lab/upper /run/lab/work
    cp -a "$folder" /run/lab/names
    mount --bind /run/lab/names "$folder"
    echo '100 10' >>"$folder/rt_tables"
    ask_for "up ppp0"
    ((status == 1)) || fail "exit status $status: $said"
    [[ $said == *"rt_tables gives 100 the name 10, which ip takes for 100"* ]] || fail "it said: $said"
    expect_equal "what it made" "$nothing" "$(dump)"
    sed -i '$d' "$folder/rt_tables"
    echo '7 109' >>"$folder/rt_protos"
    ask_for "up ppp0"
    ((status == 1)) || fail "exit status $status: $said"
    [[ $said == *"rt_protos gives 7 the name 109"* ]] || fail "it said: $said"
    sed -i '$d' "$folder/rt_protos"
    expect_up env
    umount "$folder"
}

# What pre-up starts in the background works in another folder.
test_a_relative_configuration_is_the_same_file_for_the_follower() {
    local nothing wanted
    callers_setup
    ip link set ppp0 down
    (cd /run/lab && "$MH_HOOK" --config mh-hook.toml -q event pre-up ppp0 /dev/null 0 203.0.113.10 203.0.113.1)
    iptables-restore --noflush <<<$'*nat\n-F mh-isp0\nCOMMIT'
    ip link set ppp0 up
    lab_wait is_whole
}

is_whole() { iptables-save -t nat | grep -- '-A mh-isp0 .*--dport 80 '; }

test_a_link_that_is_one_of_the_lans_is_told() {
    configure 10 192.168.0.2
    sed -i 's/^interface = "ppp0"/ipparam = "isp0"/' "$LAB_CONFIG"
    ask_for "event up eth1 /dev/null 0 192.168.0.1 192.168.0.2 isp0"
    ((status == 1)) || fail "exit status $status: $said"
    [[ $said == *'eth1 is one of the [lan] interfaces, and can'*'t be the uplink'* ]] || fail "it said: $said"
}

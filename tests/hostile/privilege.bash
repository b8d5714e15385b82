# shellcheck shell=bash
# Least privilege: what is opened, run and connected to is what tests/hostile/allowed names, and the tools can do no more
# than routing and netfilter take.

# Commands and what they find; some of them change nothing.
COMMANDS=(
    'up ppp0' 'up ppp0' 'event up ppp0 tty 1 203.0.113.10' sync status 'status --json' check 'explain 192.0.2.9 tcp/80' 'down ppp0' 'down ppp0'
    'event pre-up ppp1 tty 1 198.51.100.20' 'event down ppp0 tty 1 203.0.113.10'
)

# allowed_for COMMAND: the patterns, a line each.
allowed_for() {
    local groups=all
    case $1 in
        check*) groups='all|look|check' ;;
        status* | explain*) groups='all|look' ;;
        *) groups='all|change' ;;
    esac
    sed -nE "s/^($groups) +(.*[^ ]) +# .+/\2/p" "$(dirname "$0")/allowed"
}

test_nothing_is_opened_or_run_that_the_job_does_not_need() {
    local command line pattern
    local -a allowed
    if grep -vE '^(#|$|(all|change|look|check) +[a-z*-]+ [a-z_-]+ .*[^ ] +# .)' "$(dirname "$0")/allowed"; then
        fail "a line of tests/hostile/allowed is not of its form, or does not say why"
    fi
    : >"$LAB_DIR/found"
    for command in "${COMMANDS[@]}"; do
        mapfile -t allowed < <(allowed_for "$command")
        rm -f "$LAB_DIR"/calls.*
        # shellcheck disable=SC2086 # a command and its arguments
        in_ns router strace -ff -qq -y -s 4096 -e signal=none -e trace=%file,%network,init_module,finit_module \
            -o "$LAB_DIR/calls" -- env -i "$MH_HOOK" --config "$LAB_CONFIG" $command >/dev/null 2>&1 </dev/null ||
            [[ $command == check ]] || fail "$command does not work under strace"
        "$(dirname "$0")/calls" "$LAB_DIR/calls" "$MH_HOOK=PROGRAM/mh-hook" "$LAB_CONFIG=CONFIG" "${LAB_CONFIG%/*}=FOLDER" >"$LAB_DIR/lines"
        grep -q '^mh-hook reads CONFIG' "$LAB_DIR/lines" || fail "the calls of $command can't be read: $(cat "$LAB_DIR/lines")"
        while read -r line; do
            for pattern in "${allowed[@]}"; do
                # shellcheck disable=SC2053 # a pattern
                if [[ $line == $pattern ]]; then continue 2; fi
            done
            echo "$command: $line" >>"$LAB_DIR/found"
        done <"$LAB_DIR/lines"
    done
    [[ ! -s $LAB_DIR/found ]] || fail "not in tests/hostile/allowed:"$'\n'"$(sort -u "$LAB_DIR/found")"
}

# The tools' own words on it: each is one that notes what it was given, and is the real one then.
test_the_tools_can_do_no_more_than_routing_and_netfilter() {
    local bits=3000 name real command
    # capability.h: NET_ADMIN is bit 12, NET_RAW 13, SYS_MODULE 16.
    [[ $(/usr/sbin/iptables -V) != *legacy* ]] || bits=13000
    mkdir "$LAB_DIR/real" "$LAB_DIR/legacy" "$LAB_DIR/nft"
    for name in iptables-save iptables-restore ip; do
        real=$(readlink -f "/usr/sbin/$name")
        # iptables is one program that knows by its name what it is to do.
        cp "$real" "$LAB_DIR/real/$name"
        cat >"$LAB_DIR/noting" <<WRAPPER
#!/bin/bash
while read -r key value; do
    case \$key in CapInh:|CapPrm:|CapEff:|CapBnd:|CapAmb:|NoNewPrivs:) echo "$name \$key \$value" >>"$LAB_DIR/noted" ;; esac
done </proc/self/status
exec -a $name "$LAB_DIR/real/$name" "\$@"
WRAPPER
        chmod 0755 "$LAB_DIR/noting"
        case $name in
            iptables-*)
                # The way to it tells the backend.
                if ((bits == 3000)); then command=nft; else command=legacy; fi
                cp "$LAB_DIR/noting" "$LAB_DIR/$command/$name"
                ln -sfn "$LAB_DIR/$command/$name" "/etc/alternatives/$name"
                ;;
            *)
                cp "$LAB_DIR/noting" "$LAB_DIR/noting-$name"
                ;;
        esac
    done
    : >"$LAB_DIR/noted"
    for command in "${COMMANDS[@]}"; do
        # Without ip there is no ip netns exec.
        unshare --mount "$BASH" -c "
            mount --bind '$LAB_DIR/noting-ip' '$(readlink -f /usr/sbin/ip)'
            nsenter --net=/run/netns/router '$MH_HOOK' -q --config '$LAB_CONFIG' $command" >/dev/null 2>"$LAB_DIR/said" ||
            [[ $command == check ]] || fail "$command with noting tools: $(cat "$LAB_DIR/said")"
    done
    for name in iptables-save iptables-restore ip; do
        grep -q "^$name CapEff:" "$LAB_DIR/noted" || fail "$name did not note anything"
    done
    while read -r name key value; do
        case $key in
            NoNewPrivs:) ((value == 1)) || fail "$name could gain capabilities" ;;
            *)
                # Of a script in the place of iptables-save it is not known which backend it is until it is asked.
                value=$(printf '%x' $((0x$value & ~0x10000)))
                (((0x$value & ~0x$bits) == 0)) || fail "$name has more than it needs: $key $value, not within $bits"
                ;;
        esac
    done < <(sort -u "$LAB_DIR/noted")
}

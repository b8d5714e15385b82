# shellcheck shell=bash disable=SC2154 # ask_for sets status, said, took
# Tools that fail, are killed, lie or hang, at each call in turn: the exit status and the log are true, others' entries
# stay, and the next event converges.

FAKED=(/usr/sbin/{ip,nft,xtables-nft-multi,xtables-legacy-multi})

# fake_tools: from here on each call of a tool is counted, and misbehaves where fault says so. One shell script stands in
# for all of them, without a process of its own unless it misbehaves.
fake_tools() {
    local path real
    no_fault
    for path in "${FAKED[@]}"; do
        path=$(readlink -f "$path")
        real=${REAL:?}/${path##*/}
        # shellcheck disable=SC2016 # for the script
        if [[ -d $real ]]; then real+='/${0##*/}'; fi
        sed "s|@REAL@|$real|" >"/run/lab/fake.${path##*/}" <<'SCRIPT'
#!/bin/sh
PATH=/usr/bin:/bin
real="@REAL@"
call="${0##*/} $*"
case $call in
    # Started ahead of its turn, which has come once it has its input.
    'ip -4 -batch -' | 'ip -4 -force -batch -' | iptables-*restore*) cat >/run/lab/given.$$; exec </run/lab/given.$$ ;;
esac
read -r count </run/lab/count
count=$((count + 1))
echo $count >/run/lab/count
echo "$call" >>/run/lab/calls
read -r first last kind </run/lab/fault
if [ $count -lt $first ] || [ $count -gt $last ]; then exec "$real" "$@"; fi
case $kind in
    broken)
        # The call that was meant, and all like it.
        if [ $count = $first ]; then echo "$0 $1 $2" >/run/lab/broken; fi
        read -r like </run/lab/broken
        if [ "$like" != "$0 $1 $2" ]; then exec "$real" "$@"; fi
        echo 'a mishap' >&2
        exit 1
        ;;
    fail) echo 'a mishap' >&2; exit 1 ;;
    kill) kill -9 $$ ;;
    hang) exec sleep 1000 ;;
    leave) sleep 1000 & exec "$real" "$@" ;;
    nothing) ;;
    garbage) head -c 5000 "$real" ;;
    gibberish) printf '98:\tfrom\tproto 109\n7 default proto 109\n2: mtu\n*nat\n:mh-isp0 -\n-A mh-isp0 "\n-A PREROUTING -j mh-isp0\n' ;;
    flood) exec head -c 70000000 /dev/zero ;;
    half)
        "$real" "$@" >/run/lab/whole
        head -c $(($(stat -c %s /run/lab/whole) / 2)) /run/lab/whole
        ;;
    part)
        cat >/run/lab/input
        head -n $((($(wc -l </run/lab/input) + 1) / 2)) /run/lab/input | "$real" "$@"
        echo 'a mishap' >&2
        exit 1
        ;;
    done-fail) "$real" "$@"; echo 'a mishap' >&2; exit 1 ;;
    done-kill) "$real" "$@"; kill -9 $$ ;;
    slow)
        until [ -e /run/lab/go ]; do sleep 0.05; done
        "$real" "$@"
        echo yes >/run/lab/gone
        ;;
    memory)
        while read -r key value unit; do
            if [ "$key" = VmHWM: ]; then echo "$value" >>/run/lab/memory; fi
        done <"/proc/$PPID/status"
        exec "$real" "$@"
        ;;
esac
SCRIPT
        chmod 0755 "/run/lab/fake.${path##*/}"
        mount --bind "/run/lab/fake.${path##*/}" "$path"
    done
}

real_tools() {
    local path
    for path in "${FAKED[@]}"; do umount "$(readlink -f "$path")"; done
}

# fault FIRST LAST KIND: these calls misbehave, counted from here.
fault() {
    echo "$*" >/run/lab/fault
    echo 0 >/run/lab/count
    : >/run/lab/calls
}

no_fault() { fault 0 0 none; }

## What is asked, and from where

UP='up ppp0'
DOWN='down ppp0'
SYNC='sync'
EVENT_UP='event up ppp0 /dev/null 0 203.0.113.60 203.0.113.1'
EVENT_DOWN='event down ppp0 /dev/null 0 203.0.113.10 203.0.113.1'

# prepare REQUEST: everything stands as it did before what the request is about happened.
prepare() {
    no_fault
    LAB_CONFIG=/run/lab/before.toml
    link_up ppp0 203.0.113.10
    mh_hook -q sync
    # Begun before its forward, to a forward that goes, and to an address that goes.
    flow 192.0.2.60 203.0.113.10 27016 203.0.113.10 27016
    flow 192.0.2.61 203.0.113.10 27017 192.168.0.2 27017
    case $1 in
        "$UP" | "$SYNC") LAB_CONFIG=/run/lab/after.toml ;;
        "$EVENT_UP") link_up ppp0 203.0.113.60 ;;
        "$EVENT_DOWN") ip link set ppp0 down ;;
    esac
    no_fault
}

# kinds CALL: how this call of a tool can go wrong.
kinds() {
    case $1 in
        *' -N -batch '* | *-save* | *' -L '* | *list*) echo fail kill garbage gibberish half nothing flood ;;
        *) echo fail kill nothing flood part done-fail done-kill ;;
    esac
}

# each_fault REQUEST change|still: every call of it, and every way for that to go wrong.
each_fault() {
    local request=$1 before wanted calls=() number kind
    prepare "$request"
    before=$(dump)
    ask_for "$request"
    ((status == 0)) || fail "$request without a fault: exit status $status: $said"
    wanted=$(dump)
    [[ $before != "$wanted" ]] || fail "$request changes nothing"
    expect_foreign "$before" "$wanted" || fail "$request changed others' entries"
    if [[ $2 == still ]]; then
        no_fault
        ask_for "$request"
        before=$(dump)
        expect_equal "$request once more" "$wanted" "$before"
    fi
    mapfile -t calls </run/lab/calls
    for number in "${!calls[@]}"; do
        for kind in $(kinds "${calls[number]}"); do
            one_fault "$request" "$2" "$((number + 1))" "$((number + 1))" "$kind" "${calls[number]}"
        done
        one_fault "$request" "$2" "$((number + 1))" 999 broken "${calls[number]}"
    done
    echo "figure: $request, $2: ${#calls[@]} calls, $cases cases so far"
}

# one_fault REQUEST change|still FIRST LAST KIND CALL
one_fault() {
    local what="$1 ($2), $5 of call $3 to $4 ($6)" after
    prepare "$1"
    # shellcheck disable=SC2086 # words
    if [[ $2 == still ]]; then mh_hook -q $1; fi
    fault "$3" "$4" "$5"
    ask_for "$1"
    no_fault
    cases=$((cases + 1))
    after=$(dump)
    expect_foreign "$before" "$after" || problem "$what: others' entries changed"
    case $status in
        0) is_plausible "$5" "$6" || [[ $after == "$wanted" ]] || problem "$what: said to be done, but$(differs "$after")" ;;
        1) expect_told "$what" "$5" "$6" ;;
        *) problem "$what: exit status $status: $said" ;;
    esac
    ((took < PROMPT * 1000000)) || problem "$what took $took µs: $said"
    ask_for "$1"
    ((status == 0)) || problem "$what, the next event: exit status $status: $said"
    after=$(dump | without_stale)
    [[ $after == "$(without_stale <<<"$wanted")" ]] || problem "$what, the next event:$(differs "$after")"
}

# is_plausible KIND CALL: a falsehood that could be the truth. No rules at all is a whole answer of iptables-save, and silence
# is all that a change says.
is_plausible() {
    [[ $1 == nothing && $2 != *' -N '* ]]
}

# Connections that contradict what stands are known by what stood before: the next event does not see it.
without_stale() { grep -v 'dst=192.0.2.6[01] ' || true; }

# problem WORDS…: noted for the end of the test, which goes on.
problem() { echo "$*" >>/run/lab/problems; }

differs() {
    echo
    diff <(echo "$wanted") <(echo "$1") | grep '^[<>]' || true
}

no_problems() {
    [[ ! -s /run/lab/problems ]] || { cat /run/lab/problems; return 1; }
}

# expect_told WHAT KIND CALL: the message names the link, the command, how it ended, and its words.
expect_told() {
    local tool=${3%% *} words
    case $2 in
        fail | broken | part | done-fail) words='exit status 1.*a mishap' ;;
        kill | done-kill) words='killed by signal 9' ;;
        flood) words='printed more than' ;;
        hang | leave) words='did not end in its time' ;;
        *) words= ;;
    esac
    [[ $said =~ (ppp0|isp0|sync).*$tool.*$words ]] || problem "$1: its words tell neither link, tool nor ending: $said"
}

tools_setup() {
    configure 11 192.168.0.3
    mv "$LAB_CONFIG" /run/lab/after.toml
    configure 10 192.168.0.2
    mv "$LAB_CONFIG" /run/lab/before.toml
    foreign
    cases=0
    fake_tools
}

test_faults_of_an_up() { tools_setup; each_fault "$UP" change; each_fault "$UP" still; no_problems; }
test_faults_of_a_down() { tools_setup; each_fault "$DOWN" change; each_fault "$DOWN" still; no_problems; }
test_faults_of_a_sync() { tools_setup; each_fault "$SYNC" change; each_fault "$SYNC" still; no_problems; }
test_faults_of_an_event_up() { tools_setup; each_fault "$EVENT_UP" change; each_fault "$EVENT_UP" still; no_problems; }
test_faults_of_an_event_down() { tools_setup; each_fault "$EVENT_DOWN" change; each_fault "$EVENT_DOWN" still; no_problems; }

## Those who only look

# Whatever the tools do, nothing changes, nobody dies, and a tool that fails is named.
test_faults_of_those_who_look() {
    local look call number kind before calls=()
    tools_setup
    prepare "$UP"
    ask_for "$UP"
    before=$(dump)
    for look in status 'status --json' check 'explain 192.0.2.9 tcp/80' 'explain 192.0.2.9 tcp/80 --json'; do
        no_fault
        ask_for "$look"
        mapfile -t calls </run/lab/calls
        for number in "${!calls[@]}"; do
            call=${calls[number]}
            for kind in fail kill garbage gibberish half nothing flood; do
                fault "$((number + 1))" "$((number + 1))" "$kind"
                ask_for "$look"
                no_fault
                cases=$((cases + 1))
                ((status <= 2)) || problem "$look, $kind of $call: exit status $status: $said"
                ((took < PROMPT * 1000000)) || problem "$look, $kind of $call took $took µs"
                case $kind-$call in
                    # What is not installed, or does not work here, is none of theirs; of a version nothing follows.
                    *-'nft -j list ruleset' | *' -V') ;;
                    # The kernel's refusal is an answer.
                    fail-*'route get'*) ((status == 1)) || problem "$look, $kind of $call: exit status $status: $said" ;;
                    fail-* | kill-*)
                        if ((status == 0)) || [[ ! $said =~ ${call%% *}.*('exit status 1'.*'a mishap'|'killed by signal 9') ]]; then
                            problem "$look, $kind of $call: exit status $status: $said"
                        fi
                        ;;
                esac
            done
        done
        echo "figure: $look: ${#calls[@]} calls, $cases cases so far"
    done
    expect_equal "all this looking" "$before" "$(dump)"
    no_problems
}

## A tool that does not end

# hangs FIRST LAST hang|leave: with `up`, these of its calls. They are stopped after 10 s each, with all that they started,
# and the whole call ends within its 30 s.
hangs() {
    local wanted before calls
    tools_setup
    prepare "$UP"
    before=$(dump)
    ask_for "$UP"
    wanted=$(dump)
    mapfile -t calls </run/lab/calls
    expect_equal "how many calls it takes" 3 "${#calls[@]}"
    PROMPT=30
    one_fault "$UP" change "$1" "$2" "$3" "${calls[$1 - 1]}"
    # Killed is not yet gone.
    lab_wait nothing_hangs
    no_problems
}

nothing_hangs() { pgrep -x sleep >/dev/null || echo yes; }

test_iptables_save_hangs() { hangs 1 1 hang; }
test_ip_batch_hangs() { hangs 2 2 hang; }
test_iptables_restore_hangs() { hangs 3 3 hang; }
test_iptables_save_leaves_a_child_with_its_output() { hangs 1 1 leave; }

test_all_hangs_behind_a_lock_that_another_held_for_15_s() {
    local since
    tools_setup
    prepare "$UP"
    hold /run/mh-hook.lock 15
    fault 2 999 hang
    ask_for "$UP"
    no_fault
    ((status == 1 && took < 30000000)) || fail "exit status $status after $took µs: $said"
    # It has waited for the lock, and then for what hangs.
    since=$(since_release)
    ((since < took && since > 9000000)) || fail "it ended $since µs after the lock was free, and took $took µs"
    expect_told "all hangs" hang 'ip -batch'
    ask_for "$UP"
    ((status == 0)) || fail "the next event: $said"
    expect_equal "the next plan" "# nothing to change" "$(mh_hook --dry-run up ppp0)"
    no_problems
}

# look_hangs CALL TOOL: with `status`, this one of its calls.
look_hangs() {
    tools_setup
    prepare "$UP"
    fault "$1" "$1" hang
    ask_for status
    no_fault
    # One that hangs is waited for, and no second one.
    ((status == 1 && took < 20000000)) || fail "exit status $status after $took µs: $said"
    [[ $said == *"$2"*'did not end in its time'* ]] || fail "$said"
}

test_the_listing_of_those_who_look_hangs() { look_hangs 1 'iptables-save -c'; }

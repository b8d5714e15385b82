# shellcheck shell=bash disable=SC2154 # ask_for sets status, said, took
# kill -9 of mh-hook, of the tool that it waits for, and of both, at any moment of its work with 1,000 forwards.

# How many of each test's calls are killed before their end.
KILLS=${KILLS:-200}

# kills_setup: two configurations, and what stands with each and without: whole, and table by table.
kills_setup() {
    local name
    mkdir /run/lab/tables
    foreign
    configure 10 192.168.0.2 1000
    mv "$LAB_CONFIG" /run/lab/one.toml
    configure 11 192.168.0.3 1000
    mv "$LAB_CONFIG" /run/lab/two.toml
    declare -gA whole sums
    sums[none]=$(table_sums)
    for name in none one two; do
        LAB_CONFIG=/run/lab/${name/none/one}.toml
        if [[ $name == none ]]; then mh_hook -q down ppp0; mh_hook -q down ppp1; else mh_hook -q sync; fi
        sums[$name]=$(table_sums)
        whole[$name]=$(dump)
    done
    expect_equal "DNAT rules" 1004 "$(iptables-save -t nat | grep -c -- '-j DNAT')"
    mh_hook -q down ppp0
    whole[half]=$(dump)
    sums[half]=$(table_sums)
}

# table_sums: mangle, nat and filter as they stand, a checksum each.
table_sums() {
    local table
    # One without rules is not printed.
    for table in mangle nat filter; do : >"/run/lab/tables/$table"; done
    iptables-save | netfilter | awk '{ print >"/run/lab/tables/" $1 }'
    sha1sum /run/lab/tables/{mangle,nat,filter}
}

# whole_tables OLD NEW: each table is as in the one state or as in the other.
whole_tables() {
    local -a found old new
    local i
    mapfile -t found < <(table_sums)
    mapfile -t old <<<"${sums[$1]}"
    mapfile -t new <<<"${sums[$2]}"
    for i in 0 1 2; do
        [[ ${found[i]} == "${old[i]}" || ${found[i]} == "${new[i]}" ]] ||
            fail "a table is neither old ($1) nor new ($2): ${found[i]##*/}, $(iptables-save -t nat | grep -c -- '-j DNAT') DNAT"
    done
}

# has_ended PID: what has ended is a zombie until it is waited for, which kill -0 takes for alive.
has_ended() {
    local stat
    ! { read -r stat <"/proc/$1/stat"; } 2>/dev/null || [[ $stat == *') Z '* ]]
}

# writing PID: once it changes the tables of iptables, or has ended.
writing() {
    local child comm
    until has_ended "$1"; do
        child=
        { read -r child _ <"/proc/$1/task/$1/children"; } 2>/dev/null || true
        if { read -r comm <"/proc/$child/comm"; } 2>/dev/null && [[ $comm == iptables-restor* ]]; then break; fi
    done
}

# strike PID self|tool|both: kill -9; fails when there is nobody to be killed any more.
strike() {
    local children=
    { read -r children <"/proc/$1/task/$1/children"; } 2>/dev/null || true
    # shellcheck disable=SC2086 # a list
    case $2 in
        self) kill -9 "$1" ;;
        tool)
            until [[ $children ]] || has_ended "$1"; do
                { read -r children <"/proc/$1/task/$1/children"; } || true
            done
            kill -9 $children
            ;;
        both) kill -9 $children "$1" ;;
    esac 2>/dev/null
}

test_kill_9_at_any_moment() {
    kills_setup
    local -a steps=('one up ppp0' 'two up ppp0' 'none down ppp0' 'two sync' 'one event up ppp0' 'none down ppp0' 'one sync' 'two sync')
    local -A killed=([self]=0 [tool]=0 [both]=0)
    local from=half new request i=0 count=0 victim call status slowest=0 reach=40000
    local -a victims=(self tool both)
    while ((count < KILLS)); do
        ((i < KILLS * 4)) || fail "only $count of $i calls were caught at work"
        read -r new request <<<"${steps[i % ${#steps[@]}]}"
        victim=${victims[RANDOM % 3]}
        i=$((i + 1))
        LAB_CONFIG=/run/lab/${new/none/one}.toml
        new=${new/none/half}
        # shellcheck disable=SC2086 # words
        mh_hook_alone -q $request 2>/run/lab/said &
        call=$!
        if ((i % 2)); then
            # Microseconds. Five of six are caught at work, wherever in it, however quick this machine is just now.
            pause "$((SRANDOM % reach))"
        else
            writing "$call"
            pause "$((SRANDOM % 20000))"
        fi
        if strike "$call" "$victim"; then
            count=$((count + 1))
            if ((i % 2)); then reach=$((reach * 21 / 20)); fi
            killed[$victim]=$((killed[$victim] + 1))
        else
            if ((i % 2)); then reach=$((reach * 3 / 4 + 1000)); fi
        fi
        status=0
        wait "$call" 2>/dev/null || status=$?
        if ((status == 0)); then
            # It went on without its tool.
            expect_equal "$request, its $victim killed, said to be done" "${whole[$new]}" "$(dump)"
        elif ((SRANDOM % 2)); then
            whole_tables "$from" "$new" || fail "$request, $victim killed: $(cat /run/lab/said)"
        fi
        # Half of the time at once: the tool may be at work still, and holds the lock.
        status=0
        # shellcheck disable=SC2086 # words
        ask_for "-q $request"
        ((status == 0 && took < PROMPT * 1000000)) || fail "the next $request: exit status $status after $took µs: $said"
        slowest=$((took > slowest ? took : slowest))
        expect_equal "$request after its $victim was killed" "${whole[$new]}" "$(dump)"
        from=$new
    done
    flock --nonblock /run/mh-hook.lock true || fail "the lock is still held"
    echo "figure: $i calls, killed: ${killed[self]} mh-hook, ${killed[tool]} tools, ${killed[both]} both; the next took $slowest µs at most; the last delays were of 0 to $reach µs"
}

# mh_hook_alone ARGUMENT…: for a job of its own, whose process id is mh-hook's.
mh_hook_alone() { exec "$MH_HOOK" --config "$LAB_CONFIG" "$@"; }

# What a tool that outlives mh-hook still does is waited for: the lock is the tool's, too.
test_the_next_call_waits_for_the_tool_of_one_that_was_killed() {
    local call next number
    kills_setup
    fake_tools
    for number in 2 3; do
        LAB_CONFIG=/run/lab/one.toml
        mh_hook -q down ppp0
        fault "$number" "$number" slow
        mh_hook_alone -q up ppp0 &
        call=$!
        lab_wait the_call "$number"
        kill -9 "$call"
        wait "$call" 2>/dev/null || true
        no_fault
        mh_hook_alone -q up ppp0 &
        next=$!
        # Much longer than it takes where nothing is in its way.
        pause 2000000
        kill -0 "$next" 2>/dev/null || fail "it did not wait for call $number"
        touch /run/lab/go
        wait "$next"
        lab_wait cat_if /run/lab/gone
        rm /run/lab/go /run/lab/gone
        expect_equal "after call $number of the killed one" "${whole[one]}" "$(dump)"
    done
}

cat_if() { [[ ! -e $1 ]] || cat "$1"; }

# the_call NUMBER: printed once it has begun.
the_call() { sed -n "$1p" /run/lab/calls; }

# shellcheck shell=bash
# What README shows of status, check and explain is what they print, on a router that works and on one where a foreign rule drops.

# as_printed COMMAND…: the command and its output in 80 columns, ages aside.
as_printed() {
    echo "\$ mh-hook $*"
    COLUMNS=80 mh_hook "$@" | sed -E 's/ [0-9]+ s  / 7 s  /'
}

test_readme_shows_what_is_printed() {
    local readme shown
    [[ $(/usr/sbin/iptables -V) == *nf_tables* ]] || return 0
    lab_etc
    configure "$FORWARD_80"
    mh_hook -q sync
    expect_forward_answered
    on_router conntrack -D -d "$X" >/dev/null 2>&1
    {
        as_printed status
        as_printed check
        as_printed explain 192.0.2.9
        on_router /usr/sbin/iptables -A FORWARD -i ppp0 -j DROP
        on_router ip rule del priority 100
        as_printed status || true
        as_printed check || true
        as_printed explain 192.0.2.9 || true
    } >"$LAB_DIR/printed"
    for readme in README.md README.ja.md; do
        # Between the first command and the end of its block, and the second block likewise.
        shown=$(sed -n '/^\$ mh-hook status$/,/^```$/p' "$LAB_REPOSITORY/$readme" | grep -v '^```$')
        expect_equal "$readme" "$(cat "$LAB_DIR/printed")" "$shown"
    done
    expect_equal "lines of more than 80 columns" "" "$(grep -E '^.{81}' "$LAB_DIR/printed" || true)"
}

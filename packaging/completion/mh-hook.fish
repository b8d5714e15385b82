# Completion of mh-hook for fish.

function __mh_hook_interfaces
    command ls /sys/class/net
end

function __mh_hook_uplinks
    set -l config /etc/mh-hook.toml
    set -l words (commandline -opc)
    if set -l at (contains -i -- --config $words); and test $at -lt (count $words)
        set config $words[(math $at + 1)]
    end
    string match -rg '^\s*\[uplink\.([a-z0-9_-]+)\]' <$config 2>/dev/null
end

function __mh_hook_addresses
    ip -4 -oneline address show scope global 2>/dev/null | string match -rg ' inet ([0-9.]+)'
end

# Whether the words so far, without options and their values, are one of the arguments.
function __mh_hook_after
    set -l words
    set -l skip 0
    for word in (commandline -opc)[2..]
        if test $skip = 1
            set skip 0
        else if contains -- $word --config --local --uplink --to --from-lan
            set skip 1
        else if not string match -q -- '-*' $word
            set -a words $word
        end
    end
    contains -- "$words" $argv
end

complete -c mh-hook -f
complete -c mh-hook -n '__mh_hook_after ""' -a up -d "bring the interface's uplink to its desired state"
complete -c mh-hook -n '__mh_hook_after ""' -a down -d "remove that uplink's entries, and nothing else"
complete -c mh-hook -n '__mh_hook_after ""' -a sync -d "bring every uplink to what its link's state asks for"
complete -c mh-hook -n '__mh_hook_after ""' -a event -d "what pppd's hooks call"
complete -c mh-hook -n '__mh_hook_after ""' -a status -d 'each uplink, what stands, what it has seen'
complete -c mh-hook -n '__mh_hook_after ""' -a check -d 'what would keep this from working, and what mends it'
complete -c mh-hook -n '__mh_hook_after ""' -a explain -d 'where a request goes, and its reply'
complete -c mh-hook -n '__mh_hook_after ""' -a help -d 'the help of a command'
complete -c mh-hook -n '__mh_hook_after status' -a '(__mh_hook_uplinks)'
complete -c mh-hook -n '__mh_hook_after event' -a 'pre-up up down'
complete -c mh-hook -n '__mh_hook_after up down "event pre-up" "event up" "event down"' -a '(__mh_hook_interfaces)'
complete -c mh-hook -l config -r -F -d 'the configuration'
complete -c mh-hook -l dry-run -d 'print the plan as commands, change nothing'
complete -c mh-hook -l local -x -a '(__mh_hook_addresses)' -d "the link's address, with up"
complete -c mh-hook -l uplink -x -a '(__mh_hook_uplinks)' -d 'whose link it is, with up'
complete -c mh-hook -l prometheus -d 'print metrics for Prometheus, with status'
complete -c mh-hook -l strict -d 'exit status 1 for a warning, too, with check'
complete -c mh-hook -l json -d 'print JSON, with status, check and explain'
complete -c mh-hook -l to -x -a '(__mh_hook_uplinks)' -d 'the uplink or address that is asked, with explain'
complete -c mh-hook -l from-lan -x -d "the LAN host whose own connection is meant, with explain"
complete -c mh-hook -s v -l verbose -d 'also log what was already there'
complete -c mh-hook -s q -l quiet -d 'log errors only'
complete -c mh-hook -s h -l help -d 'print the help'
complete -c mh-hook -s V -l version -d 'print the version'

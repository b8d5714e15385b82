# shellcheck shell=bash
# What the entries cost a packet. Sourced by tests/bench.

# bench_packets BACKEND FORWARDS…
bench_packets() {
    :
}

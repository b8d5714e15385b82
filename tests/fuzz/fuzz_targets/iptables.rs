#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mh_hook_fuzz::iptables(data));

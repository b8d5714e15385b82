#![no_main]

use mh_hook_fuzz::{event, Call, VARIABLES};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let call = Call::parse(data);
    for name in VARIABLES {
        match call.variables.iter().find(|(known, _)| *known == name) {
            Some((_, value)) => std::env::set_var(name, value),
            None => std::env::remove_var(name),
        }
    }
    event(&call);
});

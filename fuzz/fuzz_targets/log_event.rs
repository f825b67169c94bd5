//! Reading an event from a logical message of the write-ahead log never panics.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let _outcome = event::log_event::decode(body, 733, 1_700_000_000_000_000);
});

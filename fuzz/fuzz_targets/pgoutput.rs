//! Decoding a message of pgoutput never panics, inside a streamed transaction or outside.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    for streamed in [false, true] {
        let _outcome = wal::pgoutput::decode(message, streamed);
    }
});

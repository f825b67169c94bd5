//! Whatever bytes arrive on the stream, decoding neither panics nor accepts what it could not have written.
#![no_main]

use event::Envelope;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    if let Ok(envelope) = Envelope::decode(body) {
        assert_eq!(Envelope::decode(&envelope.encode()).expect("own encoding decodes"), envelope);
    }
});

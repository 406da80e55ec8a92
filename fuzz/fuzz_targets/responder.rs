//! Packets of a peer that means harm: no byte lands outside of the region that it may use, and other queue pairs go on.
#![no_main]

use anypage_fuzz::victim::Victim;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut victim = Victim::new();
    victim.feed(bytes);
    victim.check_rest();
    victim.check_others_go_on();
});

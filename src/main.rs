//! anypage.
fn main() {}

//! Bytes of this process at an address, reached through the kernel: whatever the mapping allows, and without a reference.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

fn memory() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/proc/self/mem")
}

pub fn read(at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    memory()?.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

pub fn write(at: u64, bytes: &[u8]) -> io::Result<()> {
    memory()?.write_all_at(bytes, at)
}

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|index| (index as u8).wrapping_mul(7).wrapping_add((index >> 8) as u8) ^ seed | 1).collect()
}

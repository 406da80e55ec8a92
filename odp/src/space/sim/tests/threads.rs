//! The same host under real threads: programs, changes and a device that moves bytes in bursts.

use super::device::Device;
use super::*;
use crate::space::{Access, AddressSpace};
use hw_model::bus::HostMemory;
use hw_model::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use hw_model::sync::thread;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const PAGES: u64 = 64;
const WRITES: u64 = 4000;

/// Each page holds the same word all over, and its number in the low bits; whoever writes it writes all of it, by CPU. If
/// this fails, a device saw a page that was gone or half copied, or the protocol let a frame go under a burst.
#[test]
fn bursts_never_meet_a_page_that_is_gone() {
    let machine = machine(small(11, FaultMode::Wait));
    let space = machine.host.new_space();
    let shmem = machine.host.new_shmem(PAGES / 2);
    let own = space.map(MapRequest::anonymous(PAGES / 2)).expect("room");
    let source = Source::Shared { object: shmem, first: 0 };
    let shared = space.map(MapRequest::anonymous(PAGES / 2).of(source)).expect("room");
    let page = |n: u64| if n < PAGES / 2 { page_at(own, n) } else { page_at(shared, n - PAGES / 2) };
    let device = Device::new(&space);
    let (written, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (bursts, changed) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let engine = scope.spawn(|| {
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let mut slot = machine.host.epoch().register().expect("a slot");
            while !stop.load(Ordering::Acquire) || bursts.load(Ordering::Relaxed) < 1000 {
                let n = rng.random_range(0..PAGES);
                // The fault is outside the burst, as a real engine's is.
                if device.entry(&space, page(n).page_number(), Access::Read).is_err() {
                    thread::yield_now();
                    continue;
                }
                let burst = slot.enter().expect("never closed here");
                let entry = device.list.entries.lock().get(&page(n).page_number()).copied();
                if let Some(entry) = entry {
                    let mut word = [0; 8];
                    for offset in (0..PAGE_SIZE).step_by(512) {
                        machine.host.read(entry.phys.offset(offset), &mut word).expect("not under a burst");
                        let word = u64::from_le_bytes(word);
                        assert!(word == 0 || word % PAGES == n, "page {n} holds {word:#x}, of another page");
                    }
                    bursts.fetch_add(1, Ordering::Relaxed);
                }
                drop(burst);
            }
        });
        scope.spawn(|| {
            let mut rng = ChaCha8Rng::seed_from_u64(2);
            for count in 1..=WRITES {
                let n = rng.random_range(0..PAGES);
                let word = (count * PAGES + n).to_le_bytes();
                space.cpu_write(page(n), &word.repeat(PAGE_SIZE as usize / 8)).expect("mapped");
            }
            written.store(true, Ordering::Release);
        });
        let changer = scope.spawn(|| {
            let mut rng = ChaCha8Rng::seed_from_u64(3);
            while !written.load(Ordering::Acquire) {
                let range = part(if rng.random() { own } else { shared }, rng.random_range(0..28), 4);
                let change = match rng.random_range(0..7) {
                    0 => SpaceChange::Migrate(range),
                    1 => SpaceChange::SwapOut(range),
                    2 => SpaceChange::Discard(range),
                    3 => SpaceChange::Remove(range),
                    4 => SpaceChange::ToDevice { range, memory: machine.private },
                    5 => SpaceChange::ToDevice { range, memory: machine.coherent },
                    _ => SpaceChange::FromDevice(range),
                };
                if space.change(change).is_ok() {
                    changed.fetch_add(1, Ordering::Relaxed);
                }
                if rng.random_range(0..16) == 0 {
                    let child = space.fork().expect("memory");
                    child.cpu_write(page(0), &[0; 8]).expect("mapped");
                }
            }
        });
        changer.join().expect("changes");
        stop.store(true, Ordering::Release);
        engine.join().expect("bursts");
    });
    drop(device);
    machine.host.check().expect("the host agrees with itself");
    let stats = space.notifiers().stats();
    assert!(changed.load(Ordering::Relaxed) > 0 && stats.drains > 0 && stats.running == 0, "{stats:?}");
    assert_eq!((machine.host.stats().processes, machine.host.stats().parked), (1, 0));
}

//! The registration cache on the exact rung: memory that the program itself maps and unmaps, at addresses that come again.
//!
//! The filter must be there before the first other thread, so this is a process of its own; where the kernel or a container
//! refuses it, every test is a skip that is counted.

use anypage::machine::{End, Machine, MachineConfig};
use anypage::mixed::{Kind, MixedMemory};
use hw_model::addr::PAGE_SIZE;
use hw_model::hca::{Access, Key, Remote, SendRequest, Sge, Status};
use hw_model::sync::Arc;
use hw_model::sync::Mutex;
use hw_model::sync::atomic::{AtomicU64, Ordering};
use libtest_mimic::{Arguments, Failed, Trial};
use mr::{Cache, CacheConfig, RegisterOptions};
use odp::space::process::{Exact, Options, OwnedMemory, ProcessSpace};
use odp::space::{AddressSpace, Rung};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

const PAGES: u64 = 16;
const ROUNDS: u64 = 60;
const PATIENCE: Duration = Duration::from_secs(30);

fn rights() -> Access {
    Access::LOCAL_WRITE | Access::REMOTE_WRITE | Access::REMOTE_READ
}

/// A peer that writes eight bytes and reads eight bytes, and a cache beside the queue pair that it talks to.
struct Bed {
    space: Arc<ProcessSpace>,
    mirror: Arc<OwnedMemory>,
    near: End,
    far: End,
    machine: Machine,
}

impl Bed {
    fn new(exact: Exact) -> Result<(Self, Cache), Failed> {
        let space = ProcessSpace::open(Options { exact: Some(exact), ..Options::default() })?;
        let machine = Machine::new(space.memory(), None, &MachineConfig::default())?;
        let mirror = Arc::new(OwnedMemory::new(&space, PAGE_SIZE)?);
        let near = End::new(&machine.near, &mirror.user_range(), RegisterOptions::on_demand())?;
        let far = End::new(&machine.far, &mirror.user_range(), RegisterOptions::on_demand())?;
        near.connect(&far)?;
        let cache = Cache::new(Arc::clone(&near.pd), Arc::clone(&space) as _, CacheConfig::default());
        Ok((Self { space, mirror, near, far, machine }, cache))
    }

    fn reconnect(&mut self) -> Result<(), Failed> {
        use mr::Device;
        for (end, device) in [(&mut self.near, &self.machine.near), (&mut self.far, &self.machine.far)] {
            end.cq = Arc::clone(device).create_cq(16)?;
            end.qp = Arc::clone(&end.pd).create_qp(Arc::clone(&end.cq), 16)?;
        }
        Ok(self.near.connect(&self.far)?)
    }

    fn ends(&self, request: &SendRequest<'_>) -> Result<Status, Failed> {
        self.far.qp.post_send(request)?;
        let mut completions = Vec::new();
        while self.far.cq.poll(&mut completions, 1)? == 0 {
            if !self.far.cq.wait(PATIENCE) {
                return Err("a posted request never ended".into());
            }
        }
        Ok(completions[0].status)
    }

    /// The peer writes `word` to the remote place.
    fn write(&self, word: u64, remote: Remote) -> Result<Status, Failed> {
        self.mirror.write_at(0, &word.to_le_bytes())?;
        let region = &self.far.region;
        self.ends(&SendRequest::write(
            1,
            &[Sge { key: region.key(), address: region.address(), length: 8 }],
            remote,
        ))
    }

    /// What the peer reads there.
    fn read(&self, remote: Remote) -> Result<u64, Failed> {
        let region = &self.far.region;
        let address = region.address().offset(64);
        let status =
            self.ends(&SendRequest::read(2, &[Sge { key: region.key(), address, length: 8 }], remote))?;
        if status != Status::Success {
            return Err(format!("the read ended with {status:?}").into());
        }
        let mut bytes = [0; 8];
        self.mirror.read_at(64, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn anonymous() -> Result<Arc<MixedMemory>, Failed> {
    Ok(Arc::new(MixedMemory::new(&[(Kind::Anonymous, PAGES * PAGE_SIZE)])?))
}

/// Unmapped by its owner alone: the key from the cache reaches neither what was there nor what comes to the same place.
fn an_old_key_reaches_nothing_new(exact: Exact) -> Result<(), Failed> {
    let (mut bed, cache) = Bed::new(exact)?;
    let mut met_again = 0;
    for round in 0..ROUNDS {
        let memory = anonymous()?;
        let range = memory.user_range(Arc::clone(&bed.space) as _);
        assert_eq!(range.space().rung(range.range()), Rung::Exact);
        let lease = cache.get(&range, rights())?;
        let remote = Remote { key: lease.key(), address: lease.address() };
        assert_eq!(bed.write(round, remote)?, Status::Success);
        let place = range.range();
        // Every other time the lease goes first, so that the region is sealed idle, and in use.
        let kept = (round % 2 == 0).then_some(lease);
        drop((range, memory));
        let other = anonymous()?;
        met_again += u64::from(other.range().overlaps(place));
        assert_eq!(bed.write(round, remote)?, Status::RemoteAccessError, "an old key reached new memory");
        bed.reconnect()?;
        let range = other.user_range(Arc::clone(&bed.space) as _);
        let anew = cache.get(&range, rights())?;
        assert_ne!(anew.key(), remote.key, "a stale hit");
        assert_eq!(
            bed.read(Remote { key: anew.key(), address: anew.address() })?,
            0,
            "new memory has old bytes"
        );
        drop(kept);
    }
    println!("the same addresses came again {met_again} of {ROUNDS} times");
    Ok(())
}

fn racing_threads_never_find_a_key_of_memory_that_is_gone(exact: Exact) -> Result<(), Failed> {
    let (bed, cache) = Bed::new(exact)?;
    let (bed, lives) = (Mutex::new(bed), AtomicU64::new(1));
    let life_of = Mutex::new(BTreeMap::<Key, u64>::new());
    let race = || -> Result<(), Failed> {
        let space = Arc::clone(&bed.lock().space);
        for _ in 0..ROUNDS {
            let memory = anonymous()?;
            let life = lives.fetch_add(1, Ordering::Relaxed);
            let range = memory.user_range(Arc::clone(&space) as _);
            for turn in 0..3 {
                let lease = cache.get_part(&range, turn * 5000, 4096, rights())?;
                let again = cache.get_part(&range, turn * 5000 + 7, 100, rights())?;
                for lease in [&lease, &again] {
                    let known = *life_of.lock().entry(lease.key()).or_insert(life);
                    assert_eq!(known, life, "a stale hit: {lease:?} was made for memory that is gone");
                }
                let bed = bed.lock();
                let remote = Remote { key: lease.key(), address: lease.address() };
                assert_eq!(bed.write(life, remote)?, Status::Success);
                assert_eq!(bed.read(remote)?, life);
                drop(bed);
                if turn == 1 {
                    memory.discard(0, 4)?;
                }
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(race)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    println!("{:?}", cache.stats());
    Ok(())
}

type Check = fn(Exact) -> Result<(), Failed>;

const TESTS: [(&str, Check); 2] = [
    ("an_old_key_reaches_nothing_new", an_old_key_reaches_nothing_new),
    (
        "racing_threads_never_find_a_key_of_memory_that_is_gone",
        racing_threads_never_find_a_key_of_memory_that_is_gone,
    ),
];

fn main() -> ExitCode {
    // Before any other thread: those that exist already would not be filtered.
    let installed = Exact::install();
    let mut trials = Vec::new();
    for (name, check) in TESTS {
        match installed {
            Ok(exact) => trials.push(Trial::test(name, move || check(exact))),
            Err(ref error) => println!("SKIPPED {name}: {error}"),
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

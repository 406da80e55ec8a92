//! Many queue pairs: what each costs, and that each has its turn.

use crate::burst::bytes_in_use;
use crate::world::{Pair, Region, config, connect};
use hw_model::hca::{FaultOutcome, HcaConfig, QueuePair, SendRequest, Status};
use hw_model::sync::Arc;

/// Two hosts with so many queue pairs between them, beside the one that each has already.
struct Crowd {
    pair: Pair,
    near: Vec<Arc<QueuePair>>,
    _far: Vec<Arc<QueuePair>>,
    local: Region,
    remote: Region,
}

impl Crowd {
    fn new(count: usize, config: HcaConfig) -> Self {
        let pair = Pair::new(config);
        let (local, remote) = (pair.a.region(1 << 20), pair.b.region(1 << 20));
        let mut crowd = Self { pair, near: Vec::new(), _far: Vec::new(), local, remote };
        crowd.grow(count);
        crowd
    }

    fn grow(&mut self, count: usize) {
        for _ in 0..count {
            let (near, far) = (self.pair.a.qp(), self.pair.b.qp());
            connect(&near, &far);
            self.near.push(near);
            self._far.push(far);
        }
    }

    /// A write of queue pair `index`; its completion carries that number.
    fn post(&self, index: usize, length: u32) {
        let sges = [self.local.sge(0, length)];
        let request = SendRequest::write(index as u64, &sges, self.remote.remote(0));
        self.near[index].post_send(&request).expect("the queue has room");
    }

    /// Steps both hosts until `wanted` says that it has seen enough of the completions, which are counted by queue pair.
    fn run_until(&mut self, wanted: impl Fn(&[usize]) -> bool) -> Vec<usize> {
        let mut ended = vec![0; self.near.len()];
        for _ in 0..1_000_000 {
            if let Some(Some(wake)) = self.pair.step() {
                self.pair.now = wake.max(self.pair.now);
            }
            for completion in self.pair.a.take() {
                assert_eq!(completion.status, Status::Success);
                ended[completion.id.0 as usize] += 1;
            }
            if wanted(&ended) {
                return ended;
            }
        }
        panic!("what was waited for never ends: {ended:?}");
    }
}

/// Issue 6: under 2 KiB a queue pair, plus its rings, which grow to what was under way at a time.
#[test]
fn a_queue_pair_takes_less_than_2_kib_and_its_rings_what_was_under_way() {
    const MANY: usize = 4096;
    let mut crowd = Crowd::new(MANY, config());
    let before = bytes_in_use();
    // Twice as many: tables that double have doubled.
    crowd.grow(MANY);
    let each = (bytes_in_use() - before) / (2 * MANY as i64);
    println!("a connected queue pair: {each} bytes");
    assert!(each < 2048, "a connected queue pair takes {each} bytes");

    let before = bytes_in_use();
    for index in 0..2 * MANY {
        crowd.post(index, 64);
        crowd.run_until(|ended| ended[index] == 1);
    }
    // One end asks, the other answers and keeps nothing.
    let rings = (bytes_in_use() - before) / (2 * MANY as i64);
    println!("its rings after one request at a time: {rings} bytes");
    assert!(rings < 2048, "the rings of one request at a time take {rings} bytes");
}

/// When queue pairs with little to do have done it, one that is flooded has had its turns, and no more.
#[test]
fn a_flooded_queue_pair_does_not_starve_others() {
    const QUIET: usize = 64;
    const FLOOD: usize = 250;
    const EACH: usize = 4;
    for length in [64, 4096, 65536] {
        let mut crowd = Crowd::new(1 + QUIET, config());
        for _ in 0..FLOOD {
            crowd.post(0, length);
        }
        for _ in 0..EACH {
            (1..=QUIET).for_each(|index| crowd.post(index, 64));
        }
        let ended = crowd.run_until(|ended| ended[1..].iter().all(|count| *count == EACH));
        // A turn is 8 packets; the others need two to send and to hear, and one may be under way.
        assert!(ended[0] <= 3 * 8, "{} of the flood ended before the others, of {length} bytes", ended[0]);
        let all = crowd.run_until(|more| more[0] + ended[0] == FLOOD);
        assert_eq!(all[1..].iter().sum::<usize>(), 0, "each request ends once");
    }
}

/// While one queue pair waits for a page that does not come, the others need no more steps than without it.
#[test]
fn a_queue_pair_that_faults_does_not_starve_others() {
    const OTHERS: usize = 64;
    const EACH: usize = 16;
    let steps = |faults: bool| {
        let mut crowd = Crowd::new(1 + OTHERS, config());
        let missing = crowd.pair.b.region(4096);
        if faults {
            missing.absent(0);
        }
        let sges = [crowd.local.sge(0, 64)];
        crowd.near[0].post_send(&SendRequest::write(0, &sges, missing.remote(0))).expect("posted");
        for _ in 0..EACH {
            (1..=OTHERS).for_each(|index| crowd.post(index, 64));
        }
        let ended = crowd.run_until(|ended| ended[1..].iter().all(|count| *count == EACH));
        let stats = crowd.pair.b.hca.stats();
        assert_eq!(stats.faults_by_remote_access, u64::from(faults));
        assert_eq!(ended[0] == 0, faults, "it ended without its page");
        let steps = stats.steps + crowd.pair.a.hca.stats().steps;
        if faults {
            crowd.pair.run(|_, _| {
                missing.present(0, true);
                FaultOutcome::Resolved
            });
            assert_eq!(crowd.pair.a.take().len(), 1, "it goes on when the page is there");
        }
        steps
    };
    let (without, with) = (steps(false), steps(true));
    assert!(with <= without + without / 8, "{with} steps with one that faults, {without} without");
}

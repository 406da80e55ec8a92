//! The course of a measurement, on either side.

use super::end::{End, WORD, mtu, open, remote, wrap};
use super::network::{Done, Endpoint, Plan, Talk};
use super::report::{Measured, Report};
use super::{Args, PerfError, setup};
use crate::perf::{Latency, Operation};
use hdrhistogram::Histogram;
use hw_model::hca::{Completion, RecvRequest, SendRequest, Status};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Of the conversation.
const VERSION: u32 = 2;
/// Queue pairs and messages under way, and bytes of memory, that one who listens grants.
const MOST_QPS: u32 = 256;
const MOST_DEPTH: u32 = 256;
const MOST_BYTES: u64 = 16 << 30;
/// A message that takes longer than this never comes.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it is polled before it is waited.
const SPIN: Duration = Duration::from_micros(100);
/// Completions taken at a time.
const BATCH: usize = 64;
/// Significant digits of latencies.
const DIGITS: u8 = 3;

/// Runs the side that the options ask for.
///
/// # Errors
/// See [`PerfError`].
pub fn run(args: &Args) -> Result<Report, PerfError> {
    if !(0.0..=50.0).contains(&args.sides.loss) {
        return Err(PerfError::Loss { percent: args.sides.loss });
    }
    match (args.sides.listen, args.sides.connect) {
        (Some(address), _) => listen(args, Talk::listen(address, args.sides.port)?),
        (None, Some(address)) => connect(args, Talk::connect(address, args.sides.port)?),
        (None, None) => unreachable!("the command line asks for one of them"),
    }
}

fn listen(args: &Args, mut talk: Talk) -> Result<Report, PerfError> {
    let plan: Plan = talk.hear()?;
    let fits = plan.version == VERSION
        && (1..=64 << 20).contains(&plan.size)
        && (1..=MOST_DEPTH).contains(&plan.depth)
        && (1..=MOST_QPS).contains(&plan.qps)
        && plan.bytes() <= MOST_BYTES
        && (plan.operation != Operation::Atomic || u64::from(plan.size) == WORD)
        && plan.iterations > 0;
    if !fits {
        return Err(PerfError::Peer { said: format!("{plan:?}") });
    }
    let (address, link) = open(args, plan.via, talk.own_address()?)?;
    let end = End::new(args, &plan, address, wrap(args, link)?)?;
    if plan.operation == Operation::Read {
        end.fill(plan.bytes())?;
    }
    let peer: Endpoint = talk.hear()?;
    end.connect(&peer)?;
    if plan.operation == Operation::Send {
        for message in 0..plan.iterations.min(plan.places()) {
            receive(&end, &plan, message)?;
        }
    }
    talk.say(&end.endpoint())?;
    if plan.operation == Operation::Send {
        receive_all(&end, &plan)?;
    }
    let mut done: Done = talk.hear()?;
    let touched = u64::from(plan.size) * plan.iterations.min(plan.places());
    match plan.operation {
        Operation::Read => {}
        Operation::Atomic => {
            let wrong_bytes = end.wrong_sums(plan.places(), plan.iterations)?;
            done = Done { verified_bytes: plan.bytes(), wrong_bytes };
        }
        Operation::Write | Operation::Send => {
            done = Done { verified_bytes: touched, wrong_bytes: end.wrong(touched)? };
        }
    }
    talk.say(&done)?;
    Ok(report(&end, &plan, None, done))
}

fn connect(args: &Args, mut talk: Talk) -> Result<Report, PerfError> {
    let via = args.sides.via;
    let (address, link) = open(args, via, talk.own_address()?)?;
    let link = wrap(args, link)?;
    let plan = Plan {
        version: VERSION,
        operation: args.operation,
        via,
        size: args.size,
        iterations: args.iterations,
        qps: args.qps,
        depth: args.depth,
        mtu: mtu(args, via, &*link)?,
    };
    let end = End::new(args, &plan, address, link)?;
    if plan.operation != Operation::Read {
        end.fill(plan.bytes())?;
    }
    talk.say(&plan)?;
    talk.say(&end.endpoint())?;
    let peer: Endpoint = talk.hear()?;
    end.connect(&peer)?;
    let measured = send_all(&end, &plan, &peer)?;
    let mut done = Done { verified_bytes: 0, wrong_bytes: 0 };
    if plan.operation == Operation::Read {
        let read = u64::from(plan.size) * plan.iterations.min(plan.places());
        done = Done { verified_bytes: read, wrong_bytes: end.wrong(read)? };
    }
    talk.say(&done)?;
    let done: Done = talk.hear()?;
    Ok(report(&end, &plan, Some(measured), done))
}

fn report(end: &End, plan: &Plan, measured: Option<Measured>, done: Done) -> Report {
    let hca = end.device.hca();
    let stats = hca.stats();
    Report {
        measured,
        packets_sent: stats.packets_sent,
        retries: stats.retries,
        page_faults: end.region.counters().page_faults,
        verified_bytes: done.verified_bytes,
        wrong_bytes: done.wrong_bytes,
        link: hca.link_counts().into_iter().filter(|(_, count)| *count > 0).collect(),
        ..Report::new(plan)
    }
}

/// Where a message lies in both regions.
fn offset(plan: &Plan, message: u64) -> u64 {
    message % plan.places() * u64::from(plan.size)
}

/// Posts all messages, as many at a time as there are places, and waits for their ends.
fn send_all(end: &End, plan: &Plan, peer: &Endpoint) -> Result<Measured, PerfError> {
    let longest = PATIENCE.as_nanos() as u64;
    let mut latencies = Histogram::new_with_bounds(1, longest, DIGITS).expect("such bounds are possible");
    let begun = Instant::now();
    let mut at = vec![begun; plan.places() as usize];
    let mut course = Course { posted: 0, ended: 0 };
    course.run(end, plan, |message, ended| {
        let place = (message % plan.places()) as usize;
        if ended {
            latencies.saturating_record(at[place].elapsed().as_nanos() as u64);
            return Ok(());
        }
        at[place] = Instant::now();
        let offset = offset(plan, message);
        let local = [end.place(offset, plan.size)];
        let request = match plan.operation {
            Operation::Write => SendRequest::write(message, &local, remote(peer, offset)),
            Operation::Read => SendRequest::read(message, &local, remote(peer, offset)),
            Operation::Send => SendRequest::send(message, &local),
            Operation::Atomic => SendRequest::fetch_add(message, &local, remote(peer, offset), 1),
        };
        end.qp(message).post_send(&request).map_err(setup("posting"))
    })?;
    let seconds = begun.elapsed().as_secs_f64().max(1e-9);
    let messages_per_second = plan.iterations as f64 / seconds;
    Ok(Measured {
        seconds,
        messages_per_second,
        bytes_per_second: messages_per_second * f64::from(plan.size),
        latency: Latency::of(&latencies),
    })
}

/// Takes all messages; the first receives are posted already.
fn receive_all(end: &End, plan: &Plan) -> Result<(), PerfError> {
    let mut course = Course { posted: plan.iterations.min(plan.places()), ended: 0 };
    course.run(end, plan, |message, ended| if ended { Ok(()) } else { receive(end, plan, message) })
}

fn receive(end: &End, plan: &Plan, message: u64) -> Result<(), PerfError> {
    let local = [end.place(offset(plan, message), plan.size)];
    end.qp(message).post_recv(&RecvRequest::new(message, &local)).map_err(setup("posting a receive"))
}

/// How far it has come.
struct Course {
    posted: u64,
    ended: u64,
}

impl Course {
    /// Posts what there is a place for, until all has ended. A place is free again when its message has ended: those of different
    /// queue pairs end in any order.
    fn run(
        &mut self,
        end: &End,
        plan: &Plan,
        mut each: impl FnMut(u64, bool) -> Result<(), PerfError>,
    ) -> Result<(), PerfError> {
        let mut completions: Vec<Completion> = Vec::with_capacity(BATCH);
        let mut free: VecDeque<u64> = (self.posted..plan.iterations.min(plan.places())).collect();
        let mut heard = Instant::now();
        while self.ended < plan.iterations {
            while let Some(message) = free.pop_front() {
                each(message, false)?;
                self.posted += 1;
            }
            completions.clear();
            end.cq.poll(&mut completions, BATCH).map_err(setup("completions were lost"))?;
            if completions.is_empty() {
                if heard.elapsed() > SPIN && !end.cq.wait(PATIENCE) {
                    return Err(PerfError::Silence { seconds: PATIENCE.as_secs(), ended: self.ended });
                }
                continue;
            }
            heard = Instant::now();
            for completion in &completions {
                let message = completion.id.0;
                if completion.status != Status::Success {
                    return Err(PerfError::Transfer { message, status: completion.status });
                }
                each(message, true)?;
                self.ended += 1;
                free.extend(Some(message + plan.places()).filter(|next| *next < plan.iterations));
            }
        }
        Ok(())
    }
}
